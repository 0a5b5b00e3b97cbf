"""Modules with parameters, one file per component."""

from .decoder_layer import DecoderLayer
from .encoder_layer import EncoderLayer
from .feed_forward import FeedForward
from .linear_attention import (
    LinearAttention,
    LinearCache,
    PerformerAttention,
    orthogonal_gaussian,
    positive_features,
)
from .linformer_attention import LinformerAttention
from .multi_head_attention import KVCache, MultiHeadAttention
from .normalization import LayerNorm, RMSNorm
from .position import Position
from .positional_encoding import (
    LearnedPositionalEncoding,
    RotaryPositionalEncoding,
    SinusoidalPositionalEncoding,
)
from .recurrent_memory import (
    Compression,
    MemoryLayer,
    compress,
    extend_memory,
    reconstruction_loss,
    split_memory,
)
from .relative_position import (
    AlibiBias,
    RelativePositionBias,
    ShawRelativePosition,
    TransformerXLPosition,
)
from .residual import Residual, make_norm
from .sparse_attention import BigBirdAttention, LongformerAttention
from .stack import EncoderDecoderStack, Stack

__all__ = [
    "AlibiBias",
    "BigBirdAttention",
    "Compression",
    "DecoderLayer",
    "EncoderDecoderStack",
    "EncoderLayer",
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "LinearAttention",
    "LinearCache",
    "LinformerAttention",
    "LongformerAttention",
    "MemoryLayer",
    "MultiHeadAttention",
    "PerformerAttention",
    "Position",
    "RMSNorm",
    "RelativePositionBias",
    "Residual",
    "RotaryPositionalEncoding",
    "ShawRelativePosition",
    "SinusoidalPositionalEncoding",
    "Stack",
    "TransformerXLPosition",
    "compress",
    "extend_memory",
    "make_norm",
    "orthogonal_gaussian",
    "positive_features",
    "reconstruction_loss",
    "split_memory",
]
