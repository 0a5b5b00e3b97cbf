"""Dates as people write them in several languages, with the same day in ISO 8601."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date, timedelta
from itertools import product
from typing import Any

import torch

LOCALES = ("en", "fr", "de", "es", "pt", "it")
FORMATS = ("short", "medium", "long", "full")
# One century: a year of two digits is then no riddle.
FIRST_DAY, LAST_DAY = date(1950, 1, 1), date(2049, 12, 31)

Pair = tuple[str, str]


def date_pairs(
    count: int,
    *,
    generator: torch.Generator,
    locales: Sequence[str] = LOCALES,
    formats: Sequence[str] = FORMATS,
) -> list[Pair]:
    """Pairs like ("lundi 19 janvier 2004", "2004-01-19"): a day as it is written, and in ISO 8601.

    Days from 1950 to 2049, locales and formats are drawn at random, each as likely as any other. A
    short style that begins with the month (English) is left out: beside one that begins with the
    day, nobody can tell which day "5/2/72" is.

    Args:
        count: number of pairs.
        generator: source of the draws; the same state gives the same pairs.
        locales: languages that babel knows, such as "fr" or "de_AT".
        formats: of "short" (19/01/2004) to "full" (lundi 19 janvier 2004).

    Raises:
        ImportError: babel, which knows how dates are written, is missing; says what to install.
        ValueError: an argument is impossible, or locales and formats leave no style.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    styles, write = _styles(locales, formats)
    days = (LAST_DAY - FIRST_DAY).days + 1
    day = torch.randint(days, (count,), generator=generator).tolist()
    style = torch.randint(len(styles), (count,), generator=generator).tolist()
    drawn = [(FIRST_DAY + timedelta(d), *styles[s]) for d, s in zip(day, style, strict=True)]
    return [
        (write(day, format=format_, locale=locale), day.isoformat())
        for day, locale, format_ in drawn
    ]


def split_dates(
    pairs: Sequence[Pair], fraction: float = 0.9, *, generator: torch.Generator
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs that have no day in common, in whatever language it is written.

    Args:
        pairs: (as written, ISO), from `date_pairs`.
        fraction: share of the days, not of the pairs, that goes to training.
        generator: source of the choice; the same state gives the same days.

    Raises:
        ValueError: `fraction` is not strictly between 0 and 1, or one part would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    days = sorted({iso for _, iso in pairs})
    cut = round(fraction * len(days))
    if not 0 < cut < len(days):
        raise ValueError(f"fraction={fraction} of the {len(days)} days in pairs leaves one empty")
    order = torch.randperm(len(days), generator=generator).tolist()
    seen = {days[i] for i in order[:cut]}
    train = [pair for pair in pairs if pair[1] in seen]
    return train, [pair for pair in pairs if pair[1] not in seen]


def _styles(
    locales: Sequence[str], formats: Sequence[str]
) -> tuple[list[tuple[Any, str]], Callable[..., str]]:
    """(locale, format) of every style that can be decided, and the function that writes a day."""
    try:
        from babel import Locale, UnknownLocaleError
        from babel.dates import format_date
    except ModuleNotFoundError:
        raise ImportError("date_pairs needs babel: run  pip install 'course-lib[learn]'") from None
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats must be of {', '.join(FORMATS)}; got {unknown[0]!r}")
    try:
        known = [Locale.parse(name) for name in locales]
    except (UnknownLocaleError, ValueError, TypeError) as error:
        raise ValueError(f"locales must be names that babel knows: {error}") from None
    styles = [
        (locale, name)
        for locale, name in product(known, formats)
        if not (name == "short" and locale.date_formats[name].pattern.upper().startswith("M"))
    ]
    if not styles:
        raise ValueError(
            f"locales {list(locales)} and formats {list(formats)} leave no style: a short one that "
            "begins with the month is left out"
        )
    return styles, format_date
