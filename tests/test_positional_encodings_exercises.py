"""The exercises of chapter 04: what their checks reject, accept, and say."""

import exercise_gate
import pytest
import torch
from exercise_gate import ExerciseGate

from course_lib import layers
from course_lib.grading.exercise import chapter_exercises, find
from course_lib.grading.judge import judge
from course_lib.layers.positional_encoding import sinusoids
from course_lib.ops.rotary import rotary

pytestmark = pytest.mark.exercises
pytest_generate_tests = exercise_gate.parametrize


class TestGate(ExerciseGate):
    chapter = "04_positional_encodings"
    least_held_apart = (190, 45)

    @classmethod
    def most_numbers(cls, id):
        """Two tokens of width 2 and a table of three rows: fewer would hide the scale."""
        return 14 if id == "shaw_scores" else super().most_numbers(id)


def said(id, function):
    return judge(find(id), function).lines[1]


def test_the_chapter_leads_from_sinusoids_to_relative_scores():
    ids = [exercise.id for exercise in chapter_exercises("04_positional_encodings")]
    assert ids == ["sinusoidal_encoding", "shift_encoding", "rotary", "alibi", "shaw_scores"]


def test_the_references_are_what_the_library_computes():
    g = torch.Generator().manual_seed(0)
    x, positions = torch.randn(2, 4, 5, 6, generator=g), torch.arange(3.0, 8.0)
    codes = find("sinusoidal_encoding").reference(positions, 6, base=50.0)
    torch.testing.assert_close(codes, sinusoids(positions, 6, 50.0))
    torch.testing.assert_close(find("rotary").reference(x, positions), rotary(x, offset=3))
    bias = layers.AlibiBias(4)(5, 6)
    torch.testing.assert_close(find("alibi").reference(x), x + bias)
    position = layers.ShawRelativePosition(6, max_distance=2)
    shaw = find("shaw_scores").reference(x[:, 0], x[:, 1], position.weight)
    place = position.score_bias(x[:, :1], x[:, 1:2], 6**-0.5)[:, 0]
    torch.testing.assert_close(shaw, x[:, 0] @ x[:, 1].mT * 6**-0.5 + place)


def test_codes_in_two_blocks_are_told_to_interleave():
    def sinusoidal_encoding(positions, d_model, base=10000.0):
        angle = positions[:, None] * base ** (-torch.arange(0, d_model, 2).to(positions) / d_model)
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    assert said("sinusoidal_encoding", sinusoidal_encoding).startswith(
        "Your result equals the codes with all sines first, then all cosines."
    )


def test_positions_that_are_counted_instead_of_read_are_told_so():
    def sinusoidal_encoding(positions, d_model, base=10000.0):
        return sinusoids(torch.arange(len(positions)).to(positions), d_model, base)

    assert said("sinusoidal_encoding", sinusoidal_encoding).startswith(
        "Your result equals the codes with 0, 1, 2, … for the positions."
    )


def test_a_shift_backwards_is_told_its_direction():
    reference = find("shift_encoding").reference
    line = said("shift_encoding", lambda e, offset, base=10000.0: reference(e, -offset, base))
    assert line.startswith("Your result equals a turn in the wrong direction.")


def test_adding_the_code_of_the_offset_is_no_shift():
    def shift_encoding(encoding, offset, base=10000.0):
        return encoding + sinusoids(encoding.new_tensor([offset]), encoding.shape[-1], base)

    verdict = judge(find("shift_encoding"), shift_encoding)
    assert verdict.lines[0] == "✗ shift_encoding: “a shift by 0 changes nothing” does not hold."
    assert verdict.mistake == "a turn with sine and cosine added instead"


def test_llamas_layout_is_recognised_as_a_layout():
    def llama(x, positions, base=10000.0):
        angle = positions[:, None] * base ** (-torch.arange(0, x.shape[-1], 2).to(x) / x.shape[-1])
        angle = torch.cat((angle, angle), dim=-1)
        a, b = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((-b, a), dim=-1) * angle.sin()

    assert said("rotary", llama).startswith(
        "Your result equals a turn with partners half a width apart."
    )


def test_rotary_that_counts_tokens_from_0_is_told_that_it_ignores_positions():
    line = said("rotary", lambda x, positions, base=10000.0: rotary(x, base=base))
    assert line.startswith("Your result equals a turn with 0, 1, 2, … for the positions.")


def test_alibi_with_the_papers_signed_distances_is_told_about_later_keys():
    def alibi(scores):
        _, h, n_q, n_k = scores.shape
        slope = 2.0 ** (-8 * torch.arange(1, h + 1).to(scores) / h)
        away = torch.arange(n_k) - torch.arange(n_k - n_q, n_k)[:, None]
        return scores + slope[:, None, None] * away

    assert said("alibi", alibi).startswith(
        "Your result equals ALiBi with distances that are negative for later keys."
    )


def test_relative_scores_outside_the_scale_are_told_what_the_root_divides():
    def shaw_scores(query, key, table):
        n, k = query.shape[1], len(table) // 2
        index = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-k, k) + k
        place = torch.einsum("bid,ijd->bij", query, table[index])
        return query @ key.mT / query.shape[-1] ** 0.5 + place

    verdict = judge(find("shaw_scores"), shaw_scores)
    assert verdict.mistake == "the relative scores with the distances added after the scale"
    assert verdict.lines[2] == "What does the root divide: one product, or the sum of both?"
