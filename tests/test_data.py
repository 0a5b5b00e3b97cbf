"""Text, tokenizer, split and batches."""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from course_lib import data

IDS = torch.arange(100)


def batches(**changes):
    sizes = {"length": 8, "batch_size": 4, "steps": 3, "generator": torch.Generator()}
    return data.random_batches(IDS, **(sizes | changes))


@pytest.fixture(scope="module")
def docs():
    return data.python_docs()


def test_the_documentation_is_english_text_of_useful_size(docs):
    assert len(docs) > 300_000
    assert docs.count(" the ") > 3_000


def test_the_alphabet_of_the_documentation_does_not_depend_on_the_python_version(docs):
    ascii_text = {chr(code) for code in range(ord(" "), ord("~") + 1)} | {"\n"}
    assert set(docs) == ascii_text - {"$", "`"}


def test_the_documentation_has_no_rules_no_trailing_blanks_and_no_runs_of_empty_lines(docs):
    lines = docs.split("\n")
    assert not any(line.endswith(" ") for line in lines)
    assert not any(set(line) == {"*"} and len(line) > 3 for line in lines)
    assert "\n\n\n" not in docs
    assert docs == data.python_docs()


def test_a_python_without_its_documentation_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match=r"pydoc_data\.topics.*came without it"):
        data.python_docs()


@given(st.text(min_size=1))
def test_decoding_undoes_encoding(text):
    tokenizer = data.CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.long
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(set(text))


def test_symbols_are_sorted_so_that_equal_texts_give_equal_numbers():
    assert data.CharTokenizer("banana").symbols == data.CharTokenizer("nab").symbols == "abn"


def test_an_unknown_character_is_named_with_its_position():
    with pytest.raises(ValueError, match=r"'z' at position 2"):
        data.CharTokenizer("ab").encode("abz")


def test_an_unknown_number_is_named_with_its_position():
    with pytest.raises(ValueError, match=r"ids has 2 at position 1; expected 0 … 1"):
        data.CharTokenizer("ab").decode(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"ids has -1 at position 0"):
        data.CharTokenizer("ab").decode(torch.tensor([-1]))


def test_a_tokenizer_needs_text():
    with pytest.raises(ValueError, match="text is empty"):
        data.CharTokenizer("")


def test_the_empty_text_encodes_to_no_numbers():
    ids = data.CharTokenizer("ab").encode("")
    assert ids.shape == (0,)
    assert ids.dtype == torch.long


def test_split_cuts_once_and_loses_nothing():
    first, second = data.split(IDS, 0.9)
    assert len(first) == 90
    assert torch.equal(torch.cat((first, second)), IDS)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_split_refuses_an_impossible_fraction(fraction):
    with pytest.raises(ValueError, match="fraction must lie strictly between 0 and 1"):
        data.split(IDS, fraction)


def test_split_refuses_to_leave_a_part_empty():
    with pytest.raises(ValueError, match="leaves one part empty"):
        data.split(IDS[:2], 0.1)


def test_targets_are_the_inputs_one_character_later():
    for inputs, targets in batches():
        assert inputs.shape == targets.shape == (4, 8)
        assert torch.equal(targets, inputs + 1)  # IDS counts upwards
        assert torch.equal(inputs - inputs[:, :1], torch.arange(8).expand(4, 8))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    def first(seed):
        return next(batches(generator=torch.Generator().manual_seed(seed)))[0]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_batches_do_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    list(batches())
    assert torch.equal(torch.get_rng_state(), before)


def test_random_batches_yield_as_many_as_asked_and_differ_from_one_another():
    drawn = [inputs for inputs, _ in batches(steps=5)]
    assert len(drawn) == 5
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))


def test_the_first_and_the_last_place_of_the_text_are_drawn():
    drawn = torch.cat([targets for _, targets in batches(length=97, steps=20)])
    assert set(drawn[:, -1].tolist()) == {97, 98, 99}


def test_a_text_of_one_block_and_its_target_is_enough():
    inputs, targets = next(data.random_batches(
        IDS[:9], length=8, batch_size=2, steps=1, generator=torch.Generator()
    ))  # fmt: skip
    assert torch.equal(inputs[0], IDS[:8])
    assert torch.equal(targets[0], IDS[1:9])


def test_a_text_shorter_than_a_block_is_refused_at_the_call_not_at_the_first_batch():
    with pytest.raises(ValueError, match=r"ids has 100 characters; a block of length 100 .* 101"):
        batches(length=100)


@pytest.mark.parametrize("name", ["length", "batch_size", "steps"])
def test_random_batches_refuse_a_size_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        batches(**{name: 0})


def test_consecutive_batches_cover_the_text_once_in_order():
    pairs = data.consecutive_batches(IDS, length=8, batch_size=5)
    inputs = torch.cat([inputs for inputs, _ in pairs])
    targets = torch.cat([targets for _, targets in pairs])
    assert [len(pair[0]) for pair in pairs] == [5, 5, 2]
    assert torch.equal(inputs.flatten(), IDS[:96])
    assert torch.equal(targets.flatten(), IDS[1:97])


def test_consecutive_batches_stop_at_the_limit():
    assert len(data.consecutive_batches(IDS, length=8, batch_size=5, limit=2)) == 2
    with pytest.raises(ValueError, match="limit must be at least 1"):
        data.consecutive_batches(IDS, length=8, batch_size=5, limit=0)
    with pytest.raises(ValueError, match="ids has 100 characters"):
        data.consecutive_batches(IDS, length=100, batch_size=5)


# --- every block once ----------------------------------------------------------------------------


def shuffled(steps, seed=0, length=5, batch_size=3, ids=IDS):
    g = torch.Generator().manual_seed(seed)
    return list(
        data.shuffled_batches(ids, length=length, batch_size=batch_size, steps=steps, generator=g)
    )


def test_shuffled_batches_read_no_character_twice_in_a_pass():
    ids = torch.arange(103)
    batches = shuffled(6, ids=ids)  # 19 blocks of 5, 3 at a time
    seen = torch.cat([inputs for inputs, _ in batches]).flatten().tolist()
    assert len(set(seen)) == len(seen) == 90
    for inputs, targets in batches:
        assert torch.equal(targets, inputs + 1)


def test_shuffled_batches_begin_anew_elsewhere_when_the_text_is_through():
    ids = torch.arange(103)
    firsts = [batch[0][:, 0] % 5 for batch in shuffled(60, ids=ids)]
    by_pass = [set(torch.cat(firsts[i : i + 6]).tolist()) for i in range(0, 60, 6)]
    assert all(len(places) == 1 for places in by_pass)
    assert len(set.union(*by_pass)) > 1


def test_shuffled_batches_are_the_same_for_the_same_seed():
    first, again, other = shuffled(4), shuffled(4), shuffled(4, seed=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_shuffled_batches_refuse_a_text_shorter_than_one_batch():
    with pytest.raises(ValueError, match="ids must hold batch_size = 3 blocks of length 5"):
        data.shuffled_batches(
            torch.arange(19), length=5, batch_size=3, steps=1, generator=torch.Generator()
        )
    inputs, targets = shuffled(1, ids=torch.arange(20))[0]
    assert inputs.shape == targets.shape == (3, 5)
