"""A newcomer's walk through the course in a real browser: run, type, slide, answer, be corrected.

JupyterLab is started as `course lab` starts it, on a copy of the course, and driven in headless
Chromium. On failure a screenshot is left in pytest's temporary folder; WALK_SCREENSHOTS=FOLDER
keeps one of every step.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest

from course_lib.render import KERNELSPEC

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
# nbval runs every chapter; here the first, the one that is walked through, and the newest must do.
WALKED = sorted({NOTEBOOKS[0], "02_attention.ipynb", NOTEBOOKS[-1]})
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
]
LIMIT = 120  # seconds a notebook may take here: twice its own budget, for a busy machine
TOKEN = "walk"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(400),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed"),
]


# The widgets of all chapters on one page, on numbers that cost nothing.
WIDGET_PAGE = "widgets.ipynb"
WIDGETS = {
    "imports": "import torch\n\nfrom course_lib import data, models, plots\n\nplots.use_style()",
    "mask-painter": """
plots.MaskPainter(lambda mask: mask / mask.sum(1, keepdim=True).clamp(min=1), list("abcdef")).show()
""",
    "position-explorer": "plots.PositionExplorer().show()",
    "tile-explorer": "plots.TileExplorer().show()",
    "feature-explorer": "plots.FeatureExplorer().show()",
    "depth-explorer": """
plots.DepthExplorer(lambda depth, residual, norm: {"size": [1 + residual] * (depth + 1)}).show()
""",
    "next-token": """
tokenizer = data.CharTokenizer("abcd")
config = models.TransformerConfig(vocab_size=4, d_model=8, num_layers=1, num_heads=2)
plots.NextToken(models.Decoder(config), tokenizer, "abc").show()
""",
    "fill-in": """
def guess(text):
    words = text.split()
    return words, 0, {"a": 0.7, "b": 0.3}, [1 / len(words)] * len(words)


plots.FillIn(guess, "one two").show()
""",
    "live-alignment": """
plots.LiveAlignment(
    lambda text: (list(text[::-1]), list(text), torch.eye(len(text)).flip(0)), "word"
).show()
""",
    "memory-explorer": "plots.MemoryExplorer().show()",
    "layers-and-heads": """
weights = torch.rand(3, 2, 4, 4).softmax(-1)
plots.AttentionExplorer(weights, list("abcd")).show()
""",
}

# -- the machinery: a server on a copy, a page that knows JupyterLab -----------------------------


def copy_course(to):
    """The course without a learner's outputs: what has an execution count was run here."""
    shutil.copytree(ROOT / "course_lib", to / "course_lib", ignore=shutil.ignore_patterns("*.pyc"))
    for folder in ("notebooks", "exercises"):
        shutil.copytree(ROOT / folder, to / folder)
        for path in (to / folder).glob("*.ipynb"):
            notebook = nbformat.read(path, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            nbformat.write(notebook, path)
    cells = [nbformat.v4.new_code_cell(source, id=id) for id, source in WIDGETS.items()]
    metadata = {"kernelspec": KERNELSPEC}  # else JupyterLab asks which kernel to use
    page = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(page, to / "notebooks" / WIDGET_PAGE)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home):
    """Nobody's settings, nobody's progress, and all cells kept in the page so that all are seen."""
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    folders = {
        "COURSE_HOME": "course",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
    }
    return os.environ | {name: str(home / folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a JupyterLab that `course lab` started on a copy of the course."""
    home = tmp_path_factory.mktemp("walk")
    course, log, port = home / "course copy", home / "server.log", free_port()  # a space on purpose
    copy_course(course)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "course_lib.cli", "lab", "--no-browser", f"--port={port}",
             f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True"],
            cwd=course, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(home) | {"PYTHONPATH": str(course)},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address), 60, lambda: f"no JupyterLab: {log.read_text()[-2000:]}")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server and its kernels
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def answers(address):
    try:
        urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=2).close()
    except OSError:
        return False
    return True


def wait_for(happened, seconds, otherwise):
    """Poll until `happened()`; fail with `otherwise()` after `seconds`."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            pytest.fail(otherwise())
        time.sleep(0.2)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


CELLS = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  const cells = panel?.content?.model?.cells;
  if (!cells) return [];
  return Array.from({length: cells.length}, (_, i) => cells.get(i)).map(cell => ({
    id: cell.id, type: cell.type, source: cell.sharedModel.getSource(),
    count: cell.executionCount ?? null,
    outputs: cell.type === "code" ? cell.outputs.toJSON() : [],
  }));
}"""


# The indicator says idle before the kernel is bound; a Run All sent then asks for a kernel instead.
BOUND = """() => {
  const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
  return !!context?.isReady && context.session?.kernel?.connectionStatus === "connected"
    && context.session.kernel.status === "idle";
}"""


class Lab:
    """One notebook open in one page, as a learner sees it."""

    def __init__(self, page, address, pictures):
        self.page, self.address, self.pictures = page, address, pictures
        self.outside = []  # requests that would have left this machine
        page.context.route(lambda url: not is_local(url), self._refuse)
        page.on("websocket", lambda s: None if is_local(s.url) else self.outside.append(s.url))

    def _refuse(self, route):
        self.outside.append(route.request.url)
        route.abort()

    def open(self, path):
        self.path = path
        self.page.goto(f"{self.address}/lab/tree/{path}?reset&token={TOKEN}")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        wait_for(self.cells, 30, lambda: f"{path} was not opened")
        bound = lambda: self.page.evaluate(BOUND)  # noqa: E731
        wait_for(bound, 60, lambda: f"{path}: no kernel was bound to the notebook")
        return self

    def cells(self):
        return self.page.evaluate(CELLS)

    def code(self):
        return [c for c in self.cells() if c["type"] == "code" and c["source"].strip()]

    def cell(self, cell_id):
        return self.page.locator(".jp-Cell").nth([c["id"] for c in self.cells()].index(cell_id))

    def errors(self):
        return [
            f"{self.path}, cell {cell['count']}: {out['ename']}: {out['evalue']}\n{cell['source']}"
            for cell in self.cells()
            for out in cell["outputs"]
            if out["output_type"] == "error"
        ]

    def run_all(self):
        """Run > Run All Cells from the menu, as a reader does; wait until every cell has run.

        A notebook that was run already is not run again.
        """
        end = time.monotonic() + 60
        while not self._started():  # an order can be lost in the kernel's first moments
            if time.monotonic() > end:
                pytest.fail(f"{self.path}: no cell ran within 60 s of the first Run All")
            self.page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
            self.page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()
            patience = time.monotonic() + 15
            while not self._started() and time.monotonic() < patience:
                self.page.wait_for_timeout(200)
        self._wait_until_done()
        return self

    def _started(self):
        return any(cell["count"] for cell in self.code())

    def _wait_until_done(self):
        end = time.monotonic() + LIMIT
        while (
            waiting := [c["id"] for c in self.code() if c["count"] is None]
        ) and not self.errors():
            if time.monotonic() > end:
                pytest.fail(f"{self.path}: cells {waiting} had not run after {LIMIT} s")
            self.page.wait_for_timeout(250)
        assert self.errors() == []

    def type(self, cell_id, source):
        """Replace what stands in a cell, with the keyboard."""
        self.cell(cell_id).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)

    def run(self, cell_id):
        """Shift+Enter in one cell; return the text below it."""
        count = self._count(cell_id)
        self.cell(cell_id).locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")
        wait_for(
            lambda: self._count(cell_id) not in (None, count), 60, lambda: f"{cell_id} did not run"
        )
        outputs = self.cell(cell_id).locator(".jp-OutputArea-output")
        return "\n".join(outputs.all_inner_texts())

    def _count(self, cell_id):
        return next(c["count"] for c in self.cells() if c["id"] == cell_id)

    def picture(self, name):
        if self.pictures:
            self.page.screenshot(path=self.pictures / f"{Path(self.path).stem}-{name}.png")


def is_local(url):
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "about") or parts.hostname in ("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def opened(server, browser):
    """Notebooks by path, each opened once: what costs time is starting kernels."""
    folder = os.environ.get("WALK_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    labs = {}

    def open_once(path):
        if path not in labs:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            labs[path] = Lab(page, server, Path(folder) if folder else None)
            labs[path].open(path)
        return labs[path]

    yield open_once
    for lab in labs.values():
        lab.page.close()


@pytest.fixture
def visit(opened, tmp_path, request):
    """Open a notebook; afterwards keep a picture of a failure, and see that nothing called out."""
    visited, failed = [], request.session.testsfailed

    def open_and_note(path):
        visited.append(opened(path))
        return visited[-1]

    yield open_and_note
    for lab in visited:
        if request.session.testsfailed > failed:
            lab.page.screenshot(path=tmp_path / "failed.png")
            print(f"screenshot: {tmp_path / 'failed.png'}")
        assert lab.outside == [], "the course asked for something outside this machine"


def test_a_call_to_the_outside_would_be_seen(browser):
    page = browser.new_page()
    lab = Lab(page, "http://127.0.0.1", None)
    with page.expect_event("requestfailed"):
        page.set_content("<img src='https://outside.invalid/pixel.png'>")
    page.close()
    assert lab.outside == ["https://outside.invalid/pixel.png"]


# -- the walk ------------------------------------------------------------------------------------


def in_one_worker(names):
    """Tests of one notebook go to one worker: it is opened and run there once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


@pytest.mark.parametrize("name", in_one_worker(WALKED))
def test_every_cell_of_a_notebook_runs_in_the_browser(visit, name):
    lab = visit(f"notebooks/{name}").run_all()
    lab.picture("all")
    assert all(cell["count"] for cell in lab.code())


@pytest.mark.xdist_group("00_start_here.ipynb")
def test_the_picture_follows_a_sentence_that_the_learner_types(visit):
    lab = visit("notebooks/00_start_here.ipynb").run_all()
    line = lab.page.locator(".widget-text input")
    picture, strip = lab.page.locator("img.widget-image"), lab.page.locator(".widget-html").last
    line.scroll_into_view_if_needed()
    lab.picture("before")
    before = picture.get_attribute("src")
    line.click()
    line.fill("")
    line.press_sequentially("the left and the right", delay=20)
    wait_for(lambda: "right" in strip.inner_text(), 30, lambda: f"stale: {strip.inner_text()}")
    wait_for(
        lambda: picture.get_attribute("src") != before, 30, lambda: "the picture did not change"
    )
    assert "addition" not in strip.inner_text()
    lab.picture("typed")


@pytest.mark.xdist_group("00_start_here.ipynb")
def test_a_sentence_of_unknown_words_gets_a_line_and_no_traceback(visit):
    lab = visit("notebooks/00_start_here.ipynb").run_all()
    line = lab.page.locator(".widget-text input")
    line.click()
    line.fill("xyzzy")
    message = lab.page.locator(".widget-html", has_text="not one of these words")
    wait_for(message.is_visible, 30, lambda: "no message for unknown words")
    picture = lab.page.locator("img.widget-image")
    wait_for(lambda: not picture.is_visible(), 10, lambda: "the last picture is still there")
    lab.picture("unknown")
    line.fill("one or two")
    wait_for(picture.is_visible, 30, lambda: "the picture did not come back")


@pytest.mark.parametrize("name", in_one_worker(["00_start_here.ipynb", "02_attention.ipynb"]))
def test_moving_the_slider_shows_the_weights_of_another_query(visit, name):
    lab = visit(f"notebooks/{name}").run_all()
    box = lab.page.locator(".attention-explorer").last
    handle, strip = box.locator(".noUi-handle"), box.locator(".widget-html")
    picture = box.locator("img.widget-image")
    handle.scroll_into_view_if_needed()
    lab.picture("slider-before")
    words, source = strip.inner_text(), picture.get_attribute("src")
    handle.focus()
    at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    lab.page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")
    wait_for(lambda: strip.inner_text() != words, 30, lambda: "the shaded words did not change")
    wait_for(lambda: picture.get_attribute("src") != source, 30, lambda: "the map did not change")
    lab.picture("slider-after")


@pytest.fixture
def widget(visit):
    """A widget of the page, by the id of its cell; and a wait for its picture to change."""
    lab = visit(f"notebooks/{WIDGET_PAGE}").run_all()

    def find(cell_id):
        box = lab.cell(cell_id).locator(".jp-OutputArea-output").last
        box.scroll_into_view_if_needed()
        picture = box.locator("img.widget-image").last
        before = picture.get_attribute("src")
        assert before
        lab.picture(f"{cell_id}-before")

        def changed():
            what = f"the picture of {cell_id} did not change"
            wait_for(lambda: picture.get_attribute("src") != before, 30, lambda: what)
            lab.picture(f"{cell_id}-after")

        return box, changed

    return find


@pytest.mark.xdist_group("widgets")
def test_a_cell_of_the_mask_that_is_clicked_changes_the_weights(widget):
    box, changed = widget("mask-painter")
    box.locator(".widget-toggle-button").nth(1).click()  # "a" may now look at "b"
    changed()
    assert box.locator("select").input_value() == "painted by hand"
    box.locator("select").select_option("sliding window")
    wait_for(lambda: "mod-active" not in (box.locator(".widget-toggle-button").nth(3)
             .get_attribute("class") or ""), 30, lambda: "the preset was not painted")  # fmt: skip


@pytest.mark.xdist_group("widgets")
@pytest.mark.parametrize(
    "cell_id",
    ["position-explorer", "tile-explorer", "feature-explorer", "depth-explorer", "next-token"],
)
def test_a_slider_that_is_moved_changes_the_picture(widget, cell_id):
    box, changed = widget(cell_id)
    handle = box.locator(".noUi-handle").first
    handle.focus()
    at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    box.page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")
    changed()


@pytest.mark.xdist_group("widgets")
@pytest.mark.parametrize("cell_id", ["live-alignment", "fill-in"])
def test_what_is_typed_gets_its_own_picture(widget, cell_id):
    box, changed = widget(cell_id)
    box.locator(".widget-text input").fill("another one here")
    changed()


@pytest.mark.xdist_group("widgets")
def test_another_layer_shows_other_weights(widget):
    box, changed = widget("layers-and-heads")
    box.locator("select").first.select_option("2")
    changed()


WRONG = """def softmax(scores):
    return torch.exp(scores) / torch.exp(scores).sum(dim=-1, keepdim=True)"""


def right_softmax():
    """Our own answer, as `solutions/` has it."""
    notebook = nbformat.read(ROOT / "solutions" / "02_attention.ipynb", as_version=4)
    return next(cell.source for cell in notebook.cells if cell.id == "softmax")


def test_a_wrong_answer_is_named_and_a_right_one_gets_its_tick(visit):
    lab = visit("exercises/02_attention.ipynb")
    wait_for(lambda: lab.run("imports") == "", 60, lambda: "the imports did not run")
    blank = lab.run("softmax") + lab.run("softmax-check")
    assert "not written yet" in blank
    lab.type("softmax", WRONG)
    lab.run("softmax")
    said = lab.run("softmax-check")
    lab.picture("wrong")
    assert "✗" in said
    assert "without subtracting the maximum" in said
    assert len(said.strip().splitlines()) <= 3
    assert "Traceback" not in said
    lab.type("softmax", right_softmax())
    lab.run("softmax")
    said = lab.run("softmax-check")
    lab.picture("right")
    assert "✓" in said
    assert "✗" not in said
    assert lab.errors() == []
