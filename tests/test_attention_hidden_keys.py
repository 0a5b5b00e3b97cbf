"""`attention`: what nobody may see never shows, and who sees nothing gets 0 and never NaN."""

import math

import hypothesis.strategies as st
import pytest
import torch
from attention_cases import (
    BACKENDS,
    DIFFERENTIABLE,
    DTYPES,
    cases,
    generators,
    oracle,
    qkv,
    quick_flex,
    randn,
)
from hypothesis import given, settings

from course_lib import attention, masks

# beartype samples the lists that it checks with Python's `random`.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module")

each_backend = pytest.mark.parametrize("backend", BACKENDS)
differentiable = pytest.mark.parametrize("backend", DIFFERENTIABLE)
BROKEN = (math.nan, math.inf, -math.inf)
each_broken = pytest.mark.parametrize("broken", BROKEN, ids=str)

NOTHING = {
    "padding of length 0": lambda n_q, n_k: masks.padding([0, 0]),
    "an empty tensor": lambda n_q, n_k: torch.zeros(n_q, n_k, dtype=torch.bool),
    "a contradiction": lambda n_q, n_k: masks.causal() & ~masks.causal(),
}


# --- queries that see nothing --------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_nothing_gets_output_zero(backend, dtype):
    q, k, v = qkv(n_q=6, n_k=4, dtype=dtype)  # causal: the first two queries see nothing
    q[:, :, 0] = math.nan  # and whatever such a query holds does not matter
    output = attention(q, k, v, masks.causal(), backend=backend)
    assert (output[:, :, :2] == 0).all()
    assert output[:, :, 2:].isfinite().all()
    assert (output[:, :, 2:] != 0).any()


@each_backend
@pytest.mark.parametrize("mask", NOTHING.values(), ids=NOTHING.keys())
def test_when_nobody_sees_anything_all_is_zero(backend, mask):
    q, k, v = qkv()
    assert (attention(q, k, v, mask(5, 7), backend=backend) == 0).all()


def test_a_query_that_sees_nothing_has_weights_zero_and_log_sum_exp_minus_infinity():
    q, k, v = qkv(n_q=6, n_k=4)
    q[:, :, 1] = math.inf
    extras = {"return_weights": True, "return_lse": True}
    _, weights, lse = attention(q, k, v, masks.causal(), **extras)
    assert (weights[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -math.inf).all()
    _, flex_lse = attention(q, k, v, masks.causal(), return_lse=True, backend="flex")
    torch.testing.assert_close(flex_lse, lse)


@each_backend
def test_a_bias_of_minus_infinity_hides_as_a_mask_does(backend):
    q, k, v = qkv()
    q[:, :, 2] = math.nan
    hidden = torch.zeros(5, 7)
    hidden[2], hidden[3, 4] = -math.inf, -math.inf
    got = attention(q, k, v, bias=hidden, backend=backend)
    want = attention(q, k, v, hidden == 0, backend=backend)
    assert (got[:, :, 2] == 0).all()
    torch.testing.assert_close(got, want)


@differentiable
@pytest.mark.parametrize("held", [math.nan, math.inf, torch.finfo(torch.float32).max], ids=str)
def test_gradients_through_a_query_that_sees_nothing_are_zero(backend, held):
    q, k, v = qkv(n_q=6, n_k=4)
    q[:, :, 0] = held
    bias = randn(6, 4)
    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    output = attention(q, k, v, masks.causal(), bias, backend=backend)
    got = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert (got[0][:, :, :2] == 0).all()
    assert (got[3][:2] == 0).all()
    assert all(g.isfinite().all() for g in got)
    alone = [q[:, :, 2:], k, v, bias[2:]]
    rest = attention(*alone[:3], masks.causal(), bias[2:], backend=backend)
    want = torch.autograd.grad(rest, leaves, torch.ones_like(rest))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("n_q", [0, 1, 3])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.padding([0, 0])], ids=repr)
@differentiable
def test_without_keys_the_output_is_zero(backend, mask, n_q):
    q, k, v = (t.requires_grad_() for t in qkv(n_q=n_q, n_k=0))
    output = attention(q, k, v, mask, backend=backend)
    assert output.shape == (2, 4, n_q, 3)
    assert (output == 0).all()
    output.sum().backward()
    assert (q.grad == 0).all()


# --- broken numbers in keys and values -----------------------------------------------------------


@st.composite
def poisoned(draw, **options):
    """A case, the same with broken queries, keys and values, and the rows that may show it."""
    case = draw(cases(masked=True, **options))
    g, (batch, heads, n_q, n_k) = draw(generators()), case.shape
    groups, share = case.k.shape[1], draw(st.sampled_from([0.15, 0.4]))
    bad_q = torch.rand(batch, heads, n_q, generator=g) < draw(st.sampled_from([0, share]))
    bad_k, bad_v = (torch.rand(batch, groups, n_k, generator=g) < share for _ in range(2))
    kind = draw(st.sampled_from(BROKEN))
    broken = [
        # Often one number in the vector is enough.
        torch.where(bad[..., None] & (torch.arange(t.shape[-1]) == 0), kind, t)
        for t, bad in ((case.q, bad_q), (case.k, bad_k), (case.v, bad_v))
    ]
    bad = (bad_k | bad_v).repeat_interleave(heads // groups, 1)  # (batch, heads, n_k)
    visible = case.visible()
    shows = (visible & bad[:, :, None]).any(-1) | (bad_q & visible.any(-1))
    return case, broken, shows


@each_backend
@settings(max_examples=50)
@given(data=st.data())
def test_a_broken_key_shows_as_nan_to_those_who_see_it_and_to_nobody_else(backend, data):
    case, broken, shows = data.draw(poisoned(least=1 if backend == "flex" else 0, dtypes=DTYPES))
    with quick_flex():
        got = attention(*broken, **case.options, backend=backend)
    want, _, _ = oracle(case.q, case.k, case.v, case.visible(), case.bias, case.scale)
    assert torch.equal(got.isnan(), shows[..., None].expand(got.shape))
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double()[~shows], want[~shows], rtol=0, atol=40 * eps)


@settings(max_examples=30)
@given(poisoned())
def test_weights_and_log_sum_exp_show_a_broken_key_only_to_those_who_see_it(poison):
    case, broken, shows = poison
    _, weights, lse = attention(*broken, **case.options, return_weights=True, return_lse=True)
    _, w, want = oracle(case.q, case.k, case.v, case.visible(), case.bias, case.scale)
    assert weights[shows].isnan().all()
    torch.testing.assert_close(weights[~shows], w[~shows])
    assert torch.equal(lse.isnan(), shows)
    torch.testing.assert_close(lse[~shows], want[~shows])


@differentiable
@settings(max_examples=40)
@given(data=st.data())
def test_a_broken_key_reaches_no_gradient_of_those_who_do_not_see_it(backend, data):
    case, broken, shows = data.draw(poisoned())
    bias = None if case.bias is None else case.bias.double()
    upstream = randn(*case.q.shape[:3], case.v.shape[-1], dtype=torch.float64)
    upstream = upstream.masked_fill(shows[..., None], 0)  # a loss over the unspoiled rows

    def gradients(tensors, call):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        output = call(*leaves)
        if not output.requires_grad:  # nobody sees anything
            return [torch.zeros_like(t) for t in leaves]
        return torch.autograd.grad(output, leaves, upstream, materialize_grads=True)

    added = [] if bias is None else [bias]
    got = gradients(
        [*broken, *added],
        lambda q, k, v, bias=None: attention(
            q, k, v, case.rule.mask, bias, scale=case.scale, backend=backend
        ),
    )
    want = gradients(
        [case.q, case.k, case.v, *added],
        lambda q, k, v, bias=None: oracle(q, k, v, case.visible(), bias, case.scale)[0],
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


@each_broken
@each_backend
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_broken_future_reaches_no_earlier_output(backend, where, broken):
    q, k, v = qkv(n_q=6, n_k=6)
    want = attention(q, k, v, masks.causal(), backend=backend)
    {"key": k, "value": v}[where][:, :, 4, 1] = broken
    for mask in (masks.causal(), masks.causal().dense(6, 6)):  # SDPA's own causal mask, and ours
        got = attention(q, k, v, mask, backend=backend)
        torch.testing.assert_close(got[:, :, :4], want[:, :, :4])
        assert got[:, :, 4:].isnan().all()


@differentiable
@each_broken
def test_a_broken_future_reaches_no_gradient_of_an_earlier_loss(backend, broken):
    q, k, v = qkv(n_q=6, n_k=6)
    for t in (q, k, v):
        t[:, :, 4:] = broken  # as when the padding of x went through the projections
    leaves = [t.requires_grad_() for t in (q, k, v)]
    loss = attention(*leaves, masks.causal(), backend=backend)[:, :, :4].square().sum()
    got = torch.autograd.grad(loss, leaves)
    short = [t.detach()[:, :, :4].requires_grad_() for t in leaves]
    want = attention(*short, masks.causal(), backend=backend).square().sum()
    for g, w in zip(got, torch.autograd.grad(want, short), strict=True):
        assert (g[:, :, 4:] == 0).all()
        torch.testing.assert_close(g[:, :, :4], w)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leftovers_in_memory_beyond_the_length_never_show(backend, dtype):
    q, k, v = qkv(dtype=dtype)
    want = attention(q, k[:, :, :4], v[:, :, :4], backend=backend)
    for t in (k, v):
        t[:, :, 4:] = torch.finfo(dtype).max  # finite, but a score of it overflows
        t[:, :, 5] *= -1
    got = attention(q, k, v, masks.padding([4, 4]), backend=backend)
    torch.testing.assert_close(got, want)


@each_backend
def test_without_a_mask_everybody_sees_a_broken_key(backend):
    q, k, v = qkv(groups=2)
    k[0, 1, 3, 0] = math.nan
    got = attention(q, k, v, backend=backend)
    assert got[0, 2:].isnan().all()
    assert got[0, :2].isfinite().all()
    assert got[1].isfinite().all()


@each_backend
def test_a_broken_key_shows_even_where_its_weight_would_vanish(backend):
    q, k, v = qkv()
    v[0, 0, 2] = math.nan
    bias = torch.zeros(7)
    bias[2] = -1e9
    got = attention(q, k, v, masks.causal(), bias, backend=backend)
    assert got[0, :2].isnan().all()
    assert got[0, 2:].isfinite().all()


@each_backend
def test_a_bias_where_the_mask_hides_has_no_effect(backend):
    q, k, v = qkv(n_k=5)
    bias = randn(5, 5)
    want = attention(q, k, v, masks.causal(), bias, backend=backend)
    for odd in (math.nan, math.inf, -math.inf, 1e30):
        hidden = ~masks.causal().dense(5, 5)[0, 0]
        got = attention(q, k, v, masks.causal(), bias.masked_fill(hidden, odd), backend=backend)
        torch.testing.assert_close(got, want)
