"""Looking back over the edge of a segment, at what each layer read before.

A long text is read in segments. A layer's memory is what it was given to read in the segments
before, kept as numbers: looked at, but not learned through.

    Transformer-XL                        [ memory | segment ]
    Compressive Transformer  [ compressed | memory | segment ]

In all of them time is axis 1, the oldest first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..masks import Mask
from ..ops.attention import attention
from .encoder_layer import EncoderLayer
from .multi_head_attention import KVCache

POOLINGS = ("mean", "max")
COMPRESSIONS = (*POOLINGS, "conv")


def extend_memory(
    hidden: Float[Tensor, "batch n d_model"], memory: Float[Tensor, "batch m d_model"], length: int
) -> Float[Tensor, "batch kept d_model"]:
    """The last `length` vectors of memory followed by hidden, out of the gradient's reach.

    Source: Dai et al. 2019, "Transformer-XL", §3.2; SG there is the detach here.

    Args:
        hidden: what the layer read now, (batch, n, d_model).
        memory: what it read before, (batch, m, d_model); m may be 0.
        length: most vectors kept, at least 0.
    """
    both = torch.cat([memory, hidden], dim=1).detach()  # (batch, m + n, d_model)
    return both[:, max(both.shape[1] - length, 0) :]  # [-length:] would keep all of it for 0


def split_memory(
    memory: Float[Tensor, "batch m d_model"], length: int, rate: int
) -> tuple[Float[Tensor, "batch old d_model"], Float[Tensor, "batch kept d_model"]]:
    """What no longer fits into `length`, and what stays.

    Only whole groups of `rate` go. Up to rate - 1 vectors stay beyond `length` until their group is
    there, so that nothing is lost.
    """
    old = max(memory.shape[1] - length, 0) // rate * rate
    return memory[:, :old], memory[:, old:]


def compress(
    old: Float[Tensor, "batch m d_model"], rate: int, how: str = "mean"
) -> Float[Tensor, "batch m_compressed d_model"]:
    """Each `rate` neighbours become one, their mean or their max.

    Source: Rae et al. 2020, "Compressive Transformers for Long-Range Sequence Modelling", §3.1.

    Raises:
        ValueError: m is no multiple of rate, or there is no such pooling.
    """
    groups = _groups(old, rate)
    if how not in POOLINGS:
        raise ValueError(f"how must be one of {', '.join(POOLINGS)}; got {how!r}")
    return groups.mean(2) if how == "mean" else groups.amax(2)


class Compression(nn.Module):
    """`compress` as a module; "conv" learns how.

    The convolution has a kernel and a stride of `rate`: a matrix from `rate` neighbours, side by
    side, to one vector. It starts as their mean. Source: Rae et al. 2020, §3.1.

    Args:
        d_model: width of the memories.
        rate: how many become one.
        how: "mean", "max" or "conv".

    Raises:
        ValueError: a size is below 1, or there is no such compression.
    """

    def __init__(self, d_model: int, rate: int, how: str = "mean") -> None:
        super().__init__()
        if d_model < 1 or rate < 1:
            raise ValueError(f"d_model and rate must be at least 1, got {d_model} and {rate}")
        if how not in COMPRESSIONS:
            raise ValueError(f"compression must be one of {', '.join(COMPRESSIONS)}; got {how!r}")
        self.rate, self.how = rate, how
        if how == "conv":
            self.mix = nn.Linear(rate * d_model, d_model)
            with torch.no_grad():
                self.mix.weight.copy_(torch.eye(d_model).repeat(1, rate) / rate)
                self.mix.bias.zero_()

    def forward(
        self, old: Float[Tensor, "batch m d_model"]
    ) -> Float[Tensor, "batch m_compressed d_model"]:
        """(batch, m, d_model) -> (batch, m / rate, d_model); m is a multiple of rate."""
        if self.how != "conv":
            return compress(old, self.rate, self.how)
        # (batch, m / rate, rate, d_model) -> (batch, m / rate, rate · d_model) -> (…, d_model)
        return self.mix(_groups(old, self.rate).flatten(2))

    def extra_repr(self) -> str:
        return f"rate={self.rate}, how={self.how!r}"


class MemoryLayer(EncoderLayer):
    """An `EncoderLayer` whose keys and values come from a memory and x, its queries from x alone.

    The last token of x stands at the last key, so that `masks.causal()` shows each token the whole
    memory and x up to itself, and a relative scheme of position counts on over the seam.
    Source: Dai et al. 2019, "Transformer-XL", §3.2, on pre-norm or post-norm blocks alike.
    """

    def forward(
        self,
        x: Float[Tensor, "batch n d_model"],
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
        *,
        memory: Float[Tensor, "batch m d_model"] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, n, d_model) -> the same shape; mask, bias and weights are (…, n, m + n).

        Args:
            memory: (batch, m, d_model), of the same kind as x: what this layer read before. Without
                one the layer is an `EncoderLayer`.

        Raises:
            ValueError: a cache and a memory are both given.
        """
        if memory is None:
            return super().forward(x, mask, bias, cache, return_weights)
        if cache is not None:
            raise ValueError("cache and memory are both given; one of them must be None")
        residual = self.attention_residual
        before = residual.norm(memory) if residual.norm_first else memory

        def attend(now: Tensor) -> Any:
            context = torch.cat([before, now], dim=1)  # (batch, m + n, d_model)
            return self.attention(now, context, mask, bias, return_weights=return_weights)

        result = residual(x, attend)
        x, *weights = result if return_weights else (result,)
        x = self.feed_forward_residual(x, self.feed_forward)
        return (x, weights[0]) if return_weights else x


def reconstruction_loss(
    layer: MemoryLayer,
    hidden: Float[Tensor, "batch n d_model"],
    old: Float[Tensor, "batch m d_model"],
    compressed: Float[Tensor, "batch m_compressed d_model"],
) -> Float[Tensor, ""]:
    """How differently a layer's heads answer when they look at compressed memories, not the old.

    The mean squared difference between attention(hidden, old) and attention(hidden, compressed), by
    contents alone, without positions. Only `compressed` gets a gradient: compression learns to
    serve the layer, and the layer does not learn to be easily served.
    Source: Rae et al. 2020, §3.2 and algorithm 2, whose norm is a mean square here.
    """
    hidden, old = hidden.detach(), old.detach()
    query = _heads(layer, "q_proj", hidden)

    def find(memory: Tensor) -> Tensor:
        key, value = _heads(layer, "k_proj", memory), _heads(layer, "v_proj", memory)
        return attention(query, key, value)  # (batch, heads, n, d_head)

    return F.mse_loss(find(compressed), find(old))


def _heads(layer: MemoryLayer, name: str, x: Tensor) -> Float[Tensor, "batch heads n d_head"]:
    """Queries, keys or values of x, by weights that get no gradient."""
    residual = layer.attention_residual
    x = _frozen(residual.norm, x) if residual.norm_first else x
    x = _frozen(getattr(layer.attention, name), x)
    # (batch, n, heads · d_head) -> (batch, n, heads, d_head) -> (batch, heads, n, d_head)
    return x.unflatten(-1, (-1, layer.attention.d_head)).transpose(1, 2)


def _frozen(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), through which a gradient reaches x and no parameter."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return functional_call(module, parameters, (x,))


def _groups(
    old: Float[Tensor, "batch m d_model"], rate: int
) -> Float[Tensor, "batch m_compressed rate d_model"]:
    """(batch, m, d_model) -> (batch, m / rate, rate, d_model)."""
    if rate < 1 or old.shape[1] % rate:
        raise ValueError(f"old must hold a multiple of rate={rate} memories, got {old.shape[1]}")
    return old.unflatten(1, (old.shape[1] // rate, rate))
