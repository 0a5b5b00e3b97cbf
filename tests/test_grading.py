"""The machinery of the exercises, each rule with a tiny invented exercise."""

import functools
import json
import os
import random
import subprocess
import sys
import time
import warnings

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import Tensor, nn

from course_lib import checks
from course_lib.grading import exercise as exercises
from course_lib.grading import mutants, progress
from course_lib.grading.exercise import Exercise, Mistake, find
from course_lib.grading.judge import judge
from course_lib.grading.observe import expect

pytestmark = pytest.mark.exercises


@pytest.fixture
def mean(monkeypatch, course_home):
    """An exercise about the weighted mean of each row, known only to one test."""
    monkeypatch.setattr(exercises, "_REGISTRY", {})
    monkeypatch.setattr(exercises, "all_exercises", lambda: exercises._REGISTRY)
    ex = Exercise(
        "mean", chapter="99_test", title="Mean", minutes=5, difficulty=1, importance=1, points=2,
        prompt="The mean.", hints=("How many?", "It is linear.", "Divide by n."), batched=True,
    )  # fmt: skip

    @ex.solution
    def mean(x: Tensor, weight: float = 1.0) -> Tensor:
        """The mean of each row, times weight. x: (..., n) -> (...)."""
        ### BEGIN SOLUTION
        return weight * x.mean(dim=-1)
        ### END SOLUTION

    @ex.cases
    def _(g):
        shapes = [(2, 3), (4,), (1, 2), (2, 3, 4), (3, 3, 2)]
        plain = [{"x": torch.randn(*shape, generator=g)} for shape in shapes]
        return [plain[0], {"x": torch.randn(3, 2, generator=g), "weight": 2.0}, *plain[1:]]

    @ex.behaviour("the mean of equal numbers is that number")
    def _(answer):
        expect(answer(torch.full((2, 3), 5.0)), torch.tensor([5.0, 5.0]))

    ex.mistake("the sum", "Nothing is divided.", "By what must it be divided?")(
        lambda x, weight=1.0: weight * x.sum(-1)
    )
    ex.alternative("sum over n")(lambda x, weight=1.0: weight * x.sum(-1) / x.shape[-1])
    return ex


def right(x, weight=1.0):
    return weight * x.mean(-1)


def said(exercise, function):
    return str(judge(exercise, function))


# --- who passes ----------------------------------------------------------------------------------


class Method:
    def __call__(self, x, weight=1.0):
        return right(x, weight)

    def method(self, x, weight=1.0):
        return right(x, weight)


class Module(nn.Module):
    def forward(self, x, weight=1.0):
        return right(x, weight)


@pytest.mark.parametrize(
    "function",
    [
        right,
        functools.partial(right, weight=1.0),
        Method(),
        Method().method,
        Module(),
        lambda numbers, by=1.0: right(numbers, by),
        lambda *args, **options: right(*args, **options),
        lambda x, weight=1.0, dim=-1: weight * x.mean(dim),
        lambda x, *, weight=1.0: right(x, weight),
        lambda x, weight=1.0: right(x.double(), weight).to(x.dtype),
        lambda x, weight=1.0: (
            print("hello") or warnings.warn("w", stacklevel=1) or right(x, weight)
        ),
    ],
)
def test_a_right_answer_of_any_kind_passes_in_silence(mean, function, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdict = judge(mean, function)
    assert verdict.lines == ("✓ mean: all 6 behaviours hold (2 points).",)
    assert (verdict.points, capsys.readouterr()) == (2.0, ("", ""))


def test_a_blank_is_not_written_yet_and_earns_nothing(mean):
    def blank(x, weight=1.0):
        raise NotImplementedError("not written yet")

    verdict = judge(mean, blank)
    assert "not written yet" in verdict.lines[0]
    assert (verdict.blank, verdict.points, len(verdict.lines)) == (True, 0.0, 1)


def test_an_operation_that_torch_lacks_is_not_taken_for_the_blank(mean):
    verdict = judge(mean, lambda x, weight=1.0: (x > 0).softmax(-1))
    assert not verdict.blank
    assert "NotImplementedError" in verdict.lines[0]


def test_half_a_blank_is_shown_where_it_still_raises(mean):
    def half(x, weight=1.0):
        if weight != 1.0:
            raise NotImplementedError("not written yet")
        return x.mean(-1)

    assert "your code raised NotImplementedError: not written yet (line" in said(mean, half)


# --- what is not a function ----------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize("given", [torch.ones(3), None, 3, "mean"])
def test_a_result_instead_of_the_function_is_refused_in_one_line(mean, given):
    with pytest.raises(TypeError, match=r'check\("mean", mean\) takes the function itself, got'):
        checks.check("mean", given)


def test_an_unknown_id_is_told_its_neighbours():
    with pytest.raises(ValueError, match="no exercise 'sofmax'; did you mean softmax"):
        checks.check("sofmax", right)


# --- crashes -------------------------------------------------------------------------------------


def test_an_exception_shows_the_learners_own_line(mean):
    def answer(x, weight=1.0):
        return torch.matmul(x, x) + undefined  # noqa: F821

    message = said(mean, answer)
    assert "✗ mean: your code raised RuntimeError" in message
    assert "`return torch.matmul(x, x) + undefined  # noqa: F821`" in message
    assert "It was called with x (2, 3)." in message


@pytest.mark.parametrize("error", [SystemExit(1), MemoryError(), GeneratorExit(), ValueError()])
def test_no_exception_gets_out(mean, error):
    def answer(x, weight=1.0):
        raise error

    assert f"your code raised {type(error).__name__}" in said(mean, answer)


def test_an_endless_recursion_is_one_line(mean):
    def answer(x, weight=1.0):
        return answer(x)

    assert "your code raised RecursionError" in said(mean, answer)


def test_an_interrupt_passes_through(mean):
    def answer(x, weight=1.0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(mean, answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: 3, "takes 0 positional arguments but 1 was given"),
        (lambda x: x.mean(-1), "unexpected keyword argument 'weight'"),
        (lambda x, y, weight: x, "missing 2 required positional arguments"),
    ],
)
def test_a_wrong_signature_is_named(mean, answer, message):
    assert message in said(mean, answer)


def test_addresses_and_long_messages_are_cut(mean):
    def answer(x, weight=1.0):
        raise ValueError(f"{object()} " + "x" * 1000)

    first = said(mean, answer).splitlines()[0]
    assert " at 0x" not in first
    assert len(first) < 400


# --- structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, weight=1.0: right(x, weight).tolist(), "got list, want a tensor"),
        (
            lambda x, weight=1.0: right(x, weight).detach().numpy(),
            "got numpy.ndarray, want a tensor",
        ),
        (lambda x, weight=1.0: (right(x), x), "got a tuple of 2, want a tensor"),
        (lambda x, weight=1.0: 1.0, "got float, want a tensor"),
        (lambda x, weight=1.0: x[..., :2], "For x (2, 3): got shape (2, 2), want (2,)"),
        (lambda x, weight=1.0: None, "Your function returned None"),
        (lambda x, weight=1.0: right(x, weight).to_sparse(), "not a dense tensor"),
        (lambda x, weight=1.0: right(x, weight).to("meta"), "not a dense tensor"),
    ],
)
def test_a_result_of_another_kind_or_shape_is_named(mean, answer, message):
    assert message in said(mean, answer)


# --- recognising ---------------------------------------------------------------------------------


def test_a_known_mistake_is_named_with_its_cause_and_question(mean):
    verdict = judge(mean, lambda x, weight=1.0: weight * sum(x.unbind(-1)))
    assert verdict.mistake == "the sum"
    assert verdict.lines[1:] == (
        "Your result equals the sum. Nothing is divided.",
        "By what must it be divided?",
    )


def test_a_mistake_made_only_sometimes_is_named_for_those_inputs_alone(mean):
    verdict = judge(mean, lambda x, weight=1.0: weight * (x.sum(-1) if x.ndim == 3 else x.mean(-1)))
    assert verdict.lines[1] == "For x (2, 3, 4) your result equals the sum."


def test_zeros_and_nans_alone_are_no_proof_of_a_mistake(mean):
    mean.mistake("nan", "It is nan.", "Why?")(lambda x, weight=1.0: right(x, weight) * float("nan"))

    def answer(x, weight=1.0):
        return right(x, weight) * (float("nan") if weight != 1.0 else 1.0)

    assert judge(mean, answer).mistake is None


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (lambda x, weight=1.0: right(x.detach(), weight), "detached gradient"),
        (torch.no_grad()(right), "detached gradient"),
        (torch.inference_mode()(right), "detached gradient"),
        (lambda x, weight=1.0: weight * x.sub_(1).mean(-1) + weight, "input changed in place"),
        (lambda x, weight=1.0: right(x.float(), weight), "wrong dtype"),
        (lambda x, weight=1.0: right(x + torch.rand(()), weight), "another result each time"),
        (lambda x, weight=1.0: right(x, weight) * random.random(), "another result each time"),
        (lambda x, weight=1.0: right(x, weight).squeeze(), "dimensions of size 1 dropped or added"),
        (lambda x, weight=1.0: right(x[:1], weight).expand(x.shape[:-1]), None),
        (lambda x, weight=1.0: torch.einsum("ij->i", x) * weight / x.shape[1], "shape hard-coded"),
        (lambda x, weight=1.0: torch.zeros(x.shape[:-1]), "zeros"),
        (lambda x, weight=1.0: x, "the identity"),
        (lambda x, weight=1.0: torch.ones(x.shape[:-1]), "a constant"),
        (lambda x, weight=1.0: right(x, weight) if weight == 1.0 else unknown, None),  # noqa: F821
    ],
)
def test_a_universal_mistake_is_found_by_its_rule(mean, answer, name):
    verdict = judge(mean, answer)
    assert (verdict.passed, verdict.mistake) == (False, name)


def test_the_gradient_is_judged_on_every_case(mean):
    def answer(x, weight=1.0):
        return right(x if weight == 1.0 else x.detach(), weight)

    assert "For x (3, 2), weight = 2.0: the gradient by `x`" in said(mean, answer)


def test_an_overwritten_tensor_that_the_gradient_needs_is_explained(mean):
    def answer(x, weight=1.0):
        exp = x.exp()
        logs = exp.log()
        exp.zero_()
        return right(logs, weight)

    assert judge(mean, answer).mistake == "a tensor that the gradient needs, overwritten"


# --- points --------------------------------------------------------------------------------------


def test_right_plain_numbers_earn_a_share_and_wrong_ones_nothing(mean):
    detached = judge(mean, lambda x, weight=1.0: right(x.detach(), weight))
    assert detached.points == round(2 * 5 / 6, 2)
    assert judge(mean, lambda x, weight=1.0: x.sum(-1)).points == 0.0


def test_nbgrader_reads_the_points_from_the_plain_text(mean, monkeypatch):
    verdict = judge(mean, lambda x, weight=1.0: right(x.detach(), weight))
    assert verdict._repr_mimebundle_()["text/plain"] == str(verdict)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert float(verdict._repr_mimebundle_()["text/plain"]) == verdict.points


def test_html_shows_what_the_learner_wrote_as_text(mean):
    def answer(x, weight=1.0):
        raise ValueError("<script>alert(1)</script>")

    page = judge(mean, answer)._repr_mimebundle_()["text/html"]
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


# --- the surroundings ----------------------------------------------------------------------------


def test_a_check_leaves_the_notebook_as_it_was(mean):
    torch.manual_seed(3)
    before = torch.get_rng_state()

    def answer(x, weight=1.0):
        torch.manual_seed(1)
        torch.rand(3)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return right(x, weight)

    judge(mean, answer)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_check_does_not_depend_on_where_it_is_called(context):
    softmax = find("softmax")
    with context():
        assert judge(softmax, lambda s: s.softmax(-1)).passed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_check_does_not_depend_on_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        softmax = find("softmax")
        assert judge(softmax, lambda s: s.softmax(-1)).passed
        name = judge(softmax, lambda s: s.exp() / s.exp().sum(-1, keepdim=True)).mistake
    finally:
        torch.set_default_dtype(torch.float32)
    assert name == "softmax without subtracting the maximum"


def test_a_check_takes_less_than_half_a_second():
    attention, times = find("attention"), []
    judge(attention, attention.reference)
    for mistake in attention.mistakes[:9]:
        started = time.perf_counter()
        judge(attention, mistake.function)
        times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 2] < 0.5


# --- progress ------------------------------------------------------------------------------------


def test_the_best_points_attempts_and_hints_are_kept(mean):
    checks.check("mean", lambda x, weight=1.0: x.sum(-1))
    checks.check("mean", right)
    checks.check("mean", lambda x, weight=1.0: x.sum(-1))
    assert [str(checks.hint("mean"))[:6] for _ in range(4)] == [
        "Hint 1",
        "Hint 2",
        "Hint 3",
        "Hint 3",
    ]
    assert progress.load()["mean"] == progress.Record(attempts=3, points=2.0, solved=True, hints=3)
    assert "1 of 1 exercises solved, 2 of 2 points; all done" in repr(checks.status())


def test_a_blank_is_no_attempt(mean):
    def blank(x, weight=1.0):
        raise NotImplementedError("not written yet")

    checks.check("mean", blank)
    assert "next: mean (about 5 min)" in repr(checks.status())
    assert progress.load() == {}


def test_an_impossible_hint_level_is_refused(mean):
    with pytest.raises(ValueError, match="level must be 1, 2 or 3, got 4"):
        checks.hint("mean", 4)


def test_torn_and_strange_lines_are_passed_over(mean, course_home):
    checks.check("mean", right)
    with (course_home / "progress.jsonl").open("ab") as file:
        file.write(b'\n[1]\n\xff\xfe\n{"exercise": 3}\n{"exercise": "mean", "att')
    checks.check("mean", right)
    assert progress.load()["mean"].attempts == 2


def test_a_folder_that_cannot_be_written_stops_nobody(mean, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "file"))
    assert checks.check("mean", right).passed
    assert "could not be saved" in capsys.readouterr().out


def test_two_notebooks_can_write_at_once(mean, course_home):
    code = (
        "from course_lib.grading import progress\n"
        "for _ in range(200): progress.note_hint('mean', 1); progress._add('mean', attempt=True)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert progress.load()["mean"].attempts == 400


def test_forgetting_forgets_one_exercise(mean):
    checks.check("mean", right)
    progress.note_hint("other", 2)
    progress.forget("mean")
    assert set(progress.load()) == {"other"}


# --- the graders graded --------------------------------------------------------------------------


def test_the_report_counts_and_says_what_got_through(mean):
    mean.alternative("not right")(lambda x, weight=1.0: x.sum(-1))
    mean.mistake("not wrong", "Nothing is.", "Is it?")(right)
    totals = mutants.summary([mean])
    assert totals["exercises"] == 1
    assert totals["blanks"] == {"total": 1, "rejected": 1}
    assert totals["solutions"] == {"total": 1, "accepted": 1}
    assert totals["alternatives"] == {"total": 2, "accepted": 1}
    through = totals["per_exercise"]["mean"]["got_through"]
    assert [line.partition(":")[0] for line in through] == ["not right", "not wrong"]
    assert not mutants.passes(totals)


def test_a_mistake_under_another_name_is_rejected_but_not_named(mean):
    mean.mistakes.append(Mistake("the same sum", "Also.", "Why?", mean.mistakes[0].function))
    count = mutants.examine(mean)["mistakes"]
    assert (count.total - count.good, count.total - count.named) == (0, 1)


def test_two_exercises_cannot_share_an_id(mean):
    with pytest.raises(ValueError, match="two exercises have the id 'mean'"):
        Exercise("mean", "99_test", "Mean", 1, 1, 1, "", ("", "", ""))


# --- in a real kernel ----------------------------------------------------------------------------

CELLS = [
    "import torch\nfrom course_lib.checks import check, hint, status",
    "def softmax(scores):\n    shifted = scores - scores.max(-1, keepdim=True)\n    return shifted",
    'check("softmax", softmax)',
    'check("softmax", torch.ones(2))',
    'check("sofmax", torch.softmax)',
    'check("softmax", lambda scores: scores.softmax(-1))',
    'hint("softmax", 9)',
    "status()",
]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The outputs of CELLS in Jupyter, where a cell's file is a kernel's temporary name."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    env = {**os.environ, "COURSE_HOME": str(tmp_path_factory.mktemp("home"))}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True)
    client.create_kernel_manager()
    client.start_new_kernel(env=env)
    client.start_new_kernel_client()
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    return [cell.outputs for cell in notebook.cells]


def test_a_kernel_shows_the_learners_line_and_no_stack(kernel):
    (output,) = kernel[2]
    plain = output.data["text/plain"]
    assert "(line 2: `shifted = scores - scores.max(-1, keepdim=True)`)" in plain
    assert "TypeError" in output.data["text/html"]
    assert len(plain.splitlines()) <= 3


@pytest.mark.parametrize(("cell", "begins"), [(3, "check("), (4, "there is no"), (6, "level must")])
def test_a_misuse_of_check_is_one_line_in_a_kernel(kernel, cell, begins):
    (output,) = kernel[cell]
    assert output.output_type == "error"
    assert len(output.traceback) == 1
    assert output.traceback[0].startswith(begins)


def test_a_kernel_shows_success_and_the_board(kernel):
    assert kernel[5][0].data["text/plain"].startswith("✓ softmax")
    assert "1 of " in kernel[7][0].data["text/plain"]
    assert "<table>" in kernel[7][0].data["text/html"]


def test_messages_survive_json(mean):
    verdict = judge(mean, lambda x, weight=1.0: x.sum(-1))
    assert json.loads(json.dumps(str(verdict))) == str(verdict)
