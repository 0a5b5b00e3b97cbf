"""LinformerAttention: full attention where nothing is mixed, n · k elsewhere, and never causal."""

import math

import pytest
import torch
from largest import Largest

from course_lib import layers, leaks, masks
from course_lib.layers import LinformerAttention, MultiHeadAttention

N = 12
each_share = pytest.mark.parametrize("share", ["none", "heads", "kv"])


def make(max_length=N, k=4, share="heads", **options):
    torch.manual_seed(0)
    return LinformerAttention(8, 4, max_length=max_length, k=k, share=share, **options).double()


def full(layer, **options):
    """Multi-head attention with the same projections."""
    mha = MultiHeadAttention(8, 4, **options).double()
    mha.load_state_dict(layer.state_dict(), strict=False)
    return mha


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def set_to_identity(layer):
    with torch.no_grad():
        for matrix in (layer.e, layer.f):
            matrix.copy_(torch.eye(*matrix.shape[-2:]))


# --- the equation ---------------------------------------------------------------------------------


@each_share
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_identity_projections_of_full_size_are_full_attention(kv_heads, share):
    layer = make(k=N, share=share, num_kv_heads=kv_heads)
    set_to_identity(layer)
    x, context = randn(2, N, 8), randn(2, N, 8, seed=1)
    mha = full(layer, num_kv_heads=kv_heads)
    same(layer(x), mha(x))
    same(layer(x, context), mha(x, context))
    for got, want in zip(layer(x, return_weights=True), mha(x, return_weights=True), strict=True):
        same(got, want)


@each_share
@pytest.mark.parametrize("n", [N, 7, 1])
def test_each_head_attends_to_k_mixtures_of_keys_and_values(n, share):
    layer, x = make(share=share), randn(2, n, 8)
    output, weights = layer(x, return_weights=True)
    q, k, v = (p(x).unflatten(-1, (4, 2)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = []
    for h in range(4):
        e, f = (m[h] if share == "none" else m for m in (layer.e, layer.f))
        mixed_k, mixed_v = e[:, :n] @ k[:, :, h], f[:, :n] @ v[:, :, h]  # (batch, k, d_head)
        w = (q[:, :, h] @ mixed_k.mT / math.sqrt(2)).softmax(-1)
        same(weights[:, h], w)
        heads.append(w @ mixed_v)
    same(output, layer.out_proj(torch.cat(heads, -1)))


def test_sharing_decides_how_many_matrices_there_are():
    extra = {share: len(list(make(share=share).parameters())) - 8 for share in ("heads", "kv")}
    assert extra == {"heads": 2, "kv": 1}
    layer = make(share="kv")
    assert layer.e is layer.f
    assert make(share="none", num_kv_heads=2).e.shape == (2, 4, N)


def test_mixtures_vary_as_much_as_tokens_at_the_start():
    torch.manual_seed(0)
    layer = LinformerAttention(8, 4, max_length=1000, k=64)
    mixtures = layer.e @ torch.randn(1000, 50, generator=torch.Generator().manual_seed(0))
    assert mixtures.std().item() == pytest.approx(1, abs=0.1)


# --- padding --------------------------------------------------------------------------------------


@each_share
def test_padding_is_as_if_the_rest_were_not_there(share):
    layer, x = make(share=share), randn(3, N, 8)
    x[1, 7:], x[2] = math.nan, 1.0
    output = layer(x, mask=masks.padding([N, 7, 0]))
    same(output[0], layer(x[:1])[0])
    same(output[1, :7], layer(x[1:2, :7])[0])
    same(output[2], layer.out_proj.bias.expand(N, 8))  # mixtures of nothing are 0


def test_every_output_depends_on_every_key():
    layer, x = make(), randn(1, 5, 8)
    future = {(t, s) for t in range(5) for s in range(t + 1, 5)}
    assert {(leak.output, leak.input) for leak in leaks.find_leaks(layer, x)} == future


# --- cost and training ----------------------------------------------------------------------------


def test_no_tensor_is_larger_than_the_weights_of_n_tokens_for_k_mixtures():
    n, k = 2048, 16
    layer = make(max_length=n, k=k)
    with Largest() as seen:
        output = layer(randn(1, n, 8), return_weights=True)[0]
        output.sum().backward()
    assert seen.numbers <= 4 * n * k  # heads · n · k


@each_share
def test_gradients_reach_every_parameter_and_dropout_acts_in_training(share):
    layer, x = make(share=share, dropout=0.5), randn(2, 7, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert (layer.e.grad[..., 7:] == 0).all()  # columns that no key used


@pytest.mark.parametrize("position", [layers.RotaryPositionalEncoding(2),
                                      layers.SinusoidalPositionalEncoding(8)])  # fmt: skip
def test_positions_are_seen(position):
    layer, x = make(position=position), randn(1, 6, 8)
    assert not torch.allclose(layer(x), make()(x))


def test_it_compiles_and_runs_under_autocast(plain, compiled):
    torch.manual_seed(0)
    layer = plain.layers.LinformerAttention(8, 4, max_length=N, k=4)
    x, mask = torch.randn(2, N, 8), plain.masks.padding([N, 5])
    want = layer(x, mask=mask)
    torch.testing.assert_close(compiled(layer, backend="eager")(x, mask=mask), want)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, mask=mask)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=3e-2)


# --- what it cannot do ----------------------------------------------------------------------------

X = torch.zeros(2, N, 8, dtype=torch.float64)
REFUSED = [
    (lambda: make()(X, mask=masks.causal()), ValueError, r"causal\(\) cannot be served.*future"),
    (lambda: make()(X, mask=masks.causal() & masks.padding([1, 2])), ValueError, "the future"),
    (lambda: make()(X, mask=masks.longformer(2)), ValueError, "longformer.*holds all positions"),
    (lambda: make()(X, mask=torch.ones(N, N).bool()), ValueError, r"mask of shape \(12, 12\)"),
    (lambda: make()(X, mask=masks.padding([1])), ValueError, "batch size 1.*batch size 2"),
    (lambda: make()(X, bias=torch.zeros(N, N)), ValueError, "bias cannot be served"),
    (lambda: make()(X, cache=layers.KVCache()), ValueError, "Linformer cannot serve a cache"),
    (lambda: make().new_cache(), ValueError, "Linformer cannot serve a cache"),
    (lambda: make()(randn(1, N + 1, 8)), ValueError, "there are 13 keys, but max_length=12"),
    (lambda: make(k=N + 1), ValueError, "k must be at most max_length.*k=13 and max_length=12"),
    (lambda: make(k=0), ValueError, "k must be at least 1, got 0"),
    (lambda: make(max_length=None), TypeError, "max_length must be an int, got None"),
    (lambda: make(share="layers"), ValueError, "share must be one of none, heads, kv"),
    (lambda: make(position=layers.AlibiBias(4)), ValueError, "AlibiBias adds to the scores"),
]  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m[:30] for *_, m in REFUSED])
def test_what_cannot_be_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
