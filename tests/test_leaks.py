"""The leak detector finds every leak that has a gradient, and only those."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import course_lib
from course_lib import attention, layers, leaks, masks


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def floats(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def pairs(found):
    return [(leak.output, leak.input) for leak in found]


class TinyLM(nn.Module):
    """Token ids -> logits, through one causal block; dropout and a running mean on demand."""

    def __init__(self, mask=None, dropout=0.0):
        super().__init__()
        self.mask = masks.causal() if mask is None else mask
        self.embedding = nn.Embedding(11, 8)
        self.block = layers.EncoderLayer(8, 2, dropout=dropout)
        self.output = nn.Linear(8, 3)

    def forward(self, ids):
        return self.output(self.block(self.embedding(ids), mask=self.mask))


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return TinyLM().eval()


@pytest.fixture
def ids():
    return torch.randint(11, (2, 5), generator=rng())


# --- influence ------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_of_a_linear_map_it_is_the_largest_coefficient(batch, n, d, seed):
    weight = floats(n, d, n, d, seed=seed)
    found = leaks.influence(
        lambda x: torch.einsum("tisj,bsj->bti", weight, x), floats(batch, n, d, seed=seed + 1)
    )
    torch.testing.assert_close(found, weight.abs().amax((1, 3)), rtol=0, atol=0)


def test_it_equals_the_largest_entry_of_the_jacobian():
    block = layers.EncoderLayer(4, 2).double()
    x = floats(2, 3, 4)
    jacobian = torch.autograd.functional.jacobian(block, x)  # (2, 3, 4, 2, 3, 4)
    torch.testing.assert_close(
        leaks.influence(block, x), jacobian.abs().amax((0, 2, 3, 5)), rtol=1e-12, atol=1e-15
    )


def test_one_small_entry_among_many_large_ones_is_not_averaged_away():
    def sneaky(x):
        peek = torch.zeros_like(x)
        peek[1, 0, 2] = 1e-12 * x[1, 4, 3]  # one feature of one sequence
        return x + peek

    assert leaks.find_leaks(sneaky, floats(2, 5, 4)) == [(0, 4, pytest.approx(1e-12))]


def test_effects_that_cancel_in_a_sum_are_found():
    def cancelling(x):
        future = x[:, 1:].sum((1, 2))  # (batch,)
        return torch.stack([future, -future], -1)[:, None]  # (batch, 1, 2): sums to 0

    found = leaks.influence(cancelling, floats(2, 4, 3))
    assert found.tolist() == [[0, 1, 1, 1]]


def test_a_leak_from_another_sequence_of_the_batch_is_found():
    found = leaks.find_leaks(lambda x: x + x.flip(0).flip(1), floats(2, 3, 1))
    assert pairs(found) == [(0, 2)]


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_any_rank_of_output_with_time_at_axis_1(rank):
    def spread(x):
        return x.mean(-1).reshape(2, 3, *[1] * (rank - 2))

    assert leaks.influence(spread, floats(2, 3, 4)).tolist() == (torch.eye(3) / 4).tolist()


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_any_rank_of_input_with_time_at_axis_1(shape):
    assert torch.equal(leaks.influence(lambda x: 2 * x, floats(*shape)), 2 * torch.eye(3).double())


def test_outputs_may_be_fewer_or_more_than_inputs():
    found = leaks.influence(lambda x: x.unfold(1, 2, 2).sum(-1), floats(1, 6, 2))
    assert found.bool().tolist() == [
        [True, True, False, False, False, False],
        [False, False, True, True, False, False],
        [False, False, False, False, True, True],
    ]


@pytest.mark.parametrize("function", [torch.ones_like, torch.detach, torch.round, torch.sign])
def test_what_has_no_gradient_gives_zeros(function):
    assert leaks.influence(function, floats(2, 3, 4)).tolist() == torch.zeros(3, 3).tolist()


def test_a_gradient_that_is_not_a_number_is_kept():
    assert leaks.influence(lambda x: (0 * x).sqrt(), torch.ones(1, 1)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_precision_of_the_question(dtype):
    assert leaks.influence(lambda x: x * 2, floats(1, 3, 2).to(dtype)).dtype == dtype


def test_a_function_may_write_into_its_input():
    x = floats(1, 3, 2)
    before = x.clone()
    assert torch.equal(leaks.influence(lambda x: x.mul_(3), x), 3 * torch.eye(3).double())
    assert torch.equal(x, before)


# --- token ids ------------------------------------------------------------------------------------


def test_token_ids_are_followed_from_what_the_embedding_gives(lm, ids):
    after = nn.Sequential(lm.block, lm.output)
    vectors = lm.embedding(ids).detach()
    expected = leaks.influence(lambda x: after[1](after[0](x, mask=masks.causal())), vectors)
    torch.testing.assert_close(leaks.influence(lm, ids), expected, rtol=0, atol=0)


def test_the_embedding_may_hide_inside_a_plain_function(lm, ids):
    assert torch.equal(leaks.influence(lambda i: lm(i) * 1, ids), leaks.influence(lm, ids))


def test_an_embedding_of_positions_is_not_taken_for_one_of_tokens(ids):
    tokens, positions = nn.Embedding(11, 4), nn.Embedding(5, 4)

    def model(ids):
        return tokens(ids) + positions(torch.arange(ids.shape[1]).expand_as(ids)).roll(1, 1)

    assert leaks.find_leaks(model, ids) == []
    assert leaks.influence(model, ids).tolist() == torch.eye(5).tolist()


def test_two_embeddings_of_the_same_tokens_both_count(ids):
    first, second = nn.Embedding(11, 4), nn.Embedding(11, 2)
    found = leaks.influence(lambda i: torch.cat([first(i), second(i).roll(-1, 1)], -1), ids)
    assert found.bool().tolist() == (torch.eye(5) + torch.eye(5).roll(1, 1)).bool().tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_integer_type(lm, ids, dtype):
    assert leaks.find_leaks(lm, ids.to(dtype)) == []


def test_ids_that_no_embedding_sees_are_refused_with_the_way_out(ids):
    with pytest.raises(ValueError, match=r"x holds integers, shape \(2, 5\).*no nn.Embedding"):
        leaks.influence(lambda i: F.one_hot(i, 11).float(), ids)


def test_ids_that_were_cut_before_the_embedding_are_refused(lm, ids):
    with pytest.raises(ValueError, match="as they are"):
        leaks.influence(lambda i: lm(i[:, 1:]), ids)


def test_no_hook_is_left_behind_even_after_an_error(lm, ids):
    def broken(i):
        lm(i)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        leaks.influence(broken, ids)
    assert not lm.embedding(ids).is_leaf  # a hook would have put its own leaf here


# --- find_leaks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(
    "mask", [masks.causal(), masks.sliding_window(1, 0), masks.documents([[0, 0, 1, 1, 1]])]
)
def test_a_masked_model_depends_on_what_its_mask_shows_and_on_nothing_else(mask, backend):
    layer = layers.MultiHeadAttention(8, 2, backend=backend)
    x = torch.randn(1, 5, 8, generator=rng())
    found = leaks.influence(lambda x: layer(x, mask=mask), x)
    assert torch.equal(found > 0, mask.dense(5, 5)[0, 0])
    assert leaks.find_leaks(lambda x: layer(x, mask=mask), x, mask) == []
    assert leaks.find_leaks(lambda x: layer(x, mask=mask), x, ~mask) != []


def test_the_whole_model_does_not_leak(lm, ids):
    assert leaks.find_leaks(lm, ids) == []


def test_causal_is_asked_for_unless_something_else_is(ids):
    torch.manual_seed(0)
    model = TinyLM(mask=masks.sliding_window(5, 5))
    upper = [(t, s) for t in range(5) for s in range(t + 1, 5)]
    assert pairs(leaks.find_leaks(model, ids)) == upper
    assert leaks.find_leaks(model, ids, torch.ones(5, 5, dtype=torch.bool)) == []


def test_a_leak_can_be_read_by_name_and_as_a_tuple():
    (leak,) = leaks.find_leaks(lambda x: x + 3 * x.flip(1), floats(1, 2, 1))
    assert (leak.output, leak.input, leak.size) == leak == (0, 1, 3.0)


LEAKY = {
    "softmax over the queries": lambda x: (
        (x @ x.mT).masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf).softmax(-2) @ x
    ),
    "a mask one step too late": lambda x: (
        (x @ x.mT).masked_fill(torch.ones(4, 4).triu(2).bool(), -math.inf).softmax(-1) @ x
    ),
    "a mask of -10": lambda x: (
        (x @ x.mT - 10 * torch.ones(4, 4).triu(1)).softmax(-1) @ x
    ),
    "a mean over tokens": lambda x: x - x.mean(1, keepdim=True),
    "a norm over time": lambda x: F.normalize(x, dim=1),
    "a centred convolution": lambda x: F.conv1d(x.mT, torch.ones(2, 3, 3).to(x), padding=1).mT,
    "a reversed scan": lambda x: x.flip(1).cumsum(1).flip(1),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKY)
def test_every_usual_leak_is_found_next_door(name):
    assert (0, 1) in pairs(leaks.find_leaks(LEAKY[name], floats(2, 4, 3)))


def test_every_sequence_is_held_to_its_own_mask():
    rule = masks.documents([[0, 0, 1], [0, 1, 1]])
    assert pairs(leaks.find_leaks(lambda x: x.cumsum(1), floats(2, 3, 1), rule)) == [
        (1, 0),  # in the second sequence
        (2, 0),
        (2, 1),  # in the first
    ]


def test_what_one_head_may_see_the_model_may_see():
    per_head = torch.stack([torch.eye(3), torch.ones(3, 3)]).bool()[None]  # (1, 2, 3, 3)
    assert leaks.find_leaks(lambda x: x.cumsum(1), floats(1, 3, 1), per_head) == []


def test_fewer_outputs_are_aligned_at_the_last_input():
    assert leaks.find_leaks(lambda x: x.cumsum(1)[:, -2:], floats(1, 4, 1)) == []
    first_two = leaks.find_leaks(lambda x: x.flip(1).cumsum(1)[:, :2], floats(1, 4, 1))
    assert pairs(first_two) == [(0, 3)]


def test_a_gradient_that_is_not_a_number_is_a_leak():
    def spoil(x):
        return x + 0 * (x - x.detach()).abs().sqrt().sum(1, keepdim=True)

    found = leaks.find_leaks(spoil, floats(1, 2, 1))
    assert pairs(found) == [(0, 1)]
    assert math.isnan(found[0].size)


def test_a_pair_that_sees_nothing_and_a_masked_nan_do_not_leak():
    x = floats(1, 1, 4, 3)[0]
    x[:, 3] = math.nan
    rule = masks.causal() & masks.padding([3])

    def layer(x):
        return attention(x[:, None], x[:, None], x[:, None], rule)[:, 0, :3]

    assert leaks.find_leaks(layer, x, rule.dense(4, 4)[:, :, :3]) == []


# --- nothing is disturbed ------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_left_as_it_was(lm, ids, training):
    whole = Composed(lm, nn.BatchNorm1d(3)).train(training)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    leaks.influence(whole, ids)
    assert {m.training for m in whole.modules()} == {training}
    assert all(torch.equal(before[name], value) for name, value in whole.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in whole.parameters())


class Composed(nn.Module):
    """Logits, then a batch norm over batch and time: it has running means."""

    def __init__(self, lm, norm):
        super().__init__()
        self.lm, self.norm = lm, norm

    def forward(self, ids):
        return self.norm(self.lm(ids).mT).mT  # (batch, n, 3) -> (batch, 3, n) and back


def test_batch_norm_leaks_in_training_and_not_afterwards(lm, ids):
    model = Composed(lm, nn.BatchNorm1d(3))
    assert leaks.find_leaks(model.train(), ids) != []
    assert leaks.find_leaks(model.eval(), ids) == []


def test_gradients_that_were_there_stay(lm, ids):
    lm(ids).sum().backward()
    before = [p.grad.clone() for p in lm.parameters()]
    leaks.influence(lm, ids)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, lm.parameters(), strict=True))


def test_random_numbers_go_on_as_if_nothing_had_been(ids):
    model = TinyLM(dropout=0.5).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert leaks.find_leaks(model, ids) == []
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(lm, mode):
    with mode():
        x = torch.randn(1, 3, 8, generator=rng())
        found = leaks.influence(lambda x: lm.block(x, mask=masks.causal()), x)
    assert torch.equal(found > 0, torch.ones(3, 3).tril().bool())


def test_parameters_that_are_frozen_stay_so(lm, ids):
    lm.requires_grad_(False)
    assert torch.equal(leaks.influence(lm, ids) > 0, torch.ones(5, 5).tril().bool())
    assert not any(p.requires_grad for p in lm.parameters())


def test_it_is_a_public_name():
    assert course_lib.leaks is leaks
    assert "leaks" in course_lib.__all__


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize("question", [leaks.influence, leaks.find_leaks])
@pytest.mark.parametrize(
    ("function", "x", "error", "said"),
    [
        (3, torch.zeros(1, 2, 3), TypeError, "function must be callable, got int"),
        (torch.sin, [[0.0]], TypeError, r"x must be a torch.Tensor, got list"),
        (torch.sin, torch.ones(1, 2).bool(), TypeError, "x must hold .*got torch.bool"),
        (torch.sin, torch.zeros(1, 2, 3).cfloat(), TypeError, "x must hold .*complex64"),
        (torch.sin, torch.zeros(3), ValueError, r"x must have shape \(batch, n, …\), got \(3,\)"),
        (torch.sin, torch.zeros(1, 2, 3).long(), ValueError, r"\(batch, n\) for token ids, got"),
        (torch.sin, torch.zeros(1, 0, 3), ValueError, r"x must hold at least one.*\(1, 0, 3\)"),
        (torch.sum, torch.zeros(1, 2, 3), ValueError, r"function must return.*axis 1.*\(\)"),
        (lambda x: (x, x), torch.zeros(1, 2, 3), TypeError, "function must return.*got tuple"),
        (torch.argmax, torch.zeros(1, 2, 3), TypeError, "function must return.*got torch.int64"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(question, function, x, error, said):
    with pytest.raises(error, match=said):
        question(function, x)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("allowed", "error", "said"),
    [
        ("causal", TypeError, "allowed must be a Mask or a bool tensor.*got str"),
        (torch.ones(3, 3), TypeError, "allowed must be .*got torch.float32"),
        (torch.ones(2, 3, 3).bool(), ValueError, r"allowed must have shape.*\(2, 3, 3\)"),
        (torch.ones(4, 4).bool(), ValueError, "allowed must fit 3 outputs and 3 inputs"),
        (masks.documents([[0, 0]]), ValueError, "allowed must fit 3 outputs and 3 inputs"),
        (masks.padding([1, 2, 3]), ValueError, "allowed is for a batch of 3.*output's is 2"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(allowed, error, said):
    with pytest.raises(error, match=said):
        leaks.find_leaks(torch.sin, floats(2, 3, 1), allowed)
