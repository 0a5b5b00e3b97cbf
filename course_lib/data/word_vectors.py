"""Word vectors from counts: words that stand in like company get like vectors. No training."""

import re
from collections import Counter

import torch
from jaxtyping import Float, Int
from torch import Tensor


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters; digits and signs are left out."""
    return re.findall(r"[^\W\d_]+", text.lower())


def word_vectors(
    text: str, *, dim: int = 64, window: int = 5, min_count: int = 6
) -> tuple[dict[str, int], Float[Tensor, "words dim"]]:
    """Vectors of length 1 for the words of a text, so that words used alike point alike.

    Counts how often two words stand within `window` words of each other, turns the counts into
    positive pointwise mutual information, and keeps the `dim` strongest directions (Levy, Goldberg
    & Dagan 2015, "Improving Distributional Similarity", §2 and §3: weight 1/distance, context
    counts to the power 0.75, square root of the spectrum). Nothing is drawn at random.

    Args:
        text: some 10 000 words or more of one language.
        dim: length of a vector; fewer where the vocabulary is smaller.
        window: how far apart two words may stand, in words, and still be company.
        min_count: words seen less often are left out: too little is known about them.

    Returns:
        The number of each word, and the vectors, one row a word.

    Raises:
        ValueError: `dim`, `window` or `min_count` is below 1, or no two words are frequent enough.
    """
    for name, value in (("dim", dim), ("window", window), ("min_count", min_count)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    words = words_of(text)
    frequent = [word for word, count in Counter(words).most_common() if count >= min_count]
    if len(frequent) < 2:
        raise ValueError(
            f"text: expected at least 2 words that occur {min_count} times, got {len(frequent)} "
            f"in {len(words)} words; pass a longer text or a smaller min_count"
        )
    number = {word: index for index, word in enumerate(frequent)}
    ids = torch.tensor([number.get(word, -1) for word in words])
    association = _positive_information(_company(ids, len(frequent), window))
    strength, directions = torch.linalg.eigh(association)
    strongest = strength.abs().argsort(descending=True)[:dim]
    vectors = directions[:, strongest] * strength[strongest].abs().sqrt()  # (words, dim)
    return number, torch.nn.functional.normalize(vectors, dim=-1).float()


def _company(ids: Int[Tensor, " text"], size: int, window: int) -> Float[Tensor, "words words"]:
    """How often each pair stands together, a pair at distance d counting 1/d; symmetric."""
    counts = torch.zeros(size, size, dtype=torch.float64)
    for distance in range(1, window + 1):
        left, right = ids[:-distance], ids[distance:]
        known = (left >= 0) & (right >= 0)
        weight = torch.full((int(known.sum()),), 1 / distance, dtype=torch.float64)
        counts.index_put_((left[known], right[known]), weight, accumulate=True)
    return counts + counts.T


def _positive_information(counts: Float[Tensor, "words words"]) -> Float[Tensor, "words words"]:
    """max(0, log of how much oftener a pair stands together than chance would have it)."""
    total = counts.sum(1)
    # the power keeps rare words from looking more telling than they are
    chance = total.pow(0.75) / total.pow(0.75).sum()
    information = (counts / (total[:, None] * chance)).log().nan_to_num(nan=0.0, neginf=0.0)
    positive = information.clamp_min(0)
    return (positive + positive.T) / 2
