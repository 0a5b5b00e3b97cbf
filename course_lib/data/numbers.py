"""Numbers in words, in two languages: a translation whose right answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

LAST = 9_999

Pair = tuple[str, str]


def number_pairs(
    first: int = 0, last: int = LAST, *, source: str = "en", target: str = "fr"
) -> list[Pair]:
    """Pairs like ("ninety-nine", "quatre-vingt-dix-neuf"), one for each number, in their order.

    Args:
        first, last: the smallest and the largest number, both included, of 0 … 9999.
        source, target: languages that num2words knows, such as "en", "fr" or "fr_BE".

    Raises:
        ImportError: num2words, which knows how numbers are said, is missing; says what to install.
        ValueError: a number or a language is impossible.
    """
    if not 0 <= first <= last <= LAST:
        raise ValueError(f"need 0 <= first <= last <= {LAST}, got first={first} and last={last}")
    say = _words(source=source, target=target)
    return [(say(n, lang=source), say(n, lang=target)) for n in range(first, last + 1)]


def split_numbers(
    pairs: Sequence[Pair], count: int, *, generator: torch.Generator
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs that have no number in common, however often it is translated.

    Args:
        pairs: (source, target), from `number_pairs`; a number is known by its source.
        count: how many numbers go to training; all pairs of the others are held out.
        generator: source of the choice; the same state gives the same numbers.

    Raises:
        ValueError: one part would be empty.
    """
    numbers = list(dict.fromkeys(source for source, _ in pairs))  # distinct, in their order
    if not 0 < count < len(numbers):
        raise ValueError(f"count={count} of the {len(numbers)} numbers in pairs leaves one empty")
    order = torch.randperm(len(numbers), generator=generator).tolist()
    seen = {numbers[i] for i in order[:count]}
    train = [pair for pair in pairs if pair[0] in seen]
    return train, [pair for pair in pairs if pair[0] not in seen]


def _words(**languages: str) -> Callable[..., str]:
    """The function that says a number, once it is sure that it speaks these languages."""
    try:
        from num2words import CONVERTER_CLASSES, num2words
    except ModuleNotFoundError:
        raise ImportError(
            "number_pairs needs num2words: run  pip install 'course-lib[learn]'"
        ) from None
    for name, language in languages.items():
        # num2words itself falls back from "fr_XX" to "fr" without a word
        if language not in CONVERTER_CLASSES:
            raise ValueError(
                f"{name} must be a language that num2words knows, such as 'en', 'fr' or 'fr_BE'; "
                f"got {language!r}"
            )
    return num2words
