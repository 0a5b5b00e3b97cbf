"""Counting instead of learning: the n-gram model that a small network must beat."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class KneserNey:
    """How often a token followed the last few, with less certain guesses from fewer of them.

    p_n(w | c) = max(C(c w) - D, 0) / C(c) + γ(c) p_{n-1}(w | c without its first token),
    where D depends on whether C is 1, 2 or more and γ gives back what it took. Below the longest
    contexts C(c w) counts how many different tokens stood before c w, not how often. Interpolated
    modified Kneser-Ney: Chen & Goodman 1999, "An Empirical Study of Smoothing Techniques", §3.

    Args:
        ids: a text as tokens 0 … vocab_size - 1.
        vocab_size: number of distinct tokens.
        context: most tokens looked back at.

    Raises:
        ValueError: ids are fewer than context + 1, or their n-grams do not fit into 63 bits.
    """

    def __init__(self, ids: Int[Tensor, " text"], vocab_size: int, context: int = 5) -> None:
        if len(ids) <= context:
            raise ValueError(f"ids has {len(ids)} tokens, needs more than context={context}")
        if vocab_size ** (context + 1) >= 2**63:
            raise ValueError(
                f"vocab_size={vocab_size} and context={context} need too large numbers"
            )
        self.vocab_size, self.context = vocab_size, context
        grams, counts = torch.unique(_codes(ids.long(), context, vocab_size), return_counts=True)
        orders = []
        for order in range(context, -1, -1):
            orders.append(_Order(grams, counts, vocab_size))
            if order:  # each different n-gram counts once for its shorter self
                shorter = grams % vocab_size**order
                grams, counts = torch.unique(shorter, return_counts=True)
        self.orders = orders[::-1]

    def probabilities(
        self, ids: Int[Tensor, "batch length"], targets: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length"]:
        """p(target | at most `context` tokens up to and with the one at its place, none before)."""
        length = ids.shape[1]
        p = torch.full(ids.shape, 1 / self.vocab_size, dtype=torch.float64)
        past = torch.zeros_like(ids)  # code of the last `order` tokens
        for order, table in enumerate(self.orders):
            if order:  # what is rolled round stands where there are not so many tokens before
                past = past + ids.roll(order - 1, 1) * self.vocab_size ** (order - 1)
            known = torch.arange(length) >= order - 1
            p = torch.where(known, table.mix(past, targets, p), p)
        return p

    def loss(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Mean nats per token over (inputs, targets), as `training.mean_loss` of a network."""
        surprise = [-self.probabilities(*batch).log().flatten() for batch in batches]
        return torch.cat(surprise).mean().item()


class _Order:
    """The counts of n-grams of one length: a sorted table that is looked up by bisection."""

    def __init__(self, grams: Tensor, counts: Tensor, vocab_size: int) -> None:
        self.grams, self.counts, self.vocab_size = grams, counts, vocab_size
        n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
        y = n1 / max(1, n1 + 2 * n2)
        found = [k - (k + 1) * y * b / max(1, a) for k, (a, b) in
                 enumerate(((n1, n2), (n2, n3), (n3, n4)), 1)]  # fmt: skip
        # a short text may have no n-gram that was seen three times
        discounts = torch.tensor([0.0, *(min(max(d, 0.0), k) for k, d in enumerate(found, 1))])
        self.discount = discounts.double()[counts.clamp(max=3)]
        contexts, place = torch.unique(grams // vocab_size, return_inverse=True)
        self.contexts = contexts
        self.total = torch.zeros(len(contexts), dtype=torch.float64)
        self.total.index_add_(0, place, counts.double())
        self.freed = torch.zeros(len(contexts), dtype=torch.float64)
        self.freed.index_add_(0, place, self.discount)

    def mix(self, past: Tensor, targets: Tensor, shorter: Tensor) -> Tensor:
        """p of the targets after these contexts, given p from contexts one token shorter."""
        gram, seen = _find(self.grams, past * self.vocab_size + targets)
        place, known = _find(self.contexts, past)
        own = torch.where(seen, (self.counts[gram] - self.discount[gram]).double(), 0.0)
        total = self.total[place]
        return torch.where(known, (own + self.freed[place] * shorter) / total, shorter)


def _find(table: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted number stands in a sorted table, and whether it does."""
    place = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
    return place, table[place] == wanted


def _codes(ids: Tensor, context: int, vocab_size: int) -> Tensor:
    """Every run of context + 1 tokens as one number, its first token in the highest place."""
    windows = ids.unfold(0, context + 1, 1)  # (runs, context + 1)
    powers = vocab_size ** torch.arange(context, -1, -1)
    return (windows * powers).sum(1)
