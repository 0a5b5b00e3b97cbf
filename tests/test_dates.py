"""Dates in many languages: each pair is one day, and held-out days are never seen in training."""

import sys
from datetime import date

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from course_lib import data
from course_lib.data.dates import FIRST_DAY, FORMATS, LAST_DAY, LOCALES


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(count=400, seed=0, **options):
    return data.date_pairs(count, generator=generator(seed), **options)


@pytest.mark.parametrize(
    ("locale", "format_", "written"),
    [
        ("en", "full", "{day:%A}, {day:%B} {day.day}, {day.year}"),
        ("fr", "short", "{day:%d/%m/%Y}"),
        ("de", "short", "{day:%d.%m.%y}"),
        ("de", "medium", "{day:%d.%m.%Y}"),
        ("es", "short", "{day.day}/{day.month}/{day:%y}"),
    ],
)
def test_a_day_is_written_as_its_language_writes_it(locale, format_, written):
    """Held against Python's own calendar (in the C locale, which speaks English)."""
    for text, iso in pairs(50, locales=[locale], formats=[format_]):
        assert text == written.format(day=date.fromisoformat(iso))


@pytest.mark.parametrize(
    ("locale", "format_", "months"),
    [
        ("en", "long", {"January", "July", "December"}),
        ("fr", "full", {"janvier", "juillet", "décembre"}),
        ("de", "full", {"Januar", "Juli", "Dezember"}),
        ("es", "full", {"enero", "julio", "diciembre"}),
        ("pt", "full", {"janeiro", "julho", "dezembro"}),
        ("it", "full", {"gennaio", "luglio", "dicembre"}),
    ],
)
def test_each_language_names_its_months(locale, format_, months):
    texts = [text for text, _ in pairs(600, locales=[locale], formats=[format_])]
    assert all(any(month in text for text in texts) for month in months)


def test_every_day_is_real_and_of_the_century():
    days = [date.fromisoformat(iso) for _, iso in pairs()]
    assert all(FIRST_DAY <= day <= LAST_DAY for day in days)
    assert len({day.year for day in days}) > 90


def test_what_is_written_decides_the_day():
    """No text stands for two days: a reader who is told nothing else can know the answer."""
    days = {}
    for text, iso in pairs(60_000):
        assert days.setdefault(text, iso) == iso


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("format_", FORMATS)
def test_day_and_year_stand_in_the_text_in_every_style(locale, format_):
    if (locale, format_) == ("en", "short"):
        return
    for text, iso in pairs(30, locales=[locale], formats=[format_]):
        assert str(int(iso[8:])) in text
        assert iso[2:4] in text


def test_the_english_short_style_is_left_out():
    with pytest.raises(
        ValueError, match=r"locales \['en'\] and formats \['short'\] leave no style"
    ):
        pairs(locales=["en"], formats=["short"])
    both = [text for text, _ in pairs(locales=["en", "es"], formats=["short"])]
    assert all(int(text.split("/")[0]) <= 31 for text in both)
    assert any(int(text.split("/")[0]) > 12 for text in both)  # Spanish: the day comes first


def test_every_style_is_drawn_about_as_often():
    texts = [text for text, _ in pairs(6_000, locales=["fr"], formats=["short", "full"])]
    short = sum("/" in text for text in texts) / len(texts)
    assert 0.45 < short < 0.55


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others():
    assert pairs(seed=3) == pairs(seed=3)
    assert pairs(seed=3) != pairs(seed=4)


def test_drawing_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    data.split_dates(pairs(), generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


# --- the split ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 100), fraction=st.sampled_from([0.1, 0.5, 0.9]))
def test_no_held_out_day_is_in_training_and_no_pair_is_lost(seed, fraction):
    ours = [(f"{text}{i}", iso) for i, (text, iso) in enumerate(MANY)]
    train, held_out = data.split_dates(ours, fraction, generator=generator(seed))
    assert {iso for _, iso in train}.isdisjoint(iso for _, iso in held_out)
    assert sorted(train + held_out) == sorted(ours)
    assert len({iso for _, iso in train}) == round(fraction * len({iso for _, iso in ours}))


# 40 days, each in five languages
MANY = [(f"{name} ", f"2001-02-{day:02d}") for day in range(1, 29) for name in "abcde"]


def test_a_split_keeps_the_order_and_the_same_seed_splits_alike():
    drawn = pairs()
    train, held_out = data.split_dates(drawn, generator=generator(1))
    assert [pair for pair in drawn if pair in train] == train
    assert (train, held_out) == data.split_dates(drawn, generator=generator(1))
    assert held_out != data.split_dates(drawn, generator=generator(2))[1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_split_refuses_an_impossible_fraction(fraction):
    with pytest.raises(ValueError, match="fraction must lie strictly between 0 and 1"):
        data.split_dates(MANY, fraction, generator=generator())


def test_split_refuses_to_leave_a_part_empty():
    with pytest.raises(ValueError, match=r"fraction=0\.9 of the 1 days in pairs leaves one empty"):
        data.split_dates(MANY[:5], generator=generator())


# --- what cannot be drawn -------------------------------------------------------------------------


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        pairs(0)


def test_an_unknown_format_is_named():
    with pytest.raises(
        ValueError, match="formats must be of short, medium, long, full; got 'tiny'"
    ):
        pairs(formats=["full", "tiny"])


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["xx", "", "klingon", 3, None])
def test_an_unknown_locale_is_refused(name):
    with pytest.raises(ValueError, match="locales must be names that babel knows"):
        pairs(locales=["fr", name])


@pytest.mark.parametrize("name", ["locales", "formats"])
def test_nothing_to_choose_from_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}.*leave no style"):
        pairs(**{name: []})


def test_without_babel_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "babel", None)
    with pytest.raises(ImportError, match=r"needs babel: run  pip install 'course-lib\[learn\]'"):
        pairs()
