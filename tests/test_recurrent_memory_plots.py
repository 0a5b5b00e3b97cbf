"""The memory explorer: what it draws is what a model of that shape can reach."""

import pytest
import torch

from course_lib import leaks, masks, models, plots


def model_of(explorer):
    config = models.TransformerConfig(
        vocab_size=5, d_model=8, num_layers=explorer.layers.value, num_heads=2, max_length=None,
        position="transformer_xl",
    )  # fmt: skip
    return models.CompressiveTransformer(
        config,
        memory_length=explorer.memory.value,
        compressed_length=explorer.compressed.value,
        rate=explorer.rate.value,
    )


def test_it_opens_with_a_picture():
    explorer = plots.MemoryExplorer()
    assert explorer.picture().startswith(b"\x89PNG")
    assert explorer.reached.shape == (3, 256)
    data, _ = explorer._repr_mimebundle_()
    assert "image/png" in data
    assert "MemoryExplorer" in data["text/plain"]


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("memory", [0, 4, 16])
@pytest.mark.parametrize("compressed", [0, 8])
def test_the_reach_is_the_one_that_the_model_states(layers, memory, compressed):
    explorer = plots.MemoryExplorer(
        segment=8, memory=memory, layers=layers, compressed=compressed, rate=2
    )
    assert explorer.reach == model_of(explorer).reach(8)


def test_without_a_memory_nothing_is_reached_before_the_segment():
    explorer = plots.MemoryExplorer(memory=0)
    assert explorer.reach == 0
    assert explorer.reached[-1].sum() == explorer.segment.value


def test_the_text_reached_is_what_a_model_depends_on():
    explorer = plots.MemoryExplorer(segment=4, memory=4, layers=2, compressed=4, rate=2)
    torch.manual_seed(0)
    model, memory = model_of(explorer).double(), None

    def read_all(x):
        nonlocal memory
        for segment in x.split(4, 1):
            logits, memory = without_seam(model, segment, memory)
        return logits[:, -1:]

    def without_seam(model, segment, memory):
        """One segment, the gradient going on over the seam: what can matter, matters."""
        memory = memory or [(segment[:, :0], segment[:, :0])] * 2
        x, after = segment, []
        for layer, (small, recent) in zip(model.stack.layers, memory, strict=True):
            both = torch.cat([recent, x], 1)
            old = max(both.shape[1] - 4, 0) // 2 * 2
            new = both[:, :old].unflatten(1, (old // 2, 2)).mean(2)
            after.append((torch.cat([small, new], 1)[:, -4:], both[:, old:]))
            x = layer(x, masks.causal(), memory=torch.cat([small, recent], 1))
        return x, after

    x = torch.randn(1, 40, 8, dtype=torch.float64)
    depends = leaks.influence(read_all, x)[0] > 0
    assert depends.tolist() == (explorer.reached[-1, -40:] > 0).tolist()


def test_a_control_redraws_the_picture():
    explorer = plots.MemoryExplorer()
    for name, value in (("memory", 8), ("compressed", 8), ("rate", 2), ("layers", 3)):
        before = explorer.picture()
        getattr(explorer, name).value = value
        assert explorer.picture() != before


def test_compressed_tokens_are_told_from_remembered_ones():
    explorer = plots.MemoryExplorer(segment=16, memory=16, layers=1, compressed=4, rate=4)
    below = explorer.reached[1]
    assert below[-16:].tolist() == [1] * 16
    assert below[-32:-16].tolist() == [2] * 16
    assert below[-48:-32].tolist() == [3] * 16
    assert not below[:-48].any()


def test_rate_1_reaches_as_far_as_that_much_more_memory():
    small = plots.MemoryExplorer(segment=8, memory=8, compressed=8, rate=1, layers=2)
    assert small.reach == plots.MemoryExplorer(segment=8, memory=16, layers=2).reach


@pytest.mark.parametrize("wrong", [{"segment": 5}, {"layers": 0}, {"rate": 3}])
def test_a_value_that_no_control_has_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
        plots.MemoryExplorer(**wrong)
