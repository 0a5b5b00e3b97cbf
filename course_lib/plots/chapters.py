"""The chapters of the course, in order: the one table that pictures and readers' maps draw from."""

from __future__ import annotations

from typing import NamedTuple


class Chapter(NamedTuple):
    """One chapter: its number, the stem of its files, title, contents, and whether it is there."""

    number: int
    stem: str
    title: str
    about: str
    ready: bool = False


CHAPTERS = (
    Chapter(0, "start_here", "Start here", "what you will build, how to work, a first look", True),
    Chapter(1, "why_attention", "Why attention", "recurrence against attention, measured", True),
    Chapter(2, "attention", "Attention", "from one query to the batched matrix form", True),
    Chapter(3, "multi_head_attention", "Multi-head attention", "several relations at once", True),
    Chapter(
        4, "positional_encodings", "Positional encodings", "how a bag of words gets an order", True
    ),
    Chapter(
        5,
        "residual_and_layer_norm",
        "Residuals and layer norm",
        "depth without dying gradients",
        True,
    ),
    Chapter(6, "masking", "Masking", "padding, causality, and how leaks are found", True),
    Chapter(7, "cross_attention", "Cross-attention", "one sequence reads another", True),
    Chapter(8, "encoder", "The encoder", "masked words, classification", True),
    Chapter(9, "decoder", "The decoder", "next-token training, generation, the KV cache", True),
    Chapter(
        10, "encoder_decoder", "Encoder and decoder together", "translation, beam search", True
    ),
    Chapter(
        11, "sparse_attention", "Sparse attention", "Longformer and BigBird for long texts", True
    ),
    Chapter(
        12,
        "linear_attention",
        "Linear attention",
        "Performer, Linformer, attention as an RNN",
        True,
    ),
    Chapter(
        13, "recurrent_memory", "Recurrent memory", "Transformer-XL, Compressive Transformer", True
    ),
    Chapter(14, "gpu_kernels", "GPU kernels", "tiling, online softmax, Triton without a GPU"),
    Chapter(15, "scaling", "Scaling laws", "loss against parameters, data and compute"),
    Chapter(16, "inside_the_model", "Inside the model", "induction heads, and what can be read"),
    Chapter(17, "what_is_needed", "What is needed, what is not", "sawing off parts at equal loss"),
    Chapter(
        18, "pretrained_models", "Pretrained models", "a trained body, a small head of your own"
    ),
)
"""Chapters 00 to 18. A test holds `ready` against the notebooks that exist."""
