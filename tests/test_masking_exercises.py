"""The exercises of chapter 06: what their checks reject, accept, and say."""

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
    chapter = "06_masking"
    least_held_apart = (200, 45)


def said(id, function):
    return judge(find(id), function).lines


def test_the_chapter_leads_from_the_triangle_to_the_loss():
    ids = [exercise.id for exercise in chapter_exercises("06_masking")]
    assert ids == [
        "hide_future",
        "padding_mask",
        "additive_mask",
        "packed_mask",
        "left_padded_attention",
        "masked_loss",
    ]


# --- our answers are what course_lib does ---------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(3, 3), (1, 4), (2, 5), (4, 2)])
def test_the_hidden_future_is_that_of_masks_causal(n_q, n_k):
    hidden = find("hide_future").reference(torch.ones(n_q, n_k)) == -torch.inf
    assert torch.equal(~hidden, masks.causal().dense(n_q, n_k)[0, 0])


def test_the_masks_are_those_of_course_lib():
    lengths, ids = torch.tensor([0, 3, 2]), torch.tensor([[1, 1, 2, 2], [0, 5, 0, 5]])
    assert torch.equal(
        find("padding_mask").reference(lengths, 4), masks.padding(lengths).dense(1, 4)
    )
    packed = (masks.causal() & masks.documents(ids)).dense(4, 4)
    assert torch.equal(find("packed_mask").reference(ids), packed)


def test_left_padded_attention_is_that_of_course_lib():
    query, key, value = torch.randn(3, 2, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([2, 4])
    real = torch.arange(4) >= 4 - lengths[:, None]
    mask = masks.causal() & masks.from_dense(real[:, None, None, :])
    value = value.masked_fill(~real[:, None, :, None], torch.nan)
    got = find("left_padded_attention").reference(query, key, value, lengths)
    torch.testing.assert_close(got, attention(query, key, value, mask))


# --- famous traps ---------------------------------------------------------------------------------


def test_a_triangle_aligned_at_the_top_left_is_told_so():
    lines = said(
        "hide_future", lambda s: s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf)
    )
    assert lines == (
        "✗ hide_future: “the last query stands at the last key and sees them all” does not hold.",
        "Your result equals the scores aligned at the top left. The last query stands at the last "
        "key, not the first query at the first one.",
        "With one query and three keys, as when the earlier ones are cached, what may it see?",
    )


def test_a_score_of_0_taken_for_a_hidden_one_is_told_so():
    def hide_future(scores):
        kept = scores.tril(scores.shape[-1] - scores.shape[-2])
        return kept.masked_fill(kept == 0, -torch.inf)

    lines = said("hide_future", hide_future)
    assert lines[0] == "✗ hide_future: “gives the right numbers for every size” does not hold."
    assert lines[1].startswith("Your result equals the scores with -inf wherever `tril` left a 0.")


def test_a_mask_with_the_other_meaning_of_true_is_told_so():
    lines = said(
        "padding_mask", lambda lengths, n: (torch.arange(n) >= lengths[:, None])[:, None, None]
    )
    assert lines[0] == (
        "✗ padding_mask: “a key is visible where its position is below the length” does not hold."
    )
    assert lines[1].startswith("Your result equals the mask with real tokens and padding swapped.")


def test_a_full_row_hidden_by_the_slice_from_minus_0_is_told_so():
    def padding_mask(lengths, n):
        mask = torch.ones(len(lengths), 1, 1, n, dtype=torch.bool)
        for b in range(len(lengths)):
            mask[b, :, :, lengths[b] - n :] = False
        return mask

    lines = said("padding_mask", padding_mask)
    assert lines[1:] == (
        "Your result equals the mask with a full row hidden, as the slice [-0:] does. With no "
        "padding, `[-(n - length):]` is `[-0:]`, and that is the whole row.",
        "What does `row[-0:]` give?",
    )


def test_0_times_inf_is_told_so():
    lines = said("additive_mask", lambda mask: (1 - mask.float()) * -torch.inf)
    assert lines == (
        "✗ additive_mask: “a visible key gets 0” does not hold.",
        "Your result equals the mask made by (1 - mask) · (-inf). 0 · inf is NaN: the visible keys "
        "are spoiled.",
        "What is (1 - mask) · (-inf) where the mask is 1?",
    )


def test_a_forgotten_triangle_is_told_so():
    lines = said("packed_mask", lambda ids: (ids[:, :, None] == ids[:, None, :])[:, None])
    assert lines[0] == (
        "✗ packed_mask: “two documents of two tokens: two small triangles” does not hold."
    )
    assert lines[1].startswith("Your result equals the mask of the documents alone.")


def test_a_weight_of_0_times_nan_is_told_so():
    def left_padded_attention(query, key, value, lengths):
        n = query.shape[2]
        real = torch.arange(n) >= n - lengths[:, None]
        visible = real[:, None, None, :] & torch.ones(n, n).tril().bool()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)

    assert said("left_padded_attention", left_padded_attention) == (
        "✗ left_padded_attention: “what stands at a padded position cannot change the output, not "
        "even NaN” does not hold.",
        "Your result equals attention with NaN from a padded value. The weight is 0, but 0 · NaN "
        "is NaN.",
        "What must be done to the values before they are multiplied by weights of 0?",
    )


def test_a_mean_of_means_is_told_so():
    def masked_loss(logits, targets, lengths):
        real = torch.arange(targets.shape[1]) < lengths[:, None]
        losses = F.cross_entropy(logits.mT, targets, reduction="none") * real
        return (losses.sum(1) / lengths.clamp(min=1)).mean()

    lines = said("masked_loss", masked_loss)
    assert lines[0] == (
        "✗ masked_loss: “every real token counts alike, in a long text or a short one” does not "
        "hold."
    )
    assert lines[1].startswith(
        "Your result equals the loss averaged within each row first, 0 for an empty one."
    )
