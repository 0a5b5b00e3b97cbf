"""The exercises of chapter 07: what their checks reject, accept, and say."""

import exercise_gate
import pytest
import torch
import torch.nn.functional as F
from exercise_gate import ExerciseGate

from course_lib.grading.exercise import chapter_exercises, find
from course_lib.grading.judge import judge

pytestmark = pytest.mark.exercises
pytest_generate_tests = exercise_gate.parametrize


class TestGate(ExerciseGate):
    chapter = "07_cross_attention"
    least_held_apart = (250, 50)

    @classmethod
    def most_numbers(cls, id):
        return 16 if id == "cross_attention" else 12  # four weight matrices


def test_the_chapter_leads_from_cross_attention_to_the_decoder_layer():
    ids = [exercise.id for exercise in chapter_exercises("07_cross_attention")]
    assert ids == ["cross_attention", "cross_mask", "shift_right", "cached_step", "decoder_layer"]


def test_cross_attention_that_asks_from_the_wrong_side_is_told_so():
    def swapped(x, context, w_q, w_k, w_v, w_o, num_heads, mask=None):
        query, key, value = (
            t.unflatten(-1, (num_heads, -1)).transpose(1, 2)
            for t in (context @ w_q, x @ w_k, x @ w_v)
        )
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return heads.transpose(1, 2).flatten(2) @ w_o

    verdict = judge(find("cross_attention"), swapped)
    assert (
        verdict.mistake == "cross-attention with queries from the context, keys and values from x"
    )
    assert verdict.lines[2] == "Who asks, and who is asked?"


def test_attention_that_forgets_the_context_breaks_its_first_behaviour():
    def forgetful(x, context, w_q, w_k, w_v, w_o, num_heads, mask=None):
        query, key, value = (
            t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (x @ w_q, x @ w_k, x @ w_v)
        )
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return heads.transpose(1, 2).flatten(2) @ w_o

    verdict = judge(find("cross_attention"), forgetful)
    assert verdict.lines[1:] == (
        "Elsewhere your result equals cross-attention that ignores the context: self-attention of "
        "x. Queries, keys and values all come from x.",
        "Where does `context` enter?",
    )


def test_a_mask_that_forgets_the_padded_queries_is_told_so():
    def keys_alone(query_lengths, key_lengths, n_q, n_k):
        real = torch.arange(n_k) < key_lengths[:, None, None, None]
        return real.expand(-1, 1, n_q, -1)

    verdict = judge(find("cross_mask"), keys_alone)
    assert verdict.lines == (
        "✗ cross_mask: “a padded query may attend to nothing” does not hold.",
        "Your result equals a mask of the keys alone. Padded queries attend to the real keys.",
        "Where do the query lengths enter?",
    )


def test_teacher_forcing_without_the_shift_is_caught():
    verdict = judge(find("shift_right"), lambda targets, start: targets.clone())
    assert verdict.lines[0] == (
        "✗ shift_right: “every row begins with the start token” does not hold."
    )
    assert verdict.mistake == "the identity"


def test_a_shift_in_the_wrong_direction_is_told_so():
    def left(targets, start):
        return torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], start)], dim=1)

    line = judge(find("shift_right"), left).lines[1]
    assert line == (
        "Your result equals the targets shifted to the left, with the start token behind. "
        "Position i reads y_{i+1}, which is still to be predicted."
    )


def test_a_token_that_does_not_see_itself_is_told_so():
    def blind(x, key_cache, value_cache, w_q, w_k, w_v):
        output = F.scaled_dot_product_attention(x @ w_q, key_cache, value_cache)
        return output, torch.cat([key_cache, x @ w_k], 1), torch.cat([value_cache, x @ w_v], 1)

    verdict = judge(find("cached_step"), blind)
    assert verdict.mistake == "the step in which the new token does not see itself"
    assert verdict.lines[2] == "How many keys does the query look at, t or t + 1?"


def test_a_post_norm_layer_is_told_so():
    def post_norm(x, context, look, read, feed, norm_1, norm_2, norm_3):
        x = norm_1(x + look(x))
        x = norm_2(x + read(x, context))
        return norm_3(x + feed(x))

    verdict = judge(find("decoder_layer"), post_norm)
    assert verdict.lines[0] == (
        "✗ decoder_layer: “if all three sublayers give 0, x comes through unchanged” does not hold."
    )
    assert verdict.mistake == "a post-norm layer"
