"""`attention` inside what PyTorch offers: compile, vmap, autocast, dropout, devices, memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, DIFFERENTIABLE, TRACEABLE, qkv, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from course_lib import attention, masks

each_backend = pytest.mark.parametrize("backend", BACKENDS)
differentiable = pytest.mark.parametrize("backend", DIFFERENTIABLE)
traceable = pytest.mark.parametrize("backend", TRACEABLE)
N = 6
MASKS = {
    "none": None,
    "causal": masks.causal(),
    "padding": masks.padding([3, 0]),
    "longformer": masks.longformer(1, [0]) & masks.prefix([1, 2]),
    "bigbird": masks.bigbird(2, window_blocks=1, global_blocks=0, random_blocks=1),
    "documents": ~masks.documents(torch.arange(2 * N).view(2, N) // 4) | masks.sliding_window(1, 0),
    "tensor": torch.ones(N, N).tril() > 0,
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def same(got, want, **tolerance):
    torch.testing.assert_close(got, want, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


# --- torch.compile -------------------------------------------------------------------------------


COMPILED_MASKS = {
    "none": lambda masks: None,
    "causal": lambda masks: masks.causal(),
    "longformer": lambda masks: masks.longformer(1, [0]) & masks.prefix([1, 2]),
    "bigbird": lambda masks: ~masks.bigbird(2, window_blocks=1, global_blocks=0, random_blocks=1),
    "documents": lambda masks: masks.documents(torch.arange(2 * N).view(2, N) // 4),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, name) for name in ("none", "causal", "longformer", "bigbird") for b in TRACEABLE][1:],
)
def test_torch_compile_changes_nothing(backend, name, plain, compiled):
    q, k, v = (t.requires_grad_() for t in qkv(n_q=N, n_k=N))
    bias, mask = randn(N, N).requires_grad_(), COMPILED_MASKS[name](plain.masks)

    def call(q, k, v, bias):
        return plain.attention(q, k, v, mask, bias, backend=backend)

    got, want = compiled(call, backend="aot_eager")(q, k, v, bias), call(q, k, v, bias)
    same(got, want)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v, bias)) for x in (got, want)]
    for g, w in zip(*grads, strict=True):
        same(g, w)


@pytest.mark.parametrize("name", ["none", "documents"])
def test_torch_compile_takes_flex_along(name, plain, compiled):
    q, k, v = qkv(n_q=N, n_k=N)
    mask = COMPILED_MASKS[name](plain.masks)
    got = compiled(lambda *x: plain.attention(*x, mask, backend="flex"), backend="eager")(q, k, v)
    same(got, plain.attention(q, k, v, mask, backend="flex"))


def test_one_compilation_serves_every_length(plain, compiled):
    def call(q, k, v):
        return plain.attention(q, k, v, plain.masks.sliding_window(2, 0))

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    fast = compiled(call, backend=count)
    for n in (6, 9):
        inputs = qkv(n_q=n, n_k=n)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 2)
        same(fast(*inputs), call(*inputs))
    assert len(graphs) == 1


def test_a_mask_may_be_built_inside_the_compiled_function(plain, compiled):
    def call(q, k, v, lengths):
        mask = plain.masks.padding(lengths) & plain.masks.causal()
        return plain.attention(q, k, v, mask, return_weights=True)

    args = (*qkv(n_q=N, n_k=N), torch.tensor([2, 5]))
    for got, want in zip(compiled(call, backend="eager")(*args), call(*args), strict=True):
        same(got, want)


# --- torch.func ----------------------------------------------------------------------------------


@each_mask
@traceable
def test_vmap_equals_a_loop(backend, mask):
    q, k, v = (torch.stack([t, 2 * t, -t]) for t in qkv(n_q=N, n_k=N))

    def call(q, k, v):
        return attention(q, k, v, mask, backend=backend)

    want = torch.stack([call(*row) for row in zip(q, k, v, strict=True)])
    same(torch.func.vmap(call)(q, k, v), want)
    only_q = torch.func.vmap(call, in_dims=(0, None, None))(q, k[0], v[0])
    same(only_q, torch.stack([call(row, k[0], v[0]) for row in q]))


@traceable
def test_vmap_over_masks_and_biases_equals_a_loop(backend):
    q, k, v = qkv(n_q=N, n_k=N)
    tables, biases = torch.stack([MASKS["tensor"], ~MASKS["tensor"]]), randn(2, N, N)

    def call(table, bias):
        return attention(q, k, v, table, bias, backend=backend)

    want = torch.stack([call(*row) for row in zip(tables, biases, strict=True)])
    same(torch.func.vmap(call)(tables, biases), want)


@traceable
def test_functional_gradients_equal_those_of_autograd(backend):
    q, k, v = qkv(n_q=N, n_k=N)

    def loss(q, k):
        return attention(q, k, v, masks.causal(), backend=backend).square().sum()

    want = torch.autograd.functional.jacobian(loss, (q, k))
    for transform in (torch.func.grad, torch.func.jacrev):
        for g, w in zip(transform(loss, argnums=(0, 1))(q, k), want, strict=True):
            same(g, w)
    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))
    same(per_example(torch.stack([q, q]), k)[1], want[0])


# --- autocast and grad modes -------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@each_backend
def test_autocast_gives_the_dtype_that_pytorch_gives(backend, dtype, low):
    q, k, v = qkv(dtype=dtype)
    bias = randn(5, 7, dtype=dtype)
    with torch.autocast("cpu", low):
        want = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
        got = attention(q, k, v, bias=bias, backend=backend)
    assert got.dtype == want.dtype
    same(got, want, rtol=2e-2, atol=2e-2)


@each_backend
def test_autocast_brings_projected_and_plain_tensors_together(backend):
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        projected = F.linear(q, torch.eye(4))  # bfloat16 by now, beside float32
        assert attention(projected, k, v, masks.causal(), backend=backend).dtype == torch.bfloat16


@each_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_every_backend_serves_parameters(backend, mode):
    q, k, v = (t.requires_grad_() for t in qkv())
    want = attention(q, k, v, masks.causal())
    with mode():
        got = attention(q, k, v, masks.causal(), backend=backend)
    same(got, want)
    assert not got.requires_grad


@differentiable
def test_a_mask_built_under_inference_mode_serves_training(backend):
    with torch.inference_mode():
        mask = masks.padding([2, 3]) & masks.bigbird(2)
    q, k, v = (t.requires_grad_() for t in qkv())
    attention(q, k, v, mask, backend=backend).sum().backward()
    assert q.grad.isfinite().all()


@traceable
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.padding([3, 0])], ids=repr)
def test_the_meta_device_tells_shapes_without_computing(backend, mask):
    q, k, v = (t.to("meta") for t in qkv())
    output = attention(q, k, v, mask, backend=backend)
    assert output.device.type == "meta"
    assert output.shape == (2, 4, 5, 3)


@traceable
def test_shapes_are_traced_without_looking_at_numbers(backend):
    q, k, v = qkv()

    def call(q, k, v):
        return attention(q, k, v, masks.causal(), backend=backend)

    with FakeTensorMode() as mode:
        assert call(*map(mode.from_tensor, (q, k, v))).shape == (2, 4, 5, 3)
    k[:, :, 2:4] = float("nan")
    got, want = make_fx(call)(*qkv())(q, k, v), call(q, k, v)
    assert want.isnan().any()
    same(got, want, equal_nan=True)


# --- dropout -------------------------------------------------------------------------------------


@differentiable
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_zeroes_weights_and_keeps_their_mean(backend, p):
    torch.manual_seed(0)
    q, k = torch.zeros(4, 4, 100, 2), torch.zeros(4, 4, 100, 2)
    v = torch.eye(100).expand(4, 4, 100, 100)  # so that the output is the weights
    kept = attention(q, k, v, dropout_p=p, backend=backend) * 100
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert (kept == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    same(kept[kept != 0], torch.full_like(kept[kept != 0], 1 / (1 - p)))


def test_dropout_follows_the_generator_given_and_leaves_the_global_one_alone():
    q, k, v = qkv(n_q=20, n_k=20)

    def draw(seed):
        return attention(q, k, v, dropout_p=0.5, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


@differentiable
def test_dropout_without_a_generator_follows_the_global_seed(backend):
    q, k, v = qkv(n_q=20, n_k=20)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(attention(q, k, v, masks.causal(), dropout_p=0.5, backend=backend))
    assert torch.equal(*outputs)


def test_the_weights_returned_are_those_before_dropout():
    q, k, v = qkv()
    output, weights = attention(q, k, v, dropout_p=0.5, return_weights=True)
    plain, want = attention(q, k, v, return_weights=True)
    assert torch.equal(weights, want)
    assert not torch.equal(output, plain)


@differentiable
def test_dropout_keeps_hidden_queries_at_zero(backend):
    q, k, v = qkv(n_q=6, n_k=4)
    output = attention(q, k, v, masks.causal(), dropout_p=0.5, backend=backend)
    assert (output[:, :, :2] == 0).all()
    assert output.isfinite().all()


# --- memory --------------------------------------------------------------------------------------


def growth(code):
    """How many MiB the peak memory of a fresh process grows by while it runs the code."""
    program = f"""
import resource, sys, torch
from course_lib import attention, masks
torch.set_num_threads(1)
unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
def randn(*shape):
    return torch.randn(shape)
attention(*3 * [randn(1, 1, 64, 16)], masks.causal()), masks.causal().tiles(64, 64)  # warm up
n = 16384
{code}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


on_unix = pytest.mark.skipif(sys.platform == "win32", reason="no resource module on Windows")


@on_unix
def test_a_length_of_16384_needs_no_quadratic_memory():
    grown = growth("""
q, k, v = (randn(1, 1, n, 16) for _ in range(3))
before = peak()
assert attention(q, k, v).isfinite().all()
assert attention(q, k, v, masks.causal()).isfinite().all()
assert len((masks.causal() & masks.padding([n - 7])).tiles(n, n).patterns) <= 4
print(peak() - before)""")
    assert grown < 100  # a bool for each pair would take 256 MiB


@on_unix
@differentiable
def test_grouped_queries_do_not_repeat_keys_and_values(backend):
    grown = growth(f"""
q, k, v = randn(1, 64, 1, 256), randn(1, 1, n, 256), randn(1, 1, n, 256)  # k is 16 MiB
before = peak()
attention(q, k, v, masks.padding([n]), backend="{backend}")
print(peak() - before)""")
    assert grown < 300  # repeated for 64 heads k would take 1024 MiB
