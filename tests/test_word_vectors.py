"""Word vectors from counts: like company, like direction."""

import pytest
import torch

from course_lib import data
from course_lib.data.word_vectors import word_vectors, words_of


@pytest.fixture(scope="module")
def learned():
    return word_vectors(data.python_docs())


def nearest(learned, word):
    number, vectors = learned
    closeness = vectors @ vectors[number[word]]
    closeness[number[word]] = -1
    return list(number)[closeness.argmax()]


@pytest.mark.parametrize(
    ("word", "partner"),
    [("left", "right"), ("true", "false"), ("except", "try"), ("float", "complex")],
)
def test_words_used_alike_are_neighbours(learned, word, partner):
    assert nearest(learned, word) == partner


def test_every_vector_has_length_one(learned):
    number, vectors = learned
    assert vectors.shape == (len(number), 64)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(number)), atol=1e-5)


def test_words_that_keep_the_same_company_get_the_same_vector():
    text = "red wine and white wine. " * 10 + "the old dog ran home, the old cat ran home. " * 10
    number, vectors = word_vectors(text, window=2, min_count=10)
    same = vectors[number["dog"]] @ vectors[number["cat"]]
    assert same > 0.9
    assert same > vectors[number["dog"]] @ vectors[number["wine"]] + 0.5


def test_the_same_text_gives_the_same_closeness():
    text = data.python_docs()[:60_000]
    (_, first), (_, second) = word_vectors(text), word_vectors(text)
    assert torch.allclose(first @ first.T, second @ second.T, atol=1e-5)


def test_rare_words_are_left_out():
    number, _ = word_vectors("often often rare again again " * 1 + "often again " * 9, min_count=5)
    assert set(number) == {"often", "again"}


def test_a_small_vocabulary_has_short_vectors():
    assert word_vectors("yes no " * 20)[1].shape == (2, 2)


def test_signs_and_digits_are_no_words():
    assert words_of("It's 3 o'clock: x_1 = été!") == ["it", "s", "o", "clock", "x", "été"]


@pytest.mark.parametrize("text", ["", "one two three", "123 456"])
def test_a_text_too_short_to_learn_from_is_refused(text):
    with pytest.raises(ValueError, match="text: expected at least 2 words"):
        word_vectors(text)


@pytest.mark.parametrize("name", ["dim", "window", "min_count"])
def test_a_size_below_one_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        word_vectors("a b", **{name: 0})
