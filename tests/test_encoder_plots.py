"""The live gap of chapter 08: guesses for a hidden word, and where the model looked."""

import pytest

from course_lib import plots


def fill(text):
    """Guess the longest other word, looking at all words alike."""
    words = text.split()
    if "_" not in words:
        raise ValueError("Write _ for the hidden word.")
    longest = max(words, key=len)
    return words, words.index("_"), {longest: 0.75, "the": 0.25}, [1 / len(words)] * len(words)


def test_it_opens_with_a_picture_and_the_guesses():
    live = plots.FillIn(fill, "a function returns _ object")
    assert live.picture().startswith(b"\x89PNG")
    assert live.guesses == {"function": 0.75, "the": 0.25}
    assert live.looks.tolist() == [0.2] * 5


def test_typing_another_sentence_redraws_it():
    live = plots.FillIn(fill, "a function returns _ object")
    before = live.picture()
    live.text.value = "the _"
    assert live.picture() != before
    assert len(live.looks) == 2


def test_a_word_may_occur_twice():
    live = plots.FillIn(fill, "the _ of the list")
    assert not live.message
    assert len(live.looks) == 5


def test_a_sentence_without_a_gap_shows_the_message_and_no_old_picture():
    live = plots.FillIn(fill, "the _")
    live.text.value = "no gap here"
    assert live.message == "Write _ for the hidden word."
    assert live.picture() == b""
    assert live.guesses == {}
    live.text.value = "a _"
    assert not live.message
    assert live.picture()


def test_an_empty_line_asks_for_words():
    assert "Type" in plots.FillIn(fill, "  ").message


@pytest.mark.parametrize(
    ("answer", "word"),
    [((["a", "_"], 1, {"b": 1.0}, [1.0]), "looks"), ((["a"], 1, {"b": 1.0}, [1.0]), "place")],
)
def test_an_answer_that_does_not_fit_is_named(answer, word):
    live = plots.FillIn(lambda text: answer, "a _")
    assert isinstance(live.error, ValueError)
    assert word in live.message


def test_displayed_it_is_a_picture_where_no_widget_can_be():
    data, _ = plots.FillIn(fill, "the _")._repr_mimebundle_()
    assert "image/png" in data
    assert "FillIn" in data["text/plain"]
