"""`attention`: every backend gives what the definition gives, for any shape, dtype and mask."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BACKENDS,
    DIFFERENTIABLE,
    DTYPES,
    cases,
    largest,
    oracle,
    qkv,
    quick_flex,
    randn,
)
from hypothesis import given, settings

from course_lib import BackendUnsupportedError, attention, explain_backends, masks

# beartype samples the lists that it checks with Python's `random`.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module")

each_backend = pytest.mark.parametrize("backend", BACKENDS)
differentiable = pytest.mark.parametrize("backend", DIFFERENTIABLE)


def least(backend):
    """The least size that a backend takes: FlexAttention refuses empty tensors."""
    return 1 if backend == "flex" else 0


# --- the definition ------------------------------------------------------------------------------


@each_backend
@settings(max_examples=60)
@given(data=st.data())
def test_the_output_is_that_of_the_definition(backend, data):
    case = data.draw(cases(DTYPES, least=least(backend)))
    with quick_flex():
        got = attention(case.q, case.k, case.v, **case.options, backend=backend)
    want, _, _ = oracle(case.q, case.k, case.v, case.visible(), case.bias, case.scale)
    assert got.dtype == case.q.dtype
    # An output is a mean of values: a few roundings of the largest of them.
    atol = 8 * torch.finfo(case.q.dtype).eps * (1 + largest(case.v))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("n_q", [1, 4, 7, 9])
@each_backend
def test_causal_attention_is_aligned_at_the_bottom_right(backend, n_q):
    q, k, v = qkv(n_q=n_q, n_k=7)
    seen = torch.tensor([[j <= i + 7 - n_q for j in range(7)] for i in range(n_q)])
    want, _, _ = oracle(q, k, v, seen.expand(2, 4, n_q, 7))
    with quick_flex():
        got = attention(q, k, v, masks.causal(), backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(cases(DTYPES))
def test_weights_and_log_sum_exp_are_those_of_the_definition(case):
    call = (case.q, case.k, case.v)
    output, weights, lse = attention(*call, **case.options, return_weights=True, return_lse=True)
    _, want_weights, want_lse = oracle(*call, case.visible(), case.bias, case.scale)
    eps = torch.finfo(case.q.dtype).eps
    torch.testing.assert_close(weights.double(), want_weights, rtol=0, atol=16 * eps)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-5)
    assert torch.equal(lse == -math.inf, ~case.visible().any(-1))
    assert torch.equal(output, attention(*call, **case.options, backend="reference"))
    sums = case.visible().any(-1).double()
    torch.testing.assert_close(weights.double().sum(-1), sums, rtol=0, atol=16 * eps)
    assert (weights.masked_select(~case.visible()) == 0).all()


@settings(max_examples=60)
@given(cases(DTYPES, least=1))
def test_flex_returns_the_log_sum_exp_of_the_definition(case):
    call = (case.q, case.k, case.v)
    with quick_flex():
        _, lse = attention(*call, **case.options, return_lse=True, backend="flex")
    _, _, want = oracle(*call, case.visible(), case.bias, case.scale)
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=2e-5)


@differentiable
@settings(max_examples=40)
@given(data=st.data())
def test_the_gradients_are_those_of_the_definition(backend, data):
    case = data.draw(cases())
    leaves = [t.detach().clone().requires_grad_() for t in (case.q, case.k, case.v)]
    bias = None if case.bias is None else case.bias.double().requires_grad_()
    leaves += [] if bias is None else [bias]
    visible, options = case.visible(), {"bias": bias, "scale": case.scale}
    got = attention(*leaves[:3], mask=case.rule.mask, **options, backend=backend)
    want, _, _ = oracle(*leaves[:3], visible, **options)
    upstream = randn(*want.shape, dtype=torch.float64)
    got = torch.autograd.grad(got, leaves, upstream, materialize_grads=True)
    if want.requires_grad:
        want = torch.autograd.grad(want, leaves, upstream, materialize_grads=True)
    else:  # nobody sees anything
        want = [torch.zeros_like(t) for t in leaves]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


def test_the_gradients_of_weights_and_log_sum_exp_reach_query_and_bias():
    q, k, v = (t[:1, :2, :3].requires_grad_() for t in qkv(dtype=torch.float64))
    bias = randn(3, 3, dtype=torch.float64).requires_grad_()

    def extras(q, bias):
        mask = masks.causal() & masks.padding([2])
        return attention(q, k, v, mask, bias, return_weights=True, return_lse=True)[1:]

    assert torch.autograd.gradcheck(extras, (q, bias))


@pytest.mark.parametrize("grouped", [False, True])
@differentiable
def test_gradcheck_holds_in_float64(backend, grouped):
    leaves = qkv(batch=1, n_q=3, n_k=4, groups=2 if grouped else 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*leaves, randn(4, 1, 4, dtype=torch.float64))]
    mask = masks.sliding_window(1, 0) & masks.padding([3])  # the last row sees one key only

    def call(q, k, v, bias):
        return attention(q, k, v, mask, bias, backend=backend)

    assert torch.autograd.gradcheck(call, leaves)
    if backend == "reference" and grouped:
        assert torch.autograd.gradgradcheck(call, leaves)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@each_backend
def test_the_error_is_at_most_twice_that_of_pytorch(backend, dtype, masked):
    errors, torchs = [], []
    for seed in range(3):
        q, k, v = (randn(2, 4, 96, 32, seed=10 * seed + s, dtype=dtype) for s in range(3))
        mask = masks.sliding_window(40, 3) if masked else None
        seen = None if mask is None else mask.dense(96, 96)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), seen)
        torchs.append(F.scaled_dot_product_attention(q, k, v, seen).double() - exact)
        errors.append(attention(q, k, v, mask, backend=backend).double() - exact)
    for size in (lambda e: e.abs().max(), lambda e: e.pow(2).mean().sqrt()):
        floor = torch.finfo(dtype).eps * (0 if dtype != torch.float64 else 10)
        assert size(torch.stack(errors)) <= 2 * size(torch.stack(torchs)) + floor


@each_backend
def test_scores_beyond_float16_do_not_overflow(backend):
    q, k, v = (300 * t for t in qkv(d_k=64, dtype=torch.float16))  # scores up to 10⁷
    got = attention(q, k, v, backend=backend)
    want, _, _ = oracle(q, k, v, torch.ones(2, 4, 5, 7, dtype=torch.bool))
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=0.1)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_sum_of_equal_weights_keeps_its_digits(backend, dtype):
    q, k = torch.zeros(1, 1, 1, 8, dtype=dtype), torch.zeros(1, 1, 5000, 8, dtype=dtype)
    v = torch.ones(1, 1, 5000, 2, dtype=dtype)  # a sum in float16 would stop growing at 2048
    got = attention(q, k, v, masks.padding([4999]), backend=backend)
    torch.testing.assert_close(got, torch.ones_like(got), rtol=0, atol=2e-3)


@each_backend
def test_a_bias_wider_than_the_query_keeps_its_range(backend):
    q, k, v = qkv(dtype=torch.float16)
    q[:, :, 0] = 0  # beside -1e9 float32 has no digits left for a score
    bias = torch.zeros(5, 7)
    bias[:, :3] = -1e9  # would be -inf in float16
    bias[0] = -1e9  # and would hide every key of this row
    got = attention(q, k, v, bias=bias, backend=backend)
    want, _, _ = oracle(q, k, v, torch.ones(2, 4, 5, 7, dtype=torch.bool), bias)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-3)


# --- arguments -----------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 3.0])
def test_a_given_scale_replaces_one_over_the_root_of_d(backend, scale):
    q, k, v = qkv(dtype=torch.float64)
    want, _, _ = oracle(q, k, v, torch.ones(2, 4, 5, 7, dtype=torch.bool), scale=scale)
    torch.testing.assert_close(attention(q, k, v, scale=scale, backend=backend), want)


def test_neighbouring_query_heads_share_one_key_head_as_in_pytorch():
    q, k, v = qkv(heads=6, groups=2)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    for backend in BACKENDS:
        torch.testing.assert_close(attention(q, k, v, backend=backend), want)


@each_backend
@pytest.mark.parametrize(
    "mask", [None, masks.causal(), masks.padding([3, 0]), torch.ones(5, 5).tril() > 0], ids=repr
)
def test_inputs_are_never_modified_and_calls_repeat_exactly(backend, mask):
    q, k, v = qkv(n_k=5)
    k[0, 0, 2], v[1, 1, 4], q[0, 0, 0] = math.nan, math.inf, math.nan
    bias = randn(5, 5)
    bias[0] = -math.inf
    given = [q, k, v, bias] + [mask] * isinstance(mask, torch.Tensor)
    before = [t.clone() for t in given]
    state = torch.get_rng_state()
    first, second = (attention(q, k, v, mask, bias, backend=backend) for _ in range(2))
    assert torch.equal(first.nan_to_num(7), second.nan_to_num(7))
    assert torch.equal(torch.get_rng_state(), state), "no randomness without dropout"
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))


@pytest.mark.parametrize(
    ("extras", "names"),
    [
        ({}, ["output"]),
        ({"return_weights": True}, ["output", "weights"]),
        ({"return_lse": True}, ["output", "lse"]),
        ({"return_weights": True, "return_lse": True}, ["output", "weights", "lse"]),
    ],
    ids=str,
)
def test_what_is_asked_for_comes_after_the_output(extras, names):
    q, k, v = qkv(dtype=torch.float16)
    got = attention(q, k, v, **extras)
    got = got if extras else (got,)
    shapes = {"output": (2, 4, 5, 3), "weights": (2, 4, 5, 7), "lse": (2, 4, 5)}
    assert [tuple(t.shape) for t in got] == [shapes[name] for name in names]


# --- choosing a backend --------------------------------------------------------------------------

CALLS = {
    "plain": {},
    "weights": {"return_weights": True},
    "lse": {"return_lse": True},
    "dropout": {"dropout_p": 0.1},
    "generator": {"dropout_p": 0.1, "generator": torch.Generator()},
    "mask and bias": {"mask": masks.padding([1, 2]), "bias": torch.zeros(7)},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("grad", [False, True])
def test_explain_backends_tells_what_each_backend_then_does(options, grad):
    q, k, v = (t.requires_grad_(grad) for t in qkv())
    reasons = explain_backends(q, k, v, **options)
    assert list(reasons) == ["sdpa", "reference", "tiled", "flex", "triton"]
    for backend, reason in reasons.items():
        assert reason
        if reason == "ok":
            attention(q, k, v, **options, backend=backend)
        else:
            with pytest.raises(BackendUnsupportedError, match=backend) as raised:
                attention(q, k, v, **options, backend=backend)
            assert reason in str(raised.value)


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_auto_takes_the_first_backend_that_is_ok(options, monkeypatch):
    from course_lib.ops.attention import reference, sdpa

    q, k, v = qkv()
    took = []
    for module in (sdpa, reference):
        monkeypatch.setattr(
            module, "attention",
            lambda inputs, real=module.attention, name=module.__name__: (
                took.append(name.rpartition(".")[2]) or real(inputs)),
        )  # fmt: skip
    attention(q, k, v, **options)
    assert took == [
        next(n for n, why in explain_backends(q, k, v, **options).items() if why == "ok")
    ]


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        ("sdpa", {"return_weights": True}, "does not return the weights"),
        ("sdpa", {"return_lse": True}, "log-sum-exp"),
        ("sdpa", {"generator": torch.Generator()}, "global generator"),
        ("flex", {"return_weights": True}, "does not return the weights"),
        ("flex", {"dropout_p": 0.5}, "no dropout"),
        ("tiled", {"return_weights": True}, "never holds all weights"),
        ("triton", {"return_weights": True}, "never hold all weights"),
    ],
)
def test_a_backend_by_name_never_falls_back(backend, options, reason):
    with pytest.raises(BackendUnsupportedError, match=f'"{backend}".*{reason}'):
        attention(*qkv(), **options, backend=backend)


def test_flex_says_that_it_has_no_backward_pass_on_a_cpu():
    q, k, v = qkv()
    q.requires_grad_()
    with pytest.raises(BackendUnsupportedError, match="no backward pass on a CPU"):
        attention(q, k, v, backend="flex")
    with torch.no_grad():
        assert attention(q, k, v, backend="flex").isfinite().all()
