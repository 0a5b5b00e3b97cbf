"""The exercises of chapter 02: what their checks reject, accept, and say."""

import functools
import re

import held_apart
import pytest
import torch
import torch.nn.functional as F

from course_lib.grading.exercise import all_exercises, chapter_exercises, find
from course_lib.grading.judge import judge
from course_lib.grading.mutants import examine

pytestmark = pytest.mark.exercises

EXERCISES = [exercise.id for exercise in chapter_exercises("02_attention")]
HELD_APART = held_apart.read("attention")

each = pytest.mark.parametrize("id", EXERCISES)


# --- the gate ------------------------------------------------------------------------------------


def test_the_chapter_leads_from_softmax_to_batched_attention():
    assert len(EXERCISES) >= 6
    assert (EXERCISES[0], EXERCISES[-1]) == ("softmax", "attention")


@each
def test_an_exercise_has_mistakes_alternatives_behaviours_and_three_hints(id):
    exercise = find(id)
    assert len(exercise.mistakes) >= 8
    assert len(exercise.alternatives) >= 3
    assert len(exercise.behaviours) >= 5
    assert len(exercise.hints) == 3


@each
def test_every_known_answer_is_judged_as_it_should_be(id):
    counts = examine(find(id))
    assert [line for count in counts.values() for line in count.through] == []
    assert counts["mistakes"].named == counts["mistakes"].total


@each
def test_mistakes_have_different_names_and_texts_that_are_sentences(id):
    mistakes = find(id).mistakes
    assert len({m.name for m in mistakes}) == len(mistakes)
    assert [m.name for m in mistakes if not re.search(r"[.`]$", m.cause)] == []
    assert [m.name for m in mistakes if not m.ask.endswith("?") and "`" not in m.ask] == []


@functools.cache
def verdict(id, text, function):
    return judge(find(id), function)


# --- answers that the catalogue does not hold ----------------------------------------------------


def test_hundreds_of_answers_are_held_apart():
    entries = [entry for section in HELD_APART.values() for entry in section]
    assert set(HELD_APART) == set(EXERCISES)
    assert sum(not entry.right for entry in entries) >= 150
    assert sum(entry.right for entry in entries) >= 60


@each
def test_an_unseen_right_answer_is_accepted(id):
    verdicts = {e.text: verdict(id, e.text, e.function) for e in HELD_APART[id] if e.right}
    assert {text: str(v) for text, v in verdicts.items() if not v.passed} == {}


@each
def test_an_unseen_wrong_answer_is_rejected_and_given_no_misleading_name(id):
    for entry in HELD_APART[id]:
        if not entry.right:
            said = verdict(id, entry.text, entry.function)
            assert (said.passed, said.mistake) == (False, entry.mistake), entry.text


# --- what is said --------------------------------------------------------------------------------


def wrong_answers(id):
    held = [(e.text, e.function) for e in HELD_APART[id] if not e.right]
    return held + [(m.name, m.function) for m in find(id).mistakes]


@each
def test_a_message_is_one_to_three_legible_lines_without_a_stack_trace(id):
    for text, function in wrong_answers(id):
        lines = verdict(id, text, function).lines
        assert 1 <= len(lines) <= 3, text
        assert lines[0].startswith(f"✗ {id}: "), text
        assert max(map(len, lines)) < 400, text
        assert not any("Traceback" in line or 'File "' in line for line in lines), text


@each
def test_a_message_never_gives_the_answer_away(id):
    exercise = find(id)
    secret = exercise.source().partition("### BEGIN SOLUTION")[2].splitlines()
    secret = {line.split("#")[0].strip() for line in secret}
    secret = {line for line in secret if len(line) > 25 and "raise" not in line}
    assert secret
    for text, function in wrong_answers(id):
        said = "\n".join(line.split(" (line ")[0] for line in verdict(id, text, function).lines)
        assert not any(line in said for line in secret), text


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


@each
def test_a_counterexample_is_made_of_round_numbers(id):
    """At least in its smallest case, a learner can follow the numbers by hand."""
    first = find(id).cases_for()[0]
    floats = [v for v in first.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert sum(v.numel() for v in first.values()) <= 12
    for value in floats:
        torch.testing.assert_close((value * 10).round() / 10, value)


def test_every_exercise_of_the_course_belongs_to_a_chapter_with_a_number():
    assert [e.id for e in all_exercises().values() if not re.match(r"\d\d_", e.chapter)] == []
