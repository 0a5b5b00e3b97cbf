"""The next-token panel: what it draws is what `generate` draws from."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch

from course_lib import data, generation, models, plots

mpl.use("agg")
TEXT = "the cat sat on the mat.\n"
TOKENIZER = data.CharTokenizer(TEXT)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = models.TransformerConfig(
        vocab_size=TOKENIZER.vocab_size, d_model=8, num_layers=1, num_heads=2, max_length=32
    )
    built = models.Decoder(config)
    with torch.no_grad():
        built.embedding.tokens.weight.mul_(50)  # far from a flat distribution
    return built


@pytest.fixture
def panel(model):
    return plots.NextToken(model, TOKENIZER, "the cat", length=12, bars=6)


def logits(model, prompt):
    with torch.no_grad():
        return model(TOKENIZER.encode(prompt)[None])[:, -1]


def test_it_starts_with_the_models_own_distribution(panel, model):
    expected = generation.shares(logits(model, "the cat"))[0]
    assert panel.before == pytest.approx(expected.numpy())
    assert panel.after == pytest.approx(expected.numpy())
    assert panel.message == ""


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_keeps_the_k_likeliest(panel, k):
    panel.top_k.value = k
    assert set(np.flatnonzero(panel.after)) == set(np.argsort(-panel.before)[:k])
    assert panel.after.sum() == pytest.approx(1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_top_p_keeps_the_fewest_that_reach_p(panel, p):
    panel.top_p.value = p
    kept = np.sort(panel.before[panel.after > 0])
    assert kept.sum() >= p - 1e-6
    assert kept[1:].sum() < p  # without the least of them it is not enough


def test_a_low_temperature_sharpens(panel):
    flat = panel.before.max()
    panel.temperature.value = 0.3
    assert panel.before.max() > flat


def test_temperature_zero_is_greedy(panel, model):
    panel.temperature.value = 0.0
    assert panel.after.max() == 1
    assert panel.after.argmax() == panel.before.argmax()
    greedy = generation.generate(model, TOKENIZER.encode("the cat"), 12, temperature=0)
    assert panel.continuation == TOKENIZER.decode(greedy[7:])


def test_the_text_is_what_generate_writes_with_these_controls(panel, model):
    panel.top_k.value, panel.temperature.value = 3, 0.7
    g = torch.Generator().manual_seed(0)
    expected = generation.generate(
        model, TOKENIZER.encode("the cat"), 12, temperature=0.7, top_k=3, top_p=1.0, generator=g
    )
    assert panel.continuation == TOKENIZER.decode(expected[7:])


def test_another_prompt_gives_another_distribution(panel, model):
    panel.text.value = "on the"
    assert panel.before == pytest.approx(generation.shares(logits(model, "on the"))[0].numpy())


@pytest.mark.parametrize(
    ("prompt", "said"), [("déjà", "'d'|'é'"), ("", "empty"), ("the " * 9, "max_length")]
)
def test_a_prompt_that_cannot_be_read_is_said_and_not_raised(panel, prompt, said):
    panel.text.value = prompt
    assert isinstance(panel.error, ValueError)
    assert any(word.strip("'") in panel.message for word in said.split("|"))
    assert panel.picture() == b""
    panel.text.value = "the cat"
    assert panel.error is None
    assert panel.picture().startswith(b"\x89PNG")


def test_it_leaves_the_model_in_its_mode(model):
    model.train()
    plots.NextToken(model, TOKENIZER, "the", length=2)
    assert model.training


def test_it_shows_live_and_as_a_picture(panel):
    data_, _ = panel._repr_mimebundle_()
    assert {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"} <= set(data_)


def test_markup_in_the_prompt_stays_text(model):
    tokenizer = data.CharTokenizer(TEXT + "<b>")
    torch.manual_seed(0)
    config = models.TransformerConfig(
        vocab_size=tokenizer.vocab_size, d_model=8, num_layers=1, num_heads=2
    )
    panel = plots.NextToken(models.Decoder(config), tokenizer, "<b>", length=2)
    assert "<b>" not in panel._line.value


def test_bars_below_one_are_refused(model):
    with pytest.raises(ValueError, match="bars"):
        plots.NextToken(model, TOKENIZER, "the", bars=0)


def test_importing_it_needs_neither_torch_nor_matplotlib():
    code = "import sys, course_lib.plots.next_token; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
