"""Whole models."""

from course_lib.models.compressive import CompressiveMemory, CompressiveTransformer
from course_lib.models.config import TransformerConfig
from course_lib.models.counts import KneserNey
from course_lib.models.recurrent import LSTMLanguageModel
from course_lib.models.recurrent_encoder_decoder import LSTMEncoderDecoder
from course_lib.models.transformer import Decoder, Encoder, EncoderDecoder
from course_lib.models.transformer_xl import InSegments, Remembering, TransformerXL

__all__ = [
    "CompressiveMemory",
    "CompressiveTransformer",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "InSegments",
    "KneserNey",
    "LSTMEncoderDecoder",
    "LSTMLanguageModel",
    "Remembering",
    "TransformerConfig",
    "TransformerXL",
]
