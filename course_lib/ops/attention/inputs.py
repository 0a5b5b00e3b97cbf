"""The checked arguments of one call of `attention`, and what the backends ask of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ... import masks

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Inputs:
    """Arguments of `attention` after checking: shapes, dtypes and devices fit together."""

    query: Float[Tensor, "batch heads n_q d_k"]
    key: Float[Tensor, "batch groups n_k d_k"]
    value: Float[Tensor, "batch groups n_k d_v"]
    mask: masks.Mask | None
    bias: Float[Tensor, ...] | None
    scale: float
    dropout_p: float = 0.0
    return_weights: bool = False
    return_lse: bool = False
    generator: torch.Generator | None = None
    intact: bool = False  # known to hold no NaN and no inf

    @property
    def grouped(self) -> bool:
        """Fewer key/value heads than query heads."""
        return self.query.shape[1] != self.key.shape[1]

    @property
    def needs_grad(self) -> bool:
        tensors = [t for t in (self.query, self.key, self.value, self.bias) if t is not None]
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    @property
    def lengths(self) -> tuple[int, int]:
        """(n_q, n_k)"""
        return self.query.shape[2], self.key.shape[2]

    @property
    def all_visible(self) -> bool:
        """Nothing can be hidden: there is neither a mask nor a bias that might hold -inf."""
        return self.mask is None and self.bias is None

    def tiles_out_of_sight(self, who: str) -> str | None:
        """Why `who` cannot look at the mask's tiles, or None: somebody traces the call, say."""
        if torch.compiler.is_compiling() or _is_traced(self.query):
            return f"{who} must look at the mask's tiles, which no compiler can trace"
        tensors = [t for t in (self.query, self.key, self.value, self.bias) if t is not None]
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
            return f"{who} cannot run under torch.func"
        return None

    def visible(self) -> Bool[Tensor, "batch_or_1 heads_or_1 n_q n_k"]:
        """The pairs that count: those the mask shows and no bias of -inf forbids."""
        n_q, n_k = self.lengths
        device = self.query.device
        if self.mask is not None:
            shown = self.mask.dense(n_q, n_k, device)
        else:
            shown = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, n_q, n_k)
        return shown if self.bias is None else shown & (self.bias != -math.inf)

    def dropout(self, weights: Tensor) -> Tensor:
        """Weights zeroed with probability p, the rest scaled up so that the mean stays."""
        if self.dropout_p == 0:
            return weights
        noise = torch.empty_like(weights)
        keep = noise.uniform_(generator=self.generator) >= self.dropout_p
        return weights * keep / (1 - self.dropout_p)

    def isolated(self) -> Inputs:
        """The same call with 0 in place of every query, key and value that holds a NaN or inf.

        0 · NaN is NaN: a broken number in a key that nobody may see would still reach every output
        and every gradient through the products. So broken vectors are taken out beforehand, and
        `spoiled` says which outputs must show NaN for it.
        """
        if self.all_visible or self.intact:  # all see what is broken, or nothing is
            return self
        broken = self.broken_keys()[..., None]  # (batch, groups, n_k, 1)
        return replace(
            self,
            query=self.query.masked_fill(self.broken_queries()[..., None], 0),
            key=self.key.masked_fill(broken, 0),
            value=self.value.masked_fill(broken, 0),
        )

    def spoiled(
        self, visible: Bool[Tensor, "batch_or_1 heads_or_1 n_q n_k"]
    ) -> Bool[Tensor, "batch heads n_q 1"]:
        """Queries whose output must be NaN: those that see a broken key, or see and are broken."""
        shown = visible.to(torch.float32)
        broken = self.per_head(self.broken_keys()).to(shown.dtype)
        sees_broken = torch.einsum("bhij,bhj->bhi", shown, broken) > 0  # how many it sees
        return (sees_broken | (self.broken_queries() & visible.any(-1)))[..., None]

    def spoiled_by(self, attend: Callable[[Inputs], Tensor]) -> Bool[Tensor, "batch heads n_q"]:
        """`spoiled`, found by a backend's own attention, without writing the mask out.

        Attention by equal scores is the mean over the visible keys. So it says who sees a broken
        key if the first entry of a value is 1 there and 0 elsewhere, and who sees any if the others
        are 1.
        """
        width = 16  # the least that FlexAttention's kernels take
        flags = F.pad(self.broken_keys()[..., None].float(), (0, width - 1), value=1.0)
        query = flags.new_zeros(*self.query.shape[:3], width)
        hidden = None
        if self.bias is not None:
            hidden = torch.zeros_like(self.bias).masked_fill(self.bias == -math.inf, -math.inf)
        share = attend(
            replace(
                self, query=query, key=torch.zeros_like(flags), value=flags, bias=hidden,
                dropout_p=0.0,
            )
        )  # fmt: skip
        return (share[..., 0] > 0) | (self.broken_queries() & (share[..., 1] > 0))

    def broken_queries(self) -> Bool[Tensor, "batch heads n_q"]:
        """Queries that hold a NaN or inf."""
        return broken_rows(self.query)

    def broken_keys(self) -> Bool[Tensor, "batch groups n_k"]:
        """Keys that hold a NaN or inf, in themselves or in their value."""
        return broken_rows(self.key) | broken_rows(self.value)

    def per_head(self, x: Tensor) -> Tensor:
        """(batch, groups, ...) -> (batch, heads, ...): each group serves heads/groups heads."""
        heads, groups = self.query.shape[1], self.key.shape[1]
        return x if heads == groups else x.repeat_interleave(heads // groups, dim=1)

    def per_group(self, seen: Bool[Tensor, "b h n_k"]) -> Bool[Tensor, "b groups_or_1 n_k"]:
        """Keys that any head of the group sees, from what each head sees (or one for all)."""
        if seen.shape[1] == 1:
            return seen
        return seen.unflatten(1, (self.key.shape[1], -1)).any(2)  # (b, h, n) -> (b, g, r, n)


def _is_traced(x: Tensor) -> bool:
    """Whether somebody only asks for shapes, or writes down what is done."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # not there: nobody traces
    return isinstance(x, FakeTensor) or bool(tracer and tracer.get_proxy_mode())


def broken_rows(x: Float[Tensor, "*rows d"]) -> Bool[Tensor, "*rows"]:
    """Rows that hold a NaN or inf.

    One reduction is many times faster than isfinite and all; 0 · x would do too, but torch.compile
    takes that to be 0 whatever x is.
    """
    if x.shape[-1] == 0:  # amax has no answer
        return x.new_zeros(x.shape[:-1], dtype=torch.bool)
    return ~x.detach().abs().amax(-1).isfinite()


def known_intact(*tensors: Tensor) -> bool:
    """Whether it is known that nothing is broken: then nothing need be isolated.

    Asked of tensors at hand in a CPU's memory only. A GPU would have to be waited for, and under
    torch.compile and vmap there are no numbers to ask yet: there the answer is False.
    """
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return False
    try:
        return all(math.isfinite(t.detach().sum().item()) for t in tensors)
    except RuntimeError:  # no numbers: vmap, or somebody traces shapes
        return False


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: masks.Mask | Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
    return_weights: bool,
    return_lse: bool,
    generator: torch.Generator | None,
) -> Inputs:
    """The arguments of `attention` as `Inputs`, or an error that names the culprit."""
    query, key, value, bias = autocast(query, key, value, bias)
    _check_tensors(query, key, value)
    _check_shapes(query, key, value)
    if mask is not None:
        mask = _check_mask(mask, query, key)
    if bias is not None:
        bias = _check_bias(bias, query, key)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    return Inputs(
        query, key, value, mask, bias, float(scale), dropout_p,
        return_weights, return_lse, generator, known_intact(query, key, value),
    )  # fmt: skip


def autocast(query: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under torch.autocast, cast as PyTorch's own attention would (float64 is left alone)."""
    if not isinstance(query, Tensor) or query.dtype not in FLOATS[:3]:
        return query, *others
    kind = query.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return query, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS[:3] else t
        for t in (query, *others)
    )


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast; nothing where the device knows none (meta)."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have shape (batch, heads, length, d_head), got {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query is {query.dtype}: they must agree")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must agree in (batch, heads, length): {shapes}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have the same batch size: {shapes}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must have the same d_head (their last dimension): {shapes}"
        )
    if query.shape[3] == 0:
        raise ValueError(f"query has d_head 0, nothing to compare: {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key/value heads: "
            f"{shapes}"
        )


def _check_mask(mask: masks.Mask | Tensor, query: Tensor, key: Tensor) -> masks.Mask:
    batch, heads, n_q, _ = query.shape
    if isinstance(mask, Tensor) and mask.device != query.device:
        raise ValueError(f"mask is on {mask.device} but query is on {query.device}")
    if not isinstance(mask, masks.Mask):
        mask = masks.from_dense(mask)
    for name, have, want in (
        ("batch size", mask.batch_size, batch),
        ("number of heads", mask.num_heads, heads),
    ):
        if have is not None and have != want:
            raise ValueError(
                f"mask {mask} is made for {name} {have}, but query has shape {tuple(query.shape)} "
                "(batch, heads, n_q, d_head)"
            )
    mask.mask_mod(n_q, key.shape[2], query.device)  # raises where it cannot serve these lengths
    return mask


def _check_bias(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The bias in the query's dtype, or in float32 where that one would round it."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a torch.Tensor, got {type(bias).__name__}")
    if bias.dtype not in FLOATS:
        raise TypeError(
            f"bias must be floating point (it is added to the scores), got {bias.dtype}"
            + ("; a bool mask goes in mask" if bias.dtype == torch.bool else "")
        )
    if bias.device != query.device:
        raise ValueError(f"bias is on {bias.device} but query is on {query.device}")
    target = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(bias.shape), reversed(target), strict=False)
    if bias.ndim > 4 or any(have not in (1, want) for have, want in sizes):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, which does not broadcast to (batch, heads, n_q, "
            f"n_k) = {target}"
        )
    same = bias.dtype == query.dtype
    return bias if same else bias.to(torch.promote_types(query.dtype, torch.float32))
