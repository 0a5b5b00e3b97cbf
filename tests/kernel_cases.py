"""What the tests of the small Triton kernels share: hostile memory, and how far off is allowed."""

import math

import pytest
import torch

from course_lib.ops import triton_runtime

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := triton_runtime.why_not(DEVICE):
    pytest.skip(reason, allow_module_level=True)

SPARE = 3
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def nothing_comes_zeroed(monkeypatch):
    """New memory holds NaN: whatever a kernel forgets to write shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def poisoned(*shape, seed=0, dtype=torch.float32):
    """Random numbers inside a larger tensor of NaN: whoever reads beyond an edge gets one.

    The last two dimensions are cut out, so that no row begins where the one before it ends.
    """
    *outer, n, d = shape
    whole = torch.full((*outer, n + 2 * SPARE, d + 2 * SPARE), math.nan, dtype=dtype, device=DEVICE)
    inner = whole[..., SPARE : n + SPARE, SPARE : d + SPARE]
    inner.copy_(randn(*shape, seed=seed, dtype=dtype))
    return inner


def with_gradients(call, leaves, upstream=5):
    """Every result of call(*leaves) and every gradient, the gradients from random ones above."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    given = [x for x in leaves if x is not None]
    above = [randn(*r.shape, seed=upstream + i, dtype=r.dtype) for i, r in enumerate(results)]
    return [r.detach() for r in results] + list(torch.autograd.grad(results, given, above))


def in_float64(leaves):
    return [None if x is None else x.detach().double() for x in leaves]


def assert_no_worse(ours, theirs, exact):
    """Against float64, ours may be twice as far off as PyTorch's, and one rounding more."""
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        rounding = torch.finfo(mine.dtype).eps * true.abs().max().item()
        allowed = 2 * (other.double() - true).abs().max().item() + rounding
        assert (mine.double() - true).abs().max().item() <= allowed
