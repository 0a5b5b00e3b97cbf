"""Cross-entropy, and the loss of a linear layer that never holds all its logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from largest import Largest

from course_lib.ops.cross_entropy import cross_entropy, linear_cross_entropy

each_backend = pytest.mark.parametrize("backend", ["reference", "fused", "auto"])
each_smoothing = pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
each_reduction = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def targets_for(*shape, vocab, seed=0):
    """Words, every third of them not counted."""
    targets = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))
    targets.view(-1)[1::3] = -100
    return targets


def problem(tokens=11, d=5, vocab=7, dtype=torch.float64):
    leaves = randn(tokens, d, dtype=dtype), randn(vocab, d, seed=1, dtype=dtype), randn(vocab)
    return [x.to(dtype).requires_grad_() for x in leaves], targets_for(tokens, vocab=vocab)


def two_steps(hidden, weight, bias, targets, **options):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, **options)


# --- from logits ----------------------------------------------------------------------------------


@each_backend
def test_it_is_minus_the_log_of_the_targets_probability(backend):
    logits = torch.tensor([[0.0, math.log(3.0)]])
    for word, probability in enumerate((0.25, 0.75)):
        got = cross_entropy(logits, torch.tensor([word]), backend=backend)
        assert got.item() == pytest.approx(-math.log(probability))


@each_backend
@each_smoothing
@each_reduction
def test_values_and_gradients_equal_pytorchs(reduction, smoothing, backend):
    logits, targets = randn(6, 9).requires_grad_(), targets_for(6, vocab=9)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    got = cross_entropy(logits, targets, backend=backend, **options)
    want = F.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(got, want)
    above = randn(*want.shape, seed=3)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, above) for x in (got, want)))


@each_backend
def test_gradients_are_those_of_the_function(backend):
    targets = targets_for(4, vocab=5)

    def loss(logits):
        return cross_entropy(logits, targets, label_smoothing=0.2, backend=backend)

    assert torch.autograd.gradcheck(loss, randn(4, 5).requires_grad_())


@each_backend
@each_reduction
def test_any_number_of_dimensions_may_stand_before_the_vocabulary(reduction, backend):
    logits, targets = randn(2, 3, 4, 5), targets_for(2, 3, 4, vocab=5)
    got = cross_entropy(logits, targets, reduction=reduction, backend=backend)
    want = F.cross_entropy(logits.movedim(-1, 1), targets, reduction=reduction)
    torch.testing.assert_close(got, want)
    one = cross_entropy(logits[0, 0, 0], targets[0, 0, 0], backend=backend)
    torch.testing.assert_close(one, F.cross_entropy(logits[0, 0, 0], targets[0, 0, 0]))


@each_backend
def test_ignored_targets_count_neither_in_the_mean_nor_in_the_gradient(backend):
    logits, targets = randn(6, 4).requires_grad_(), targets_for(6, vocab=4)
    got = cross_entropy(logits, targets, backend=backend)
    keep = targets >= 0
    torch.testing.assert_close(got, F.cross_entropy(logits[keep], targets[keep]))
    (gradient,) = torch.autograd.grad(got, logits)
    assert (gradient[~keep] == 0).all()
    padding = targets.clone()
    padding[~keep] = 0  # a word as the index that is ignored
    got = cross_entropy(logits, padding, ignore_index=0, backend=backend)
    torch.testing.assert_close(got, F.cross_entropy(logits, padding, ignore_index=0))


@each_backend
def test_where_no_target_counts_the_mean_is_nan(backend):
    targets = torch.full((3,), -100)
    assert cross_entropy(randn(3, 5), targets, backend=backend).isnan()
    assert cross_entropy(randn(3, 5), targets, reduction="sum", backend=backend) == 0


@each_backend
def test_logits_may_be_large_and_words_impossible(backend):
    logits = torch.tensor([[1e4, -1e4, -math.inf], [-1e4, 0.0, 1e4]]).double()
    got = cross_entropy(logits, torch.tensor([1, 2]), reduction="none", backend=backend)
    torch.testing.assert_close(got, torch.tensor([2e4, 0.0]).double())
    assert cross_entropy(logits[:1], torch.tensor([2]), backend=backend) == math.inf


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_under_autocast_gives_float32(dtype, backend):
    logits, targets = randn(8, 50, dtype=dtype), targets_for(8, vocab=50)
    want = F.cross_entropy(logits.double(), targets).item()
    got = cross_entropy(logits, targets, backend=backend)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(want, rel=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        got = cross_entropy(logits, targets, backend=backend)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_may_be_any_integers(dtype):
    logits, targets = randn(4, 5), torch.tensor([0, 4, 2, 2])
    want = cross_entropy(logits, targets)
    torch.testing.assert_close(cross_entropy(logits, targets.to(dtype)), want)
    got = linear_cross_entropy(logits, torch.eye(5).double(), targets.to(dtype))
    torch.testing.assert_close(got, want)


def test_vmap_over_batches_equals_a_loop():
    logits, targets = randn(3, 4, 5), targets_for(3, 4, vocab=5)
    want = torch.stack([cross_entropy(x, t) for x, t in zip(logits, targets, strict=True)])
    torch.testing.assert_close(torch.func.vmap(cross_entropy)(logits, targets), want)


# --- from hidden states ---------------------------------------------------------------------------


@each_smoothing
@each_reduction
@pytest.mark.parametrize("chunk", [1, 4, 11, 1000])
def test_the_linear_loss_equals_two_steps_in_float64(chunk, reduction, smoothing):
    leaves, targets = problem()
    options = {"label_smoothing": smoothing, "reduction": reduction}
    *parts, bias = leaves
    got = linear_cross_entropy(*parts, targets, bias=bias, chunk=chunk, **options)
    want = two_steps(*leaves, targets, **options)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    above = randn(*want.shape, seed=3)
    ours, theirs = (torch.autograd.grad(x, leaves, above) for x in (got, want))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_the_linear_losss_gradients_are_those_of_the_function():
    (hidden, weight, bias), targets = problem(5, 3, 4)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=2)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_only_the_gradients_that_are_wanted_are_made():
    (hidden, weight, bias), targets = problem()
    want = torch.autograd.grad(two_steps(hidden, weight, bias, targets), [hidden, weight, bias])
    for i, leaf in enumerate((hidden, weight, bias)):
        given = [x if x is leaf else x.detach() for x in (hidden, weight, bias)]
        loss = linear_cross_entropy(*given[:2], targets, bias=given[2], chunk=4)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], want[i])


def test_leading_dimensions_and_no_tokens_at_all():
    (hidden, weight, _), targets = problem(12)
    batched, words = hidden.view(3, 4, 5), targets.view(3, 4)  # (12, d) -> (3, 4, d)
    got = linear_cross_entropy(batched, weight, words, reduction="none", chunk=5)
    want = two_steps(hidden, weight, None, targets, reduction="none").view(3, 4)
    torch.testing.assert_close(got, want)
    nothing = linear_cross_entropy(hidden[:0], weight, targets[:0], reduction="sum")
    assert nothing == 0
    assert torch.equal(torch.autograd.grad(nothing, weight)[0], torch.zeros_like(weight))


def test_the_weights_gradient_is_summed_in_float32():
    """A thousand equal parts: bfloat16 would stop growing at 256 of them."""
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(1000, dtype=torch.long)
    linear_cross_entropy(hidden, weight, targets, chunk=1, reduction="sum").backward()
    assert weight.grad.flatten().tolist() == [-500, 500]


def test_under_autocast_the_linear_loss_works_as_two_steps_do():
    leaves, targets = problem(64, 16, 50, torch.float32)
    *parts, bias = leaves
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(*parts, targets, bias=bias, chunk=10)
        want = two_steps(*leaves, targets)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    ours, theirs = torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)


def test_no_tensor_is_as_large_as_all_logits():
    tokens, d, vocab, chunk = 512, 4, 1000, 8
    leaves, targets = problem(tokens, d, vocab, torch.float32)
    *parts, bias = leaves
    with Largest() as ours:
        linear_cross_entropy(*parts, targets, bias=bias, chunk=chunk).backward()
    with Largest() as theirs:
        two_steps(*leaves, targets).backward()
    assert theirs.numbers == tokens * vocab
    assert ours.numbers == max(chunk * vocab, tokens * d, vocab * d)


def test_what_waits_for_the_backward_pass_is_small():
    leaves, targets = problem(64, 4, 100, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        linear_cross_entropy(*leaves[:2], targets, chunk=8, reduction="sum")
    assert sum(kept) <= 64 * 4 + 100 * 4 + 64 + 64  # hidden, weight, targets, log-sum-exp


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("biased", [True, False])
def test_the_linear_loss_can_be_differentiated_twice_and_by_torch_func(biased):
    (hidden, weight, bias), targets = problem(5, 3, 4)
    leaves = [hidden, weight, bias][: 2 + biased]

    def loss(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=2)

    assert torch.autograd.gradgradcheck(loss, leaves)
    got = torch.func.grad(loss)(*(x.detach() for x in leaves))
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), hidden)[0])


# --- arguments ------------------------------------------------------------------------------------

X, T = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cross_entropy([1.0], T), TypeError, "logits must be a floating-point tensor"),
        (lambda: cross_entropy(X, X), TypeError, "targets must be a tensor of integers, got torch"),
        (lambda: cross_entropy(X, T.bool()), TypeError, "targets must be a tensor of integers"),
        (lambda: cross_entropy(X, T[:1]), ValueError, r"got \(2, 3\) and \(1,\)"),
        (lambda: cross_entropy(X, T + 3), ValueError, r"from 0 to 2 or ignore_index.*got 3"),
        (lambda: cross_entropy(X, T - 1), ValueError, "got -1"),
        (lambda: cross_entropy(X, T.to("meta")), ValueError, "targets is on meta but logits is on"),
        (lambda: cross_entropy(X, T, reduction="max"), ValueError, "one of none, mean, sum; got"),
        (lambda: cross_entropy(X, T, label_smoothing=2), ValueError, "from 0 to 1, got 2"),
        (lambda: cross_entropy(X, T, ignore_index=0.5), TypeError, "ignore_index must be an int"),
        (
            lambda: cross_entropy(X, T, backend="flex"),
            ValueError,
            "one of auto, fused, reference, triton; got 'flex'",
        ),
        (lambda: linear_cross_entropy(X, X.mT, T), ValueError, r"weight must be \(vocab, 3\)"),
        (lambda: linear_cross_entropy(X, X, T, bias=X[0]), ValueError, r"bias must be \(2,\)"),
        (lambda: linear_cross_entropy(X, X.double(), T), TypeError, "they must agree"),
        (lambda: linear_cross_entropy(X, X.to("meta"), T), ValueError, "weight is on meta"),
        (lambda: linear_cross_entropy(X, X, T + 2), ValueError, "from 0 to 1"),
        (lambda: linear_cross_entropy(X, X, T, chunk=0), ValueError, "at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
