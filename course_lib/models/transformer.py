"""The three architectures. They share every layer and differ by mask and wiring.

Encoder          everyone looks at everyone                       hidden states
Decoder          an Encoder with a causal mask and a head         logits of the next token
EncoderDecoder   a decoder whose blocks also look at an encoder   logits of the next token
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import layers, masks
from ..masks import Mask
from .config import TransformerConfig
from .tokens import check_tokens

Lengths = Sequence[int] | Tensor


class Embedding(nn.Module):
    """Tokens as vectors, with their positions in them where the scheme adds them to tokens.

    Source: Vaswani et al. 2017, §3.4 (beside sinusoids, embeddings are multiplied by √d_model, lest
    they drown) and §3.5.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        d_model, scheme = config.d_model, config.position
        self.max_length, self.vocab_size = config.max_length, vocab_size
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.scale, self.position = 1.0, layers.Position()
        if scheme == "sinusoidal":
            self.scale = math.sqrt(d_model)
            self.position = layers.SinusoidalPositionalEncoding(d_model)
        elif scheme == "learned":
            assert config.max_length is not None
            self.position = layers.LearnedPositionalEncoding(config.max_length, d_model)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, tokens: Int[Tensor, "batch n"], offset: int = 0, name: str = "tokens"
    ) -> Float[Tensor, "batch n d_model"]:
        """Vectors of the tokens; offset: position of the first one."""
        limit = None if self.max_length is None else self.max_length - offset
        check_tokens(tokens, self.vocab_size, limit, name=name)
        x = self.tokens(tokens) * self.scale  # (batch, n) -> (batch, n, d_model)
        return self.dropout(self.position.encode_tokens(x, offset))


class Encoder(nn.Module):
    """Tokens to hidden states; every token may look at every other. Vaswani et al. 2017, §3.1.

    Without a head, as BERT's body (Devlin et al. 2019): what is done with the states is the
    caller's to say.
    """

    rule: Mask | None = None
    """Who may look at whom, padding apart: everyone at everyone."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        vocab_size = config.vocab_size
        self.embedding = Embedding(config, vocab_size)
        self.stack = make_stack(config, layers.EncoderLayer, causal=self.rule is not None)
        initialise(self.stack, config)

    def forward(
        self,
        tokens: Int[Tensor, "batch n"],
        padding: Lengths | None = None,
        mask: Mask | Tensor | None = None,
        *,
        cache: list[Any] | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Hidden states (batch, n, d_model), or (states, [weights of each layer]).

        Args:
            tokens: (batch, n) of integers.
            padding: the length of each sequence; what stands at or beyond it is not looked at.
            mask: who else may not be looked at; True = may attend.
            cache: from `new_cache`; tokens then holds the new ones only.
            return_weights: also return the weights, a list of (batch, heads, n, n_k).

        Raises:
            TypeError, ValueError: tokens are outside the vocabulary or too many, or a mask does not
                fit.
        """
        offset = 0 if cache is None else len(cache[0])
        x = self.embedding(tokens, offset)
        rule = both(self.rule, padding_mask(padding), mask)
        return self.stack(x, mask=rule, cache=cache, return_weights=return_weights)

    def new_cache(self) -> list[Any]:
        """Empty caches, one per layer."""
        return self.stack.new_cache()


class Decoder(Encoder):
    """Tokens to logits of the next token: an Encoder with a causal mask and a head.

    As GPT (Radford et al. 2018, 2019). Position t has seen tokens 0 … t.
    """

    rule = masks.causal()

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.head = make_head(config, self.embedding)

    def forward(self, *args: Any, return_weights: bool = False, **options: Any) -> Any:
        """Logits (batch, n, vocab_size); arguments as in `Encoder`."""
        result = super().forward(*args, return_weights=return_weights, **options)
        states, *weights = result if return_weights else (result,)
        logits = self.head(states)  # (batch, n, d_model) -> (batch, n, vocab_size)
        return (logits, weights[0]) if return_weights else logits


class EncoderDecoder(nn.Module):
    """A source is read by an encoder, a target written by a decoder that looks at it.

    Source: Vaswani et al. 2017, figure 1.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.source_embedding = Embedding(config, config.source_vocab_size or config.vocab_size)
        self.target_embedding = Embedding(config, config.vocab_size)
        self.encoder = make_stack(config, layers.EncoderLayer, causal=False)
        self.decoder = make_stack(config, layers.DecoderLayer, causal=True)
        for stack in (self.encoder, self.decoder):
            initialise(stack, config)
        self.head = make_head(config, self.target_embedding)

    def forward(
        self,
        source: Int[Tensor, "batch n_k"],
        target: Int[Tensor, "batch n_q"],
        source_padding: Lengths | None = None,
        target_padding: Lengths | None = None,
        *,
        return_weights: bool = False,
    ) -> Any:
        """Logits (batch, n_q, vocab_size) of the token after each target token.

        Args:
            source, target: tokens; under teacher forcing, target begins with a start token.
            source_padding, target_padding: the length of each sequence.
            return_weights: also return each decoder layer's weights, pairs of self-attention
                (batch, heads, n_q, n_q) and cross-attention (batch, heads, n_q, n_k).
        """
        states = self.encode(source, source_padding)
        return self.decode(
            target, states, source_padding, target_padding, return_weights=return_weights
        )

    def encode(
        self, source: Int[Tensor, "batch n_k"], source_padding: Lengths | None = None
    ) -> Float[Tensor, "batch n_k d_model"]:
        """Hidden states of the source."""
        x = self.source_embedding(source, name="source")
        return self.encoder(x, mask=padding_mask(source_padding))

    def decode(
        self,
        target: Int[Tensor, "batch n_q"],
        states: Float[Tensor, "batch n_k d_model"],
        source_padding: Lengths | None = None,
        target_padding: Lengths | None = None,
        *,
        cache: list[Any] | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Logits, given the encoder's states; with a cache, target holds the new tokens only."""
        offset = 0 if cache is None else len(cache[0][0])
        x = self.target_embedding(target, offset, name="target")
        result = self.decoder(
            x, states, cache=cache, return_weights=return_weights,
            mask=both(masks.causal(), padding_mask(target_padding)),
            context_mask=padding_mask(source_padding),
        )  # fmt: skip
        hidden, *weights = result if return_weights else (result,)
        logits = self.head(hidden)  # (batch, n_q, d_model) -> (batch, n_q, vocab_size)
        return (logits, weights[0]) if return_weights else logits

    def new_cache(self) -> list[Any]:
        """Empty caches, one pair per decoder layer."""
        return self.decoder.new_cache()


# --- the parts they share -------------------------------------------------------------------------


def padding_mask(lengths: Lengths | None) -> Mask | None:
    """The mask of these lengths; None where there is no padding."""
    return None if lengths is None else masks.padding(lengths)


def both(*rules: Mask | Tensor | None) -> Any:
    """All rules at once; None where there is none."""
    there = [rule for rule in rules if rule is not None]
    return functools.reduce(operator.and_, there) if there else None


def make_stack(config: TransformerConfig, layer: Any, *, causal: bool) -> layers.Stack:
    """The blocks, and the last norm that pre-norm blocks need."""
    position = make_position(config, causal)
    blocks = [
        layer(
            config.d_model, config.num_heads, config.d_ff, num_kv_heads=config.num_kv_heads,
            norm=config.norm, norm_eps=config.norm_eps, norm_affine=config.norm_affine,
            norm_first=config.norm_first, activation=config.activation, dropout=config.dropout,
            bias=config.bias, position=position(), backend=config.backend,
            attention=config.make_attention(),
        )
        for _ in range(config.num_layers)
    ]  # fmt: skip
    last = layers.make_norm(
        config.norm, config.d_model, eps=config.norm_eps, bias=config.bias,
        affine=config.norm_affine,
    )  # fmt: skip
    return layers.Stack(blocks, last if config.norm_first else None)


def make_position(config: TransformerConfig, causal: bool) -> Any:
    """A function that gives each layer its scheme; T5's bias is one for all layers."""
    d_model, heads = config.d_model, config.num_heads
    if config.position == "t5":
        shared = layers.RelativePositionBias(heads, bidirectional=not causal)
        return lambda: shared
    inside = {
        "rotary": partial(layers.RotaryPositionalEncoding, d_model // heads),
        "alibi": partial(layers.AlibiBias, heads),
        "shaw": partial(layers.ShawRelativePosition, d_model // heads),
        "transformer_xl": partial(layers.TransformerXLPosition, d_model, heads),
    }
    return inside.get(config.position, layers.Position)


def make_head(config: TransformerConfig, embedding: Embedding) -> nn.Linear:
    """Hidden states to logits, perhaps by the embedding's own matrix (Press & Wolf 2017)."""
    head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    nn.init.zeros_(head.weight) if config.zero_residuals else nn.init.normal_(head.weight, std=0.02)
    if config.tie_embeddings:
        head.weight = embedding.tokens.weight
    return head


def initialise(stack: layers.Stack, config: TransformerConfig) -> None:
    """Matrices from N(0, 0.02²), biases 0; what residuals add starts smaller, or at 0.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", §2.3.
    """
    small = 0.0 if config.zero_residuals else 0.02 / math.sqrt(2 * config.num_layers)
    for name, module in stack.named_modules():
        if isinstance(module, nn.Linear):
            last = name.endswith(("out_proj", "down"))
            nn.init.normal_(module.weight, std=small if last else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
