"""Whole models."""

from course_lib.models.config import TransformerConfig
from course_lib.models.counts import KneserNey
from course_lib.models.recurrent import LSTMLanguageModel
from course_lib.models.recurrent_encoder_decoder import LSTMEncoderDecoder
from course_lib.models.transformer import Decoder, Encoder, EncoderDecoder

__all__ = [
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "KneserNey",
    "LSTMEncoderDecoder",
    "LSTMLanguageModel",
    "TransformerConfig",
]
