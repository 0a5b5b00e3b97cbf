"""`course doctor`: each problem comes with what mends it, and minutes are measured, not guessed."""

import argparse
import json
import shutil
import time
from collections import namedtuple

import pytest
import torch

from course_lib import doctor

STAGES = {"products_per_second": 100.0, "small_steps_per_second": 10_000.0}


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A folder of the course with two timed chapters, on a machine as fast as the one they had."""
    (tmp_path / "course_lib").mkdir()
    (tmp_path / "notebooks").mkdir()
    results = tmp_path / doctor.CHAPTER_SECONDS
    results.parent.mkdir(parents=True)
    chapters = {"00_start": {"seconds": 6.0}, "01_why": {"seconds": 60.0}}
    results.write_text(json.dumps({"calibration": STAGES, "chapters": chapters}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "calibrate", lambda: dict(STAGES))
    return tmp_path


def run_doctor(capsys, as_json: bool = False) -> tuple[int, str]:
    code = doctor.run(argparse.Namespace(json=as_json))
    return code, capsys.readouterr().out


def test_the_report_names_all_that_a_learner_may_ask_about(course, capsys):
    code, out = run_doctor(capsys, as_json=True)
    report = json.loads(out)
    found = {finding["name"]: finding for finding in report["findings"]}
    asked = {"Python", "torch", "GPU", "Triton", "C++ compiler", "Cores", "Memory", "Free disk"}
    assert asked | {"Set-up", "Data", "Extras", "Chapters"} == set(found)
    assert torch.__version__ in found["torch"]["value"]
    assert report["ok"] is (code == 0)


def test_a_problem_comes_with_the_command_that_mends_it_and_exit_code_1(
    course, capsys, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 10**10, 10**8))
    code, out = run_doctor(capsys)
    assert code == 1
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("! Free disk"))
    assert "less than 1 GB" in lines[at + 1]
    assert "mend: pip cache purge" in lines[at + 2]
    assert lines[-1].startswith("Problems: ")


def test_every_problem_has_something_that_mends_it(course, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)  # as if nothing were installed
    report = json.loads(run_doctor(capsys, as_json=True)[1])
    problems = [finding for finding in report["findings"] if finding["problem"]]
    assert {"Extras"} <= {finding["name"] for finding in problems}
    assert [finding["name"] for finding in problems if not finding["mend"]] == []


def test_a_package_that_is_missing_is_a_finding_and_no_crash():
    def look_at_colours():
        raise ModuleNotFoundError("No module named 'colours'", name="colours")

    finding = doctor.look_safely(look_at_colours)
    assert finding.name == "Colours"
    assert finding.problem == "No module named 'colours'"
    assert finding.mend == "make setup"


@pytest.mark.parametrize(
    ("version", "cuda", "asked", "said"),
    [
        ("3.7.1", True, "0", "3.7.1, native"),
        ("3.7.1", False, "0", "3.7.1, interpreter"),
        ("3.7.1", True, "1", "3.7.1, interpreter"),
        (None, True, "0", "not installed"),
    ],
)
def test_the_mode_of_triton_depends_on_gpu_and_wish(monkeypatch, version, cuda, asked, said):
    monkeypatch.setattr(doctor, "installed", lambda name: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("TRITON_INTERPRET", asked)
    assert doctor.look_at_triton().value.startswith(said)


# --- minutes -------------------------------------------------------------------------------------


def test_an_equal_machine_takes_the_measured_time(course):
    minutes = doctor.minutes_by_chapter(course, STAGES)
    assert minutes == pytest.approx({"00_start": 0.1, "01_why": 1.0})


def test_a_machine_of_half_the_speed_takes_twice_the_time(course):
    half = {name: value / 2 for name, value in STAGES.items()}
    assert doctor.minutes_by_chapter(course, half)["01_why"] == pytest.approx(2.0)


def test_chapters_never_timed_are_said_to_be_so(course, capsys):
    (course / doctor.CHAPTER_SECONDS).unlink()
    _, out = run_doctor(capsys)
    assert "never timed" in out
    assert "make bench-chapters" in out


def test_calibration_measures_both_kinds_of_work_in_the_time_it_was_given():
    started = time.perf_counter()
    here = doctor.calibrate(0.4)
    took = time.perf_counter() - started
    assert set(here) == set(STAGES)
    assert min(here.values()) > 0
    assert 0.4 <= took < 0.4 + 5  # a stall of a shared machine may come on top


def test_a_stall_does_not_change_the_calibration():
    """The median over slices: one slow call among many leaves the rate where it was."""
    calls = iter(range(10**9))

    def work():
        time.sleep(0.1 if next(calls) == 20 else 0.002)

    assert doctor.rate(work, 0.5) > 100


def test_the_stored_seconds_are_of_chapters_that_exist():
    root = doctor.find_root(__file__)
    path = root / doctor.CHAPTER_SECONDS
    if not path.exists():
        pytest.fail("benchmarks/results/chapters.json is missing: make bench-chapters")
    stored = json.loads(path.read_text())
    assert set(stored["calibration"]) == set(STAGES)
    notebooks = {notebook.stem for notebook in (root / "notebooks").glob("*.ipynb")}
    assert set(stored["chapters"]) == notebooks
