"""What every test runs with: checked shapes, one thread, a home of its own."""

import functools
import importlib
import importlib.machinery
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

# Checked shapes: must come before course_lib is imported for the first time.
assert "course_lib" not in sys.modules, "course_lib was imported before its annotations are checked"
# The exercises' checks are left out: they call answers of any shape, thousands of them.
UNCHECKED = {"checks", "grading", "bootstrap"}
PARTS = {path.stem for path in Path(__file__).parents[1].joinpath("course_lib").iterdir()}
jaxtyping.install_import_hook(
    [f"course_lib.{part}" for part in PARTS - UNCHECKED if not part.startswith("_")],
    "beartype.beartype",
)


class KernelsAsTheyAre:
    """Modules of Triton kernels load without checks: @triton.jit reads their source."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith("course_lib.") and name.rpartition(".")[2].startswith("triton_"):
            return importlib.machinery.PathFinder.find_spec(name, path, target)
        return None


sys.meta_path.insert(0, KernelsAsTheyAre)

# A learner's progress is never touched, whoever runs pytest and however.
_home = tempfile.TemporaryDirectory(prefix="course-home-")  # removed when the tests end
os.environ["COURSE_HOME"] = _home.name

import torch  # noqa: E402

torch.set_num_threads(1)

hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True)
def _shape_checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check every annotated shape, but where the test is about what happens without."""
    off = any(map(request.node.get_closest_marker, ("bad_input", "no_shape_checks")))
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", bool(off))
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def course_home(tmp_path, monkeypatch):
    """An empty folder for one test's progress."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def plain():
    """course_lib as users import it: torch.compile cannot trace through run-time shape checks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in sys.modules if n.partition(".")[0] == "course_lib"]:
            patch.delitem(sys.modules, name)
        finders = [f for f in sys.meta_path if not type(f).__module__.startswith("jaxtyping")]
        patch.setattr(sys, "meta_path", finders)
        yield importlib.import_module("course_lib")


@pytest.fixture
def compiled():
    """Compile without a graph break; dynamo forgets everything before and after."""
    torch._dynamo.reset()
    # It also remembers modules by their names, but each file's `plain` brings others.
    remembered = getattr(torch._dynamo.symbolic_convert, "_import_module", None)
    getattr(remembered, "cache_clear", lambda: None)()
    yield functools.partial(torch.compile, fullgraph=True)
    torch._dynamo.reset()
