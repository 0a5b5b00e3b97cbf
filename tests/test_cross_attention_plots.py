"""The live alignment: rows are what comes out, columns are what was typed."""

import pytest
import torch

from course_lib import plots


def first_letters(text):
    """The first letter of each word, and the place where it stands."""
    places = [i for i, c in enumerate(text) if c != " " and (i == 0 or text[i - 1] == " ")]
    weights = torch.zeros(len(places), len(text))
    weights[range(len(places)), places] = 1.0
    return [text[i] for i in places], list(text), weights


def test_it_opens_with_a_picture_of_one_row_for_each_token_that_comes_out():
    live = plots.LiveAlignment(first_letters, "to be or")
    assert live.picture().startswith(b"\x89PNG")
    assert [label for label, _ in live.explorer.query.options] == ["0 · t", "1 · b", "2 · o"]
    assert live.explorer.row.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    live.explorer.query.value = 2
    assert live.explorer.row.tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


def test_typing_redraws_it_for_other_lengths_on_both_sides():
    live = plots.LiveAlignment(first_letters, "to be or")
    live.explorer.query.value = 2
    before = live.picture()
    live.text.value = "not to"
    assert live.picture() != before
    assert len(live.explorer.row) == 6
    assert live.explorer.query.value == 1  # the nearest row that there still is
    assert live.explorer.row.tolist() == [0, 0, 0, 0, 1, 0]


def test_weights_of_several_heads_can_be_chosen_from():
    def two_heads(text):
        queries, keys, weights = first_letters(text)
        return queries, keys, torch.stack([weights, weights.flip(-1)])

    live = plots.LiveAlignment(two_heads, "a b")
    live.explorer.head.value = 1
    assert live.explorer.row.tolist() == [0, 0, 1]


def test_what_cannot_be_read_is_said_in_place_of_the_picture_and_forgotten_afterwards():
    def picky(text):
        if not text.isascii():
            raise ValueError("only plain letters")
        return first_letters(text)

    live = plots.LiveAlignment(picky, "to be")
    live.text.value = "être"
    assert live.message == "only plain letters"
    assert live.picture() == b""
    live.text.value = "to be"
    assert not live.message
    assert live.error is None
    assert live.picture()


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_line_asks_for_words(text):
    live = plots.LiveAlignment(first_letters, text)
    assert "Type" in live.message
    assert live.error is None


@pytest.mark.parametrize("answer", [(list("ab"), list("abc")), (["a"], list("abc"), torch.eye(3))])
def test_an_answer_of_another_shape_is_an_error_that_names_itself(answer):
    live = plots.LiveAlignment(lambda text: answer, "abc")
    assert live.error is not None
    assert live.message
