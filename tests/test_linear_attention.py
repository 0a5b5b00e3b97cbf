"""LinearAttention and PerformerAttention: kernels in place of softmax, one constant state."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import layers, leaks, masks
from course_lib.generation import generate
from course_lib.layers import LinearAttention, LinearCache, MultiHeadAttention, PerformerAttention

KINDS = {
    "elu": lambda **o: LinearAttention(8, 4, **o),
    "relu": lambda **o: LinearAttention(8, 4, feature_map="relu", **o),
    "exp": lambda **o: LinearAttention(8, 4, feature_map="exp", **o),
    "function": lambda **o: LinearAttention(8, 4, feature_map=lambda x: x.square() + 1, **o),
    "performer": lambda **o: PerformerAttention(8, 4, num_features=16, **o),
    "performer, iid": lambda **o: PerformerAttention(8, 4, orthogonal=False, **o),
    "performer, relu": lambda **o: PerformerAttention(8, 4, kernel="relu", num_features=16, **o),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
CAUSAL = masks.causal()


def make(kind, **options):
    torch.manual_seed(0)
    return KINDS[kind](**options).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got, want, **tolerance):
    torch.testing.assert_close(got, want, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


# --- the equation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_weights_are_products_of_features_and_sum_to_one(kv_heads):
    layer, x, context = make("elu", num_kv_heads=kv_heads), randn(2, 5, 8), randn(2, 7, 8, seed=1)
    output, weights = layer(x, context, return_weights=True)
    phi = F.elu(layer.q_proj(x)).add(1).unflatten(-1, (4, 2))  # (batch, n_q, heads, d_head)
    psi = F.elu(layer.k_proj(context)).add(1).unflatten(-1, (kv_heads, 2))
    products = torch.einsum("bihf,bjhf->bhij", phi, psi.repeat_interleave(4 // kv_heads, 2))
    want = products / products.sum(-1, keepdim=True)
    same(weights, want)
    values = layer.v_proj(context).unflatten(-1, (kv_heads, 2))
    heads = torch.einsum("bhij,bjhd->bihd", want, values.repeat_interleave(4 // kv_heads, 2))
    same(output, layer.out_proj(heads.flatten(2)))


@each_kind
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["none", "causal"])
def test_every_backend_gives_the_same(kind, mask):
    layer, x = make(kind), randn(2, 70, 8)
    want = layer(x, mask=mask)
    for backend in ("reference", "tiled", *(["recurrent"] if mask else [])):
        layer.backend = backend
        same(layer(x, mask=mask), want)


@each_kind
def test_the_weights_returned_make_the_output(kind):
    layer, x = make(kind), randn(2, 6, 8)
    mask = CAUSAL & masks.padding([6, 3])
    output, weights = layer(x, mask=mask, return_weights=True)
    same(output, layer(x, mask=mask))
    assert (weights[:, :, ~torch.ones(6, 6).tril().bool()] == 0).all()
    assert (weights[1, :, :, 3:] == 0).all()
    heads = weights @ layer.v_proj(x).unflatten(-1, (4, 2)).transpose(1, 2)
    same(output, layer.out_proj(heads.transpose(1, 2).flatten(2)))


def test_dropout_acts_on_what_the_heads_find_and_only_in_training():
    layer, x = make("elu", dropout=0.5), randn(2, 50, 8)
    layer.out_proj = nn.Identity()
    kept = layer(x)
    want = layer.eval()(x)
    assert (kept == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    same(kept[kept != 0], 2 * want[kept != 0])


# --- who sees whom --------------------------------------------------------------------------------


@each_kind
def test_nothing_leaks_from_the_future(kind):
    layer, x = make(kind, num_kv_heads=2), randn(2, 6, 8)
    assert leaks.find_leaks(lambda x: layer(x, mask=CAUSAL), x) == []
    poisoned = x.clone()
    poisoned[:, 4:] = math.nan
    assert torch.equal(layer(poisoned, mask=CAUSAL)[:, :4], layer(x, mask=CAUSAL)[:, :4])
    assert leaks.find_leaks(layer, x) != []  # and without a mask it does


@each_kind
def test_a_huge_later_key_does_not_change_an_earlier_output_by_one_bit(kind):
    layer, x = make(kind).float(), randn(1, 6, 8).float()
    want = layer(x, mask=CAUSAL)
    x[:, 5] = 30.0
    assert torch.equal(layer(x, mask=CAUSAL)[:, :5], want[:, :5])


@each_kind
def test_padding_is_as_if_the_rest_were_not_there(kind):
    layer, x = make(kind), randn(3, 6, 8)
    x[1, 4:], x[2] = math.nan, 1.0
    for rule in (masks.padding([6, 4, 0]), CAUSAL & masks.padding([6, 4, 0])):
        output = layer(x, mask=rule)
        same(output[0], layer(x[:1], mask=CAUSAL if "causal" in repr(rule) else None)[0])
        alone = layer(x[1:2, :4], mask=CAUSAL if "causal" in repr(rule) else None)
        same(output[1, :4], alone[0])
        same(output[2], layer.out_proj.bias.expand(6, 8))  # nothing to see: heads are 0


def test_two_paddings_both_hold():
    layer, x = make("elu"), randn(2, 6, 8)
    both = masks.padding([6, 2]) & CAUSAL & masks.padding([3, 5])
    same(layer(x, mask=both), layer(x, mask=CAUSAL & masks.padding([3, 2])))


@each_kind
def test_causal_cross_attention_stands_at_the_bottom_right(kind):
    layer, x, context = make(kind), randn(2, 3, 8), randn(2, 7, 8, seed=1)
    weights = layer(x, context, mask=CAUSAL, return_weights=True)[1]
    assert torch.equal(weights > 0, (weights > 0) & CAUSAL.dense(3, 7))


# --- positions and the cache ----------------------------------------------------------------------

POSITIONS = {
    "none": lambda: None,
    "sinusoidal": lambda: layers.SinusoidalPositionalEncoding(8),
    "learned": lambda: layers.LearnedPositionalEncoding(9, 8),
    "rotary": lambda: layers.RotaryPositionalEncoding(2),
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [8, 1]], ids=str)
@pytest.mark.parametrize("kind", ["elu", "performer"])
def test_with_a_cache_it_is_what_it_is_at_once(kind, sizes, position):
    layer, x = make(kind, position=POSITIONS[position](), num_kv_heads=2), randn(2, 9, 8)
    cache, rule = layer.new_cache(), CAUSAL & masks.padding([9, 5])
    parts = [layer(part, mask=rule, cache=cache) for part in x.split(sizes, 1)]
    same(torch.cat(parts, 1), layer(x, mask=rule))
    assert len(cache) == 9


def test_the_cache_is_as_large_after_many_tokens_as_after_one():
    layer, cache = make("performer"), LinearCache()
    sizes = []
    for token in randn(2, 20, 8).split(1, 1):
        layer(token, cache=cache)
        sizes.append(sum(x.numel() for x in cache.state))
    assert len(set(sizes)) == 1
    assert cache.state[0].shape == (2, 4, 16, 2)


def test_a_cache_keeps_the_rows_selected():
    layer, x = make("elu"), randn(3, 5, 8)
    cache, rows = layer.new_cache(), torch.tensor([2, 0, 2, 1])
    layer(x[:, :4], mask=CAUSAL, cache=cache)
    cache.select(rows)
    same(layer(x[rows, 4:], mask=CAUSAL, cache=cache), layer(x, mask=CAUSAL)[rows, 4:])


def test_a_context_is_read_once_into_the_cache():
    layer, x, context = make("elu"), randn(2, 4, 8), randn(2, 7, 8, seed=1)
    cache, rule = layer.new_cache(), masks.padding([7, 3])
    parts = [layer(token, context, mask=rule, cache=cache) for token in x.split(1, 1)]
    same(torch.cat(parts, 1), layer(x, context, mask=rule))
    cache.select(torch.tensor([1]))
    one = layer(x[1:, :1], context[1:], mask=masks.padding([3]), cache=cache)
    same(one, layer(x, context, mask=rule)[1:, :1])


def test_a_bad_call_leaves_the_cache_as_it_was():
    layer, x = make("elu"), randn(2, 3, 8)
    cache = layer.new_cache()
    layer(x, cache=cache)
    state = cache.state
    with pytest.raises(ValueError, match=r"cache holds a batch of 2, but x is a batch of 1"):
        layer(x[:1], cache=cache)
    with pytest.raises(ValueError, match="bias cannot be served"):
        layer(x, bias=torch.zeros(3, 6), cache=cache)
    assert cache.state is state
    assert len(cache) == 3


class Writer(nn.Module):
    """A language model of two blocks."""

    def __init__(self, attention):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        blocks = [
            layers.EncoderLayer(
                8, 2, attention=attention, position=layers.RotaryPositionalEncoding(4)
            )
            for _ in range(2)
        ]
        self.stack = layers.Stack(blocks)
        self.new_cache = self.stack.new_cache

    def forward(self, tokens, cache=None):
        return (
            self.stack(self.embedding(tokens), mask=CAUSAL, cache=cache) @ self.embedding.weight.T
        )


@pytest.mark.parametrize("attention", [LinearAttention, PerformerAttention])
def test_writing_with_the_constant_cache_gives_the_same_text(attention):
    torch.manual_seed(0)
    model, prompt = Writer(attention), torch.tensor([[1, 2, 3], [4, 5, 6]])
    texts = [
        generate(model, prompt, 20, use_cache=use, generator=torch.Generator().manual_seed(0))
        for use in (True, False)
    ]
    assert torch.equal(*texts)


# --- random features ------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [layers.orthogonal_gaussian, torch.randn])
def test_positive_features_are_unbiased_for_the_exponential(draw):
    blocks, d = 20_000, 4
    x, y = 0.6 * randn(d), 0.6 * randn(d, seed=1)
    omega = draw(blocks * d, d, generator=torch.Generator().manual_seed(0)).double()
    phi, psi = (layers.positive_features(z, omega) for z in (x, y))
    # The mean over all is φ·ψ; blocks of d are independent of one another.
    estimates = (phi * psi * len(omega)).view(blocks, d).mean(-1)
    error = estimates.mean() - (x @ y).exp()
    assert abs(error) < 4 * estimates.std() / math.sqrt(blocks)
    same((phi * psi).sum(), estimates.mean())


def test_stabilising_divides_the_features_of_a_vector_by_their_largest():
    x, omega = randn(3, 4), randn(6, 4, seed=1)
    plain = layers.positive_features(x, omega)
    tamed = layers.positive_features(x, omega, stabilise=True)
    same(tamed, plain / plain.amax(-1, keepdim=True) / math.sqrt(6))


def test_orthogonal_rows_stand_at_right_angles_and_are_as_long_as_gaussian_ones():
    omega = layers.orthogonal_gaussian(10, 4, torch.Generator().manual_seed(0)).double()
    assert omega.shape == (10, 4)
    for block in omega.split(4):
        products = block @ block.T
        same(products, products.diagonal().diag(), atol=1e-5)
    many = layers.orthogonal_gaussian(40_000, 4, torch.Generator().manual_seed(1)).double()
    assert many.square().sum(-1).mean().item() == pytest.approx(4, abs=0.1)
    same(many.T @ many / len(many), torch.eye(4, dtype=torch.float64), atol=0.03)


def errors(num_features, seeds, draw):
    """Root mean squared error of φ(x)·φ(y), relative to exp(x·y), over pairs and seeds."""
    x, y = 0.25 * randn(10, 8), 0.25 * randn(10, 8, seed=1)
    exact, squares = (x @ y.T).exp(), []
    for seed in range(seeds):
        omega = draw(num_features, 8, generator=torch.Generator().manual_seed(seed)).double()
        phi, psi = (layers.positive_features(z, omega) for z in (x, y))
        squares.append((phi @ psi.T / exact - 1).square().mean())
    return torch.stack(squares).mean().sqrt().item()


@pytest.mark.parametrize("draw", [layers.orthogonal_gaussian, torch.randn])
def test_the_error_falls_with_the_root_of_the_number_of_features(draw):
    sizes = [16, 64, 256, 1024]
    x = torch.tensor(sizes).double().log()
    y = torch.tensor([errors(m, 60, draw) for m in sizes]).double().log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert -0.65 <= slope.item() <= -0.35


def test_orthogonal_features_err_less_than_independent_ones():
    assert errors(16, 300, layers.orthogonal_gaussian) < 0.95 * errors(16, 300, torch.randn)


@torch.no_grad()
def test_performer_approaches_softmax_attention_where_scores_are_moderate():
    torch.manual_seed(0)
    layer = PerformerAttention(16, 2, num_features=4096).double()
    full, x = MultiHeadAttention(16, 2).double(), randn(2, 12, 16)
    full.load_state_dict(layer.state_dict(), strict=False)
    for mask in (None, CAUSAL, CAUSAL & masks.padding([12, 5])):
        want = full(x, mask=mask)
        assert (layer(x, mask=mask) - want).norm() < 0.1 * want.norm()


def test_the_seed_decides_the_directions_and_they_are_saved():
    first, again, other = (PerformerAttention(8, 2, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.projection, again.projection)
    assert not torch.equal(first.projection, other.projection)
    other.redraw(1)
    assert torch.equal(first.projection, other.projection)
    assert "projection" in first.state_dict()
    state = torch.get_rng_state()
    first.redraw(5)
    assert torch.equal(state, torch.get_rng_state())


def test_as_many_features_as_the_paper_unless_told():
    assert PerformerAttention(128, 2).num_features == round(64 * math.log(64))
    assert PerformerAttention(2, 2).num_features == 1


@pytest.mark.parametrize("d_head", [1, 8, 64, 256])
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_random_features_stay_in_the_range_of_float32(d_head, size):
    torch.manual_seed(0)
    layer = PerformerAttention(d_head, 1)
    x = size * torch.randn(1, 40, d_head)
    features = layer.key_features(x[:, None])
    assert features.isfinite().all()
    assert (features.sum(-1) > 0).all()
    largest = layer.key_features(layer.projection[None, None] * d_head**0.25)  # k = ω
    assert largest.isfinite().all()
    output = layer(x, mask=CAUSAL)
    output.sum().backward()
    assert output.isfinite().all()
    assert layer.k_proj.weight.grad.isfinite().all()


# --- dtypes and compilers -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["elu", "performer"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_half_precision_are_close_to_float32(low, kind):
    layer, x = make(kind).float(), randn(2, 20, 8).float()
    want = layer(x, mask=CAUSAL)
    with torch.autocast("cpu", low):
        got = layer(x, mask=CAUSAL)
    assert got.dtype == low
    same(got.float(), want, rtol=3e-2, atol=3e-2)
    same(layer.to(low)(x.to(low), mask=CAUSAL).float(), want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["LinearAttention", "PerformerAttention"])
def test_a_layer_compiles(name, plain, compiled):
    torch.manual_seed(0)
    layer, x = getattr(plain.layers, name)(8, 2), torch.randn(2, 6, 8)
    rule = plain.masks.causal() & plain.masks.padding([6, 4])
    torch.testing.assert_close(compiled(layer, backend="eager")(x, mask=rule), layer(x, mask=rule))


def test_a_step_with_a_cache_compiles(plain, compiled):
    layer, x = plain.layers.LinearAttention(8, 2), torch.randn(1, 2, 8)
    fast, cache = compiled(layer, backend="eager"), plain.layers.LinearCache()
    parts = [fast(token, cache=cache) for token in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, mask=plain.masks.causal()))


@each_kind
def test_gradients_reach_every_parameter(kind):
    layer = make(kind)
    layer(randn(2, 5, 8), mask=CAUSAL).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())


# --- bad input ------------------------------------------------------------------------------------

X = torch.zeros(2, 5, 8, dtype=torch.float64)
REFUSED = [
    (lambda: LinearAttention(8, 2, feature_map="cosine"), ValueError, r"feature_map.*'cosine'"),
    (lambda: LinearAttention(8, 2, feature_map=3), TypeError, "feature_map must be a name"),
    (lambda: LinearAttention(8, 2, num_features=3), TypeError, "num_features"),
    (lambda: LinearAttention(8, 2, position=layers.AlibiBias(2)), ValueError,
     "position AlibiBias adds to the scores, but there is no score matrix"),
    (lambda: PerformerAttention(8, 2, position=layers.RelativePositionBias(2)), ValueError,
     "RelativePositionBias"),
    (lambda: PerformerAttention(8, 2, kernel="exp"), ValueError, r"kernel.*softmax, relu.*'exp'"),
    (lambda: PerformerAttention(8, 2, num_features=0), ValueError, "num_features.*got 0"),
    (lambda: PerformerAttention(8, 3), ValueError, "d_model must be a positive multiple"),
    (lambda: make("elu")(X, mask=masks.sliding_window(2, 0)), ValueError,
     r"sliding_window.*no score matrix to mask: masks.causal\(\), masks.padding"),
    (lambda: make("elu")(X, mask=CAUSAL | masks.padding([1, 2])), ValueError, r"\|.*score matrix"),
    (lambda: make("elu")(X, mask=~CAUSAL), ValueError, "~causal.*score matrix"),
    (lambda: make("elu")(X, mask=torch.ones(5, 5).bool()), ValueError, r"mask of shape \(5, 5\)"),
    (lambda: make("elu")(X, mask="causal"), TypeError, "mask must be a masks.Mask or None"),
    (lambda: make("elu")(X, mask=masks.padding([1, 2, 3])), ValueError, "batch size 3.*size 2"),
    (lambda: make("performer")(X, bias=torch.zeros(5, 5)), ValueError, "bias cannot be served"),
    (lambda: make("elu")(X, cache=layers.KVCache()), TypeError, "LinearCache.*KVCache"),
    (lambda: make("elu")(X[..., :7]), ValueError, r"x must be \(batch, length, 8\)"),
]  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m[:30] for *_, m in REFUSED])
def test_what_cannot_be_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_weights_of_what_only_the_cache_has_seen_cannot_be_returned():
    layer, cache = make("elu"), LinearCache()
    layer(X, cache=cache, return_weights=True)
    with pytest.raises(ValueError, match="return_weights needs all keys"):
        layer(X, cache=cache, return_weights=True)
