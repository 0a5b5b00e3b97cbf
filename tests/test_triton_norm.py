"""The kernels of LayerNorm and RMSNorm: on a GPU where there is one, else in the interpreter."""

import importlib

import pytest
import torch
from kernel_cases import (
    DEVICE,
    assert_no_worse,
    each_dtype,
    in_float64,
    nothing_comes_zeroed,  # noqa: F401
    poisoned,
    randn,
    with_gradients,
)

from course_lib import BackendUnsupportedError
from course_lib.ops.norm import layer_norm, rms_norm

# Rows and width: one number, odd ones, a power of 2, several tiles, many programs' partial sums.
SHAPES = [(1, 1), (5, 33), (3, 64), (70, 100), (300, 257)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_norm = pytest.mark.parametrize("norm", [layer_norm, rms_norm])
each_residual = pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])


def leaves_of(norm, shape, dtype, added):
    x, residual = poisoned(*shape, dtype=dtype), poisoned(*shape, seed=1, dtype=dtype)
    # Every second number of a longer tensor: a step of 2.
    parameters = [randn(2 * shape[-1], seed=s, dtype=dtype)[::2] for s in (2, 3)]
    return x, residual if added else None, *parameters[: 1 + (norm is layer_norm)]


def calling(norm, backend, **options):
    return lambda x, residual, *parameters: norm(
        x, *parameters, residual=residual, backend=backend, **options
    )


@each_dtype
@each_shape
@each_norm
@each_residual
def test_results_and_gradients_are_as_near_to_float64_as_pytorchs(norm, shape, dtype, added):
    leaves = leaves_of(norm, shape, dtype, added)
    ours, theirs = (with_gradients(calling(norm, b), leaves) for b in ("triton", "fused"))
    exact = with_gradients(calling(norm, "reference"), in_float64(leaves))
    assert_no_worse(ours, theirs, exact)


@each_norm
@pytest.mark.parametrize("given", [(), (2,), (2, 3)], ids=["none", "weight", "both"])
def test_parameters_can_be_left_out(norm, given):
    parameters = [randn(7, seed=s) for s in given][: 1 + (norm is layer_norm)]
    leaves = [poisoned(4, 7), None, *parameters]
    ours, theirs = (with_gradients(calling(norm, b), leaves) for b in ("triton", "fused"))
    torch.testing.assert_close(ours, theirs)


def test_a_bias_needs_no_weight():
    x, bias = randn(4, 7), randn(7, seed=1)
    got = layer_norm(x, bias=bias, backend="triton")
    torch.testing.assert_close(got, layer_norm(x, bias=bias, backend="fused"))


@each_norm
def test_the_residual_sum_is_returned_and_can_be_used_alone(norm):
    x, residual = randn(2, 3, 8).requires_grad_(), randn(2, 3, 8, seed=1).requires_grad_()
    _, total = norm(x, residual=residual, backend="triton")
    assert torch.equal(total, x + residual)
    total.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * total.detach())
    torch.testing.assert_close(residual.grad, 2 * total.detach())


@each_norm
@pytest.mark.parametrize("backend", ["reference", "fused", "auto"])
def test_every_backend_adds_a_residual(norm, backend):
    x, residual = randn(2, 3, 8), randn(2, 3, 8, seed=1)
    y, total = norm(x, residual=residual, backend=backend)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, norm(x + residual, backend="reference"))


@each_norm
def test_a_stream_in_float32_takes_a_sublayers_half_precision(norm):
    """As under autocast: the sum, and what is normalised, are in the wider of the two."""
    x, residual, weight = randn(5, 16, dtype=torch.float16), randn(5, 16, seed=1), randn(16, seed=2)
    ours, theirs = (
        with_gradients(calling(norm, b), (x, residual, weight)) for b in ("triton", "reference")
    )
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@each_norm
def test_any_shape_and_memory_order_will_do(norm):
    x = randn(2, 5, 3, 4).transpose(1, 3)  # (2, 4, 3, 5)
    torch.testing.assert_close(norm(x, backend="triton"), norm(x, backend="reference"))
    assert norm(x[:0], backend="triton").shape == (0, 4, 3, 5)
    weight = torch.ones(5, device=DEVICE, requires_grad=True)
    norm(x[:0], weight, backend="triton").sum().backward()
    assert torch.equal(weight.grad, torch.zeros(5, device=DEVICE))


def test_a_mean_far_from_zero_costs_no_digits():
    x = randn(8, 32, dtype=torch.float64) + 1000
    got = layer_norm(x.float(), backend="triton").double()
    torch.testing.assert_close(got, layer_norm(x), atol=1e-3, rtol=1e-3)


@each_norm
def test_a_zero_row_gives_zeros(norm):
    assert torch.equal(norm(torch.zeros(2, 5, device=DEVICE), backend="triton").cpu(),
                       torch.zeros(2, 5))  # fmt: skip


@each_norm
def test_a_gradient_may_come_in_any_memory_order(norm):
    """That of a sum is one number, with a step of 0; that of a transposed result is transposed."""
    for loss in (torch.sum, lambda y: (y.T * randn(5, 70)).sum()):
        gradients = []
        for backend in ("triton", "reference"):
            x = randn(70, 5).requires_grad_()
            y, total = norm(x, residual=x, backend=backend)
            gradients += torch.autograd.grad(loss(y) + loss(total.square()), x)
        torch.testing.assert_close(*gradients)


@each_norm
def test_gradients_are_the_same_at_every_call(norm):
    leaves = leaves_of(norm, (200, 64), torch.float32, True)
    first, second = (with_gradients(calling(norm, "triton"), leaves) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_inputs_are_left_as_they_are():
    x, residual = randn(4, 6), randn(4, 6, seed=1)
    before = x.clone(), residual.clone()
    layer_norm(x, residual=residual, backend="triton")
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_the_kernel_compiles_without_a_graph_break(plain, compiled, how):
    from_plain = importlib.import_module("course_lib.ops.norm").layer_norm

    def call(x, residual, weight):
        y, total = from_plain(x, weight, residual=residual, backend="triton")
        return y * 2, total

    leaves = randn(4, 6), randn(4, 6, seed=1), randn(6, seed=2)
    want = with_gradients(call, leaves)
    torch.testing.assert_close(with_gradients(compiled(call, backend=how), leaves), want)


@pytest.mark.parametrize(
    ("options", "x", "reason"),
    [
        ({}, torch.zeros(2, 3, dtype=torch.float64), "compute in float32"),
        ({}, torch.zeros(1, 8193), "8192 numbers at most"),
        ({}, torch.zeros(2, 3, device="meta"), "no kernels for the device meta"),
    ],
)
def test_a_call_that_cannot_be_served_says_why(options, x, reason):
    with pytest.raises(BackendUnsupportedError, match=reason):
        layer_norm(x, backend="triton", **options)
    layer_norm(x)  # "auto" takes another


def test_under_vmap_the_kernel_says_no_and_auto_goes_on():
    x = randn(3, 2, 4)
    with pytest.raises(BackendUnsupportedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: rms_norm(x, backend="triton"))(x)
    torch.testing.assert_close(torch.func.vmap(rms_norm)(x), rms_norm(x))


@pytest.mark.bad_input
def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"residual must have the shape of x \(2, 3\), got \(3,\)"):
        layer_norm(torch.zeros(2, 3), residual=torch.zeros(3))
    with pytest.raises(TypeError, match=r"residual must be a floating-point tensor, got list"):
        rms_norm(torch.zeros(2, 3), residual=[1.0])
