"""Data for models with a memory: streams that go on from batch to batch, and a task of recall."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import torch
from jaxtyping import Int
from torch import Tensor

from .text import Batch

IGNORED = -100  # a target that does not count, as in training.next_token_loss


def stream_batches(
    ids: Int[Tensor, " characters"], *, length: int, batch_size: int, steps: int | None = None
) -> Iterator[Batch]:
    """Segments of batch_size streams: row b of each batch goes on where row b of the last ended.

    The streams begin at even distances in the text. One pass reads each up to the next one's
    beginning. With more steps they read on, and the text is a circle: once a pass, one row goes
    from the last character to the first.

    Args:
        ids: the text as integers.
        length: characters in a segment.
        batch_size: streams.
        steps: batches to yield; None for one pass, in which no seam is crossed.

    Returns:
        An iterator over (inputs, targets), both (batch, length), `targets` one character later.
        `training.fit` wants a list of them for validation.

    Raises:
        ValueError: at once, if a stream would be shorter than a segment, or a size is < 1.
    """
    for name, size in (("length", length), ("batch_size", batch_size), ("steps", steps)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    apart = (len(ids) - 1) // batch_size
    if apart < length:
        raise ValueError(
            f"ids has {len(ids)} characters; batch_size={batch_size} streams of at least one "
            f"segment of length {length} and its target need {batch_size * length + 1}"
        )
    starts = torch.arange(batch_size, device=ids.device)[:, None] * apart  # (batch, 1)
    places = starts + torch.arange(length + 1, device=ids.device)  # (batch, length + 1)

    def segment(number: int) -> Batch:
        chosen = ids[(places + number * length) % len(ids)]  # (batch, length + 1)
        return chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()

    return map(segment, islice(count(), apart // length if steps is None else steps))


def recall_batches(
    *,
    distance: int,
    batch_size: int,
    steps: int,
    generator: torch.Generator,
    pairs: int = 1,
    symbols: int = 8,
) -> Iterator[Batch]:
    """What stood there, `distance` tokens ago? A task that needs a reach and nothing else.

        k v   · · · · · ·   k   ->  v

    Pairs of a key and its value are shown, then `distance` tokens of filler, then one of the keys
    again. Only the answer to it counts: its target is the value, all others are -100. A model that
    does not reach back guesses, at ln(symbols) nats. With one pair it is enough to find the only
    value there is; with more, to find the one beside the key.

    Keys are the tokens 0 … s - 1, values s … 2s - 1, fillers 2s … 3s - 1, where s = symbols: a
    vocabulary of 3s. The last value stands distance + 1 before the question. After Arora et al.
    2024, "Zoology: Measuring and Improving Recall in Efficient Language Models".

    Args:
        distance: tokens of filler, at least 0.
        batch_size: sequences in a batch.
        steps: batches to yield.
        generator: source of chance; the same state gives the same batches.
        pairs: how many are shown, with different keys; the asked one is any of them.
        symbols: how many keys, values and fillers there are.

    Returns:
        An iterator over (inputs, targets), both (batch, 2 · pairs + distance + 1).

    Raises:
        ValueError: at once, if a size is impossible.
    """
    _check_recall(distance, pairs, symbols, batch_size=batch_size, steps=steps)

    return (_recall(distance, batch_size, pairs, symbols, generator) for _ in range(steps))


def _recall(
    distance: int, batch_size: int, pairs: int, symbols: int, generator: torch.Generator
) -> Batch:
    def some(count: int) -> Tensor:
        return torch.randint(symbols, (batch_size, count), generator=generator)

    keys = torch.rand(batch_size, symbols, generator=generator).argsort(1)[:, :pairs]
    values = some(pairs) + symbols
    shown = torch.stack([keys, values], dim=2).flatten(1)  # (batch, 2 · pairs): k v k v …
    filler = some(distance) + 2 * symbols
    asked = torch.randint(pairs, (batch_size, 1), generator=generator)
    inputs = torch.cat([shown, filler, keys.gather(1, asked)], dim=1)
    targets = torch.full_like(inputs, IGNORED)
    targets[:, -1:] = values.gather(1, asked)
    return inputs, targets


def _check_recall(distance: int, pairs: int, symbols: int, **sizes: int) -> None:
    for name, size in (*sizes.items(), ("pairs", pairs), ("symbols", symbols)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if distance < 0:
        raise ValueError(f"distance must be at least 0, got {distance}")
    if pairs > symbols:
        raise ValueError(f"pairs={pairs} need as many keys, but symbols={symbols}")
