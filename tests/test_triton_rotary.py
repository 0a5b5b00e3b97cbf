"""The kernel of rotary positions: on a GPU where there is one, else in the interpreter."""

import importlib

import pytest
import torch
from kernel_cases import (
    assert_no_worse,
    each_dtype,
    in_float64,
    nothing_comes_zeroed,  # noqa: F401
    poisoned,
    randn,
    with_gradients,
)

from course_lib import BackendUnsupportedError
from course_lib.ops.rotary import rotary

# Batch, heads, length, d_head: one pair, odd numbers of pairs, several tiles.
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 6), (1, 2, 70, 34), (2, 1, 17, 128)]
each_layout = pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])


def calling(backend, **options):
    return lambda x: rotary(x, backend=backend, **options)


@each_dtype
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0, 12_345])
def test_results_and_gradients_are_as_near_to_float64_as_pytorchs(
    shape, offset, interleaved, dtype
):
    options = {"offset": offset, "interleaved": interleaved}
    leaves = [poisoned(*shape, dtype=dtype)]
    ours, theirs = (with_gradients(calling(b, **options), leaves) for b in ("triton", "reference"))
    assert_no_worse(
        ours, theirs, with_gradients(calling("reference", **options), in_float64(leaves))
    )


@each_layout
def test_backends_agree(interleaved):
    x = randn(2, 2, 9, 8)
    want = rotary(x, interleaved=interleaved, base=100.0)
    for backend in ["reference", "triton"] + ["complex"] * interleaved:
        got = rotary(x, interleaved=interleaved, base=100.0, backend=backend)
        torch.testing.assert_close(got, want)


@each_layout
def test_any_memory_order_will_do(interleaved):
    heads = randn(2, 5, 3, 8).transpose(1, 2)  # (2, 3, 5, 8), as a layer splits heads
    columns = randn(2, 3, 8, 5).mT  # (2, 3, 5, 8), a step between the entries
    for x in (heads, columns):
        ours, theirs = (
            with_gradients(calling(b, interleaved=interleaved), [x])
            for b in ("triton", "reference")
        )
        torch.testing.assert_close(ours, theirs)


def test_a_gradient_with_a_step_of_0_will_do():
    gradients = []
    for backend in ("triton", "reference"):
        x = randn(1, 2, 5, 8).requires_grad_()
        gradients += torch.autograd.grad(rotary(x, backend=backend).sum(), x)
    torch.testing.assert_close(*gradients)


@each_layout
def test_turning_back_undoes_turning(interleaved):
    x = randn(1, 2, 6, 8).requires_grad_()
    turned = rotary(x, offset=3, interleaved=interleaved, backend="triton")
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    torch.testing.assert_close(back, x.detach())


def test_the_gradient_has_a_gradient():
    x, above = randn(1, 1, 3, 4).requires_grad_(), randn(1, 1, 3, 4, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(
        rotary(x, backend="triton"), x, above, create_graph=True
    )  # fmt: skip
    (second,) = torch.autograd.grad(first, above, x.detach())
    torch.testing.assert_close(second, rotary(x, backend="reference").detach())


def test_no_tokens_no_heads_and_no_width_give_nothing():
    for shape in [(2, 2, 0, 4), (0, 2, 3, 4), (2, 0, 3, 4), (1, 1, 1, 0)]:
        assert rotary(randn(*shape), backend="triton").shape == shape


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_the_kernel_compiles_without_a_graph_break(plain, compiled, how):
    from_plain = importlib.import_module("course_lib.ops.rotary").rotary

    def call(x):
        return from_plain(x, offset=2, backend="triton") * 2

    leaves = [randn(2, 2, 5, 4)]
    want = with_gradients(call, leaves)
    torch.testing.assert_close(with_gradients(compiled(call, backend=how), leaves), want)


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendUnsupportedError, match="compute in float32"):
        rotary(randn(1, 1, 2, 4, dtype=torch.float64), backend="triton")
    with pytest.raises(BackendUnsupportedError, match="pairs that are neighbours"):
        rotary(randn(1, 1, 2, 4), interleaved=False, backend="complex")
    with pytest.raises(
        ValueError, match="one of auto, reference, complex, triton; got 'flex'"
    ):  # fmt: skip
        rotary(randn(1, 1, 2, 4), backend="flex")
