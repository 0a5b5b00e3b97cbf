"""What every chapter's exercises must pass: a class of tests that each chapter's file takes over.

    class TestGate(ExerciseGate):
        chapter = "03_multi_head_attention"

Answers that the catalogue does not hold stand in `answers/<chapter without number>.txt`.
"""

import functools
import re

import held_apart
import pytest
import torch

from course_lib.grading.exercise import chapter_exercises, find
from course_lib.grading.judge import judge
from course_lib.grading.mutants import examine


@functools.cache
def verdict(id, text, function):
    return judge(find(id), function)


def wrong_answers(gate, id):
    held = [(e.text, e.function) for e in gate.held_apart()[id] if not e.right]
    return held + [(m.name, m.function) for m in find(id).mistakes]


def parametrize(metafunc):
    """For `pytest_generate_tests`: `id` is each exercise of the gate's chapter."""
    if "id" in metafunc.fixturenames and metafunc.cls is not None:
        ids = [exercise.id for exercise in chapter_exercises(metafunc.cls.chapter)]
        metafunc.parametrize("id", ids)


@pytest.mark.no_shape_checks
class ExerciseGate:
    """All known answers are judged as they should be, and what is said is fit to be read."""

    chapter: str
    least_held_apart = (40, 16)  # wrong and right answers outside the catalogue, in a chapter

    @classmethod
    def held_apart(cls):
        return held_apart.read(re.sub(r"^\d\d_", "", cls.chapter))

    def test_the_chapter_has_at_least_four_exercises(self):
        assert len(chapter_exercises(self.chapter)) >= 4

    def test_an_exercise_has_mistakes_alternatives_behaviours_and_three_hints(self, id):
        exercise = find(id)
        assert len(exercise.mistakes) >= 8
        assert len(exercise.alternatives) >= 3
        assert len(exercise.behaviours) >= 3
        assert len(exercise.hints) == 3

    def test_every_known_answer_is_judged_as_it_should_be(self, id):
        counts = examine(find(id))
        assert [line for count in counts.values() for line in count.through] == []
        assert counts["mistakes"].named == counts["mistakes"].total

    def test_mistakes_have_different_names_and_texts_that_are_sentences(self, id):
        mistakes = find(id).mistakes
        assert len({m.name for m in mistakes}) == len(mistakes)
        assert [m.name for m in mistakes if not re.search(r"[.`]$", m.cause)] == []
        assert [m.name for m in mistakes if not m.ask.endswith("?") and "`" not in m.ask] == []

    def test_answers_are_held_apart_for_every_exercise(self):
        wrong, right = self.least_held_apart
        sections = self.held_apart()
        entries = [entry for section in sections.values() for entry in section]
        assert set(sections) == {e.id for e in chapter_exercises(self.chapter)}
        assert sum(not entry.right for entry in entries) >= wrong
        assert sum(entry.right for entry in entries) >= right

    def test_an_unseen_right_answer_is_accepted(self, id):
        entries = [e for e in self.held_apart()[id] if e.right]
        verdicts = {e.text: verdict(id, e.text, e.function) for e in entries}
        assert {text: str(v) for text, v in verdicts.items() if not v.passed} == {}

    def test_an_unseen_wrong_answer_is_rejected_and_given_no_misleading_name(self, id):
        for entry in self.held_apart()[id]:
            if not entry.right:
                said = verdict(id, entry.text, entry.function)
                assert (said.passed, said.mistake) == (False, entry.mistake), entry.text

    def test_a_message_is_one_to_three_legible_lines_without_a_stack_trace(self, id):
        for text, function in wrong_answers(self, id):
            lines = verdict(id, text, function).lines
            assert 1 <= len(lines) <= 3, text
            assert lines[0].startswith(f"✗ {id}: "), text
            assert max(map(len, lines)) < 400, text
            assert not any("Traceback" in line or 'File "' in line for line in lines), text

    def test_a_message_never_gives_the_answer_away(self, id):
        exercise = find(id)
        secret = exercise.source().partition("### BEGIN SOLUTION")[2].splitlines()
        secret = {line.split("#")[0].strip() for line in secret}
        secret = {line for line in secret if len(line) > 25 and "raise" not in line}
        for text, function in wrong_answers(self, id):
            lines = verdict(id, text, function).lines
            said = "\n".join(line.split(" (line ")[0] for line in lines)
            assert not any(line in said for line in secret), text

    def test_a_counterexample_is_made_of_few_round_numbers(self, id):
        """At least in its smallest case, a learner can follow the numbers by hand."""
        first = [v for v in find(id).cases_for()[0].values() if isinstance(v, torch.Tensor)]
        assert sum(v.numel() for v in first) <= self.most_numbers(id)
        for value in filter(torch.Tensor.is_floating_point, first):
            torch.testing.assert_close((value * 10).round() / 10, value)

    @classmethod
    def most_numbers(cls, id):
        """Numbers that the smallest case of an exercise may have; weights make it large."""
        return 12
