"""LayerNorm and RMSNorm."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.layers import LayerNorm, RMSNorm
from course_lib.ops.norm import layer_norm, rms_norm

each_backend = pytest.mark.parametrize("backend", ["reference", "fused", "auto"])
each_norm = pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
SHAPES = [(1,), (7,), (2, 5), (2, 3, 1), (0, 4), (2, 3, 4, 6)]


def filled(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def slow(row, weight, bias, eps, centre):
    """One row, one number at a time."""
    d = len(row)
    mean = sum(row) / d if centre else 0.0
    variance = sum((r - mean) ** 2 for r in row) / d
    return [
        (r - mean) / math.sqrt(variance + eps) * w + b
        for r, w, b in zip(row, weight, bias, strict=True)
    ]


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_both_equal_their_equations(shape, backend):
    x, d = filled(shape), shape[-1]
    weight, bias, none = filled((d,), seed=1), filled((d,), seed=2), torch.zeros(d)
    rows = x.reshape(-1, d).tolist()
    want = [slow(r, weight.tolist(), bias.tolist(), 1e-5, centre=True) for r in rows]
    got = layer_norm(x, weight, bias, backend=backend)
    torch.testing.assert_close(got, torch.tensor(want, dtype=x.dtype).reshape(shape))
    want = [slow(r, weight.tolist(), none.tolist(), 1e-3, centre=False) for r in rows]
    got = rms_norm(x, weight, eps=1e-3, backend=backend)
    torch.testing.assert_close(got, torch.tensor(want, dtype=x.dtype).reshape(shape))


@each_backend
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_gradients_are_those_of_the_function(norm, backend):
    x = filled((2, 3, 5)).requires_grad_()
    parameters = [filled((5,), seed=s).requires_grad_() for s in range(1 + (norm is layer_norm))]
    assert torch.autograd.gradcheck(lambda x, *p: norm(x, *p, backend=backend), (x, *parameters))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, backend):
    # Squares of 300 overflow float16, and bfloat16 would lose the spread beside the mean.
    x = (300 + filled((4, 64))).to(dtype)
    for norm in (layer_norm, rms_norm):
        got = norm(x, backend=backend)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), norm(x.double()), atol=0.02, rtol=0.01)


@each_backend
def test_float32_copes_with_a_mean_far_from_zero(backend):
    x = filled((8, 32)) + 1000
    got = layer_norm(x.float(), backend=backend).double()
    torch.testing.assert_close(got, layer_norm(x), atol=1e-3, rtol=1e-3)


def test_each_token_has_mean_0_and_variance_1_whatever_the_others_are():
    x = filled((2, 6, 16)) * 50 + 7
    y = LayerNorm(16).double()(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(2, 6).double())
    x[:, 1:] = 0
    assert torch.equal(LayerNorm(16).double()(x)[:, 0], y[:, 0])


def test_rms_norm_gives_a_mean_square_of_1_and_keeps_the_mean():
    y = RMSNorm(16, eps=0.0)(filled((2, 6, 16), torch.float32) + 3)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 6))
    assert (y.mean(-1) > 0.5).all()


def test_epsilon_stands_inside_the_root():
    x = torch.tensor([1.0, -1.0])
    want = torch.tensor([0.5, -0.5])  # 1 / sqrt(1 + 3), where 1 / (1 + 3) would be a quarter
    torch.testing.assert_close(layer_norm(x, eps=3.0), want)
    torch.testing.assert_close(rms_norm(x, eps=3.0), want)


@each_norm
def test_a_constant_token_gives_numbers(make):
    y = make(4)(torch.zeros(1, 2, 4))
    assert torch.equal(y, torch.zeros(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_equal_pytorchs_modules(dtype):
    x = filled((3, 5, 8), dtype)
    torch.testing.assert_close(LayerNorm(8).to(dtype)(x), nn.LayerNorm(8, dtype=dtype)(x))
    rms = RMSNorm(8, eps=None).to(dtype)
    torch.testing.assert_close(rms(x / 1e4), nn.RMSNorm(8, dtype=dtype)(x / 1e4))


def test_parameters_can_be_left_out():
    shapes = {name: tuple(p.shape) for name, p in LayerNorm(3).named_parameters()}
    assert shapes == {"weight": (3,), "bias": (3,)}
    assert [name for name, _ in LayerNorm(3, bias=False).named_parameters()] == ["weight"]
    assert [name for name, _ in RMSNorm(3).named_parameters()] == ["weight"]
    assert [*LayerNorm(3, affine=False).parameters(), *RMSNorm(3, affine=False).parameters()] == []


@each_norm
def test_under_autocast_parameters_stay_in_float32(make):
    norm, x = make(8), filled((2, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x)
    torch.testing.assert_close(got.float(), norm(x.float()), atol=0.02, rtol=0.02)


@each_norm
def test_a_restored_module_computes_the_same(make):
    norm, twin, x = make(6), make(6), torch.randn(2, 6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    twin.load_state_dict(norm.state_dict())
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    for other in (twin, copy.deepcopy(norm), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), norm(x))


def test_layer_norm_is_not_fooled_by_memory_order():
    x = filled((5, 3, 4)).transpose(0, 2)  # (4, 3, 5), the last dimension is not contiguous
    torch.testing.assert_close(LayerNorm(5).double()(x), F.layer_norm(x, (5,)))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LayerNorm(0), ValueError, "d_model must be at least 1, got 0"),
        (lambda: RMSNorm(4, eps=-1.0), ValueError, "eps must not be negative, got -1"),
        (lambda: LayerNorm(4, eps=math.nan), ValueError, "eps must not be negative, got nan"),
        (lambda: LayerNorm(4)(torch.zeros(2, 3)), ValueError, r"\(\.\.\., 4\), got \(2, 3\)"),
        (lambda: RMSNorm(4)(torch.zeros(())), ValueError, r"\(\.\.\., 4\), got \(\)"),
        (lambda: layer_norm(torch.zeros(2, dtype=torch.long)), TypeError, "got torch.int64"),
        (lambda: rms_norm([1.0, 2.0]), TypeError, "x must be a floating-point tensor, got list"),
        (lambda: rms_norm(torch.zeros(3, 0)), ValueError, r"d at least 1, got \(3, 0\)"),
        (
            lambda: layer_norm(torch.zeros(2, 3), torch.zeros(2)),
            ValueError,
            r"weight must have shape \(3,\) to fit x \(2, 3\), got \(2,\)",
        ),
        (
            lambda: layer_norm(torch.zeros(2), backend="cudnn"),
            ValueError,
            "backend must be one of auto, fused, reference, triton; got 'cudnn'",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
