"""Whole models."""

from course_lib.models.config import TransformerConfig
from course_lib.models.recurrent import LSTMLanguageModel
from course_lib.models.transformer import Decoder, Encoder, EncoderDecoder

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "LSTMLanguageModel", "TransformerConfig"]
