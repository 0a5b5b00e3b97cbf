"""The public API as an engineer writes it. Never run: tests/test_packaging.py type-checks it."""

from torch import Tensor

from course_lib import attention, explain_backends, masks


def decode_step(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """A plain call returns a tensor, not a union to be taken apart."""
    visible = masks.causal() & masks.padding(lengths)
    output = attention(query, key, value, visible, backend="sdpa")
    return output.transpose(1, 2).flatten(2)  # (B, H, n, d) -> (B, n, H * d)


def look_inside(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, float]:
    """Asked for the weights, it returns two tensors."""
    output, weights = attention(query, key, value, return_weights=True)
    return output, weights.max().item()


def own_mask(n_q: int, n_k: int) -> Tensor:
    """Rules combine into rules, and become a matrix on demand."""
    rule: masks.Mask = masks.sliding_window(4, 0) | ~masks.causal()
    return rule.dense(n_q, n_k)


def why_not(query: Tensor) -> list[str]:
    """Each backend's answer is a string."""
    reasons: dict[str, str] = explain_backends(query, query, query, masks.causal())
    return [name for name, reason in reasons.items() if reason != "ok"]
