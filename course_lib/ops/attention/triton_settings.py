"""Tile sizes, warps and pipeline stages of the attention kernels: a small table, picked by hand.

They were chosen without a GPU, as the largest tiles that keep all numbers in registers and fit the
shared memory of an A100 and an H100 (`tests/test_triton_compile_attention.py`), and have not been
timed. Kernels that sum dK and dV hold two sums of (block_k, d): they are what spills first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import triton_runtime


@dataclass(frozen=True)
class Launch:
    """How to start one kernel: queries and keys in a tile, warps, and loads in flight."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """The launch as keyword arguments of a kernel."""
        return {
            "BLOCK_Q": self.block_q, "BLOCK_K": self.block_k,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


INTERPRETER = Launch(64, 64, 4, 1)

# By bytes of a number and the wider of d_k and d_v, rounded up to a power of 2 (64 at least).
FORWARD = {
    (2, 64): Launch(128, 64, 8, 3),
    (2, 128): Launch(128, 64, 8, 2),
    (2, 256): Launch(64, 32, 8, 2),
    (4, 64): Launch(32, 32, 8, 2),
    (4, 128): Launch(16, 16, 4, 2),
    (4, 256): Launch(16, 16, 4, 2),
}
BACKWARD_QUERY = {
    (2, 64): Launch(128, 64, 8, 2),
    (2, 128): Launch(128, 32, 8, 2),
    (2, 256): Launch(64, 32, 8, 2),
    (4, 64): Launch(32, 32, 8, 1),
    (4, 128): Launch(16, 16, 4, 2),
    (4, 256): Launch(16, 16, 8, 2),
}
BACKWARD_KEY = {
    (2, 64): Launch(32, 128, 8, 2),
    (2, 128): Launch(32, 128, 8, 1),
    (2, 256): Launch(16, 32, 4, 1),
    (4, 64): Launch(32, 32, 8, 1),
    (4, 128): Launch(16, 32, 8, 2),
    (4, 256): Launch(16, 16, 8, 1),
}


def forward_launch(query: Tensor, value: Tensor) -> Launch:
    """How to start the forward kernel for these tensors."""
    return _pick(FORWARD, query, value)


def query_launch(query: Tensor, value: Tensor) -> Launch:
    """How to start the backward kernel that sums dQ."""
    return _pick(BACKWARD_QUERY, query, value)


def key_launch(query: Tensor, value: Tensor) -> Launch:
    """How to start the backward kernel that sums dK and dV."""
    return _pick(BACKWARD_KEY, query, value)


def _pick(table: dict[tuple[int, int], Launch], query: Tensor, value: Tensor) -> Launch:
    if triton_runtime.capability(query.device) == 0:
        return INTERPRETER
    d = max(query.shape[-1], value.shape[-1])
    wide = next(width for width in (64, 128, 256) if d <= width)
    return table[query.element_size(), wide]
