"""The README says what is true: its generated parts, its links, its example."""

import re
from pathlib import Path

import pytest

from course_lib.grading.exercise import all_exercises
from course_lib.grading.universal import UNIVERSAL
from course_lib.plots import readme, results

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


STALE = "stale: python -m course_lib.plots.readme makes it anew"


@pytest.mark.exercises
def test_the_graders_message_is_what_the_grader_says_today():
    assert readme.fill(TEXT, message=readme.message) == TEXT, STALE


@pytest.mark.exercises
def test_the_counts_are_of_the_exercises_that_exist():
    """That all are rejected and accepted is the gate's to say, for each exercise."""
    exercises = all_exercises().values()
    made = [u.make(e) for e in exercises for u in UNIVERSAL]
    wrong = sum(len(e.mistakes) for e in exercises) + sum(m is not None for m in made)
    right = sum(len(e.alternatives) for e in exercises)
    said = re.search(r"<!-- counts -->\n(.*?)\n<!--", TEXT, flags=re.DOTALL)
    numbers = [int(n) for n in re.findall(r"\d+", said[1])]
    assert numbers == [len(exercises), wrong, wrong, wrong, right, right], STALE


@pytest.mark.parametrize("part", ["verdicts", "race", "efficient"])
def test_what_was_measured_is_what_the_data_say(part):
    assert f"<!-- {part} -->" in TEXT
    assert readme.fill(TEXT, **{part: readme.parts(ROOT)[part]}) == TEXT, STALE


def test_the_picture_of_the_race_shows_the_result_that_is_stored():
    from PIL import Image

    race = results.load("race", ROOT)
    with Image.open(ROOT / readme.RACE_PICTURE) as picture:
        assert picture.info["Description"] == readme.fingerprint(race), STALE


def test_what_was_not_measured_says_so():
    assert results.race_table(None) == "not measured"
    assert results.efficiency_table(None) == "not measured"
    assert results.load("nothing", ROOT) is None


def test_every_link_and_picture_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_chapter_that_exists_stands_in_the_table():
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        row = next((line for line in TEXT.splitlines() if f"notebooks/{path.name}" in line), "")
        assert row.startswith("|"), path.name
        for folder in ("exercises", "solutions"):
            has = (ROOT / folder / path.name).exists()
            assert (f"{folder}/{path.name}" in row) == has, (folder, path.name)


def test_the_examples_for_engineers_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    examples = [block for block in blocks if "from course_lib" in block]
    assert len(examples) >= 2
    namespace = {}
    for example in examples:
        exec(example, namespace)
    assert "sdpa" in capsys.readouterr().out
