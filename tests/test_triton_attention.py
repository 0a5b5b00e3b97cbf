"""The Triton kernels of attention: on a GPU where there is one, otherwise in the interpreter.

The interpreter takes a hundredth of a second a tile of 64 x 64, so the calls are small: two or
three tiles each way. What only a compiler can show is in test_triton_compile_attention.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import cases, largest, oracle, qkv, randn
from hypothesis import given, settings

from course_lib import BackendUnsupportedError, attention, explain_backends, masks
from course_lib.ops import triton_runtime

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := triton_runtime.why_not(DEVICE):
    pytest.skip(reason, allow_module_level=True)

# The interpreter computes with numpy, which tells of every overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def triton(*args, **options):
    return attention(*args, **options, backend="triton")


def poisoned(shape, dtype, spare=3):
    """Random numbers inside a larger tensor of NaN: whoever reads beyond the edge gets one."""
    b, h, n, d = shape
    whole = torch.full((b, n + 2 * spare, h, d + 2 * spare), math.nan, dtype=dtype, device=DEVICE)
    inner = whole.transpose(1, 2)[:, :, spare : n + spare, spare : d + spare]
    inner.copy_(randn(*shape, seed=n + d, dtype=dtype))
    return inner


@pytest.fixture(autouse=True)
def nothing_comes_zeroed(monkeypatch):
    """New memory holds NaN: whatever a kernel forgets to write shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# --- one call after another against float64 -------------------------------------------------------

# d_k, d_v, n_q, n_k, heads, groups, mask, bias's shape, scale
CALLS = {
    "plain": (16, 16, 64, 64, 1, 1, None, None, None),
    "ragged": (24, 40, 70, 131, 2, 2, None, None, None),
    "causal": (32, 32, 100, 100, 2, 1, masks.causal(), None, None),
    "causal, more keys": (16, 16, 70, 100, 2, 1, masks.causal(), None, None),
    "causal, more queries": (16, 16, 100, 70, 1, 1, masks.causal(), None, None),
    "one query": (80, 80, 1, 130, 4, 2, masks.causal(), None, None),
    "window": (16, 16, 150, 150, 1, 1, masks.sliding_window(40, 5), None, 0.3),
    "padding": (16, 20, 66, 90, 2, 2, masks.padding([66, 0]) & masks.causal(), None, -1.0),
    "documents": (16, 16, 96, 96, 1, 1, masks.documents((torch.arange(192) // 40).view(2, 96)),
                  None, None),
    "bias": (16, 16, 70, 66, 2, 1, masks.causal(), (2, 70, 66), None),
    "bias of the keys": (17, 16, 20, 66, 2, 2, None, (2, 1, 66), None),
    "bias of the heads": (1, 3, 66, 20, 4, 2, masks.sliding_window(70, 0), (4, 1, 1), 2.0),
}  # fmt: skip


def call(name, dtype=torch.float32):
    d_k, d_v, n_q, n_k, heads, groups, mask, bias, scale = CALLS[name]
    batch = mask.batch_size or 1 if mask is not None else 1
    shapes = (heads, n_q, d_k), (groups, n_k, d_k), (groups, n_k, d_v)
    tensors = [poisoned((batch, *shape), dtype) for shape in shapes]
    if bias is not None:
        bias = randn(*bias, seed=8).to(DEVICE)
        bias.view(-1)[::5] = -math.inf
    leaves = [t.requires_grad_() for t in (*tensors, bias) if t is not None]
    return leaves, {"mask": mask, "scale": scale}


def results(leaves, options, backend):
    """Output, log-sum-exp and all gradients of a loss of both."""
    bias = leaves[3] if len(leaves) > 3 else None
    output, lse = attention(
        *leaves[:3], bias=bias, **options, return_lse=True, backend=backend
    )  # fmt: skip
    weight = torch.linspace(-1, 1, output.shape[-1], device=DEVICE, dtype=output.dtype)
    loss = (output * weight).sum() + lse[lse > -math.inf].sin().sum()
    return output, lse, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", CALLS)
def test_output_log_sum_exp_and_every_gradient_are_right(name):
    leaves, options = call(name)
    exact = results([t.double() for t in leaves], options, "reference")
    got = results(leaves, options, "triton")
    for g, e, like in zip(got, exact, (leaves[0], leaves[0], *leaves), strict=True):
        assert g.dtype == like.dtype
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_error_is_at_most_twice_that_of_pytorch(dtype, masked):
    mask = masks.sliding_window(40, 3) if masked else None
    seen = mask.dense(96, 96, DEVICE) if masked else None
    leaves = [
        randn(2, 4, 96, 32, seed=s, dtype=dtype).to(DEVICE).requires_grad_() for s in range(3)
    ]
    upstream = randn(2, 4, 96, 32, seed=3, dtype=dtype).to(DEVICE)

    def outcome(call, leaves):
        output = call(*leaves, seen if call is sdpa else mask)
        return output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype))

    sdpa = F.scaled_dot_product_attention
    exact = outcome(sdpa, [t.detach().double().requires_grad_() for t in leaves])
    ours, theirs = outcome(triton, leaves), outcome(sdpa, leaves)
    for o, t, e in zip(ours, theirs, exact, strict=True):
        for size in (lambda x: x.abs().max(), lambda x: x.pow(2).mean().sqrt()):
            assert size(o.double() - e) <= 2 * size(t.double() - e)


def test_gradients_repeat_to_the_last_bit():
    leaves, options = call("causal")
    for first, second in zip(*(results(leaves, options, "triton") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


# --- any call at all ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Do not use the .random. module")
@settings(max_examples=40)
@given(case=cases((torch.float16, torch.float32)))
def test_any_small_call_gives_what_the_definition_gives(case):
    bias = None if case.bias is None else case.bias.to(DEVICE)
    mask = case.rule.mask
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) else mask
    tensors = [t.to(DEVICE) for t in (case.q, case.k, case.v)]
    got, lse = triton(*tensors, mask, bias, scale=case.scale, return_lse=True)
    want, _, want_lse = oracle(case.q, case.k, case.v, case.visible(), case.bias, case.scale)
    assert got.dtype == case.q.dtype
    atol = 8 * torch.finfo(got.dtype).eps * (1 + largest(case.v))
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double().cpu(), want_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths_give_empty_or_zero(n_q, n_k):
    q, k, v = (t.to(DEVICE).requires_grad_() for t in qkv(n_q=n_q, n_k=n_k))
    output, lse = triton(q, k, v, return_lse=True)
    assert output.shape == (2, 4, n_q, 3)
    assert (output == 0).all()
    assert (lse == -math.inf).all()
    output.sum().backward()
    assert all((t.grad == 0).all() for t in (q, k, v))


# --- what is hidden -------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_a_broken_key_shows_to_those_who_see_it_and_to_nobody_else(broken, dense):
    q, k, v = (t.to(DEVICE) for t in qkv(n_q=80, n_k=80, d_k=16, d_v=16))
    mask = masks.causal().dense(80, 80, DEVICE) if dense else masks.causal()
    leaves = [t.requires_grad_() for t in (q.clone(), k.clone(), v.clone())]
    want = triton(*leaves, mask)
    want_grads = torch.autograd.grad(want[:, :, :70].sum(), leaves)
    k[0, 0, 70, 1], v[1, 1, 75, 0], q[1, 0, 79, 3] = broken, broken, broken
    leaves = [t.requires_grad_() for t in (q, k, v)]
    got, lse = triton(*leaves, mask, return_lse=True)
    shows = torch.zeros(2, 4, 80, dtype=torch.bool, device=DEVICE)
    shows[0, :2, 70:], shows[1, 2:, 75:], shows[1, 0, 79] = True, True, True
    assert torch.equal(got.isnan(), shows[..., None].expand(got.shape))
    assert torch.equal(lse.isnan(), shows)
    assert torch.equal(got[~shows], want[~shows])
    grads = torch.autograd.grad(got[:, :, :70].sum(), leaves)
    for g, w in zip(grads, want_grads, strict=True):
        assert torch.equal(g, w)


def test_leftovers_beyond_the_length_reach_neither_output_nor_gradient():
    q, k, v = (t.to(DEVICE) for t in qkv(n_k=90))
    short = [t.requires_grad_() for t in (q, k[:, :, :70].clone(), v[:, :, :70].clone())]
    want = triton(*short)
    k[:, :, 70:] = v[:, :, 70:] = torch.finfo(torch.float32).max
    full = [t.requires_grad_() for t in (q, k, v)]
    got = triton(*full, masks.padding([70, 70]))
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got.sum(), full)
    for g, w in zip(grads, torch.autograd.grad(want.sum(), short), strict=True):
        torch.testing.assert_close(g[:, :, : w.shape[2]], w)
        assert (g[:, :, w.shape[2] :] == 0).all()


def test_the_least_finite_bias_hides_nobody():
    q, k, v = (t.to(DEVICE) for t in qkv())
    bias = torch.full((7,), torch.finfo(torch.float32).min, device=DEVICE)
    torch.testing.assert_close(
        triton(q, k, v, bias=bias),
        v.mean(2).repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 5, -1),
    )


# --- when it serves -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "how", "reason"),
    [
        ({"return_weights": True}, {}, "never hold all weights"),
        ({"dropout_p": 0.5}, {}, "no dropout"),
        ({}, {"dtype": torch.float64}, "no float64"),
        ({}, {"d_k": 257}, "up to 256"),
    ],
    ids=str,
)
def test_it_says_what_it_does_not_do(options, how, reason):
    tensors = [t.to(DEVICE) for t in qkv(**how)]
    with pytest.raises(BackendUnsupportedError, match=reason):
        triton(*tensors, **options)
    assert reason in explain_backends(*tensors, **options)["triton"]


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU computes in bfloat16")
def test_the_interpreter_is_not_trusted_with_bfloat16():
    with pytest.raises(BackendUnsupportedError, match="bfloat16"):
        triton(*qkv(dtype=torch.bfloat16))


def test_torch_func_is_refused_with_a_reason():
    with pytest.raises(BackendUnsupportedError, match=r"torch\.func"):
        torch.func.vmap(lambda q: triton(q, q, q))(randn(2, 1, 1, 4, 16).to(DEVICE))


def test_torch_compile_is_refused_with_a_reason_and_auto_serves(plain, compiled):
    q = randn(1, 1, 4, 16).to(DEVICE)
    mask = plain.masks.causal()
    served = compiled(lambda q: plain.attention(q, q, q, mask), backend="eager")
    torch.testing.assert_close(served(q), triton(q, q, q, masks.causal()))
    refused = compiled(lambda q: plain.attention(q, q, q, mask, backend="triton"), backend="eager")
    with pytest.raises(Exception, match="no compiler can trace"):
        refused(q)
