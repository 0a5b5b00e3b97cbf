"""Every scheme of position behind the one hook, against slow loops written from its paper."""

import cmath
import copy
import math

import pytest
import torch
from torch import Tensor

from course_lib import layers, masks
from course_lib.layers import KVCache, MultiHeadAttention

D_MODEL, HEADS, D_HEAD = 24, 4, 6

SCHEMES = {
    "none": lambda: None,
    "sinusoidal": lambda: layers.SinusoidalPositionalEncoding(D_MODEL),
    "learned": lambda: layers.LearnedPositionalEncoding(40, D_MODEL),
    "rotary": lambda: layers.RotaryPositionalEncoding(D_HEAD),
    "rotary_halves": lambda: layers.RotaryPositionalEncoding(D_HEAD, interleaved=False),
    "t5": lambda: layers.RelativePositionBias(HEADS, num_buckets=8, max_distance=6),
    "t5_causal": lambda: layers.RelativePositionBias(
        HEADS, num_buckets=6, max_distance=6, bidirectional=False
    ),
    "alibi": lambda: layers.AlibiBias(HEADS),
    "shaw": lambda: layers.ShawRelativePosition(D_HEAD, max_distance=3),
    "transformer_xl": lambda: layers.TransformerXLPosition(D_MODEL, HEADS),
}
every_scheme = pytest.mark.parametrize("name", SCHEMES)
RELATIVE = [name for name in SCHEMES if name not in ("none", "sinusoidal", "learned")]


def attention_with(name: str, kv_heads: int = HEADS, seed: int = 0) -> MultiHeadAttention:
    """In float64, every parameter random: also those that begin at zero."""
    torch.manual_seed(seed)
    mha = MultiHeadAttention(D_MODEL, HEADS, num_kv_heads=kv_heads, position=SCHEMES[name]())
    for parameter in mha.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mha.double()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D_MODEL, generator=generator, dtype=torch.float64)


# --- the papers' formulas, one pair of positions at a time ---------------------------------------


def sinusoid(pos: int, width: int) -> Tensor:
    angles = [pos / 10_000 ** (2 * i / width) for i in range(width // 2)]
    pairs = [f(angle) for angle in angles for f in (math.sin, math.cos)]
    return torch.tensor(pairs, dtype=torch.float64)


def turned(vector: Tensor, pos: int, interleaved: bool) -> Tensor:
    """Rotary: pairs as complex numbers, multiplied by exp(i · angle)."""
    half = D_HEAD // 2
    result = [vector[0]] * D_HEAD
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        factor = cmath.exp(1j * pos * 10_000 ** (-2 * i / D_HEAD))
        result[a] = vector[a] * factor.real - vector[b] * factor.imag
        result[b] = vector[a] * factor.imag + vector[b] * factor.real
    return torch.stack(result)


def t5_bucket(distance: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    log = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(num_buckets - 1, exact + int(log * (num_buckets - exact) + 1e-9))


def alibi_slopes(heads: int) -> list[float]:
    """The recipe of the paper: of the power of 2 below, then every other one of the next power."""
    power = 2 ** math.floor(math.log2(heads))
    if power == heads:
        return [2 ** (-8 / heads * (i + 1)) for i in range(heads)]
    return alibi_slopes(power) + alibi_slopes(2 * power)[0::2][: heads - power]


def slow_score(name: str, position, h: int, q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
    """The score of query position i and key position j, scale and all."""
    root = math.sqrt(D_HEAD)
    if name.startswith("rotary"):
        whole = name == "rotary"
        return turned(q, i, whole) @ turned(k, j, whole) / root
    if name.startswith("t5"):
        options = (8, 6, True) if name == "t5" else (6, 6, False)
        return q @ k / root + position.weight[t5_bucket(j - i, *options), h]
    if name == "alibi":
        return q @ k / root - alibi_slopes(HEADS)[h] * abs(i - j)
    if name == "shaw":
        return q @ (k + position.weight[min(max(j - i, -3), 3) + 3]) / root
    if name == "transformer_xl":
        w_r = position.r_proj.weight[h * D_HEAD : (h + 1) * D_HEAD]
        r = w_r @ sinusoid(i - j, D_MODEL)
        u, v = position.u[h], position.v[h]
        return (q @ k + q @ r + u @ k + v @ r) / root  # terms (a), (b), (c), (d) of the paper
    return q @ k / root


def slow_tokens(name: str, position, x: Tensor, start: int) -> Tensor:
    if name == "sinusoidal":
        return x + torch.stack([sinusoid(start + t, D_MODEL) for t in range(x.shape[1])])
    if name == "learned":
        return x + torch.stack([position.weight[start + t] for t in range(x.shape[1])])
    return x


def slow_attention(
    name: str, mha: MultiHeadAttention, x: Tensor, context: Tensor, visible: Tensor
) -> Tensor:
    """Attention of x to context, whose end x is; visible: (n_q, n_k), no empty rows."""
    (batch, n_q, _), n_k = x.shape, context.shape[1]
    start = n_k - n_q
    x, context = (slow_tokens(name, mha.position, t, s) for t, s in ((x, start), (context, 0)))
    q = mha.q_proj(x).reshape(batch, n_q, HEADS, D_HEAD)
    k = mha.k_proj(context).reshape(batch, n_k, mha.num_kv_heads, D_HEAD)
    v = mha.v_proj(context).reshape(batch, n_k, mha.num_kv_heads, D_HEAD)
    rows = []
    for b in range(batch):
        for i in range(n_q):
            for h in range(HEADS):
                g = h // (HEADS // mha.num_kv_heads)
                seen = [j for j in range(n_k) if visible[i, j]]
                scores = [
                    slow_score(name, mha.position, h, q[b, i, h], k[b, j, g], start + i, j)
                    for j in seen
                ]
                rows.append(torch.stack(scores).softmax(0) @ v[b, seen, g])
    return mha.out_proj(torch.stack(rows).reshape(batch, n_q, D_MODEL))


@every_scheme
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_self_attention_equals_the_papers_formula(name, kv_heads):
    mha, x = attention_with(name, kv_heads), tokens(1, 9)
    all_pairs = torch.ones(9, 9, dtype=torch.bool)
    with torch.no_grad():
        want = slow_attention(name, mha, x, x, all_pairs)
        torch.testing.assert_close(mha(x), want, atol=1e-12, rtol=1e-12)
        want = slow_attention(name, mha, x, x, all_pairs.tril())
        torch.testing.assert_close(mha(x, mask=masks.causal()), want, atol=1e-12, rtol=1e-12)


LENGTHS = [(name, n_q, n_k) for name in SCHEMES for n_q, n_k in [(3, 8), (1, 5), (5, 5)]]
# A query before the first key: no scheme that adds to the tokens has a vector for it.
LENGTHS += [(name, 6, 2) for name in ["none", *RELATIVE]]


@pytest.mark.parametrize(("name", "n_q", "n_k"), LENGTHS)
def test_attention_to_a_memory_equals_the_papers_formula(name, n_q, n_k):
    mha, x, context = attention_with(name, 2), tokens(2, n_q), tokens(2, n_k, seed=2)
    with torch.no_grad():
        want = slow_attention(name, mha, x, context, torch.ones(n_q, n_k, dtype=torch.bool))
        torch.testing.assert_close(mha(x, context), want, atol=1e-12, rtol=1e-12)


@every_scheme
def test_gradients_equal_those_of_the_papers_formula(name):
    mha, x = attention_with(name, 2), tokens(1, 6).requires_grad_()
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    leaves = [x, *mha.parameters()]
    fast = torch.autograd.grad(mha(x, mask=visible).square().sum(), leaves)
    slow = torch.autograd.grad(slow_attention(name, mha, x, x, visible).square().sum(), leaves)
    for got, want in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


# --- what holds for every scheme -----------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("chunks", [[1] * 9, [9], [4, 1, 3, 1]], ids=["tokens", "once", "chunks"])
def test_decoding_with_a_cache_equals_the_full_pass(name, chunks):
    mha, x, cache = attention_with(name, 2), tokens(2, 9), KVCache()
    with torch.no_grad():
        parts = [mha(part, mask=masks.causal(), cache=cache) for part in x.split(chunks, dim=1)]
        want = mha(x, mask=masks.causal())
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-12, rtol=1e-12)
    assert len(cache) == 9


@every_scheme
def test_a_memory_before_x_equals_the_end_of_one_pass_over_both(name):
    mha, both = attention_with(name, 2), tokens(2, 11)
    with torch.no_grad():
        want = mha(both, mask=masks.causal())[:, 7:]
        got = mha(both[:, 7:], context=both, mask=masks.causal())
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@every_scheme
def test_bfloat16_stays_near_float64(name):
    mha, x = attention_with(name, 2), tokens(2, 33)
    for parameter in mha.parameters():
        parameter.data = parameter.data.bfloat16().double() / 4  # both see the same numbers
    x = x.bfloat16()
    with torch.no_grad():
        want = mha(x.double())
        got = copy.deepcopy(mha).bfloat16()(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=0.05, rtol=0.05)


@every_scheme
def test_a_broken_padded_token_reaches_no_other(name):
    mha, x = attention_with(name, 2), tokens(2, 7)
    visible = masks.padding([5, 7])
    broken = x.clone()
    broken[0, 5:] = math.nan
    with torch.no_grad():
        want, got = mha(x, mask=visible), mha(broken, mask=visible)
    assert torch.equal(got[0, :5], want[0, :5])
    assert torch.equal(got[1], want[1])


@every_scheme
def test_gradients_reach_every_parameter_of_the_scheme(name):
    mha = attention_with(name)
    mha(tokens(2, 9)).square().sum().backward()
    gradients = {n: p.grad for n, p in mha.position.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())
    has_parameters = name not in ("none", "sinusoidal", "rotary", "rotary_halves", "alibi")
    assert bool(gradients) == has_parameters


@every_scheme
def test_a_copy_and_a_restored_state_compute_the_same(name):
    mha, x = attention_with(name), tokens(1, 5)
    other = attention_with(name, seed=7)
    other.load_state_dict(mha.state_dict())
    for twin in (copy.deepcopy(mha), other):
        assert torch.equal(twin(x), mha(x))


@every_scheme
def test_autocast_stays_near_float32(name):
    mha, x = attention_with(name).float(), tokens(2, 9).float() / 4
    with torch.no_grad():
        want = mha(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = mha(x)
    torch.testing.assert_close(got.float(), want, atol=0.15, rtol=0.1)


def test_without_a_scheme_the_order_of_tokens_is_not_seen():
    mha, x = attention_with("none"), tokens(1, 6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(mha(x[:, order]), mha(x)[:, order])


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "none"])
def test_with_a_scheme_the_order_of_tokens_is_seen(name):
    mha, x = attention_with(name), tokens(1, 6)
    mask = masks.causal() if name == "t5_causal" else None
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert (mha(x[:, order], mask=mask) - mha(x, mask=mask)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("name", RELATIVE)
def test_a_relative_scheme_sees_distances_only(name):
    """Tokens in front that nobody sees change nothing."""
    mha, x = attention_with(name), tokens(1, 6)
    longer = torch.cat((tokens(1, 5, seed=3), x), dim=1)
    window = torch.ones(11, 11, dtype=torch.bool)
    window[5:, :5] = False
    torch.testing.assert_close(mha(longer, mask=window)[:, 5:], mha(x), atol=1e-12, rtol=1e-12)


def test_one_scheme_may_serve_several_layers():
    shared = layers.RelativePositionBias(2)
    stack = layers.Stack([layers.EncoderLayer(8, 2, position=shared) for _ in range(3)])
    names = [name for name, _ in stack.named_parameters() if "position" in name]
    assert names == ["layers.0.attention.position.weight"]


# --- rotary --------------------------------------------------------------------------------------


def test_a_turn_keeps_lengths_and_leaves_position_0_alone():
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    turned_x = layers.RotaryPositionalEncoding(8)(x)
    torch.testing.assert_close(turned_x.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned_x[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_of_turned_vectors_depend_on_distances_only(interleaved):
    rotary = layers.RotaryPositionalEncoding(8, base=100.0, interleaved=interleaved)
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)
    near = rotary(q) @ rotary(k).mT
    far = rotary(q, offset=1000) @ rotary(k, offset=1000).mT
    torch.testing.assert_close(far, near, atol=1e-10, rtol=1e-10)
    assert (near - q @ k.mT).abs().max() > 0.1


def test_turned_neighbours_and_turned_halves_differ_by_a_permutation_only():
    x = torch.randn(1, 2, 9, 6)
    together = torch.tensor([0, 3, 1, 4, 2, 5])  # (i, i + d/2) made neighbours
    halves = layers.RotaryPositionalEncoding(6, interleaved=False)(x)
    pairs = layers.RotaryPositionalEncoding(6)(x[..., together])
    torch.testing.assert_close(halves[..., together], pairs)


def test_bfloat16_turns_are_computed_in_float32():
    x = torch.randn(1, 1, 600, 8).bfloat16()
    rotary = layers.RotaryPositionalEncoding(8)
    torch.testing.assert_close(rotary(x).float(), rotary(x.float()), atol=0.02, rtol=0.01)


# --- T5 ------------------------------------------------------------------------------------------

# By hand, from 8 · 16^(k/8) and 16 · 8^(k/16): where bucket 1, 2, 3, … begins.
BOTH_WAYS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
ONE_WAY = [*range(1, 17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def test_buckets_begin_where_the_paper_has_them():
    far = torch.arange(0, 300)
    want = torch.tensor([sum(d >= edge for edge in BOTH_WAYS) for d in range(300)])
    t5 = layers.RelativePositionBias(1)
    assert torch.equal(t5.bucket(-far), want)
    assert torch.equal(t5.bucket(far[1:]), want[1:] + 16)
    causal = layers.RelativePositionBias(1, bidirectional=False)
    want = torch.tensor([sum(d >= edge for edge in ONE_WAY) for d in range(300)])
    assert torch.equal(causal.bucket(-far), want)
    assert not causal.bucket(far).any()  # later keys are all "here"


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (6, 100), (64, 40)])
def test_buckets_follow_the_formula(num_buckets, max_distance, bidirectional):
    t5 = layers.RelativePositionBias(
        1, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    distance = torch.arange(-200, 201)
    options = (num_buckets, max_distance, bidirectional)
    want = torch.tensor([t5_bucket(d, *options) for d in distance.tolist()])
    assert torch.equal(t5.bucket(distance), want)
    assert int(want.max()) < num_buckets


def test_the_bias_alone_can_be_given_to_attention():
    t5, alibi = layers.RelativePositionBias(3), layers.AlibiBias(3)
    torch.nn.init.normal_(t5.weight)
    bias = t5(2, 5)
    assert bias.shape == alibi(2, 5).shape == (1, 3, 2, 5)
    assert bias[0, 1, 0, 1] == t5.weight[2, 1]  # query 0 stands at 3: the key is 2 before it
    assert bias[0, 2, 0, 4] == t5.weight[17, 2]  # 1 after it
    assert alibi(2, 5)[0, 1, 1].tolist() == pytest.approx([-s * 2**-8 for s in (4, 3, 2, 1, 0)])


# --- ALiBi ---------------------------------------------------------------------------------------


def test_slopes_of_8_heads_are_the_papers():
    want = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert layers.AlibiBias(8).slopes().tolist() == want


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 12, 16, 20])
def test_slopes_of_any_number_of_heads_follow_the_recipe(heads):
    got = layers.AlibiBias(heads).slopes(torch.float64)
    torch.testing.assert_close(got, torch.tensor(alibi_slopes(heads), dtype=torch.float64))
    assert len(got.unique()) == heads


def test_bfloat16_cannot_round_distances_away():
    q = torch.zeros(1, 4, 600, 8, dtype=torch.bfloat16)
    last = layers.AlibiBias(4).score_bias(q, q, 1.0)[0, 0, -1]
    assert len(last.unique()) == 600


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.RotaryPositionalEncoding(7), "d_head must be even and at least 2, got 7"),
        (lambda: layers.RotaryPositionalEncoding(8, base=0.5), "base must be above 1, got 0.5"),
        (lambda: layers.RelativePositionBias(0), "num_heads must be at least 1, got 0"),
        (lambda: layers.RelativePositionBias(2, num_buckets=5), "num_buckets must be even and at"),
        (lambda: layers.RelativePositionBias(2, max_distance=8), "max_distance must be above 8"),
        (lambda: layers.AlibiBias(0), "num_heads must be at least 1, got 0"),
        (lambda: layers.ShawRelativePosition(0), "d_head must be at least 1, got 0"),
        (lambda: layers.ShawRelativePosition(4, max_distance=0), "max_distance must be at least 1"),
        (lambda: layers.TransformerXLPosition(9, 3), "d_model must be even and a multiple of num_"),
        (lambda: layers.TransformerXLPosition(8, 3), "d_model must be even and a multiple of num_"),
        (
            lambda: layers.RotaryPositionalEncoding(8)(torch.zeros(2, 3, 4)),
            r"x must be \(batch, heads, length, 8\), got shape \(2, 3, 4\)",
        ),
    ],
)
def test_impossible_sizes_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("position", "message"),
    [
        (layers.AlibiBias(1), "AlibiBias was made for num_heads=1, but attention has 4"),
        (layers.RelativePositionBias(2), "RelativePositionBias was made for num_heads=2"),
        (layers.TransformerXLPosition(24, 2), "TransformerXLPosition was made for num_heads=2"),
        (layers.ShawRelativePosition(24), "position was made for d_head=24, got 6"),
        (layers.RotaryPositionalEncoding(4), r"x must be \(batch, heads, length, 4\), got shape"),
        (layers.SinusoidalPositionalEncoding(6), r"x must be \(batch, length, 6\), got shape"),
        (layers.LearnedPositionalEncoding(3, 24), "needs 5 positions, but max_length=3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_scheme_made_for_another_attention_is_refused(position, message):
    mha = MultiHeadAttention(D_MODEL, HEADS, position=position)
    with pytest.raises(ValueError, match=message):
        mha(torch.zeros(1, 5, D_MODEL))
