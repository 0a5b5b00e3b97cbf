"""The LSTM language model."""

import pytest
import torch

from course_lib.models import LSTMLanguageModel


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tokens(batch=2, length=7, vocab=11):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_have_one_row_per_position():
    assert LSTMLanguageModel(11, 6, 5)(tokens()).shape == (2, 7, 11)


def test_the_state_is_as_wide_as_the_embedding_unless_told():
    assert LSTMLanguageModel(11, 6).head.in_features == 6


def test_a_later_token_cannot_change_an_earlier_output():
    model, x = LSTMLanguageModel(11, 6, num_layers=2), tokens()
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_sequences_of_a_batch_do_not_see_one_another():
    model, x = LSTMLanguageModel(11, 6), tokens(batch=3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_the_output_follows_the_equations_of_the_docstring():
    model, x = LSTMLanguageModel(11, 6, 5), tokens()
    lstm, h, c = model.lstm, torch.zeros(2, 5), torch.zeros(2, 5)
    for t in range(x.shape[1]):
        gates = model.embedding(x[:, t]) @ lstm.weight_ih_l0.T + lstm.bias_ih_l0
        i, f, g, o = (gates + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    torch.testing.assert_close(model(x)[:, -1], model.head(h))


def test_forget_gates_start_with_the_bias_asked_for_in_every_layer():
    lstm = LSTMLanguageModel(11, 6, 5, num_layers=2, forget_bias=3.0).lstm
    for layer in range(2):
        bias = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
        assert torch.equal(bias[5:10], torch.full((5,), 3.0))
        assert not torch.equal(bias[:5], torch.full((5,), 3.0))


def test_every_parameter_gets_a_gradient():
    model = LSTMLanguageModel(11, 6, num_layers=2, dropout=0.1)
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("value", "shown"), [(11, "11"), (-1, "-1")])
def test_a_token_outside_the_vocabulary_is_named(value, shown):
    x = tokens()
    x[1, 3] = value
    with pytest.raises(ValueError, match=f"value {shown}; with vocab_size=11 expected 0 … 10"):
        LSTMLanguageModel(11, 6)(x)


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(7,), (2, 7, 1), (2, 0)])
def test_tokens_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"tokens must be \(batch, length\), not empty, got shape"):
        LSTMLanguageModel(11, 6)(torch.zeros(shape, dtype=torch.long))


@pytest.mark.bad_input
def test_tokens_that_are_not_whole_numbers_are_refused():
    with pytest.raises(TypeError, match=r"int32 or int64, got torch\.float32"):
        LSTMLanguageModel(11, 6)(torch.zeros(2, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"d_model": 0}, "d_model must be at least 1"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"dropout": 0.1}, "needs num_layers of 2 or more"),
    ],
)
def test_an_impossible_size_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        LSTMLanguageModel(**{"vocab_size": 11, "d_model": 6} | options)
