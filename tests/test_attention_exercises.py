"""The exercises of chapter 02: what their checks reject, accept, and say."""

import re

import exercise_gate
import pytest
import torch
import torch.nn.functional as F
from exercise_gate import ExerciseGate

from course_lib.grading.exercise import all_exercises, chapter_exercises, find
from course_lib.grading.judge import judge

pytestmark = pytest.mark.exercises
pytest_generate_tests = exercise_gate.parametrize


class TestGate(ExerciseGate):
    chapter = "02_attention"
    least_held_apart = (150, 60)


def test_the_chapter_leads_from_softmax_to_batched_attention():
    ids = [exercise.id for exercise in chapter_exercises("02_attention")]
    assert len(ids) >= 6
    assert (ids[0], ids[-1]) == ("softmax", "attention")


def test_attention_without_the_scale_is_told_so():
    def attention(query, key, value, mask=None, return_weights=False):
        scores = query @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        return (weights @ value, weights) if return_weights else weights @ value

    verdict = judge(find("attention"), attention)
    assert verdict.lines[1].startswith("Your result equals attention without the 1/√d_k scale.")


def test_a_partial_match_says_for_which_inputs_it_holds():
    def attention(query, key, value, mask=None, return_weights=False):
        mask = mask if mask is not None and mask.ndim == 3 else None
        weights = (query @ key.mT / query.shape[-1] ** 0.5 + 0.0).softmax(-1)
        if mask is not None:
            weights = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
            weights = weights.softmax(-1).nan_to_num(0.0)
        return (weights @ value, weights) if return_weights else weights @ value

    line = judge(find("attention"), attention).lines[1]
    assert line.startswith("For query (1, 2, 2), key (1, 2, 2), value (1, 2, 1), mask (2, 2) ")
    assert line.endswith("your result equals attention without the mask.")


def test_an_unknown_mistake_is_shown_on_a_small_input_with_got_beside_want():
    verdict = judge(find("softmax"), lambda scores: F.softplus(scores).softmax(-1))
    assert re.fullmatch(
        r"For scores = \[\[.+\]\]: got \[\[.+\]\], want \[\[.+\]\]\.", verdict.lines[1]
    )
    assert re.fullmatch(r"First difference at \[0, 0\]: got .+, want .+\.", verdict.lines[2])


def test_every_exercise_of_the_course_belongs_to_a_chapter_with_a_number():
    assert [e.id for e in all_exercises().values() if not re.match(r"\d\d_", e.chapter)] == []
