"""The exercises of chapter 11: what their checks reject, accept, and say."""

import exercise_gate
import pytest
import torch
import torch.nn.functional as F
from exercise_gate import ExerciseGate

from course_lib import attention, masks
from course_lib.grading.exercise import chapter_exercises, find
from course_lib.grading.judge import judge

pytestmark = pytest.mark.exercises
pytest_generate_tests = exercise_gate.parametrize


class TestGate(ExerciseGate):
    chapter = "11_sparse_attention"
    least_held_apart = (330, 55)


def said(id, function):
    return judge(find(id), function).lines


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_chapter_leads_from_the_window_to_the_online_softmax():
    ids = [exercise.id for exercise in chapter_exercises("11_sparse_attention")]
    assert ids == [
        "sliding_window", "longformer_mask", "bigbird_blocks", "windowed_attention",
        "online_attention",
    ]  # fmt: skip


# --- our answers are what course_lib does ---------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(5, 5), (2, 7), (6, 3)])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 1), (0, 9)])
def test_the_window_is_that_of_masks_sliding_window(n_q, n_k, left, right):
    visible = find("sliding_window").reference(torch.zeros(n_q, n_k), left, right) == 0
    assert torch.equal(visible, masks.sliding_window(left, right).dense(n_q, n_k)[0, 0])


def test_longformers_mask_is_that_of_course_lib():
    is_global = drawn(3, 9) > 1
    got = find("longformer_mask").reference(is_global, 2)
    assert torch.equal(got, masks.longformer(2, is_global).dense(9, 9))


@pytest.mark.parametrize("counts", [(3, 2, 3), (1, 0, 2), (5, 1, 0), (3, 1, 20)])
def test_bigbirds_blocks_have_the_counts_of_course_lib(counts):
    ours = find("bigbird_blocks").reference(drawn(12, 12), *counts)
    window, first, more = counts
    rule = masks.bigbird(1, window_blocks=window, global_blocks=first, random_blocks=more)
    assert torch.equal(ours.sum(1), rule.dense(12, 12)[0, 0].sum(1))


def test_attention_in_a_window_is_masked_attention():
    q, k, v = drawn(3, 2, 2, 50, 4)
    want = attention(q, k, v, masks.sliding_window(3, 3))
    torch.testing.assert_close(find("windowed_attention").reference(q, k, v, 3), want)


@pytest.mark.parametrize("block", [1, 7, 16, 100])
def test_online_attention_is_full_attention(block):
    q, k, v = drawn(3, 2, 2, 50, 4)
    got = find("online_attention").reference(q, k, v, block)
    torch.testing.assert_close(got, attention(q, k, v))


# --- what is said ---------------------------------------------------------------------------------


def test_strict_comparisons_are_told_so():
    def sliding_window(scores, left, right):
        n_q, n_k = scores.shape[-2:]
        distance = torch.arange(n_k) - torch.arange(n_q)[:, None] - (n_k - n_q)
        return scores.masked_fill(~((distance > -left) & (distance < right)), -torch.inf)

    assert said("sliding_window", sliding_window) == (
        "✗ sliding_window: “query i sees the keys from `left` before it to `right` after it, both "
        "included” does not hold.",
        "Your result equals the scores with one key too few on both sides. Both comparisons are "
        "strict, and both ends belong to the window.",
        "Which keys does query 2 see for left = 1 and right = 0, and is the outermost one visible?",
    )


def test_a_window_that_starts_at_query_0_is_told_so():
    def sliding_window(scores, left, right):
        visible = torch.ones_like(scores).tril(right).triu(-left).bool()
        return scores.masked_fill(~visible, -torch.inf)

    assert said("sliding_window", sliding_window)[:2] == (
        "✗ sliding_window: “the last query stands at the last key” does not hold.",
        "Your result equals the scores aligned at the top left. The last query stands at the last "
        "key, not the first query at the first one.",
    )


def test_global_tokens_that_nobody_sees_are_told_so():
    def longformer_mask(is_global, window):
        i = torch.arange(is_global.shape[1])
        return ((i[:, None] - i).abs() <= window) | is_global[:, None, :, None]

    lines = said("longformer_mask", longformer_mask)
    assert lines[0] == "✗ longformer_mask: “every token attends to a global token” does not hold."
    assert lines[1].startswith(
        "Your result equals the mask in which global tokens attend to all, but are not attended to "
        "by all."
    )


def bigbird(choose):
    def function(order, window_blocks, global_blocks, random_blocks):
        i = torch.arange(len(order))
        table = (i[:, None] - i).abs() <= window_blocks // 2
        table |= (i[:, None] < global_blocks) | (i < global_blocks)
        return table | choose(order, table, random_blocks)

    return function


def test_random_blocks_that_are_visible_already_are_told_so():
    lines = said("bigbird_blocks", bigbird(lambda o, t, r: o.argsort(1).argsort(1) < r))
    assert lines[1:] == (
        "Your result equals the table with random blocks chosen among all blocks. Some of them "
        "were visible already, so a row gains fewer than it should.",
        "Among which blocks are the random ones chosen?",
    )


def test_argsort_taken_for_the_rank_is_told_so():
    def choose(order, table, random_blocks):
        return order.masked_fill(table, torch.inf).argsort(1) < random_blocks

    assert said("bigbird_blocks", bigbird(choose))[1] == (
        "Your result equals the table with `argsort` taken for the rank. `argsort` lists which "
        "block comes first; it does not say at which place a block comes."
    )


def test_blocks_drawn_anew_at_every_call_are_told_so():
    def choose(order, table, random_blocks):
        drawn = torch.rand(order.shape).masked_fill(table, torch.inf)
        return drawn.argsort(1).argsort(1) < random_blocks

    lines = said("bigbird_blocks", bigbird(choose))
    assert lines[1].startswith("Called again with the same inputs, your function gives something")


def test_padding_that_gets_weight_is_told_so():
    def windowed_attention(q, k, v, window):
        key, value = (
            F.pad(t, (0, 0, window, window)).unfold(-2, 2 * window + 1, 1) for t in (k, v)
        )
        scores = (q.unsqueeze(-2) @ key).squeeze(-2) / q.shape[-1] ** 0.5
        return (scores.softmax(-1).unsqueeze(-2) @ value.mT).squeeze(-2)

    lines = said("windowed_attention", windowed_attention)
    assert lines[0] == (
        "✗ windowed_attention: “a window of n or more is full attention” does not hold."
    )
    assert lines[1] == (
        "Your result equals attention in the window with padding that takes its share of the "
        "weights. A padded key of zeros has the score 0, and exp(0) = 1."
    )


def test_right_numbers_by_way_of_the_whole_matrix_are_told_its_size():
    def windowed_attention(q, k, v, window):
        i = torch.arange(q.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, (i[:, None] - i).abs() <= window)

    assert said("windowed_attention", windowed_attention) == (
        "✗ windowed_attention: “no tensor is as large as n × n” does not hold.",
        "For 256 tokens a tensor of 65536 entries was made.",
    )


def test_the_whole_matrix_row_by_row_is_still_too_much_work():
    def windowed_attention(q, k, v, window):
        i = torch.arange(q.shape[-2])
        rows = [
            F.scaled_dot_product_attention(q[:, :, [j]], k, v, (i - j).abs()[None] <= window)
            for j in i
        ]
        return torch.cat(rows, 2)

    lines = said("windowed_attention", windowed_attention)
    assert lines[0] == (
        "✗ windowed_attention: “twice as many tokens take twice the numbers, not four times as "
        "many” does not hold."
    )


def online(step, start=-torch.inf):
    """A walk over the keys: `step(top, new_top, total, output, scores, value)` grows the sums."""

    def function(q, k, v, block):
        top = q.new_full((*q.shape[:-1], 1), start)
        total, output = torch.zeros_like(top), 0.0
        for key, value in zip(k.split(block, -2), v.split(block, -2), strict=True):
            scores = q @ key.mT / q.shape[-1] ** 0.5
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            total, output = step(top, new, total, output, scores, value)
            top = new
        return output / total

    return function


def right_step(top, new, total, output, scores, value):
    weights, rescale = (scores - new).exp(), (top - new).exp()
    return total * rescale + weights.sum(-1, keepdim=True), output * rescale + weights @ value


def test_an_output_that_is_not_rescaled_is_told_so():
    def step(top, new, total, output, scores, value):
        weights = (scores - new).exp()
        total = total * (top - new).exp() + weights.sum(-1, keepdim=True)
        return total, output + weights @ value

    lines = said("online_attention", online(step))
    assert lines[1:] == (
        "Your result equals attention with the output not rescaled. The total is brought to the "
        "new maximum, the output keeps the old one.",
        "Which of the two running sums must be rescaled when the maximum grows?",
    )


def test_a_missing_maximum_is_told_so():
    def step(top, new, total, output, scores, value):
        return total + scores.exp().sum(-1, keepdim=True), output + scores.exp() @ value

    lines = said("online_attention", online(step))
    assert lines[0] == (
        "✗ online_attention: “scores of ±10000 stay finite, wherever they stand” does not hold."
    )
    assert lines[1].startswith("Your result equals attention without a maximum.")


def test_a_maximum_that_starts_at_0_is_told_so():
    lines = said("online_attention", online(right_step, start=0.0))
    assert lines[1] == (
        "Your result equals attention with a maximum that starts at 0. Where all scores are far "
        "below 0, all weights underflow: 0 / 0."
    )


def test_right_numbers_from_scores_kept_in_pieces_are_told_how_many_were_held():
    def online_attention(q, k, v, block):
        pieces = [q @ key.mT / q.shape[-1] ** 0.5 for key in k.split(block, -2)]
        return torch.cat(pieces, -1).softmax(-1) @ v

    lines = said("online_attention", online_attention)
    assert lines[0] == "✗ online_attention: “all scores are never held at once” does not hold."
    assert lines[1].startswith("For 32 queries, 192 keys and block = 16, ")


def test_a_first_walk_for_the_maximum_is_told_so():
    def online_attention(q, k, v, block):
        q = q / q.shape[-1] ** 0.5
        tops = [(q @ key.mT).amax(-1, keepdim=True) for key in k.split(block, -2)]
        top, total, output = torch.stack(tops).amax(0), 0.0, 0.0
        for key, value in zip(k.split(block, -2), v.split(block, -2), strict=True):
            weights = (q @ key.mT - top).exp()
            total, output = total + weights.sum(-1, keepdim=True), output + weights @ value
        return output / total

    assert said("online_attention", online_attention) == (
        "✗ online_attention: “every key is read once” does not hold.",
        "The keys were read 2 times.",
    )


def test_an_answer_that_ignores_the_block_is_told_so():
    def online_attention(q, k, v, block):
        return F.scaled_dot_product_attention(q, k, v)

    lines = said("online_attention", online_attention)
    assert lines[0] == "✗ online_attention: “a smaller block takes more steps” does not hold."
