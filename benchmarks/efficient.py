"""What the efficient kinds of attention save, on a CPU: seconds and memory against dense attention.

8 heads, d_head 64, float32, batch 1. The calls of a length take turns in one process; medians.
Memory is the growth of the peak of a fresh process that does one forward and backward pass.

    python benchmarks/efficient.py [--quick] [--write]

writes benchmarks/results/efficient.json.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import medians, write
from torch import Tensor

from course_lib import attention, masks
from course_lib.ops.linear_attention import linear_attention

HEADS, D_HEAD, WINDOW = 8, 64, 256
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
WINDOWS = (64, 128, 256, 512, 1024)
THREADS = 2

Method = Callable[[Tensor, Tensor, Tensor], Tensor]


def sparse(mask: masks.Mask) -> Method:
    """Attention by the blockwise backend."""
    return lambda q, k, v: attention(q, k, v, mask, backend="tiled")


def linear(backend: str) -> Method:
    """Causal linear attention; queries and keys are made features beforehand."""
    return lambda q, k, v: linear_attention(q.abs(), k.abs(), v, causal=True, backend=backend)


def plain_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal linear attention as anyone writes it first: a loop over the tokens."""
    q, k, outputs = q.abs(), k.abs(), []
    state, total = q.new_zeros(1, HEADS, D_HEAD, D_HEAD), q.new_zeros(1, HEADS, D_HEAD)
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        total = total + k[:, :, t]
        read = (q[:, :, t, None, :] @ state).squeeze(-2)
        outputs.append(read / (q[:, :, t] * total).sum(-1, keepdim=True))
    return torch.stack(outputs, dim=2)


METHODS: dict[str, Method] = {
    "dense": lambda q, k, v: attention(q, k, v, masks.causal(), backend="sdpa"),
    "dense, both ways": lambda q, k, v: attention(q, k, v, backend="sdpa"),
    "sliding window": sparse(masks.sliding_window(WINDOW - 1, 0)),
    "longformer": sparse(masks.longformer(WINDOW // 2, range(4))),
    "bigbird": sparse(masks.bigbird(64)),
    "linear": linear("tiled"),
    "linear, a token at a time": plain_loop,
}
FORWARD_ONLY = {"linear, a token at a time"}  # its backward pass is quadratic: see LOOP
LOOP = 4096
"""At this length the loop is trained too. The gradient of each `q[:, :, t]` is as long as q."""


def inputs(n: int, grad: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, n, D_HEAD, generator=g).requires_grad_(grad) for _ in range(3)]


def training_step(method: Method, n: int) -> Callable[[], Any]:
    """A forward and a backward pass."""
    q, k, v = inputs(n, grad=True)
    return lambda: torch.autograd.grad(method(q, k, v).sum(), (q, k, v))


def times(n: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each method at length n: forward, and forward with backward."""
    q, k, v = inputs(n)
    forward = medians({name: lambda m=m: m(q, k, v) for name, m in METHODS.items()}, repeats)
    both = {name: training_step(m, n) for name, m in METHODS.items() if name not in FORWARD_ONLY}
    return {"forward": forward, "training": medians(both, max(1, repeats // 2))}


def memory(name: str, n: int) -> float:
    """MiB by which the peak of a fresh process grows in one training step."""
    code = f"import efficient; efficient.report_memory({name!r}, {n})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0]
    )
    return float(done.stdout)


def report_memory(name: str, n: int) -> None:
    """Run by `memory` in a process of its own."""
    torch.set_num_threads(THREADS)
    training_step(METHODS[name], 256)()  # what PyTorch loads at the first call does not count
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    training_step(METHODS[name], n)()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**20)


def first_shorter(table: dict[int, dict[str, float]], name: str, dense: str) -> int | None:
    """The least length measured from which on the method is faster than dense attention."""
    slower = [n for n, row in table.items() if row[name] >= row[dense]]
    faster = [n for n in table if n > max(slower, default=0)]
    return min(faster, default=None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Efficient attention on a CPU.")
    parser.add_argument("--quick", action="store_true", help="lengths up to 2048, once")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    lengths, repeats = (LENGTHS[:3], 1) if options.quick else (LENGTHS, 5)
    # First, since a new process begins with the peak of the one that starts it.
    grown = {name: {m: memory(name, m) for m in lengths[-2:]} for name in METHODS
             if name not in FORWARD_ONLY}  # fmt: skip
    seconds: dict[str, dict[int, dict[str, float]]] = {"forward": {}, "training": {}}
    for n in lengths:
        for way, row in times(n, repeats).items():
            seconds[way][n] = row
            print(n, way, {name: round(s, 4) for name, s in row.items()}, flush=True)
    n = lengths[-1]
    q, k, v = inputs(n)
    by_window = medians(
        {str(w): lambda w=w: METHODS_OF_WINDOW[w](q, k, v) for w in WINDOWS}, repeats
    )
    m = min(n, LOOP)
    steps = {name: training_step(METHODS[name], m) for name in ("linear", *FORWARD_ONLY)}
    loop = medians(steps, 1)
    result = {
        "heads": HEADS, "d_head": D_HEAD, "window": WINDOW, "seconds": seconds,
        "training_by_loop": {"length": m, "seconds": loop},
        "seconds_by_window": {"length": n, "seconds": by_window}, "memory_mib": grown,
        "faster_from": {
            way: {name: first_shorter(rows, name, "dense") for name in rows[n] if name != "dense"}
            for way, rows in seconds.items()
        },
    }  # fmt: skip
    for key in ("training_by_loop", "seconds_by_window", "memory_mib", "faster_from"):
        print(key, result[key])
    for way, rows in seconds.items():
        print(way, {k: round(rows[n]["dense"] / s, 1) for k, s in rows[n].items()}, "x faster")
    if options.write:
        write("efficient", result)
    return 0


METHODS_OF_WINDOW = {w: sparse(masks.sliding_window(w - 1, 0)) for w in WINDOWS}


if __name__ == "__main__":
    sys.exit(main())
