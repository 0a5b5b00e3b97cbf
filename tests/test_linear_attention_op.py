"""`linear_attention`: every backend equals the definition, whole or in pieces, in linear memory."""

import math

import pytest
import torch
from largest import Largest

from course_lib import BackendUnsupportedError
from course_lib.ops.linear_attention import linear_attention

BACKENDS = ("reference", "recurrent", "tiled")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
LENGTHS = [(7, 7), (1, 1), (3, 8), (8, 3), (1, 9), (5, 0), (0, 5), (0, 0), (16, 16), (33, 35)]


def rand(*shape, seed=0, dtype=torch.float64):
    """Numbers between 0 and 1: features are not negative."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(n_q=7, n_k=7, heads=4, groups=2, features=3, d_v=2, dtype=torch.float64):
    return (
        rand(2, heads, n_q, features, dtype=dtype),
        rand(2, groups, n_k, features, seed=1, dtype=dtype),
        rand(2, groups, n_k, d_v, seed=2, dtype=dtype) - 0.5,
    )


def definition(q, k, v, causal, normalize=True, eps=0.0):
    """One query at a time, one key at a time."""
    batch, heads, n_q, _ = q.shape
    n_k, share = k.shape[2], heads // k.shape[1]
    output = torch.zeros(batch, heads, n_q, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(n_q):
                keys = [j for j in range(n_k) if not causal or j <= i + n_k - n_q]
                weights = [q[b, h, i] @ k[b, h // share, j] for j in keys]
                total = sum(weights) if normalize else 1
                for w, j in zip(weights, keys, strict=True):
                    if total != 0:
                        output[b, h, i] += w / (total + eps) * v[b, h // share, j]
    return output


def same(got, want, **tolerance):
    torch.testing.assert_close(got, want, **({"rtol": 1e-10, "atol": 1e-10} | tolerance))


# --- the equation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS[:7], ids=str)
def test_all_backends_equal_the_definition(n_q, n_k, groups):
    inputs = qkv(n_q, n_k, groups=groups)
    want = definition(*inputs, causal=True)
    for backend in BACKENDS:
        same(linear_attention(*inputs, causal=True, backend=backend, chunk=2), want)
    want = definition(*inputs, causal=False)
    for backend in ("reference", "tiled"):
        same(linear_attention(*inputs, backend=backend), want)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS, ids=str)
def test_the_chunk_does_not_change_the_answer(n_q, n_k, chunk):
    inputs = qkv(n_q, n_k)
    want = linear_attention(*inputs, causal=True, backend="reference")
    same(linear_attention(*inputs, causal=True, chunk=chunk), want)


@each_backend
def test_without_the_normaliser_it_is_the_plain_sum(backend):
    q, k, v = qkv()
    q = q - 0.5  # may be negative then
    got = linear_attention(q, k, v, causal=True, normalize=False, backend=backend)
    same(got, definition(q, k, v, causal=True, normalize=False))


@each_backend
def test_eps_is_added_to_the_normaliser(backend):
    inputs = qkv()
    got = linear_attention(*inputs, causal=True, eps=0.5, backend=backend)
    same(got, definition(*inputs, causal=True, eps=0.5))


def test_auto_takes_the_chunked_backend():
    inputs = qkv(40, 40)
    got = linear_attention(*inputs, causal=True)
    assert torch.equal(got, linear_attention(*inputs, causal=True, backend="tiled"))


@each_backend
def test_causal_stands_at_the_bottom_right(backend):
    q, k, v = qkv(9, 9)
    whole = linear_attention(q, k, v, causal=True, backend=backend)
    last = linear_attention(q[:, :, -4:], k, v, causal=True, backend=backend)
    same(last, whole[:, :, -4:])


@each_backend
def test_inputs_are_left_as_they_were(backend):
    inputs = qkv()
    state = rand(2, 2, 3, 2), rand(2, 2, 3)
    before = [x.clone() for x in (*inputs, *state)]
    linear_attention(*inputs, causal=True, state=state, backend=backend)
    assert all(map(torch.equal, (*inputs, *state), before))


# --- where there is nothing to see ----------------------------------------------------------------


@each_backend
def test_a_query_that_sees_nothing_gets_zero_and_gradient_zero(backend):
    q, k, v = (x.requires_grad_() for x in qkv(6, 4))
    output = linear_attention(q, k, v, causal=True, backend=backend)
    assert (output[:, :, :2] == 0).all()
    output.sum().backward()
    assert (q.grad[:, :, :2] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_weights_that_add_up_to_zero_give_zero_and_gradient_zero(causal):
    for backend in BACKENDS if causal else ("reference", "tiled"):
        q, k, v = qkv()
        q[:, :, 3] = 0
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        output = linear_attention(q, k, v, causal=causal, backend=backend)
        assert (output[:, :, 3] == 0).all()
        gradients = torch.autograd.grad(output[:, :, 3].sum(), (q, k, v))
        assert all((g == 0).all() for g in gradients)


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["key", "value", "query"])
def test_a_broken_number_reaches_those_that_see_it_and_no_others(name, bad, backend):
    q, k, v = qkv(9, 9)
    want = linear_attention(q, k, v, causal=True)
    {"query": q, "key": k, "value": v}[name][:, :, 5, 1] = bad
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    output, (s, z) = linear_attention(
        q, k, v, causal=True, return_state=True, backend=backend, chunk=4
    )
    fine = [0, 1, 2, 3, 4] if name != "query" else [0, 1, 2, 3, 4, 6, 7, 8]
    same(output[:, :, fine], want[:, :, fine])
    assert output[:, :, [i for i in range(9) if i not in fine]].isnan().all()
    assert s.isnan().all() == z.isnan().all() == (name != "query")
    gradients = torch.autograd.grad(output[:, :, fine].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)


# --- gradients ------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("groups", [4, 2])
def test_gradients_equal_those_of_the_definition(groups, backend):
    inputs = [x.requires_grad_() for x in qkv(5, 6, groups=groups)]
    factor = rand(2, 4, 5, 2, seed=3)
    want = torch.autograd.grad((definition(*inputs, causal=True) * factor).sum(), inputs)
    got = linear_attention(*inputs, causal=True, backend=backend, chunk=2)
    for g, w in zip(torch.autograd.grad((got * factor).sum(), inputs), want, strict=True):
        same(g, w)


@each_backend
def test_gradcheck_passes_through_state_and_output(backend):
    q, k, v = (x[:1, :2, :, :2] for x in qkv(5, 5, features=2))
    inputs = [x.clone().requires_grad_() for x in (q, k, v, rand(1, 2, 2, 2), rand(1, 2, 2))]

    def call(q, k, v, s, z):
        output, state = linear_attention(
            q, k, v, causal=True, state=(s, z), return_state=True, backend=backend, chunk=2
        )
        return output, *state

    assert torch.autograd.gradcheck(call, inputs)


# --- the state ------------------------------------------------------------------------------------


@each_backend
def test_the_state_is_the_sum_over_all_keys(backend):
    q, k, v = qkv(5, 7)
    s, z = linear_attention(q, k, v, causal=True, return_state=True, backend=backend)[1]
    same(s, torch.einsum("bgnf,bgnd->bgfd", k, v))
    same(z, k.sum(2))


@each_backend
@pytest.mark.parametrize("sizes", [[16], [0, 16], [1] * 16, [5, 11], [15, 1], [3, 0, 8, 5]])
def test_in_pieces_it_is_what_it_is_at_once(sizes, backend):
    q, k, v = qkv(16, 16)
    want = linear_attention(q, k, v, causal=True, backend="reference")
    state, outputs = None, []
    for part in zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
        output, state = linear_attention(
            *part, causal=True, state=state, return_state=True, backend=backend, chunk=4
        )
        outputs.append(output)
    same(torch.cat(outputs, 2), want)
    same(state[0], k.mT @ v)


def test_pieces_may_be_read_by_different_backends():
    q, k, v = qkv(12, 12)
    first, state = linear_attention(
        q[:, :, :7], k[:, :, :7], v[:, :, :7], causal=True, return_state=True, backend="tiled"
    )
    second = linear_attention(
        q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], causal=True, state=state, backend="recurrent"
    )
    same(torch.cat([first, second], 2), linear_attention(q, k, v, causal=True))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_without_causality_every_query_sees_the_state_and_every_key(backend):
    q, k, v = qkv(4, 9)
    state = linear_attention(q, k[:, :, :5], v[:, :, :5], return_state=True, backend=backend)[1]
    got = linear_attention(q, k[:, :, 5:], v[:, :, 5:], state=state, backend=backend)
    same(got, linear_attention(q, k, v))
    nothing = linear_attention(q, k[:, :, :0], v[:, :, :0], state=state, backend=backend)
    same(nothing, linear_attention(q, k[:, :, :5], v[:, :, :5]))


# --- memory ---------------------------------------------------------------------------------------


def largest(n, backend, causal=True):
    """Of a forward and a backward pass over one head of n tokens."""
    inputs = [rand(1, 1, n, 8, dtype=torch.float32).requires_grad_() for _ in range(3)]
    with Largest() as seen:
        output = linear_attention(*inputs, causal=causal, backend=backend, chunk=16)
        torch.autograd.grad(output.sum(), inputs)
    return seen.numbers


@pytest.mark.parametrize(("backend", "causal"), [("tiled", True), ("tiled", False)])
def test_no_tensor_is_larger_than_a_few_numbers_for_each_token(backend, causal):
    n = 4096
    assert largest(n, backend, causal) <= n * 9  # d_v and the normaliser; n² would be n · 4096


def test_the_reference_holds_all_pairs():
    assert largest(512, "reference") == 512**2


def test_the_recurrent_form_holds_one_state_at_a_time():
    n = 256
    assert largest(n, "recurrent") <= n * 9


# --- dtypes and transformations -------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sums_run_in_float32_and_the_output_has_the_dtype_asked(dtype, backend):
    inputs = qkv(300, 300, dtype=dtype)
    output, (s, z) = linear_attention(*inputs, causal=True, return_state=True, backend=backend)
    assert output.dtype == dtype
    assert s.dtype == z.dtype == torch.float32
    want = linear_attention(*(x.double() for x in inputs), causal=True)
    rounding = torch.finfo(dtype).eps
    same(output.double(), want, rtol=4 * rounding, atol=4 * rounding)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_gives_the_dtype_that_attention_gives(dtype, backend):
    inputs = qkv(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_attention(*inputs, causal=True, backend=backend)
    low = dtype == torch.float32
    assert got.dtype == (torch.bfloat16 if low else torch.float64)
    tolerance = 2e-2 if low else 1e-10
    want = linear_attention(*inputs, causal=True).double()
    same(got.double(), want, rtol=tolerance, atol=tolerance)


@each_backend
def test_torch_compile_changes_nothing(backend, plain, compiled):
    from course_lib.ops.linear_attention import linear_attention  # the unchecked one

    inputs = [x.requires_grad_() for x in qkv(6, 6, dtype=torch.float32)]

    def call(q, k, v):
        output, (s, z) = linear_attention(
            q, k, v, causal=True, return_state=True, backend=backend, chunk=4
        )
        return output.sum() + s.square().sum() + z.sum()

    got, want = compiled(call, backend="aot_eager")(*inputs), call(*inputs)
    torch.testing.assert_close(got, want)
    for g, w in zip(*(torch.autograd.grad(x, inputs) for x in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


@each_backend
def test_vmap_equals_a_loop(backend):
    q, k, v = (torch.stack([t, 2 * t, t.flip(2)]) for t in qkv())

    def call(q, k, v):
        return linear_attention(q, k, v, causal=True, backend=backend, chunk=3)

    want = torch.stack([call(*row) for row in zip(q, k, v, strict=True)])
    same(torch.func.vmap(call)(q, k, v), want)
    for dims in ((0, None, None), (None, 0, None), (None, None, 0)):
        row = [x if d == 0 else x[0] for x, d in zip((q, k, v), dims, strict=True)]
        each = [[x[i] if d == 0 else x[0] for x, d in zip((q, k, v), dims, strict=True)]
                for i in range(3)]  # fmt: skip
        same(torch.func.vmap(call, in_dims=dims)(*row), torch.stack([call(*e) for e in each]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_meta_device_tells_shapes_without_computing(backend):
    q, k, v = (x.to("meta") for x in qkv(5, 7))
    assert linear_attention(q, k, v, causal=True, backend=backend).shape == (2, 4, 5, 2)


# --- bad input ------------------------------------------------------------------------------------


def test_a_recurrent_network_cannot_see_the_future():
    with pytest.raises(BackendUnsupportedError, match=r"recurrent.*needs causal=True"):
        linear_attention(*qkv(), backend="recurrent")


S, Z = torch.zeros(2, 2, 3, 2, dtype=torch.float64), torch.zeros(2, 2, 3, dtype=torch.float64)
BAD = [
    ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    ({"key": torch.zeros(2, 2, 7, 3).long()}, TypeError, "key must be float16.*int64"),
    ({"key": torch.zeros(2, 2, 7, 3)}, TypeError, "key is torch.float32 but query"),
    ({"value": torch.zeros(7, 2).double()}, ValueError, r"value must have shape.*\(7, 2\)"),
    ({"value": torch.zeros(2, 2, 6, 2).double()}, ValueError,
     r"key and value.*key \(2, 2, 7, 3\), value \(2, 2, 6, 2\)"),
    ({"query": torch.zeros(3, 4, 7, 3).double()}, ValueError, r"batch size.*\(3, 4, 7, 3\)"),
    ({"query": torch.zeros(2, 4, 7, 5).double()}, ValueError, r"features.*\(2, 4, 7, 5\)"),
    ({"query": torch.zeros(2, 3, 7, 3).double()}, ValueError, r"multiple.*\(2, 3, 7, 3\)"),
    ({"query": torch.zeros(2, 4, 7, 3, device="meta").double()}, ValueError, "key is on cpu but"),
    ({"state": S}, TypeError, "state must be a pair.*Tensor"),
    ({"state": (S, None)}, TypeError, "z is NoneType"),
    ({"state": (S[:1], Z)}, ValueError, r"S of shape \(1, 2, 3, 2\).*\(2, 2, 3, 2\)"),
    ({"state": (S, S)}, ValueError, r"z of shape \(2, 2, 3, 2\).*\(2, 2, 3\)"),
    ({"state": (S, Z), "query": torch.zeros(2, 4, 9, 3).double()}, ValueError,
     r"state needs.*\(2, 4, 9, 3\)"),
    ({"eps": "small"}, TypeError, "eps must be a number, got str"),
    ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
    ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
    ({"chunk": 2.0}, TypeError, "chunk must be an int, got float"),
    ({"backend": "flex"}, ValueError, "backend must be one of auto, tiled.*'flex'"),
    ({"backend": None}, TypeError, "backend must be a string, got NoneType"),
]  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[m[:25] for _, _, m in BAD])
def test_a_bad_argument_is_named(options, error, message):
    q, k, v = qkv()
    arguments = {"query": q, "key": k, "value": v, "causal": True} | options
    with pytest.raises(error, match=message):
        linear_attention(**arguments)
