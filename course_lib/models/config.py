"""One description of a Transformer, from which any of the three architectures is built."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from typing import Any

from .. import layers
from ..layers.feed_forward import ACTIVATIONS, GATED

NORMS = ("layer_norm", "rms_norm")
ATTENTIONS = {
    "full": layers.MultiHeadAttention,
    "longformer": layers.LongformerAttention,
    "bigbird": layers.BigBirdAttention,
    "linformer": layers.LinformerAttention,
    "performer": layers.PerformerAttention,
    "linear": layers.LinearAttention,
}
POSITIONS = ("none", "sinusoidal", "learned", "rotary", "t5", "alibi", "shaw", "transformer_xl")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Everything that makes a Transformer but its weights.

    Args:
        vocab_size: number of distinct tokens; of the target in an encoder-decoder.
        source_vocab_size: of the source in an encoder-decoder; vocab_size unless given.
        d_model: width of the activations; a multiple of num_heads.
        num_layers: blocks on top of one another; in an encoder-decoder, of each side.
        num_heads, num_kv_heads: as in `layers.MultiHeadAttention`.
        d_ff: width inside the feed-forward network; 4·d_model unless given.
        max_length: most tokens in a sequence; None for no limit ("learned" needs one).
        norm: "layer_norm" or "rms_norm". norm_eps: its ε. norm_affine: whether it has weights.
        norm_first: pre-norm (True) or post-norm, as in Vaswani et al. 2017.
        activation: as in `layers.FeedForward`.
        position: "none", "sinusoidal" or "learned" (added to the embedding), "rotary", "t5",
            "alibi", "shaw" or "transformer_xl" (inside self-attention).
        attention: of tokens to their own sequence: "full", "longformer", "bigbird", "linformer",
            "performer" or "linear".
        attention_options: what only this kind of attention takes, by name, as {"window": 64}: see
            `layers.LongformerAttention` and the others.
        tie_embeddings: whether the head uses the matrix of the embedding (Press & Wolf 2017).
        dropout: of embeddings, weights, hidden layers and what residuals add.
        bias: whether matrices and layer norms have biases.
        zero_residuals: whether what each residual adds starts at 0, so that every block starts as
            the identity; otherwise it starts small, by 1/√(2·num_layers) (Radford et al. 2019,
            §2.3).
        backend: passed on to `course_lib.attention`.

    Raises:
        TypeError: an unknown option, by its name. ValueError: a value that does not exist, or two
            that contradict one another.
    """

    vocab_size: int
    source_vocab_size: int | None = None
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    d_ff: int | None = None
    max_length: int | None = 256
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    norm_first: bool = True
    activation: str = "gelu"
    position: str = "learned"
    attention: str = "full"
    attention_options: Mapping[str, Any] = field(default_factory=dict)
    tie_embeddings: bool = True
    dropout: float = 0.0
    bias: bool = True
    zero_residuals: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_names()
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads, got d_model={self.d_model} and "
                f"num_heads={self.num_heads}"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got num_heads={self.num_heads} and "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.position == "learned" and self.max_length is None:
            raise ValueError('position="learned" needs a max_length: its table has an end')
        if self.position == "rotary" and (self.d_model // self.num_heads) % 2:
            raise ValueError(
                f'position="rotary" needs an even d_head, got {self.d_model // self.num_heads}'
            )
        if self.position in ("sinusoidal", "transformer_xl") and self.d_model % 2:
            raise ValueError(f'position="{self.position}" needs an even d_model')

    def _check_sizes(self) -> None:
        optional = {"source_vocab_size", "num_kv_heads", "d_ff", "max_length"}
        for option in fields(self):
            value = getattr(self, option.name)
            if not option.type.startswith("int") or (value is None and option.name in optional):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{option.name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{option.name} must be at least 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps must not be negative, got {self.norm_eps}")

    def _check_names(self) -> None:
        known = {
            "norm": NORMS,
            "activation": (*ACTIVATIONS, *GATED),
            "position": POSITIONS,
            "attention": ATTENTIONS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}"
                )
        if not isinstance(self.attention_options, Mapping):
            raise TypeError(f"attention_options must be a dict, got {self.attention_options!r}")
        own = _options_of(ATTENTIONS[self.attention])
        _refuse_unknown(f"attention option of {self.attention}", self.attention_options, own)

    def make_attention(self) -> Callable[..., layers.MultiHeadAttention]:
        """What makes the attention of one layer, given what all kinds of it take."""
        kind = ATTENTIONS[self.attention]
        given: dict[str, Any] = dict(self.attention_options)
        if "max_length" in _options_of(kind):
            given.setdefault("max_length", self.max_length)
        return partial(kind, **given)

    def to_dict(self) -> dict[str, Any]:
        """All options by name; `from_dict` makes the same configuration of them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> TransformerConfig:
        """The configuration with these options; the others take their defaults.

        Raises:
            TypeError: an option is unknown, or vocab_size is missing.
        """
        _refuse_unknown("option", options, [option.name for option in fields(cls)])
        if "vocab_size" not in options:
            raise TypeError("vocab_size is missing")
        return cls(**options)

    def to_json(self) -> str:
        """All options as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TransformerConfig:
        """The inverse of `to_json`; errors as in `from_dict`, ValueError where it is no JSON."""
        options = json.loads(text)
        if not isinstance(options, dict):
            raise ValueError(f"text must be a JSON object, got {type(options).__name__}")
        return cls.from_dict(options)


def _options_of(kind: type[layers.MultiHeadAttention]) -> list[str]:
    """The arguments that a kind of attention takes and multi-head attention does not."""
    common = inspect.signature(layers.MultiHeadAttention).parameters
    own = inspect.signature(kind).parameters.values()
    return [p.name for p in own if p.name not in common and p.kind is p.KEYWORD_ONLY]


def _refuse_unknown(what: str, options: Mapping[str, Any], known: list[str]) -> None:
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = (
                f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
            )
            raise TypeError(f"unknown {what} {name!r}; {meant}")
