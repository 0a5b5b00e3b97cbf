"""Numbers in words: each says its own name, and a held-out one is never seen in training."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from course_lib import data


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SMALL = data.number_pairs(0, 99)
# two right answers for each number
TWICE = SMALL + data.number_pairs(0, 99, target="fr_BE")


@pytest.mark.parametrize(
    ("number", "english", "french"),
    [
        (0, "zero", "zéro"),
        (21, "twenty-one", "vingt et un"),
        (71, "seventy-one", "soixante et onze"),
        (80, "eighty", "quatre-vingts"),
        (99, "ninety-nine", "quatre-vingt-dix-neuf"),
        (1001, "one thousand and one", "mille un"),
        (9999, "nine thousand, nine hundred and ninety-nine",
         "neuf mille neuf cent quatre-vingt-dix-neuf"),
    ],
)  # fmt: skip
def test_a_number_is_said_as_its_language_says_it(number, english, french):
    assert data.number_pairs(number, number) == [(english, french)]


def test_belgium_counts_seventy_and_ninety_by_tens():
    assert [target for _, target in data.number_pairs(70, 70, target="fr_BE")] == ["septante"]
    assert data.number_pairs(97, 97, target="fr_BE")[0][1] == "nonante-sept"


def test_all_numbers_come_once_and_in_their_order():
    pairs = data.number_pairs()
    assert len(pairs) == 10_000
    assert pairs[42] == ("forty-two", "quarante-deux")
    for side in (0, 1):  # no two numbers sound alike, so there is one right answer
        assert len({pair[side] for pair in pairs}) == len(pairs)


def test_any_two_languages_will_do():
    assert data.number_pairs(3, 4, source="de", target="es") == [
        ("drei", "tres"),
        ("vier", "cuatro"),
    ]


# --- the split ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 100), count=st.sampled_from([1, 50, 99]))
def test_no_held_out_number_is_in_training_and_no_pair_is_lost(seed, count):
    train, held_out = data.split_numbers(TWICE, count, generator=generator(seed))
    assert {source for source, _ in train}.isdisjoint(source for source, _ in held_out)
    assert sorted(train + held_out) == sorted(TWICE)
    assert len({source for source, _ in train}) == count
    assert len(train) == 2 * count


def test_a_split_keeps_the_order_and_the_same_seed_splits_alike():
    train, held_out = data.split_numbers(SMALL, 60, generator=generator(1))
    assert [pair for pair in SMALL if pair in train] == train
    assert (train, held_out) == data.split_numbers(SMALL, 60, generator=generator(1))
    assert train != data.split_numbers(SMALL, 60, generator=generator(2))[0]


def test_a_split_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    data.split_numbers(SMALL, 60, generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [-1, 0, 100, 101])
def test_a_split_refuses_to_leave_a_part_empty(count):
    with pytest.raises(ValueError, match=rf"count={count} of the 100 numbers"):
        data.split_numbers(SMALL, count, generator=generator())


# --- what cannot be said --------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(-1, 5), (5, 4), (0, 10_000)])
def test_numbers_out_of_range_are_refused(first, last):
    with pytest.raises(ValueError, match=f"got first={first} and last={last}"):
        data.number_pairs(first, last)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["source", "target"])
@pytest.mark.parametrize("language", ["klingon", "", "fr_XX", None])
def test_an_unknown_language_is_named(name, language):
    with pytest.raises(ValueError, match=f"{name} must be a language .* got {language!r}"):
        data.number_pairs(0, 1, **{name: language})


def test_without_num2words_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ImportError, match=r"needs num2words: run  pip install 'course-lib\[learn"):
        data.number_pairs()
