"""MultiHeadAttention and its cache; schemes of position have their own file."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from course_lib import layers, masks
from course_lib.layers import KVCache, MultiHeadAttention


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(*args, **options) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(*args, **options).double()


def one_head(mha, x, context, head, visible):
    """softmax(x W_Q (c W_K)ᵀ / √d_head) c W_V of one head, row by row; an empty row gives 0."""
    d = mha.d_head
    own = slice(head * d, (head + 1) * d)
    group = head // (mha.num_heads // mha.num_kv_heads)
    shared = slice(group * d, (group + 1) * d)

    def project(tokens, linear, rows):
        bias = 0 if linear.bias is None else linear.bias[rows]
        return tokens @ linear.weight[rows].T + bias

    q = project(x, mha.q_proj, own)
    k, v = project(context, mha.k_proj, shared), project(context, mha.v_proj, shared)
    output = torch.zeros(len(x), d, dtype=x.dtype)
    for i in range(len(x)):
        seen = visible[i].nonzero()[:, 0]
        if len(seen):
            output[i] = (q[i] @ k[seen].T / math.sqrt(d)).softmax(-1) @ v[seen]
    return output


def concatenated(mha, x, context, visible):
    """Concat(head_1, …, head_h) W_O; visible: (batch, n_q, n_k)."""
    rows = []
    for x_b, context_b, visible_b in zip(x, context, visible, strict=True):
        heads = [one_head(mha, x_b, context_b, h, visible_b) for h in range(mha.num_heads)]
        rows.append(torch.cat(heads, dim=-1))
    return mha.out_proj(torch.stack(rows))


def all_pairs(batch, n_q, n_k):
    return torch.ones(batch, n_q, n_k, dtype=torch.bool)


# --- the equation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d_model", "heads", "kv_heads"), [(12, 4, 4), (12, 4, 2), (12, 4, 1), (5, 5, 1), (7, 1, 1)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_all_heads_at_once_equal_one_head_after_the_other(d_model, heads, kv_heads, bias):
    mha, x = make(d_model, heads, num_kv_heads=kv_heads, bias=bias), randn(2, 7, d_model)
    torch.testing.assert_close(mha(x), concatenated(mha, x, x, all_pairs(2, 7, 7)))
    causal = all_pairs(2, 7, 7).tril()
    torch.testing.assert_close(mha(x, mask=masks.causal()), concatenated(mha, x, x, causal))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cross_attention_takes_a_context_of_another_length_and_width(kv_heads):
    mha = make(8, 4, num_kv_heads=kv_heads, d_context=5)
    x, context = randn(2, 3, 8), randn(2, 6, 5, seed=1)
    got = mha(x, context)
    torch.testing.assert_close(got, concatenated(mha, x, context, all_pairs(2, 3, 6)))


def test_padding_on_both_sides_of_cross_attention():
    mha, x, context = make(8, 2), randn(2, 4, 8), randn(2, 5, 8, seed=1)
    queries = torch.arange(4) < torch.tensor([[4], [2]])  # (batch, n_q)
    keys = torch.arange(5) < torch.tensor([[3], [5]])
    visible = queries[:, :, None] & keys[:, None, :]
    want = concatenated(mha, x, context, visible)
    torch.testing.assert_close(mha(x, context, mask=visible[:, None]), want)
    broken = context.clone()
    broken[0, 3:] = math.nan
    torch.testing.assert_close(mha(x, broken, mask=visible[:, None]), want)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_a_query_that_sees_nothing_gets_the_bias_of_the_last_projection(backend):
    mha, x = make(8, 2, backend=backend), randn(2, 3, 8).requires_grad_()
    output = mha(x, mask=masks.padding([0, 3]))
    assert torch.equal(output[0], mha.out_proj.bias.expand(3, 8))
    output.sum().backward()
    assert not x.grad[0].any()
    assert all(p.grad.isfinite().all() for p in mha.parameters())


def test_a_mask_and_the_matrix_it_stands_for_give_the_same():
    mha, x = make(8, 2), randn(2, 5, 8)
    mask = masks.causal() & masks.padding([3, 5])
    torch.testing.assert_close(mha(x, mask=mask), mha(x, mask=mask.dense(5, 5)))


def test_a_later_token_cannot_change_an_earlier_output():
    mha, x = make(8, 2), randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = (mha(t, mask=masks.causal()) for t in (x, changed))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_a_bias_is_added_to_the_scores_and_gets_a_gradient():
    mha, x, bias = make(8, 2), randn(2, 5, 8), randn(2, 5, 5, seed=1).requires_grad_()
    _, plain = mha(x, return_weights=True)
    _, moved = mha(x, bias=bias, return_weights=True)
    torch.testing.assert_close(moved, (plain.log() + bias).softmax(-1))
    moved.square().sum().backward()
    assert bias.grad.any()


def test_a_bias_joins_that_of_a_position_scheme():
    x, bias = randn(1, 5, 8), randn(1, 2, 5, 5, seed=1)
    alibi = layers.AlibiBias(2)
    both = make(8, 2, position=alibi)(x, bias=bias)
    torch.testing.assert_close(both, make(8, 2)(x, bias=bias + alibi(5, 5, torch.float64)))


def test_weights_have_one_row_per_head_and_query_and_come_with_the_same_output():
    mha, x, context = make(8, 4, num_kv_heads=2), randn(2, 3, 8), randn(2, 6, 8, seed=1)
    output, weights = mha(x, context, mask=masks.padding([4, 6]), return_weights=True)
    assert weights.shape == (2, 4, 3, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3).double())
    assert not weights[0, ..., 4:].any()
    torch.testing.assert_close(mha(x, context, mask=masks.padding([4, 6])), output)


# --- grouped queries -----------------------------------------------------------------------------


def test_grouped_queries_equal_full_heads_with_repeated_key_and_value_matrices():
    grouped, full, x = make(12, 6, num_kv_heads=2), make(12, 6), randn(2, 5, 12)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        by_head = state[name].unflatten(0, (2, 2))
        state[name] = by_head.repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(x), full(x))


@pytest.mark.parametrize("position", [None, layers.TransformerXLPosition(12, 6).double()])
def test_keys_and_values_are_not_repeated_for_the_heads_of_a_group(position, monkeypatch):
    shapes = []
    real = layers.multi_head_attention.attention

    def spy(query, key, value, *args, **options):
        shapes.append((query.shape[1], key.shape[1], value.shape[1]))
        return real(query, key, value, *args, **options)

    monkeypatch.setattr(layers.multi_head_attention, "attention", spy)
    repeat = torch.Tensor.repeat_interleave

    def refuse_heads(self, *args, **options):
        assert self.ndim < 4, "keys or values were repeated in memory"
        return repeat(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "repeat_interleave", refuse_heads)
    cache = KVCache()
    make(12, 6, num_kv_heads=2, position=position, backend="sdpa")(randn(1, 4, 12), cache=cache)
    assert shapes == [(6, 2, 2)]
    assert cache.key.shape == cache.value.shape == (1, 2, 4, 2)


# --- dropout -------------------------------------------------------------------------------------


def test_dropout_acts_in_training_mode_only_and_repeats_with_the_seed():
    mha, x = make(8, 2, dropout=0.5), randn(2, 6, 8)
    torch.manual_seed(5)
    first, second = mha(x), mha(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(mha(x), first)
    mha.eval()
    plain, state = make(8, 2)(x), torch.random.get_rng_state()
    torch.testing.assert_close(mha(x), plain)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_keeps_the_mean():
    mha, x = make(8, 2, dropout=0.3), randn(1, 6, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = mha(x.expand(4000, 6, 8)).mean(0)
        torch.testing.assert_close(mean, mha.eval()(x)[0], atol=0.02, rtol=0)


# --- the cache -----------------------------------------------------------------------------------


def test_a_cached_context_is_projected_once():
    mha, x, context = make(8, 2), randn(1, 4, 8), randn(1, 5, 8, seed=1)
    cache, calls = KVCache(), []
    mha.k_proj.register_forward_hook(lambda *_: calls.append("k"))
    steps = [mha(token, context, cache=cache) for token in x.split(1, dim=1)]
    assert calls == ["k"]
    torch.testing.assert_close(torch.cat(steps, dim=1), mha(x, context))


def test_a_cache_is_as_large_as_its_keys_and_values():
    mha, cache = make(16, 8, num_kv_heads=2), KVCache()
    assert len(cache) == 0
    mha(randn(3, 5, 16), cache=cache)
    assert len(cache) == 5
    assert cache.key.numel() == cache.value.numel() == 3 * 5 * 16 * 2 // 8


def test_padded_prompts_are_decoded_like_full_passes():
    mha, x, cache = make(8, 2), randn(2, 6, 8), KVCache()
    visible = masks.from_dense((torch.arange(6) >= torch.tensor([[2], [0]]))[:, None, None])
    mask = masks.causal() & visible
    want = mha(x, mask=mask)
    prompt = masks.causal() & masks.from_dense(visible.dense(6, 6)[..., :1, :4])
    parts = [mha(x[:, :4], mask=prompt, cache=cache)]
    for n in (5, 6):
        seen = masks.from_dense(visible.dense(6, 6)[..., :1, :n])
        parts.append(mha(x[:, n - 1 : n], mask=seen, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), want)


def test_a_refused_call_leaves_the_cache_as_it_was():
    mha, x, cache = make(8, 2), randn(1, 3, 8), KVCache()
    with pytest.raises(ValueError, match="bias has shape"):
        mha(x, bias=torch.zeros(7, 7), cache=cache)
    assert len(cache) == 0
    mha(x, cache=cache)
    with pytest.raises(ValueError, match="cache holds a batch of 1, but x is a batch of 2"):
        mha(randn(2, 1, 8), cache=cache)
    assert len(cache) == 3


# --- as a module ---------------------------------------------------------------------------------


def test_gradients_are_those_of_the_function():
    mha, x = make(4, 2, num_kv_heads=1), randn(1, 3, 4).requires_grad_()
    parameters = dict(mha.named_parameters())

    def call(x, *values):
        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(mha, state, (x,), {"mask": masks.causal()})

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


def test_a_copied_saved_or_restored_module_computes_the_same():
    mha, x = make(8, 2, num_kv_heads=1, position=layers.RelativePositionBias(2)), randn(1, 4, 8)
    torch.nn.init.normal_(mha.position.weight)
    torch.manual_seed(1)
    twin = MultiHeadAttention(8, 2, num_kv_heads=1, position=layers.RelativePositionBias(2))
    twin = twin.double()
    assert not torch.equal(twin(x), mha(x))
    twin.load_state_dict(mha.state_dict())
    file = io.BytesIO()
    torch.save(mha, file)
    file.seek(0)
    for other in (twin, copy.deepcopy(mha), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), mha(x))


def test_parameters_are_four_projections_and_bias_can_be_left_out():
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    with_bias = [name for name, _ in make(8, 2).named_parameters()]
    assert with_bias == [f"{n}.{p}" for n in names for p in ("weight", "bias")]
    without = [name for name, _ in make(8, 2, bias=False).named_parameters()]
    assert without == [f"{n}.weight" for n in names]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_stays_near_float64(dtype):
    mha, x = make(16, 4), randn(2, 9, 16)
    got = copy.deepcopy(mha).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), mha(x), atol=tolerance, rtol=tolerance)


def test_autocast_computes_in_bfloat16():
    mha, x = make(16, 4).float(), randn(2, 9, 16).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = mha(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), mha(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_an_empty_batch_or_sequence_comes_back_empty(batch, length):
    assert make(8, 2)(randn(batch, length, 8)).shape == (batch, length, 8)


def test_the_input_is_not_changed_in_place():
    x = randn(2, 5, 8)
    before = x.clone()
    make(8, 2, position=layers.RotaryPositionalEncoding(4))(x, mask=masks.padding([2, 5]))
    assert torch.equal(x, before)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "d_model must be a positive multiple of num_heads, got d_m"),
        ({"num_heads": 0}, ValueError, "multiple of num_heads, got d_model=8 and num_heads=0"),
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got num_"),
        ({"num_kv_heads": 0}, ValueError, "num_heads=4 and num_kv_heads=0"),
        ({"d_context": 0}, ValueError, "d_context must be at least 1, got 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"position": "rotary"}, TypeError, "position must be a layers.Position, got str"),
        ({"position": nn.Identity()}, TypeError, "position must be a layers.Position, got Identit"),
    ],
)
def test_impossible_sizes_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention(**({"d_model": 8, "num_heads": 4} | options))


X = torch.zeros(2, 3, 8)


def filled_cache(length):
    cache = KVCache()
    MultiHeadAttention(8, 2)(torch.zeros(2, length, 8), cache=cache)
    return cache


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("made", "given", "error", "message"),
    [
        ({}, {"x": X[0]}, ValueError, r"x must be \(batch, length, 8\), got \(3, 8\)"),
        ({}, {"x": X[..., :5]}, ValueError, r"x must be \(batch, length, 8\), got \(2, 3, 5\)"),
        ({}, {"x": X.long()}, TypeError, "x must be floating point, got torch.int64"),
        ({}, {"x": X.tolist()}, TypeError, "x must be a torch.Tensor, got list"),
        ({}, {"context": X[..., :5]}, ValueError, r"context must be \(batch, length, 8\), got \(2"),
        ({}, {"context": X[:1]}, ValueError, r"same batch size, got \(2, 3, 8\) and \(1, 3, 8\)"),
        ({"d_context": 5}, {}, ValueError, "context must be given: .* d_context=5"),
        ({}, {"mask": torch.ones(2, 3, 3).bool()}, ValueError, "mask must have shape"),
        ({}, {"mask": torch.ones(3, 3)}, TypeError, "mask must be bool"),
        ({}, {"mask": masks.padding([1])}, ValueError, "made for batch size 1"),
        ({}, {"bias": torch.zeros(4, 4)}, ValueError, "bias has shape"),
        (
            {"position": layers.AlibiBias(2)},
            {"bias": torch.zeros(4, 4)},
            ValueError,
            r"bias has shape \(4, 4\), .* position, \(1, 2, 3, 3\)",
        ),
        ({"backend": "magic"}, {}, ValueError, "backend must be one of"),
        ({}, {"context": X, "cache": filled_cache(5)}, ValueError, "holds a context of length 5"),
        (
            {"position": layers.AlibiBias(2)},
            {"context": X, "cache": KVCache()},
            ValueError,
            "cache cannot serve a context together with position",
        ),
    ],
)
def test_bad_input_is_refused_by_name(made, given, error, message):
    mha = MultiHeadAttention(8, 2, **made)
    with pytest.raises(error, match=message):
        mha(**({"x": X} | given))
