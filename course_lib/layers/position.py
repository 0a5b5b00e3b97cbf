"""The hook through which every scheme of position enters attention.

`MultiHeadAttention(position=...)` lets a scheme act at three places:

    encode_tokens   on the tokens, before the projections     sinusoidal, learned
    encode_heads    on queries and keys, after them           rotary
    score_bias      on the scores, before the softmax         T5, ALiBi, Shaw, Transformer-XL

A scheme overrides one of them and inherits "nothing" for the others. Keys stand at 0 … n_k - 1 and
the last query stands at the last key, as in `masks` and as decoding with a cache needs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Position(nn.Module):
    """A scheme that does nothing: the base of those that do something."""

    def encode_tokens(
        self, x: Float[Tensor, "batch length d_model"], offset: int
    ) -> Float[Tensor, "batch length d_model"]:
        """Tokens with their positions in them; offset: position of the first one."""
        return x

    def encode_heads(
        self, x: Float[Tensor, "batch heads length d_head"], offset: int
    ) -> Float[Tensor, "batch heads length d_head"]:
        """Queries or keys with their positions in them; offset: position of the first one."""
        return x

    def score_bias(
        self,
        query: Float[Tensor, "batch heads n_q d_head"],
        key: Float[Tensor, "batch groups n_k d_head"],
        scale: float,
    ) -> Float[Tensor, "#batch heads n_q n_k"] | None:
        """What is added to the scores, which are query · key · scale."""
        return None


def distances(
    n_q: int, n_k: int, device: torch.device | str | None = None
) -> Int[Tensor, "n_q n_k"]:
    """Key position minus query position: negative where the key is earlier."""
    query = torch.arange(n_k - n_q, n_k, device=device)
    return torch.arange(n_k, device=device)[None, :] - query[:, None]
