"""The rules themselves, and how they combine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .tiles import Tiles, build_tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query index, key index) -> bool; integer tensors that broadcast together."""


class Mask:
    """A rule that says which query may look at which key. Build one with the functions below.

    `batch_size` and `num_heads` are None where the rule is the same for every batch element or
    head; otherwise they say for how many it was made.
    """

    batch_size: int | None = None
    num_heads: int | None = None

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        """The rule as a function for sequences of n_q queries and n_k keys.

        This is FlexAttention's `mask_mod`: it takes (batch, head, query index, key index), integer
        tensors that broadcast, and returns bool. Raises ValueError where the rule cannot apply to
        these lengths.
        """
        raise NotImplementedError

    def dense(
        self, n_q: int, n_k: int, device: torch.device | str | None = None
    ) -> Bool[Tensor, "batch_or_1 heads_or_1 n_q n_k"]:
        """The rule written out as a bool matrix, True = may attend.

        Always 4-D, with size 1 where the rule does not depend on the batch element or the head, so
        that it broadcasts to (batch, heads, n_q, n_k).
        """
        rule = self.mask_mod(_length("n_q", n_q), _length("n_k", n_k), device)
        return self._evaluate(rule, torch.arange(n_q, device=device), n_k, device)

    def rows(
        self,
        queries: Int[Tensor, " queries"],
        n_q: int,
        n_k: int,
        device: torch.device | str | None = None,
    ) -> Bool[Tensor, "batch_or_1 heads_or_1 queries n_k"]:
        """`dense(n_q, n_k)[:, :, queries]`, without writing out the others."""
        rule = self.mask_mod(_length("n_q", n_q), _length("n_k", n_k), device)
        return self._evaluate(rule, queries.to(device), n_k, device)

    def block_mask(
        self,
        n_q: int,
        n_k: int,
        device: torch.device | str | None = None,
        block_size: int = 128,
    ) -> BlockMask:
        """The rule as FlexAttention's `BlockMask` (blocks of block_size x block_size)."""
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(
            self.mask_mod(n_q, n_k, device),
            B=self.batch_size,
            H=self.num_heads,
            Q_LEN=n_q,
            KV_LEN=n_k,
            device=str(device or "cpu"),
            BLOCK_SIZE=block_size,
        )

    def tiles(
        self,
        n_q: int,
        n_k: int,
        block_q: int = 64,
        block_k: int = 64,
        device: torch.device | str | None = None,
    ) -> Tiles:
        """Which block_q x block_k tiles are empty, full or partial: what blockwise kernels read.

        Looks only at the pairs of tiles that `rectangles` leaves open. Lengths need not be
        multiples of the block sizes; positions beyond the end do not count.
        """
        for name, size in (("block_q", block_q), ("block_k", block_k)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive int, got {size!r}")
        return build_tiles(self, _length("n_q", n_q), _length("n_k", n_k), block_q, block_k, device)

    def rectangles(
        self,
        n_q: int,
        n_k: int,
        rows: Int[Tensor, "rows 2"],
        columns: Int[Tensor, "columns 2"],
    ) -> tuple[Tensor, Tensor]:
        """What is known of whole rectangles: may any pair be visible, and are all of them?

        Rectangle (r, c) holds the queries from rows[r, 0] to rows[r, 1] and the keys from
        columns[c, 0] to columns[c, 1], both included. Two bool tensors that broadcast to
        (batch or 1, heads or 1, rows, columns): where the first is False no pair is visible, where
        the second is True all are; in between somebody has to look. It costs nothing per pair, so
        that tiles of long sequences are found without walking through n_q * n_k pairs.
        """
        unknown = torch.ones(1, 1, len(rows), len(columns), dtype=torch.bool, device=rows.device)
        return unknown, ~unknown

    def _evaluate(
        self, rule: MaskMod, queries: Tensor, n_k: int, device: torch.device | str | None
    ) -> Tensor:
        batch, heads = self._sizes()
        if 0 in (batch, heads, len(queries), n_k):  # no pair to ask about
            return torch.zeros(batch, heads, len(queries), n_k, dtype=torch.bool, device=device)
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(1, -1, 1, 1)
        i = queries.view(1, 1, -1, 1)
        j = torch.arange(n_k, device=device).view(1, 1, 1, -1)
        visible = rule(b, h, i, j)
        return visible.expand(batch, heads, len(queries), n_k)

    def _sizes(self) -> tuple[int, int]:
        """(batch or 1, heads or 1); a mask made for a batch of 0 stays one of 0."""
        batch, heads = self.batch_size, self.num_heads
        return 1 if batch is None else batch, 1 if heads is None else heads

    def __and__(self, other: Mask | Tensor) -> Mask:
        """Both rules must allow the pair."""
        return Combined(self, _as_mask(other), "&")

    def __or__(self, other: Mask | Tensor) -> Mask:
        """Either rule may allow the pair."""
        return Combined(self, _as_mask(other), "|")

    __rand__, __ror__ = __and__, __or__  # tensor & mask, tensor | mask

    def __invert__(self) -> Mask:
        """The pairs this rule forbids."""
        return _Not(self)


# --- the rules ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """See `causal`."""

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        shift = n_k - n_q
        return lambda b, h, i, j: j <= i + shift

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        (i0, i1), (j0, j1) = _ends(rows, columns)
        shift = n_k - n_q
        return j0 <= i1 + shift, j1 <= i0 + shift

    def __repr__(self) -> str:
        return "causal()"


@dataclass(frozen=True, eq=False)
class SlidingWindow(Mask):
    """See `sliding_window`."""

    left: int
    right: int

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        shift = n_k - n_q
        left, right = shift - self.left, shift + self.right
        return lambda b, h, i, j: (i + left <= j) & (j <= i + right)

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        (i0, i1), (j0, j1) = _ends(rows, columns)
        left, right = n_k - n_q - self.left, n_k - n_q + self.right
        return (i0 + left <= j1) & (j0 <= i1 + right), (i1 + left <= j0) & (j1 <= i0 + right)

    def __repr__(self) -> str:
        return f"sliding_window(left={self.left}, right={self.right})"


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """See `padding`."""

    lengths: Int[Tensor, " batch"]

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return len(self.lengths)

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        lengths = self.lengths.to(device)
        return lambda b, h, i, j: j < lengths[b]

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        lengths = self.lengths.to(rows.device).view(-1, 1, 1, 1)
        _, (j0, j1) = _ends(rows, columns)
        return j0 < lengths, j1 < lengths

    def __repr__(self) -> str:
        return f"padding({self.lengths.tolist()})"


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """See `prefix`."""

    lengths: Int[Tensor, " batch"]

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return len(self.lengths)

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        lengths, shift = self.lengths.to(device), n_k - n_q
        return lambda b, h, i, j: (j < lengths[b]) | (j <= i + shift)

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (Padding(self.lengths) | Causal()).rectangles(n_q, n_k, rows, columns)

    def __repr__(self) -> str:
        return f"prefix({self.lengths.tolist()})"


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """See `documents`."""

    ids: Int[Tensor, "batch n_k"]

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return len(self.ids)

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        if self.ids.shape[1] != n_k or n_q > n_k:
            raise ValueError(
                f"documents: ids have shape {tuple(self.ids.shape)} (batch, n_k) and serve "
                f"n_k = {self.ids.shape[1]} keys and at most as many queries; got n_q = {n_q}, "
                f"n_k = {n_k}"
            )
        ids, shift = self.ids.to(device), n_k - n_q
        return lambda b, h, i, j: ids[b, i + shift] == ids[b, j]

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        ids = self.ids.to(rows.device)
        q_least, q_most = (x[:, None, :, None] for x in _extremes(ids, rows + n_k - n_q))
        k_least, k_most = (x[:, None, None, :] for x in _extremes(ids, columns))
        overlap = (q_least <= k_most) & (k_least <= q_most)
        return overlap, overlap & (q_least == q_most) & (k_least == k_most)

    def __repr__(self) -> str:
        return f"documents(ids of shape {tuple(self.ids.shape)})"


@dataclass(frozen=True, eq=False)
class Longformer(Mask):
    """See `longformer`."""

    window: int
    global_tokens: Tensor  # 1-D positions, or bool (batch, n_k)
    least_n_k: int = 0  # keys that the positions need; kept, since torch.compile cannot look it up

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        return len(self.global_tokens) if self.global_tokens.dtype == torch.bool else None

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        near = sliding_window(self.window, self.window).mask_mod(n_q, n_k, device)
        of_key = self._flags(n_k).to(device)  # (batch or 1, n_k)
        # A query's flag is that of its own position; before the first key (n_q > n_k): False.
        of_query = F.pad(of_key, (n_q - n_k, 0))  # (batch or 1, n_q)
        step = 0 if self.batch_size is None else 1  # one row of flags serves the whole batch
        return lambda b, h, i, j: near(b, h, i, j) | of_query[b * step, i] | of_key[b * step, j]

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_key = self._flags(n_k).to(rows.device).int()
        of_query = F.pad(of_key, (n_q - n_k, 0))
        q_all, q_any = (x[:, None, :, None] > 0 for x in _extremes(of_query, rows))
        k_all, k_any = (x[:, None, None, :] > 0 for x in _extremes(of_key, columns))
        window = sliding_window(self.window, self.window)
        maybe, surely = window.rectangles(n_q, n_k, rows, columns)
        return maybe | q_any | k_any, surely | q_all | k_all

    def _flags(self, n_k: int) -> Tensor:
        """Bool (batch or 1, n_k): which positions are global."""
        if self.global_tokens.dtype == torch.bool:
            if self.global_tokens.shape[1] != n_k:
                raise ValueError(
                    f"longformer: global_tokens has shape {tuple(self.global_tokens.shape)} "
                    f"(batch, n_k), but there are n_k = {n_k} keys"
                )
            return self.global_tokens
        if self.least_n_k > n_k:
            raise ValueError(
                f"longformer: global_tokens {self.global_tokens.tolist()} need n_k of at least "
                f"{self.least_n_k}, but there are n_k = {n_k} keys"
            )
        flags = torch.zeros(1, n_k, dtype=torch.bool, device=self.global_tokens.device)
        flags[0, self.global_tokens] = True
        return flags

    def __repr__(self) -> str:
        bool_mask = self.global_tokens.dtype == torch.bool
        tokens = tuple(self.global_tokens.shape) if bool_mask else self.global_tokens.tolist()
        return f"longformer(window={self.window}, global_tokens={tokens})"


@dataclass(frozen=True, eq=False)
class BigBird(Mask):
    """See `bigbird`."""

    block_size: int
    window_blocks: int
    global_blocks: int
    random_blocks: int
    seed: int

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        if n_q > n_k:
            raise ValueError(f"bigbird needs n_q <= n_k, got n_q = {n_q}, n_k = {n_k}")
        table = self.block_table(math.ceil(n_k / self.block_size)).to(device)
        shift, size = n_k - n_q, self.block_size
        return lambda b, h, i, j: table[(i + shift) // size, j // size]

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        table = self.block_table(math.ceil(n_k / self.block_size)).to(rows.device)
        (a, b), (c, d) = ((rows + n_k - n_q) // self.block_size).mT, (columns // self.block_size).mT
        # How many blocks are visible in each rectangle of blocks, from sums over its corners.
        corner = F.pad(table.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
        above, below = corner[a], corner[b + 1]  # (rows, blocks + 1)
        visible = below[:, d + 1] - above[:, d + 1] - below[:, c] + above[:, c]  # (rows, columns)
        area = (b + 1 - a)[:, None] * (d + 1 - c)[None, :]
        return (visible > 0)[None, None], (visible == area)[None, None]

    def block_table(self, num_blocks: int) -> Bool[Tensor, "num_blocks num_blocks"]:
        """Which block of queries sees which block of keys; the same at every call."""
        block = torch.arange(num_blocks)
        table = (block[:, None] - block[None, :]).abs() <= self.window_blocks // 2
        table |= (block[:, None] < self.global_blocks) | (block[None, :] < self.global_blocks)
        # One random order of the keys' blocks per row; the first unseen ones are the random blocks.
        order = _uniform(self.seed, num_blocks).masked_fill(table, math.inf)
        rank = order.argsort(dim=1).argsort(dim=1)
        return table | (rank < self.random_blocks)

    def __repr__(self) -> str:
        return (
            f"bigbird({self.block_size}, window_blocks={self.window_blocks}, global_blocks="
            f"{self.global_blocks}, random_blocks={self.random_blocks}, seed={self.seed})"
        )


def _uniform(seed: int, size: int) -> Float[Tensor, "size size"]:
    """size x size numbers from [0, 1), the same ones for the same seed on every machine.

    Each is a hash of its place (two rounds of multiply and shift, as in lowbias32 by C. Wellons):
    plain integer arithmetic, which torch.compile and vmap can trace; a generator they cannot.
    """
    start = seed * 0x9E3779B9 & 0xFFFFFFFF
    place = torch.arange(size * size).view(size, size) + start
    for multiplier in (0x7FEB352D, 0x846CA68B):
        place = ((place & 0xFFFFFFFF) ^ (place & 0xFFFFFFFF) >> 16) * multiplier
    return ((place & 0xFFFFFFFF) ^ (place & 0xFFFFFFFF) >> 16).double() / 2**32


@dataclass(frozen=True, eq=False)
class FromDense(Mask):
    """See `from_dense`."""

    tensor: Bool[Tensor, "batch_or_1 heads_or_1 n_q n_k"]

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        return self.tensor.shape[0] if self.tensor.shape[0] != 1 else None

    @property
    def num_heads(self) -> int | None:  # type: ignore[override]
        return self.tensor.shape[1] if self.tensor.shape[1] != 1 else None

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        table = self._fitting(n_q, n_k).to(device)
        # Along a dimension of size 1 the entry at 0 answers for all.
        b1, h1, i1, j1 = (0 if size == 1 else 1 for size in table.shape)
        return lambda b, h, i, j: table[b * b1, h * h1, i * i1, j * j1]

    def dense(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> Tensor:
        """The tensor itself, without a copy."""
        return self._fitting(n_q, n_k).to(device).expand(-1, -1, n_q, n_k)

    def _fitting(self, n_q: int, n_k: int) -> Tensor:
        sizes = zip(self.tensor.shape[2:], (n_q, n_k), strict=True)
        if any(have not in (1, want) for have, want in sizes):
            raise ValueError(
                f"mask has shape {tuple(self.tensor.shape)} (batch, heads, n_q, n_k), but there "
                f"are n_q = {n_q} queries and n_k = {n_k} keys"
            )
        return self.tensor

    def __repr__(self) -> str:
        return f"from_dense(bool tensor of shape {tuple(self.tensor.shape)})"


@dataclass(frozen=True, eq=False)
class Combined(Mask):
    first: Mask
    second: Mask
    operator: str  # "&" or "|"

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_heads"):  # clash is found here, not at the first use
            _agreed(name, self.first, self.second)

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        return _agreed("batch_size", self.first, self.second)

    @property
    def num_heads(self) -> int | None:  # type: ignore[override]
        return _agreed("num_heads", self.first, self.second)

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        first = self.first.mask_mod(n_q, n_k, device)
        second = self.second.mask_mod(n_q, n_k, device)
        if self.operator == "&":
            return lambda b, h, i, j: first(b, h, i, j) & second(b, h, i, j)
        return lambda b, h, i, j: first(b, h, i, j) | second(b, h, i, j)

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, second = (m.rectangles(n_q, n_k, rows, columns) for m in (self.first, self.second))
        if self.operator == "&":
            return first[0] & second[0], first[1] & second[1]
        return first[0] | second[0], first[1] | second[1]

    def __repr__(self) -> str:
        return f"({self.first!r} {self.operator} {self.second!r})"


@dataclass(frozen=True, eq=False)
class _Not(Mask):
    inner: Mask

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        return self.inner.batch_size

    @property
    def num_heads(self) -> int | None:  # type: ignore[override]
        return self.inner.num_heads

    def mask_mod(self, n_q: int, n_k: int, device: torch.device | str | None = None) -> MaskMod:
        inner = self.inner.mask_mod(n_q, n_k, device)
        return lambda b, h, i, j: ~inner(b, h, i, j)

    def rectangles(
        self, n_q: int, n_k: int, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        maybe, surely = self.inner.rectangles(n_q, n_k, rows, columns)
        return ~surely, ~maybe

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


# --- the constructors ------------------------------------------------------------------------


def causal() -> Mask:
    """Nobody looks ahead: query i sees keys up to i + n_k - n_q.

    Source: "Attention Is All You Need", Vaswani et al. 2017, section 3.2.3.
    """
    return Causal()


def padding(lengths: Sequence[int] | Tensor) -> Mask:
    """Keys at or beyond a sequence's length are invisible.

    lengths: one int per batch element, at least 0; a length of 0 leaves nothing to see.
    """
    return Padding(_int_vector("lengths", lengths))


def prefix(lengths: Sequence[int] | Tensor) -> Mask:
    """The first `lengths[b]` keys are visible to all; the rest is causal (prefix language model).

    Source: "Exploring the Limits of Transfer Learning", Raffel et al. 2020, section 3.2.1.
    """
    return Prefix(_int_vector("lengths", lengths))


def sliding_window(left: int, right: int) -> Mask:
    """Query i sees keys from i - left to i + right, both included.

    i is counted from the bottom-right alignment. `sliding_window(w, 0)` is causal with a window of
    w + 1 keys. Source: "Longformer", Beltagy et al. 2020, section 3.1.
    """
    return SlidingWindow(_length("left", left), _length("right", right))


def documents(ids: Sequence[Sequence[int]] | Tensor) -> Mask:
    """Only keys of the same document are visible: several texts packed into one sequence.

    ids: integers (batch, n_k), one document number per position. Combine with `causal()` for
    language models: `documents(ids) & causal()`.
    """
    tensor = _as_tensor("ids", ids)
    if tensor.ndim != 2 or _is_not_integer(tensor):
        raise ValueError(
            f"ids must be integers of shape (batch, n_k), got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    return Documents(tensor)


def longformer(window: int, global_tokens: Iterable[int] | Tensor = ()) -> Mask:
    """`window` keys on each side, and global tokens that attend to all and are attended to by all.

    window: at least 0 (0 = only itself). global_tokens: positions, counted from the first key; or
    a bool tensor (batch, n_k) that marks them, when they differ between batch elements.
    Combine with `causal()` for language models.
    Source: "Longformer", Beltagy et al. 2020, section 3.1.
    """
    if isinstance(global_tokens, int):
        raise TypeError(
            f"global_tokens must be a collection of positions, got the int {global_tokens}: write "
            f"[{global_tokens}] for that one position, range({global_tokens}) for the first ones"
        )
    if isinstance(global_tokens, Tensor) and global_tokens.dtype == torch.bool:
        if global_tokens.ndim != 2:
            raise ValueError(
                "a bool global_tokens must have shape (batch, n_k), got "
                f"{tuple(global_tokens.shape)}"
            )
        return Longformer(_length("window", window), global_tokens)
    if isinstance(global_tokens, Iterable) and not isinstance(global_tokens, Tensor):
        global_tokens = list(global_tokens)
    positions = _int_vector("global_tokens", global_tokens)
    least_n_k = int(positions.max()) + 1 if len(positions) else 0
    return Longformer(_length("window", window), positions, least_n_k)


def bigbird(
    block_size: int,
    *,
    window_blocks: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    seed: int = 0,
) -> Mask:
    """Blocks of positions see a window, a few global blocks and a few random ones.

    Per block of queries: the `window_blocks` around it (odd, itself in the middle), the first
    `global_blocks` (which also see everything), and `random_blocks` more, drawn from `seed` and the
    same at every call and in every head. The last block may be ragged.
    Source: "Big Bird", Zaheer et al. 2020, section 2.
    """
    if _length("block_size", block_size) < 1:
        raise ValueError("block_size must be at least 1, got 0")
    if _length("window_blocks", window_blocks) % 2 == 0:
        raise ValueError(
            f"window_blocks must be odd (a block is in the middle), got {window_blocks}"
        )
    global_blocks = _length("global_blocks", global_blocks)
    random_blocks = _length("random_blocks", random_blocks)
    return BigBird(block_size, window_blocks, global_blocks, random_blocks, _length("seed", seed))


def from_dense(tensor: Tensor) -> Mask:
    """A mask from a bool tensor (n_q, n_k) or (batch, heads, n_q, n_k), True = may attend.

    Any dimension may be 1 to broadcast. Three dimensions are refused: it could not be told whether
    the first one means batch or heads.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"mask must be a torch.Tensor or a Mask, got {type(tensor).__name__}")
    if tensor.dtype != torch.bool:
        raise TypeError(
            f"mask must be bool (True = may attend), got {tensor.dtype}; numbers that are added "
            "to the scores go in bias"
        )
    if tensor.ndim not in (2, 4):
        raise ValueError(
            "mask must have shape (n_q, n_k) or (batch, heads, n_q, n_k), got "
            f"{tuple(tensor.shape)}"
        )
    return FromDense(tensor if tensor.ndim == 4 else tensor[None, None])


# --- checks of arguments ----------------------------------------------------------------------


def _ends(rows: Tensor, columns: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """First and last query (1, 1, rows, 1), first and last key (1, 1, 1, columns)."""
    i0, i1 = rows.mT.view(2, 1, 1, -1, 1)
    j0, j1 = columns.mT.view(2, 1, 1, 1, -1)
    return (i0, i1), (j0, j1)


def _extremes(values: Int[Tensor, "b n"], spans: Int[Tensor, "spans 2"]) -> tuple[Tensor, Tensor]:
    """The least and the largest value in each span, (b, spans) each."""
    ends = [values[:, first : last + 1].aminmax(dim=1) for first, last in spans.tolist()]
    return torch.stack([e.min for e in ends], 1), torch.stack([e.max for e in ends], 1)


def _as_mask(other: Mask | Tensor) -> Mask:
    return other if isinstance(other, Mask) else from_dense(other)


def _agreed(name: str, first: Mask, second: Mask) -> int | None:
    a, b = getattr(first, name), getattr(second, name)
    if a is not None and b is not None and a != b:
        raise ValueError(
            f"masks of different {name} cannot be combined: {first} has {a}, {second} has {b}"
        )
    return a if b is None else b


def _length(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def _is_not_integer(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def _as_tensor(name: str, values: object) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:  # says what, but not where
        raise TypeError(f"{name} must be ints, got {values!r}: {error}") from None


def _int_vector(name: str, values: Sequence[int] | Tensor) -> Tensor:
    tensor = _as_tensor(name, values)
    if tensor.numel() == 0:
        tensor = tensor.long()
    if tensor.ndim != 1 or _is_not_integer(tensor):
        raise ValueError(
            f"{name} must be a 1-D collection of ints, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    # A compiled graph cannot look at values, and need not wait for them.
    if not torch.compiler.is_compiling() and (tensor < 0).any():
        raise ValueError(f"{name} must be at least 0, got {tensor.tolist()}")
    return tensor.long()
