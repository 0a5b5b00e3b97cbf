"""A text, its characters as integers, and batches of consecutive characters."""

import re
from collections.abc import Iterator
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

# Typographic characters have an ASCII twin. Anything else outside ASCII, and the two characters
# that only some versions use, become a space: the vocabulary must not depend on the Python.
_ASCII_TWINS = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."}
)
# Title underlines and table borders.
_RULE_LINE = re.compile(r"^ *[*=\-~^+|]{3}[ *=\-~^+|]*$\n?", re.MULTILINE)

Batch = tuple[Int[Tensor, "_batch length"], Int[Tensor, "_batch length"]]  # the last is smaller


def python_docs() -> str:
    """English text of Python's own documentation, about 450 000 characters.

    The topics of `help()` (`pydoc_data.topics`) in alphabetical order, in printable ASCII
    without "$" and "`", and newlines: 94 symbols. Title underlines, table borders, runs of blanks
    and of empty lines are dropped; indentation is kept. The text differs a little between Python
    versions, its alphabet does not.

    Raises:
        RuntimeError: this Python was built without its documentation (`pydoc_data`).
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "python_docs() reads the documentation inside Python (the module pydoc_data.topics), "
            "and this Python came without it. Use a full Python, or another text."
        ) from error
    return _normalise("\n\n".join(topics[name] for name in sorted(topics)))


def _normalise(text: str) -> str:
    """Printable ASCII and newlines, no rule lines, no trailing blanks, at most one empty line."""
    text = text.translate(_ASCII_TWINS).expandtabs(4)
    text = re.sub(r"[^\n -~]|[$`]", " ", text)
    text = re.sub(r"(?<=\S) +", " ", text)  # runs after a word; indentation stays
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    text = _RULE_LINE.sub("", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class CharTokenizer:
    """One integer per character: the sorted distinct characters of `text` are numbered from 0.

    Attributes:
        symbols: the characters, in the order of their numbers.
        vocab_size: how many there are.

    Raises:
        ValueError: `text` is empty.
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("text is empty: a tokenizer needs at least one character")
        self.symbols: str = "".join(sorted(set(text)))
        self._index = {symbol: i for i, symbol in enumerate(self.symbols)}

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> Int[Tensor, " characters"]:
        """Numbers of the characters of `text`, as int64.

        Raises:
            ValueError: a character is not in the vocabulary; names it and its position.
        """
        try:
            return torch.tensor([self._index[symbol] for symbol in text], dtype=torch.long)
        except KeyError as error:
            unknown = error.args[0]
            raise ValueError(
                f"text has the character {unknown!r} at position {text.index(unknown)}, which is "
                f"not one of the {self.vocab_size} symbols of this tokenizer"
            ) from None

    def decode(self, ids: Int[Tensor, " characters"]) -> str:
        """The text of a row of numbers; inverse of `encode`.

        Raises:
            ValueError: a number is outside 0 … vocab_size - 1.
        """
        numbers = ids.tolist()
        for position, number in enumerate(numbers):
            if not 0 <= number < self.vocab_size:
                raise ValueError(
                    f"ids has {number} at position {position}; expected 0 … {self.vocab_size - 1}"
                )
        return "".join(self.symbols[number] for number in numbers)


def split(
    ids: Int[Tensor, " characters"], fraction: float = 0.9
) -> tuple[Int[Tensor, " first"], Int[Tensor, " second"]]:
    """The first `fraction` of a text and the rest, as views: training and validation.

    A text is cut once, not shuffled, so that no validation passage stands between training ones.

    Raises:
        ValueError: `fraction` is not strictly between 0 and 1, or one part would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    cut = round(fraction * len(ids))
    if not 0 < cut < len(ids):
        raise ValueError(f"fraction={fraction} of {len(ids)} ids leaves one part empty")
    return ids[:cut], ids[cut:]


def random_batches(
    ids: Int[Tensor, " characters"],
    *,
    length: int,
    batch_size: int,
    steps: int,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """`steps` batches of blocks drawn at random places; the target is the next character.

    Args:
        ids: the text as integers.
        length: characters in a block.
        batch_size: blocks in a batch.
        steps: batches to yield.
        generator: source of the places; the same state gives the same batches.

    Returns:
        An iterator over (inputs, targets), both (batch, length), `targets` one character later.

    Raises:
        ValueError: at once, if `ids` is shorter than one block and its target, or a size is < 1.
    """
    _check_block(ids, length, batch_size)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    places = ids.unfold(0, length + 1, 1)  # (length of text - length, length + 1), a view

    def draw() -> Batch:
        starts = torch.randint(len(places), (batch_size,), generator=generator)
        return _inputs_and_targets(places[starts.to(ids.device)])

    return (draw() for _ in range(steps))


def shuffled_batches(
    ids: Int[Tensor, " characters"],
    *,
    length: int,
    batch_size: int,
    steps: int,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """`steps` batches that read the whole text in random order before they read any of it again.

    Each pass cuts the text into blocks anew, from a random first character. Arguments, result and
    errors as in `random_batches`; the text must hold a batch of blocks.
    """
    _check_block(ids, length, batch_size)
    blocks = (len(ids) - length) // length  # whichever character a pass begins with
    if blocks < batch_size:
        raise ValueError(
            f"ids must hold batch_size = {batch_size} blocks of length {length} and one character "
            f"more, got {len(ids)} characters"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    places = ids.unfold(0, length + 1, 1)

    def passes() -> Iterator[Batch]:
        while True:
            first = torch.randint(length, (1,), generator=generator)
            starts = first + length * torch.randperm(blocks, generator=generator)
            for chosen in starts[: blocks - blocks % batch_size].view(-1, batch_size):
                yield _inputs_and_targets(places[chosen.to(ids.device)])

    return islice(passes(), steps)


def consecutive_batches(
    ids: Int[Tensor, " characters"], *, length: int, batch_size: int, limit: int | None = None
) -> list[Batch]:
    """All blocks of a text that do not overlap, in order: what a validation loss is taken over.

    Args:
        ids: the text as integers.
        length: characters in a block; what is left at the end is dropped.
        batch_size: blocks in a batch; the last batch may be smaller.
        limit: at most this many batches.

    Returns:
        A list of (inputs, targets), both (batch, length), `targets` one character later.

    Raises:
        ValueError: `ids` is shorter than one block and its target, or a size is < 1.
    """
    _check_block(ids, length, batch_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    blocks = ids.unfold(0, length + 1, length)  # (blocks, length + 1): neighbours share one id
    return [_inputs_and_targets(batch) for batch in blocks.split(batch_size)[:limit]]


def _inputs_and_targets(blocks: Int[Tensor, "batch length_plus_1"]) -> Batch:
    return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()


def _check_block(ids: Int[Tensor, " characters"], length: int, batch_size: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if len(ids) < length + 1:
        raise ValueError(
            f"ids has {len(ids)} characters; a block of length {length} and its target need "
            f"at least {length + 1}"
        )
