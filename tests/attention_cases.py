"""Attention straight from its definition, and random calls of it: what the tests compare with.

Nothing here uses `course_lib` to decide who may look at whom: each rule carries its own predicate,
written from the sentences that promise it.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from course_lib import masks

BACKENDS = ("reference", "sdpa", "tiled", "flex")
DIFFERENTIABLE = ("reference", "sdpa", "tiled")  # on a CPU
TRACEABLE = ("reference", "sdpa")  # by torch.compile and others; differentiable too
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Sees = Callable[[int, int, int, int], bool]  # (batch, head, query, key)


@dataclass
class Rule:
    mask: object  # masks.Mask, bool tensor or None
    sees: Sees


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rule: Rule
    bias: torch.Tensor | None
    scale: float | None

    @property
    def options(self):
        return {"mask": self.rule.mask, "bias": self.bias, "scale": self.scale}

    @property
    def shape(self):
        """(batch, heads, n_q, n_k)"""
        return (*self.q.shape[:3], self.k.shape[2])

    def visible(self):
        """The pairs that count, as a bool tensor (batch, heads, n_q, n_k)."""
        seen = written_out(self.rule.sees, *self.shape)
        return seen if self.bias is None else seen & (self.bias != -math.inf)


def written_out(sees, batch, heads, n_q, n_k):
    rows = [
        sees(b, h, i, j)
        for b in range(batch)
        for h in range(heads)
        for i in range(n_q)
        for j in range(n_k)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(batch, heads, n_q, n_k)


def oracle(q, k, v, visible, bias=None, scale=None):
    """One query at a time, in float64 and differentiable -> output, weights, lse."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, n_q, n_k = visible.shape
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = torch.zeros(()) if bias is None else bias
    bias = bias.double().expand(visible.shape)
    output = [[[v.new_zeros(v.shape[-1]) for _ in range(n_q)] for _ in range(heads)]
              for _ in range(batch)]  # fmt: skip
    weights, lse = q.new_zeros(visible.shape), q.new_full((batch, heads, n_q), -math.inf)
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(n_q)):
        group = h // (heads // k.shape[1])
        keys = [j for j in range(n_k) if visible[b, h, i, j]]
        if not keys:
            continue
        scores = k[b, group, keys] @ q[b, h, i] * scale + bias[b, h, i, keys]
        exps = (scores - scores.detach().max()).exp()
        row = exps / exps.sum()
        output[b][h][i] = row @ v[b, group, keys]
        weights[b, h, i, keys] = row.detach()
        lse[b, h, i] = scores.detach().max() + exps.detach().sum().log()
    flat = [row for per_head in output for rows in per_head for row in rows]
    stacked = torch.stack(flat) if flat else v.new_zeros(0)
    return stacked.view(batch, heads, n_q, v.shape[-1]), weights, lse


def randn(*shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def qkv(batch=2, heads=4, groups=2, n_q=5, n_k=7, d_k=4, d_v=3, **options):
    return (
        randn(batch, heads, n_q, d_k, seed=1, **options),
        randn(batch, groups, n_k, d_k, seed=2, **options),
        randn(batch, groups, n_k, d_v, seed=3, **options),
    )


@contextlib.contextmanager
def quick_flex():
    """FlexAttention without tracing first, which costs half a second for each new shape."""
    from torch.nn.attention import flex_attention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


def largest(tensor):
    return float(tensor.abs().max()) if tensor.numel() else 0.0


# --- random rules ----------------------------------------------------------------------------


@st.composite
def base_rules(draw, batch, heads, n_q, n_k):
    kinds = ["causal", "padding", "window", "prefix", "longformer", "longformer per batch", "dense"]
    if n_q <= n_k:
        kinds.append("documents")
    kind, shift = draw(st.sampled_from(kinds)), n_k - n_q
    lengths = draw(st.lists(st.integers(0, n_k), min_size=batch, max_size=batch))
    given = torch.tensor(lengths, dtype=torch.long)
    if kind == "causal":
        return Rule(masks.causal(), lambda b, h, i, j: j <= i + shift)
    if kind == "padding":
        return Rule(masks.padding(given), lambda b, h, i, j: j < lengths[b])
    if kind == "prefix":
        return Rule(masks.prefix(given), lambda b, h, i, j: j < lengths[b] or j <= i + shift)
    if kind == "window":
        left, right = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        return Rule(
            masks.sliding_window(left, right),
            lambda b, h, i, j: i + shift - left <= j <= i + shift + right,
        )
    if kind == "documents":
        ids = draw(_table(st.integers(-1, 2), batch, n_k))
        return Rule(
            masks.documents(torch.tensor(ids, dtype=torch.long).view(batch, n_k)),
            lambda b, h, i, j: ids[b][i + shift] == ids[b][j],
        )
    if kind == "dense":
        return draw(dense_rules(batch, heads, n_q, n_k))
    window = draw(st.integers(0, 2))
    marks = draw(_table(st.booleans(), batch, n_k))
    if kind == "longformer":  # the same positions for every batch element
        marks = [marks[0] if batch else [False] * n_k] * batch
        tokens = torch.tensor([j for j in range(n_k) if batch and marks[0][j]], dtype=torch.long)
    else:
        tokens = torch.tensor(marks, dtype=torch.bool).view(batch, n_k)
    return Rule(
        masks.longformer(window, tokens),
        lambda b, h, i, j: (
            abs(i + shift - j) <= window or marks[b][j] or (i + shift >= 0 and marks[b][i + shift])
        ),
    )


def _table(values, rows, columns):
    row = st.lists(values, min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=rows)


@st.composite
def dense_rules(draw, batch, heads, n_q, n_k):
    """A bool tensor, 2-D or 4-D, any dimension 1 to broadcast; as it is or as a `Mask`."""
    full = (batch, heads, n_q, n_k)
    shape = [draw(st.sampled_from([1, size])) for size in full]
    tensor = torch.rand(shape, generator=draw(generators())) < draw(st.sampled_from([0.2, 0.7]))
    if draw(st.booleans()):
        tensor = tensor[:1, :1].reshape(shape[2:]) if min(batch, heads) else tensor.new_ones(1, 1)
    whole = tensor.expand(full)
    return Rule(
        masks.from_dense(tensor) if draw(st.booleans()) else tensor,
        lambda b, h, i, j: bool(whole[b, h, i, j]),
    )


@st.composite
def rules(draw, batch, heads, n_q, n_k, depth=2):
    """Any rule of the package, alone or combined with `&`, `|` and `~`."""
    first = draw(base_rules(batch, heads, n_q, n_k))
    operator = draw(st.sampled_from(["", "", "&", "|", "~"])) if depth else ""
    if not operator:
        return first
    if isinstance(first.mask, torch.Tensor):
        first.mask = masks.from_dense(first.mask)
    if operator == "~":
        return Rule(~first.mask, lambda b, h, i, j: not first.sees(b, h, i, j))
    second = draw(rules(batch, heads, n_q, n_k, depth=depth - 1))
    if operator == "&":
        return Rule(
            first.mask & second.mask,
            lambda *at: first.sees(*at) and second.sees(*at),
        )
    return Rule(first.mask | second.mask, lambda *at: first.sees(*at) or second.sees(*at))


# --- random calls ----------------------------------------------------------------------------


@st.composite
def generators(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@st.composite
def tensors(draw, shape, dtype, generator):
    """Random numbers of that shape with any layout in memory: dense, transposed, sliced."""
    layout = draw(st.sampled_from(["dense", "transposed", "sliced", "expanded"]))
    if layout == "transposed":  # as the split of (batch, length, heads * d) into heads gives it
        batch, heads, length, d = shape
        return torch.randn(batch, length, heads, d, generator=generator).to(dtype).transpose(1, 2)
    if layout == "sliced":
        wide = (*shape[:2], 2 * shape[2] + 1, shape[3] + 2)
        end = 2 * shape[2] + 1
        return torch.randn(wide, generator=generator).to(dtype)[:, :, 1:end:2, 1:-1]
    if layout == "expanded" and shape[0]:
        return torch.randn(1, *shape[1:], generator=generator).to(dtype).expand(shape)
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def cases(draw, dtypes=(torch.float64,), least=0, masked=None, most=7):
    """A call of `attention`: any shapes (from `least` on), dtype, layout, mask, bias and scale."""
    batch = draw(st.sampled_from([1, 2, 2] if least else [0, 1, 2, 2]))
    groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads, dtype = groups * repeats, draw(st.sampled_from(dtypes))
    n_q, n_k = draw(st.integers(least, most)), draw(st.integers(least, most))
    d_k, d_v = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    g = draw(generators())
    q = draw(tensors((batch, heads, n_q, d_k), dtype, g))
    k = draw(tensors((batch, groups, n_k, d_k), dtype, g))
    v = draw(tensors((batch, groups, n_k, d_v), dtype, g))
    rule = Rule(None, lambda b, h, i, j: True)
    if draw(st.booleans()) if masked is None else masked:
        rule = draw(rules(batch, heads, n_q, n_k))
    bias = draw(st.none() | biases((batch, heads, n_q, n_k), dtype, g))
    return Case(q, k, v, rule, bias, draw(st.sampled_from([None, None, 0.3, 2.0, -1.0])))


@st.composite
def biases(draw, full, dtype, generator):
    """Additive scores that broadcast, with some -inf among them, of the same or another dtype."""
    shape = [draw(st.sampled_from([1, size])) for size in full]
    bias = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        bias[torch.rand(shape, generator=generator) < 0.3] = -math.inf
    bias = bias.to(draw(st.sampled_from([dtype, torch.float32])))
    return bias[(0,) * draw(st.integers(0, 3))] if 0 not in shape else bias
