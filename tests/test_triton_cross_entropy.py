"""The kernels of cross-entropy: on a GPU where there is one, else in the interpreter."""

import importlib
import math

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
from course_lib.ops.cross_entropy import cross_entropy, linear_cross_entropy

# Rows and vocabulary: one word, an odd number, a whole block, two blocks and a ragged third.
SHAPES = [(1, 1), (5, 37), (2, 4096), (3, 8200)]
each_smoothing = pytest.mark.parametrize("smoothing", [0.0, 0.1])
each_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def targets_for(rows, vocab, ignored=-100, seed=9):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (rows,), generator=generator).to(DEVICE)
    targets[1::3] = ignored
    return targets


def calling(backend, targets, **options):
    return lambda logits: cross_entropy(logits, targets, backend=backend, **options)


@each_dtype
@each_smoothing
@each_reduction
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_as_near_to_float64_as_pytorchs(
    shape, reduction, smoothing, dtype
):
    targets = targets_for(*shape)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    leaves = [3 * poisoned(*shape, dtype=dtype)]
    ours = with_gradients(calling("triton", targets, **options), leaves)
    theirs = with_gradients(calling("fused", targets, **options), leaves)
    exact = with_gradients(calling("reference", targets, **options), in_float64(leaves))
    assert_no_worse(ours, theirs, exact)


@each_dtype
def test_edges_and_steps_in_memory_are_kept(dtype):
    """Rows with a gap between them, every second target: nothing else is read or written."""
    logits = poisoned(5, 37, dtype=dtype)
    targets = targets_for(10, 37)[::2]
    ours, theirs = (with_gradients(calling(b, targets), [logits]) for b in ("triton", "fused"))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    flipped = logits.T.contiguous().T  # a step between neighbours
    assert torch.equal(with_gradients(calling("triton", targets), [flipped])[1], ours[1])


def test_a_row_that_does_not_count_is_not_read():
    logits, targets = randn(4, 9), targets_for(4, 9)
    logits[1] = math.nan
    loss, gradient = with_gradients(calling("triton", targets), [logits])
    keep = targets >= 0
    want, theirs = with_gradients(calling("fused", targets[keep]), [logits[keep]])
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient[keep], theirs)
    assert torch.equal(gradient[1].cpu(), torch.zeros(9))


def test_where_no_target_counts_the_mean_is_nan_and_the_gradient_0():
    targets = torch.full((3,), -100, device=DEVICE)
    loss, gradient = with_gradients(calling("triton", targets), [randn(3, 5)])
    assert loss.isnan()
    assert torch.equal(gradient.cpu(), torch.zeros(3, 5))


def test_the_ignored_index_may_be_a_word():
    targets = targets_for(6, 9, ignored=0)
    ours, theirs = (
        with_gradients(calling(b, targets, ignore_index=0), [randn(6, 9)])
        for b in ("triton", "fused")
    )
    torch.testing.assert_close(ours, theirs)


def test_large_logits_do_not_overflow_and_impossible_words_have_probability_0():
    logits = randn(3, 5000) * 1e4
    logits[:, ::7] = -math.inf  # the whole first element of each block among them
    logits[0, :4500] = -math.inf  # a first block with nothing in it
    targets = torch.tensor([4901, 1, 2], device=DEVICE)
    ours, theirs = (
        with_gradients(calling(b, targets, reduction="none"), [logits])
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs)


def test_the_logits_are_left_as_they_are():
    logits = randn(3, 7).requires_grad_()
    before = logits.detach().clone()
    cross_entropy(logits, targets_for(3, 7), backend="triton").backward()
    assert torch.equal(logits, before)


def test_a_target_outside_the_vocabulary_gives_nan():
    """A GPU cannot be asked without waiting for it; the kernel itself must not read there."""
    from course_lib.ops.cross_entropy.triton_cross_entropy import row_losses

    logits = poisoned(3, 7).requires_grad_()
    loss = row_losses(logits, torch.tensor([7, 2, -1], device=DEVICE), -100, 0.0)
    assert loss.isnan().tolist() == [True, False, True]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isnan().all(1).tolist() == [True, False, True]


@each_dtype
@each_smoothing
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_linear_layers_loss_equals_pytorchs_two_steps(chunk, smoothing, dtype):
    targets = targets_for(10, 37)
    leaves = randn(10, 6, dtype=dtype), randn(37, 6, seed=1, dtype=dtype), randn(37, dtype=dtype)

    def two_steps(hidden, weight, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return cross_entropy(logits, targets, label_smoothing=smoothing, backend="fused")

    def at_once(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, targets, bias=bias, chunk=chunk, label_smoothing=smoothing,
            backend="triton",
        )  # fmt: skip

    ours, theirs = with_gradients(at_once, leaves), with_gradients(two_steps, leaves)
    assert_no_worse(ours, theirs, with_gradients(two_steps, in_float64(leaves)))


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_the_kernels_compile_without_a_graph_break(plain, compiled, how):
    from_plain = importlib.import_module("course_lib.ops.cross_entropy")
    targets = targets_for(4, 9)

    def call(logits, hidden, weight):
        one = from_plain.cross_entropy(logits, targets, backend="triton")
        return one + from_plain.linear_cross_entropy(hidden, weight, targets, backend="reference")

    leaves = randn(4, 9), randn(4, 3, seed=1), randn(9, 3, seed=2)
    want = with_gradients(call, leaves)
    torch.testing.assert_close(with_gradients(compiled(call, backend=how), leaves), want)


def test_float64_is_refused_by_name():
    x = randn(2, 3, dtype=torch.float64)
    with pytest.raises(BackendUnsupportedError, match="compute in float32"):
        cross_entropy(x, targets_for(2, 3), backend="triton")
    with pytest.raises(BackendUnsupportedError, match="compute in float32"):
        linear_cross_entropy(x, x, targets_for(2, 2), backend="triton")
