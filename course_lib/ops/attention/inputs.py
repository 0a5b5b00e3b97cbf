"""The checked arguments of one call of `attention`, and what the backends ask of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ... import masks

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Inputs:
    """Arguments of `attention` after checking: shapes, dtypes and devices fit together."""

    query: Float[Tensor, "batch heads n_q d_k"]
    key: Float[Tensor, "batch groups n_k d_k"]
    value: Float[Tensor, "batch groups n_k d_v"]
    mask: masks.Mask | None
    bias: Float[Tensor, "..."] | None
    scale: float
    dropout_p: float = 0.0
    return_weights: bool = False
    return_lse: bool = False
    generator: torch.Generator | None = None

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

    def visible(self) -> Bool[Tensor, "batch_or_1 heads_or_1 n_q n_k"]:
        """The mask as a bool matrix; all True where there is none."""
        n_q, n_k = self.lengths
        device = self.query.device
        if self.mask is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, n_q, n_k)
        return self.mask.dense(n_q, n_k, device)

    def dropout(self, weights: Tensor) -> Tensor:
        """Weights zeroed with probability p, the rest scaled up so that the mean stays."""
        if self.dropout_p == 0:
            return weights
        noise = torch.empty_like(weights)
        keep = noise.uniform_(generator=self.generator) >= self.dropout_p
        return weights * keep / (1 - self.dropout_p)

    def isolated(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value without NaN and inf in the keys, and `poison` that remembers them.

        0 · NaN is NaN: a broken number in a key that nobody may see would still reach every output
        (and every gradient) through the products. So it is taken out of key and value, and NaN is
        added instead to the *scores* of that key, where the mask decides who sees it.
        poison: (batch, heads, 1, n_k), 0 or NaN. Without a mask all keys are seen: nothing to do.
        """
        q, k, v = self.query, self.key, self.value
        if self.mask is None:
            return q, k, v, q.new_zeros(1, 1, 1, 1)
        broken = self.broken_keys()[..., None]  # (batch, groups, n_k, 1)
        k, v = k.masked_fill(broken, 0), v.masked_fill(broken, 0)
        poison = q.new_zeros(broken.shape).masked_fill(broken, math.nan).mT
        return q, k, v, self.per_head(poison)

    def broken_keys(self) -> Bool[Tensor, "batch groups n_k"]:
        """Keys that hold a NaN or inf, in themselves or in their value."""
        return ~(self.key.isfinite().all(-1) & self.value.isfinite().all(-1))

    def per_head(self, x: Tensor) -> Tensor:
        """(batch, groups, ...) -> (batch, heads, ...): each group serves heads/groups heads."""
        heads, groups = self.query.shape[1], self.key.shape[1]
        return x if heads == groups else x.repeat_interleave(heads // groups, dim=1)


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
    """The arguments of `attention` as `Inputs`, or a ValueError/TypeError that names the culprit."""
    query, key, value = _autocast(query, key, value)
    _check_tensors(query, key, value)
    _check_shapes(query, key, value)
    if mask is not None:
        mask = _check_mask(mask, query, key)
    if bias is not None:
        _check_bias(bias, query, key)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    return Inputs(
        query, key, value, mask, bias, float(scale), dropout_p, return_weights, return_lse, generator
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, cast as PyTorch's own attention would (float64 is left alone)."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or any(t.dtype not in FLOATS[:3] for t in tensors):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
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
        raise ValueError(f"query and key must have the same d_head (their last dimension): {shapes}")
    if query.shape[3] == 0:
        raise ValueError(f"query has d_head 0, nothing to compare: {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key/value heads: "
            f"{shapes}"
        )


def _check_mask(mask: masks.Mask | Tensor, query: Tensor, key: Tensor) -> masks.Mask:
    batch, heads, n_q, _ = query.shape
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


def _check_bias(bias: Tensor, query: Tensor, key: Tensor) -> None:
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
