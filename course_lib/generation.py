"""Writing with a trained model: token by token, by chance or by the best of several beams."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Int[Tensor, "*batch n"],
    max_new_tokens: int,
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*batch total"]:
    """Go on from a prompt, one token at a time.

    Args:
        model: tokens (batch, n) -> logits (batch, n, vocab); run in evaluation mode.
        prompt: (batch, n) or (n,), at least one token.
        max_new_tokens: how many to add.
        temperature: the logits are divided by it; 0 takes the most likely token (greedy).
        top_k: only the k most likely tokens are drawn from (Fan, Lewis & Dauphin 2018, §5.2).
        top_p: only the fewest tokens whose shares sum to p or more (Holtzman et al. 2020, §3.1).
        use_cache: keep keys and values, where the model can (`new_cache`); the tokens are the same.
        generator: source of chance.

    Returns:
        The prompt and what follows it, (batch, n + max_new_tokens) or (n + max_new_tokens,).

    Raises:
        TypeError, ValueError: an argument is impossible, or prompt and new tokens together are
            longer than the model's max_length.
    """
    _check_generate(model, prompt, max_new_tokens, temperature, top_k, top_p)
    tokens = prompt if prompt.ndim == 2 else prompt[None]
    new_cache: Any = getattr(model, "new_cache", None) if use_cache else None
    options = {} if new_cache is None else {"cache": new_cache()}
    training, unread = model.training, tokens
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = model(unread, **options)[:, -1]  # (batch, n, vocab) -> (batch, vocab)
            new = sample(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )[:, None].to(tokens.dtype)
            tokens = torch.cat([tokens, new], dim=1)  # (batch, n) and (batch, 1)
            unread = new if options else tokens
    finally:
        model.train(training)
    return tokens if prompt.ndim == 2 else tokens[0]


def sample(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """One token for each row of logits; arguments as in `generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = shares(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def shares(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Float[Tensor, "batch vocab"]:
    """The probability of each token, 0 for those that top_k or top_p leave out.

    Temperature comes first, then top_k, then top_p of what is left.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # (batch, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = logits.softmax(-1)
    if top_p is None:
        return probabilities
    ordered, order = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # what the likelier tokens sum to
    keep = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < top_p)
    probabilities = probabilities * keep
    return probabilities / probabilities.sum(-1, keepdim=True)


class Hypothesis(NamedTuple):
    """One finished beam: its tokens without start and stop, and its score."""

    tokens: list[int]
    score: float


@torch.no_grad()
def beam_search(
    model: Any,
    source: Int[Tensor, "batch n_k"],
    *,
    start: int,
    stop: int,
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float | int = 0.0,
    source_padding: Any = None,
) -> list[list[Hypothesis]]:
    """The best targets that an encoder-decoder finds for each source, best first.

    Every beam is continued by every token, and the num_beams likeliest continuations are kept; with
    one beam that is greedy decoding. Source: Sutskever, Vinyals & Le 2014, §3.2; the length
    penalty ((5 + length) / 6)^α that divides the log-probability: Wu et al. 2016, §7.

    Args:
        model: with `encode`, `decode` and `new_cache`, as `models.EncoderDecoder`.
        source: (batch, n_k) of tokens; source_padding: their lengths.
        start, stop: tokens at the beginning and the end of a target.
        max_new_tokens: a beam that has not stopped after so many is cut.
        num_beams: how many are kept.
        length_penalty: α; 0 compares log-probabilities as they are, which favours short ones.

    Raises:
        ValueError: num_beams or max_new_tokens is below 1.
    """
    for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    training = model.training
    model.eval()
    try:
        beams = _Beams(model, source, source_padding, start, stop, num_beams)
        for _ in range(max_new_tokens):
            if beams.finished():
                break
            beams.advance()
        return beams.hypotheses(length_penalty)
    finally:
        model.train(training)


class _Beams:
    """num_beams targets for each source, side by side in one batch."""

    def __init__(
        self, model: Any, source: Tensor, padding: Any, start: int, stop: int, beams: int
    ) -> None:
        self.model, self.stop, self.beams, self.batch = model, stop, beams, len(source)
        rows = torch.arange(self.batch, device=source.device).repeat_interleave(beams)
        self.states = _pick(model.encode(source, padding), rows)
        self.padding = None if padding is None else torch.as_tensor(padding)[rows.cpu()]
        self.cache = model.new_cache()
        self.tokens = source.new_full((len(rows), 1), start)  # (batch · beams, n)
        self.score = torch.full((self.batch, beams), -math.inf, device=source.device)
        self.score[:, 0] = 0.0  # all beams are alike at first: only one may go on

    def advance(self) -> None:
        """Continue every beam by its likeliest tokens, and keep the best beams of each source."""
        logits = self.model.decode(
            self.tokens[:, -1:], self.states, self.padding, cache=self.cache
        )  # (batch · beams, 1, vocab)
        step = logits[:, -1].float().log_softmax(-1)  # (batch · beams, vocab)
        step = torch.where(self._stopped()[:, None], self._only_stop(step), step)
        total = self.score[..., None] + step.unflatten(0, (self.batch, self.beams))
        self.score, best = total.flatten(1).topk(self.beams)  # of (batch, beams · vocab)
        vocab = step.shape[-1]
        first = torch.arange(self.batch, device=best.device)[:, None] * self.beams
        rows = (best // vocab + first).flatten()  # where each kept beam came from
        new = (best % vocab).flatten()[:, None].to(self.tokens.dtype)
        self.tokens = torch.cat([self.tokens[rows], new], dim=1)
        for cache in _flat(self.cache):
            cache.select(rows)

    def _stopped(self) -> Tensor:
        return (self.tokens[:, 1:] == self.stop).any(1)

    def _only_stop(self, step: Tensor) -> Tensor:
        """A stopped beam goes on by stop tokens, at no cost."""
        frozen = torch.full_like(step, -math.inf)
        frozen[:, self.stop] = 0.0
        return frozen

    def finished(self) -> bool:
        return bool(self._stopped().all())

    def hypotheses(self, length_penalty: float) -> list[list[Hypothesis]]:
        found = []
        rows = self.tokens[:, 1:].unflatten(0, (self.batch, self.beams)).tolist()
        for beams, scores in zip(rows, self.score.tolist(), strict=True):
            several = []
            for tokens, score in zip(beams, scores, strict=True):
                text = tokens[: tokens.index(self.stop)] if self.stop in tokens else tokens
                length = len(text) + (self.stop in tokens)
                if score > -math.inf:
                    several.append(Hypothesis(text, score / ((5 + length) / 6) ** length_penalty))
            found.append(sorted(several, key=lambda h: -h.score))
        return found


def _pick(states: Any, rows: Tensor) -> Any:
    """These rows of what the encoder gave: a tensor, or a tuple of tensors."""
    return tuple(s[rows] for s in states) if isinstance(states, tuple) else states[rows]


def _flat(cache: Any) -> Iterable[Any]:
    """The caches in a list of caches and tuples of caches."""
    for item in cache:
        if isinstance(item, list | tuple):
            yield from _flat(item)
        else:
            yield item


def _check_generate(
    model: nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float | int,
    top_k: int | None,
    top_p: float | int | None,
) -> None:
    if not isinstance(prompt, Tensor) or prompt.ndim not in (1, 2) or prompt.shape[-1] == 0:
        shape = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise ValueError(f"prompt must be (n,) or (batch, n) with n at least 1, got {shape}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    limit = getattr(getattr(model, "config", None), "max_length", None)
    # the last token is written, not read
    if limit is not None and prompt.shape[-1] + max_new_tokens - 1 > limit:
        raise ValueError(
            f"prompt of {prompt.shape[-1]} and max_new_tokens={max_new_tokens} need more than the "
            f"model's max_length={limit}"
        )
