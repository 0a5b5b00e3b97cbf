"""Texts that need no download, and what turns them into batches.

text = python_docs()                          # English prose, ships with Python
tokenizer = CharTokenizer(text)
train, validation = split(tokenizer.encode(text))
batches = random_batches(train, length=64, batch_size=32, steps=100, generator=g)

pairs = date_pairs(20_000, generator=g)           # ("19 janvier 2004", "2004-01-19"), …
train, validation = split_dates(pairs, generator=g)

pairs = number_pairs()                            # ("ninety-nine", "quatre-vingt-dix-neuf"), …
train, validation = split_numbers(pairs, 9_000, generator=g)
"""

from course_lib.data.dates import date_pairs, split_dates
from course_lib.data.numbers import number_pairs, split_numbers
from course_lib.data.shakespeare import shakespeare
from course_lib.data.streams import recall_batches, stream_batches
from course_lib.data.text import (
    CharTokenizer,
    consecutive_batches,
    python_docs,
    random_batches,
    shuffled_batches,
    split,
)

__all__ = [
    "CharTokenizer",
    "consecutive_batches",
    "date_pairs",
    "number_pairs",
    "python_docs",
    "random_batches",
    "recall_batches",
    "shakespeare",
    "shuffled_batches",
    "split",
    "split_dates",
    "split_numbers",
    "stream_batches",
]
