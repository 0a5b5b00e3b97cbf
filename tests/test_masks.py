"""Masks: what each rule means, how rules combine, and that all forms of one rule agree."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from attention_cases import generators, rules, written_out
from hypothesis import given, settings

from course_lib import masks

# beartype samples the lists that it checks with Python's `random`.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module")


@st.composite
def placed_rules(draw, least=0):
    """A rule and the (batch, heads, n_q, n_k) that it serves."""
    sizes = draw(st.integers(1 if least else 0, 2)), draw(st.integers(1, 2))
    sizes += draw(st.integers(least, 9)), draw(st.integers(least, 9))
    rule = draw(rules(*sizes))
    if isinstance(rule.mask, torch.Tensor):
        rule.mask = masks.from_dense(rule.mask)
    return rule, sizes


def rows(mask, n_q, n_k):
    """The dense mask of batch element 0 and head 0 as strings, for examples one can read."""
    return ["".join(".x"[seen] for seen in row) for row in mask.dense(n_q, n_k)[0, 0].tolist()]


# --- what each rule means ----------------------------------------------------------------------


@settings(max_examples=150)
@given(placed_rules())
def test_every_rule_shows_exactly_the_pairs_that_its_sentence_names(placed):
    rule, sizes = placed
    dense = rule.mask.dense(*sizes[2:])
    assert dense.dtype == torch.bool
    assert all(have in (1, want) for have, want in zip(dense.shape[:2], sizes[:2], strict=True))
    assert dense.shape[2:] == sizes[2:]
    assert torch.equal(dense.expand(sizes), written_out(rule.sees, *sizes))


def test_causal_is_aligned_at_the_bottom_right():
    assert rows(masks.causal(), 3, 3) == ["x..", "xx.", "xxx"]
    assert rows(masks.causal(), 2, 4) == ["xxx.", "xxxx"]
    assert rows(masks.causal(), 4, 2) == ["..", "..", "x.", "xx"]
    assert rows(masks.causal(), 1, 5) == ["xxxxx"]


def test_a_sliding_window_includes_both_ends_and_is_aligned_at_the_bottom_right():
    assert rows(masks.sliding_window(1, 1), 4, 4) == ["xx..", "xxx.", ".xxx", "..xx"]
    assert rows(masks.sliding_window(2, 0), 2, 5) == [".xxx.", "..xxx"]
    assert rows(masks.sliding_window(0, 1), 3, 2) == ["x.", "xx", ".x"]
    assert rows(masks.sliding_window(0, 0), 3, 3) == ["x..", ".x.", "..x"]


def test_padding_hides_keys_from_the_length_on_and_a_length_may_be_zero():
    dense = masks.padding([0, 2, 3]).dense(2, 3)
    assert dense.sum(-1).tolist() == [[[0, 0]], [[2, 2]], [[3, 3]]]
    assert rows(masks.padding(torch.tensor([1], dtype=torch.int32)), 1, 2) == ["x."]


def test_a_prefix_is_visible_to_all_and_the_rest_is_causal():
    assert rows(masks.prefix([2]), 4, 4) == ["xx..", "xx..", "xxx.", "xxxx"]
    assert rows(masks.prefix([1]), 3, 1) == ["x", "x", "x"]


def test_documents_see_only_their_own_text():
    packed = masks.documents([[7, 7, 3, 7]])
    assert rows(packed, 4, 4) == ["xx.x", "xx.x", "..x.", "xx.x"]
    assert rows(packed & masks.causal(), 2, 4) == ["..x.", "xx.x"]


def test_longformer_global_tokens_attend_to_all_and_are_attended_to_by_all():
    mask = masks.longformer(1, [3])
    assert rows(mask, 5, 5) == ["xx.x.", "xxxx.", ".xxx.", "xxxxx", "...xx"]
    assert rows(mask, 2, 5) == ["xxxxx", "...xx"]
    assert rows(masks.longformer(0), 2, 2) == ["x.", ".x"]
    flags = torch.tensor([[False, False], [True, False]])
    assert masks.longformer(0, flags).dense(2, 2)[:, 0].int().tolist() == [
        [[1, 0], [0, 1]],
        [[1, 1], [1, 1]],
    ]


@pytest.mark.parametrize("tokens", [range(2), (0, 1), {0, 1}, torch.tensor([1, 0]), iter([0, 1])])
def test_longformer_takes_any_collection_of_positions(tokens):
    assert torch.equal(
        masks.longformer(1, tokens).dense(6, 6), masks.longformer(1, [0, 1]).dense(6, 6)
    )


# --- BigBird -----------------------------------------------------------------------------------


def block_table(mask, n, size):
    """(blocks, blocks): which block of queries sees which block of keys; blocks must be whole."""
    dense = mask.dense(n, n)[0, 0]
    corners = dense[::size, ::size]
    spread = corners.repeat_interleave(size, 0).repeat_interleave(size, 1)[:n, :n]
    assert torch.equal(dense, spread), "a block is seen whole or not at all"
    return corners


@given(
    size=st.integers(1, 4),
    n=st.integers(1, 40),
    window=st.sampled_from([1, 3, 5]),
    global_blocks=st.integers(0, 3),
    random_blocks=st.integers(0, 4),
    seed=st.integers(0, 2**40),
)
def test_bigbird_sums_window_global_and_random_blocks_for_each_query_block(
    size, n, window, global_blocks, random_blocks, seed
):
    mask = masks.bigbird(
        size, window_blocks=window, global_blocks=global_blocks, random_blocks=random_blocks,
        seed=seed,
    )  # fmt: skip
    table = block_table(mask, n, size)
    blocks = len(table)
    for q in range(blocks):
        promised = {k for k in range(blocks) if abs(q - k) <= window // 2 or k < global_blocks}
        if q < global_blocks:
            promised = set(range(blocks))
        seen = set(table[q].nonzero().flatten().tolist())
        assert promised <= seen
        assert len(seen) == min(blocks, len(promised) + random_blocks)


def test_bigbird_is_the_same_at_every_call_and_another_with_another_seed():
    first = masks.bigbird(4, seed=1)
    assert torch.equal(first.dense(128, 128), first.dense(128, 128))
    assert torch.equal(first.dense(128, 128), masks.bigbird(4, seed=1).dense(128, 128))
    assert not torch.equal(first.dense(128, 128), masks.bigbird(4, seed=2).dense(128, 128))


def test_bigbird_random_blocks_differ_between_query_blocks():
    mask = masks.bigbird(1, window_blocks=1, global_blocks=0, random_blocks=3)
    table = mask.dense(64, 64)[0, 0]
    assert len({tuple(row.nonzero().flatten().tolist()) for row in table}) == 64


def test_bigbird_decodes_with_the_rows_of_the_whole_mask():
    mask = masks.bigbird(4)
    whole = mask.dense(30, 30)
    for n_q in (1, 5, 29):
        assert torch.equal(mask.dense(n_q, 30), whole[:, :, -n_q:])


# --- combining ----------------------------------------------------------------------------------


@given(st.data())
def test_rules_combine_by_the_laws_of_logic(data):
    sizes = (
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(0, 9)),
        5,
    )
    a, b = (data.draw(rules(*sizes, depth=1)).mask for _ in range(2))
    a, b = (masks.from_dense(m) if isinstance(m, torch.Tensor) else m for m in (a, b))

    def dense(mask):
        return mask.dense(*sizes[2:]).expand(sizes)

    assert torch.equal(dense(~(a & b)), dense(~a | ~b))
    assert torch.equal(dense(~(a | b)), dense(~a & ~b))
    assert torch.equal(dense(~~a), dense(a))
    assert torch.equal(dense(a & b), dense(b & a))
    assert torch.equal(dense(a & b), dense(a) & dense(b))
    assert torch.equal(dense(a | b), dense(a) | dense(b))
    assert not dense(a & ~a).any()
    assert dense(a | ~a).all()


def test_a_bool_tensor_combines_with_a_rule_on_either_side():
    table = torch.tensor([[True, True], [False, True]])
    for both in (masks.causal() & table, table & masks.causal()):
        assert rows(both, 2, 2) == ["x.", ".x"]
    for either in (masks.causal() | table, table | masks.causal()):
        assert rows(either, 2, 2) == ["xx", "xx"]


@pytest.mark.parametrize("combine", [lambda a, b: a & b, lambda a, b: a | b])
def test_rules_for_different_batches_do_not_combine(combine):
    with pytest.raises(ValueError, match=r"batch_size.*padding\(\[1, 2\]\) has 2.* has 3"):
        combine(masks.padding([1, 2]), masks.prefix([1, 2, 3]))
    heads = [masks.from_dense(torch.ones(1, h, 1, 1, dtype=torch.bool)) for h in (2, 3)]
    with pytest.raises(ValueError, match="num_heads"):
        combine(*heads)


# --- all forms of one rule agree -----------------------------------------------------------------


@settings(max_examples=60)
@given(placed_rules(least=1), st.data())
def test_the_mask_mod_answers_one_pair_at_a_time_as_the_dense_mask_does(placed, data):
    rule, sizes = placed
    at = [data.draw(st.integers(0, max(size - 1, 0))) for size in sizes]
    answer = rule.mask.mask_mod(*sizes[2:])(*map(torch.tensor, at))
    assert bool(answer) == rule.sees(*at)


@settings(max_examples=25)
@given(placed_rules(least=1), st.sampled_from([2, 4]))
def test_the_flex_attention_form_equals_the_dense_mask(placed, block_size):
    from torch.nn.attention.flex_attention import create_mask

    rule, (batch, heads, n_q, n_k) = placed
    blocks = rule.mask.block_mask(n_q, n_k, block_size=block_size)
    whole = create_mask(blocks.mask_mod, batch, heads, n_q, n_k, device="cpu")
    want = written_out(rule.sees, batch, heads, n_q, n_k)
    assert torch.equal(whole, want)
    padded = torch.zeros(batch, heads, 12, 12, dtype=torch.bool)
    padded[:, :, :n_q, :n_k] = want
    some = padded.unflatten(3, (-1, block_size)).any(4).unflatten(2, (-1, block_size)).any(3)
    to_visit = blocks.to_dense().bool().expand(batch, heads, -1, -1)
    r, c = to_visit.shape[2:]
    assert torch.equal(to_visit, some[:, :, :r, :c])


@settings(max_examples=100)
@given(placed_rules(), st.integers(1, 5), st.integers(1, 5))
def test_tiles_put_together_are_the_dense_mask_and_each_list_holds_what_it_says(placed, bq, bk):
    rule, sizes = placed
    tiles = rule.mask.tiles(*sizes[2:], block_q=bq, block_k=bk)
    dense = rule.mask.dense(*sizes[2:])
    assert torch.equal(tiles.dense(), dense)
    assert len({tuple(p.flatten().tolist()) for p in tiles.patterns}) == len(tiles.patterns)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, tiles.num_full.shape)).tolist():
        full = tiles.full[b, h, r, : tiles.num_full[b, h, r]].tolist()
        partial = tiles.partial[b, h, r, : tiles.num_partial[b, h, r]].tolist()
        assert full == sorted(set(full))
        assert partial == sorted(set(partial))
        row = dense[b, h, r * bq : (r + 1) * bq].split(bk, dim=-1) if sizes[3] else ()
        assert full == [c for c, tile in enumerate(row) if tile.all()]
        assert partial == [c for c, tile in enumerate(row) if tile.any() and not tile.all()]


@pytest.mark.parametrize(
    ("mask", "patterns"),
    [
        (masks.causal(), 1),
        (masks.causal() & masks.padding([128, 256]), 1),
        (masks.sliding_window(64, 0), 2),
        (masks.bigbird(16), 0),
        (masks.padding([64, 64]), 0),
        (masks.padding([3, 100]), 2),
    ],
    ids=str,
)
def test_the_partial_tiles_of_a_real_mask_repeat(mask, patterns):
    assert len(mask.tiles(256, 256, 16, 16).patterns) == patterns


def test_the_patterns_of_a_mask_do_not_grow_with_the_length():
    mask = masks.longformer(70, [0, 130]) & masks.causal()
    short, long = (len(mask.tiles(n, n).patterns) for n in (512, 1024))
    assert short == long <= 12


@settings(max_examples=100)
@given(placed_rules(least=1), st.integers(1, 5), st.integers(1, 5))
def test_what_is_known_of_a_rectangle_is_true_of_all_its_pairs(placed, bq, bk):
    rule, (_, _, n_q, n_k) = placed
    rows, columns = (
        torch.tensor([[i, min(i + size, n) - 1] for i in range(0, n, size)])
        for n, size in ((n_q, bq), (n_k, bk))
    )
    dense = rule.mask.dense(n_q, n_k)
    maybe, surely = rule.mask.rectangles(n_q, n_k, rows, columns)
    shape = (*dense.shape[:2], len(rows), len(columns))
    maybe, surely = maybe.expand(shape), surely.expand(shape)
    assert not (surely & ~maybe).any()
    for r, (i0, i1) in enumerate(rows.tolist()):
        for c, (j0, j1) in enumerate(columns.tolist()):
            pairs = dense[:, :, i0 : i1 + 1, j0 : j1 + 1].flatten(2)
            assert (maybe[:, :, r, c] | ~pairs.any(-1)).all()
            assert (~surely[:, :, r, c] | pairs.all(-1)).all()


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.sliding_window(300, 5) & masks.causal(),
        ~masks.longformer(100, [0, 5000]),
        masks.bigbird(64) | masks.prefix([700]),
        masks.documents(torch.arange(8192)[None] // 1000),
    ],
    ids=repr,
)
def test_tiles_of_a_long_sequence_look_at_few_pairs(mask, monkeypatch):
    looked_at = []
    plain = type(mask).mask_mod

    def counting(self, *args):
        rule = plain(self, *args)

        def look(b, h, i, j):
            looked_at.append(torch.broadcast_shapes(*(x.shape for x in (b, h, i, j))).numel())
            return rule(b, h, i, j)

        return look

    monkeypatch.setattr(type(mask), "mask_mod", counting)
    mask.tiles(8192, 8192, 128, 128)
    assert sum(looked_at) < 8192**2 / 8


def test_the_rows_of_some_queries_are_those_of_the_dense_mask():
    mask, queries = masks.padding([5, 9]) & masks.causal(), torch.tensor([3, 0, 3])
    assert torch.equal(mask.rows(queries, 6, 9), mask.dense(6, 9)[:, :, queries])


def test_a_table_of_tiles_says_what_the_lists_say():
    tiles = (masks.causal() & masks.padding([3, 9])).tiles(8, 8, 4, 4)
    assert tiles.table().tolist() == [[[[1, -1], [2, -1]]], [[[3, -1], [0, 3]]]]
    assert [rows.tolist()[0] for rows in tiles.patterns.int()] == [
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 0],
    ]


def test_bad_tile_sizes_are_refused():
    with pytest.raises(ValueError, match="block_k must be a positive int, got 0"):
        masks.causal().tiles(4, 4, block_q=1, block_k=0)


# --- being good citizens -----------------------------------------------------------------------

EACH_KIND = [
    masks.causal(),
    masks.padding([1, 3]),
    masks.sliding_window(1, 0),
    masks.prefix([1, 2]),
    masks.documents([[0, 0, 1, 1], [0, 1, 1, 1]]),
    masks.longformer(1, [2]),
    masks.bigbird(2, random_blocks=1),
    masks.from_dense(torch.tensor([[True, False, True, True]])),
    ~(masks.causal() & masks.padding([1, 3])) | masks.sliding_window(0, 0),
]
each_kind = pytest.mark.parametrize("mask", EACH_KIND, ids=repr)


@each_kind
def test_a_mask_survives_copy_and_pickle(mask):
    want = mask.dense(4, 4)
    for again in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert repr(again) == repr(mask)
        assert torch.equal(again.dense(4, 4), want)


@each_kind
def test_a_mask_leaves_the_global_generator_alone(mask):
    before = torch.get_rng_state()
    mask.dense(4, 4)
    mask.tiles(4, 4)
    mask.block_mask(4, 4)
    assert torch.equal(torch.get_rng_state(), before)


@each_kind
def test_a_mask_is_written_out_on_the_device_asked_for(mask):
    there = mask.dense(4, 4, device="meta")
    assert there.device.type == "meta"
    assert there.shape == mask.dense(4, 4).shape


@each_kind
def test_a_mask_names_itself_as_it_was_built(mask):
    assert "object at" not in repr(mask)


@given(generators())
def test_a_dense_mask_is_the_tensor_itself(generator):
    tensor = torch.rand(2, 1, 3, 4, generator=generator) < 0.5
    dense = masks.from_dense(tensor).dense(3, 4)
    assert dense.data_ptr() == tensor.data_ptr()
    assert torch.equal(dense, tensor)


# --- bad input -----------------------------------------------------------------------------------

BAD = {
    "padding: negative": (lambda: masks.padding([2, -1]), ValueError, r"lengths.*-1"),
    "padding: one number": (lambda: masks.padding(3), ValueError, r"lengths.*shape \(\)"),
    "padding: floats": (lambda: masks.padding([1.5]), ValueError, "lengths.*float32"),
    "padding: bools": (lambda: masks.padding([True]), ValueError, "lengths.*bool"),
    "padding: text": (lambda: masks.padding("ab"), TypeError, "lengths.*'ab'"),
    "padding: None": (lambda: masks.padding(None), TypeError, "lengths.*None"),
    "padding: 2-D": (lambda: masks.padding([[1]]), ValueError, r"lengths.*\(1, 1\)"),
    "prefix: negative": (lambda: masks.prefix([-2]), ValueError, r"lengths.*-2"),
    "window: negative": (lambda: masks.sliding_window(-1, 0), ValueError, "left.*-1"),
    "window: negative right": (lambda: masks.sliding_window(0, -3), ValueError, "right.*-3"),
    "window: float": (lambda: masks.sliding_window(1.0, 0), TypeError, "left.*float"),
    "window: bool": (lambda: masks.sliding_window(0, True), TypeError, "right.*bool"),
    "documents: 1-D": (lambda: masks.documents([1, 2]), ValueError, r"ids.*\(2,\)"),
    "documents: floats": (lambda: masks.documents([[1.0]]), ValueError, "ids.*float32"),
    "documents: ragged": (lambda: masks.documents([[1], [1, 2]]), TypeError, "ids"),
    "documents: other length": (
        lambda: masks.documents([[1, 2, 3]]).dense(2, 2), ValueError, r"\(1, 3\).*n_k = 2"),
    "documents: more queries than keys": (
        lambda: masks.documents([[1, 2]]).dense(3, 2), ValueError, "n_q = 3"),
    "longformer: one number": (lambda: masks.longformer(1, 0), TypeError, r"global_tokens.*\[0\]"),
    "longformer: negative": (lambda: masks.longformer(1, [-1]), ValueError, "global_tokens.*-1"),
    "longformer: None": (lambda: masks.longformer(1, None), TypeError, "global_tokens.*None"),
    "longformer: outside": (
        lambda: masks.longformer(1, [0, 9]).dense(4, 4), ValueError, r"global_tokens \[0, 9\].*4"),
    "longformer: bool of rank 1": (
        lambda: masks.longformer(1, torch.ones(4, dtype=torch.bool)), ValueError, r"\(4,\)"),
    "longformer: bool of other length": (
        lambda: masks.longformer(1, torch.ones(2, 3, dtype=torch.bool)).dense(4, 4),
        ValueError, r"global_tokens.*\(2, 3\).*n_k = 4"),
    "longformer: negative window": (lambda: masks.longformer(-1), ValueError, "window.*-1"),
    "bigbird: block size 0": (lambda: masks.bigbird(0), ValueError, "block_size"),
    "bigbird: even window": (lambda: masks.bigbird(4, window_blocks=2), ValueError,
                             "window_blocks must be odd.*2"),
    "bigbird: negative": (lambda: masks.bigbird(4, random_blocks=-1), ValueError, "random_blocks"),
    "bigbird: seed": (lambda: masks.bigbird(4, seed="a"), TypeError, "seed.*str"),
    "bigbird: more queries than keys": (
        lambda: masks.bigbird(2).dense(5, 4), ValueError, "n_q = 5"),
    "from_dense: list": (lambda: masks.from_dense([[True]]), TypeError, "mask.*list"),
    "from_dense: floats": (lambda: masks.from_dense(torch.zeros(2, 2)), TypeError, "float32.*bias"),
    "from_dense: ints": (lambda: masks.from_dense(torch.ones(2, 2).int()), TypeError, "int32"),
    "from_dense: 3-D": (
        lambda: masks.from_dense(torch.ones(2, 2, 2, dtype=torch.bool)), ValueError,
        r"\(2, 2, 2\)"),
    "from_dense: other lengths": (
        lambda: masks.from_dense(torch.ones(2, 3, dtype=torch.bool)).dense(2, 4), ValueError,
        r"\(1, 1, 2, 3\).*n_q = 2.*n_k = 4"),
    "and: a number": (lambda: masks.causal() & 1, TypeError, "mask.*int"),
    "dense: negative": (lambda: masks.causal().dense(-1, 2), ValueError, "n_q.*-1"),
    "dense: float": (lambda: masks.causal().dense(2, 2.0), TypeError, "n_k.*float"),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
