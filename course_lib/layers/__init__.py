"""Modules with parameters, one file per component."""

from .decoder_layer import DecoderLayer
from .encoder_layer import EncoderLayer
from .feed_forward import FeedForward
from .multi_head_attention import KVCache, MultiHeadAttention
from .normalization import LayerNorm, RMSNorm
from .position import Position
from .positional_encoding import (
    LearnedPositionalEncoding,
    RotaryPositionalEncoding,
    SinusoidalPositionalEncoding,
)
from .relative_position import (
    AlibiBias,
    RelativePositionBias,
    ShawRelativePosition,
    TransformerXLPosition,
)
from .residual import Residual, make_norm
from .stack import EncoderDecoderStack, Stack

__all__ = [
    "AlibiBias",
    "DecoderLayer",
    "EncoderDecoderStack",
    "EncoderLayer",
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "MultiHeadAttention",
    "Position",
    "RMSNorm",
    "RelativePositionBias",
    "Residual",
    "RotaryPositionalEncoding",
    "ShawRelativePosition",
    "SinusoidalPositionalEncoding",
    "Stack",
    "TransformerXLPosition",
    "make_norm",
]
