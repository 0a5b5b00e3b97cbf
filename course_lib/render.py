"""Run notebooks and store their outputs the way this repository keeps them.

``python -m course_lib.render notebooks/02_attention.ipynb`` runs a notebook from top to bottom
in a fresh kernel and writes it back without what changes from machine to machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from . import checkout, claims

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path, timeout: int = 600) -> tuple[NotebookNode, float]:
    """Run a notebook in a fresh kernel, in its own folder.

    Args:
        path: the notebook; the file is not changed.
        timeout: seconds that one cell may take.

    Returns:
        The notebook with its outputs, and the seconds it took, the kernel's start included.
    """
    notebook = cast(NotebookNode, nbformat.read(path, as_version=4))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
    )
    started = time.perf_counter()
    client.execute()
    return notebook, time.perf_counter() - started


def clean(notebook: NotebookNode) -> NotebookNode:
    """Remove what differs between machines: widget state, Python's patch version, timings."""
    for name in ("widgets", "jupytext"):
        notebook.metadata.pop(name, None)
    notebook.metadata["kernelspec"] = dict(KERNELSPEC)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for name in ("execution", "collapsed", "scrolled"):
            cell.metadata.pop(name, None)
    return notebook


def main(paths: Sequence[str]) -> int:
    """Run and store each notebook named, then the ledger of claims; stop at the first failure."""
    for path in map(Path, paths):
        try:
            notebook, seconds = execute(path)
        except CellExecutionError as error:
            print(f"{path} is left as it was, because a cell failed:\n{error}", file=sys.stderr)
            return 1
        nbformat.write(clean(notebook), path)
        print(f"{path}: {seconds:.0f} s", flush=True)
        claims.write(checkout.find_root(path.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
