"""Does the future leak into the past? Measured on any model, by its gradients.

    >>> import torch
    >>> from course_lib import leaks
    >>> x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    >>> leaks.find_leaks(lambda x: x.cumsum(1), x)  # each output adds up the past
    []
    >>> found = leaks.find_leaks(lambda x: x - x.mean(1, keepdim=True), x)
    >>> [(output, input) for output, input, size in found][:3]  # the mean knows the whole text
    [(0, 1), (0, 2), (0, 3)]

`find_leaks` answers "who may not, and does?", `influence` hands over all the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from . import masks

__all__ = ["Leak", "find_leaks", "influence"]

Function = Callable[[Tensor], Tensor]


class Leak(NamedTuple):
    """Input `input` reaches output `output`, and should not; `size` is the largest gradient."""

    output: int
    input: int
    size: float


def influence(function: Function, x: Tensor) -> Float[Tensor, "n_out n_in"]:
    """How strongly each output depends on each input: max |∂ output[t] / ∂ input[s]|.

    The maximum is over the batch and all features of both sides. It is exact: one backward pass for
    each number of the output, no finite differences, no random probes. So keep x small; a few
    tokens of a few sequences show what there is to see.

    Args:
        function: a module, or anything that maps x to a floating-point tensor of rank 2 or more
            with time at axis 1: (batch, n_out, …). It runs once, as it is, in training mode or not;
            its parameters get no .grad, and torch's random numbers go on as if nothing had been. If
            it is a module, its buffers (running means, …) are put back.
        x: (batch, n_in, …) of floating point; or token ids (batch, n_in), integers that function
            gives to an `nn.Embedding`. Then "input" is what the embedding hands over for a token.

    Returns:
        (n_out, n_in). 0 means: no gradient at all. NaN where a gradient is NaN.

    What it cannot see is a dependence without a gradient *at this x*: argmax, rounding, comparison,
    `detach`, a ReLU that is off, a dropped unit, a gradient too small for its dtype, and whatever
    depends on the number of tokens and not on their values. A zero means more at random inputs, in
    evaluation mode, and at several of them.

    Raises:
        TypeError: function is not callable or returns no floating-point tensor; x is no tensor of
            numbers.
        ValueError: x or the output has too few axes, or no `nn.Embedding` was called with x.
    """
    return _by_sequence(function, x).amax(0)  # (batch, n_out, n_in) -> (n_out, n_in)


def find_leaks(
    function: Function, x: Tensor, allowed: masks.Mask | Tensor | None = None
) -> list[Leak]:
    """Every pair (output, input) that depends and may not, with the size of the dependence.

    Args:
        function, x: as in `influence`, with the same blind spots.
        allowed: a `masks.Mask`, or a bool tensor (n_out, n_in) or (batch, heads, n_out, n_in), True
            = may depend; `masks.causal()` if None. What one head may see the model may see.

    Returns:
        (output, input, size), in the order of their places; [] if nothing leaks. A gradient that is
        NaN is a leak of size NaN. Anything but exactly 0 counts.

    Raises:
        TypeError, ValueError: as `influence`, or allowed does not fit.
    """
    rule = _rule(allowed)
    sizes = _by_sequence(function, x)  # (batch, n_out, n_in)
    visible = _visible(rule, sizes)  # (batch or 1, n_out, n_in)
    worst = sizes.masked_fill(visible, 0).amax(0)  # (batch, n_out, n_in) -> (n_out, n_in)
    return [Leak(t, s, worst[t, s].item()) for t, s in (worst != 0).nonzero().tolist()]


def _rule(allowed: masks.Mask | Tensor | None) -> masks.Mask:
    if allowed is None:
        return masks.causal()
    if isinstance(allowed, masks.Mask):
        return allowed
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
        raise TypeError(f"allowed must be a Mask or a bool tensor, True = may depend; got {kind}")
    if allowed.ndim not in (2, 4):
        raise ValueError(
            "allowed must have shape (n_out, n_in) or (batch, heads, n_out, n_in), got "
            f"{tuple(allowed.shape)}"
        )
    return masks.from_dense(allowed)


def _visible(rule: masks.Mask, sizes: Tensor) -> Tensor:
    batch, n_out, n_in = sizes.shape
    try:
        dense = rule.dense(n_out, n_in, device=sizes.device)
    except ValueError as error:
        raise ValueError(f"allowed must fit {n_out} outputs and {n_in} inputs: {error}") from None
    if len(dense) not in (1, batch):
        raise ValueError(f"allowed is for a batch of {len(dense)}, but the output's is {batch}")
    return dense.any(1)  # (batch or 1, heads, n_out, n_in) -> (batch or 1, n_out, n_in)


def _by_sequence(function: Function, x: Tensor) -> Float[Tensor, "batch n_out n_in"]:
    """The influence on each output sequence, of inputs of any sequence."""
    _check(function, x)
    with torch.inference_mode(False), torch.enable_grad(), _undisturbed(function, x):
        output, inputs = _run(function, x.detach().clone())
        _check_output(output)
        (batch, n_out), n_in = output.shape[:2], x.shape[1]
        dtype = torch.promote_types(output.dtype, inputs[0].dtype)
        sizes = torch.zeros(batch, n_out, n_in, dtype=dtype, device=output.device)
        if output.requires_grad:  # else nothing in it comes from x
            for b, t in product(range(batch), range(n_out)):
                for number in output[b, t].reshape(-1):  # each feature by itself
                    for size in _gradient_sizes(number, inputs):
                        sizes[b, t] = torch.maximum(sizes[b, t], size.to(sizes))
    return sizes


def _gradient_sizes(number: Tensor, inputs: list[Tensor]) -> list[Float[Tensor, " n_in"]]:
    """Largest |∂ number / ∂ input[s]| over batch and features, for each tensor of inputs."""
    gradients = torch.autograd.grad(number, inputs, retain_graph=True, allow_unused=True)
    # (batch, n_in, …) -> (n_in, batch, …) -> (n_in,)
    return [g.abs().transpose(0, 1).flatten(1).amax(1) for g in gradients if g is not None]


def _run(function: Function, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the tensors that stand for the input: x, or what embeddings gave for it."""
    if x.is_floating_point():
        leaf = x.requires_grad_()
        return function(leaf.clone()), [leaf]  # a clone may be written to
    leaves: list[Tensor] = []

    def start_here(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        is_x = isinstance(module, nn.Embedding) and given and given[0].shape == x.shape
        if not is_x or not torch.equal(given[0].to(x), x):
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()

    hook = register_module_forward_hook(start_here)  # whatever module function may hold
    try:
        output = function(x.clone())
    finally:
        hook.remove()
    if not leaves:
        raise ValueError(
            f"x holds integers, shape {tuple(x.shape)}, but function gave them to no nn.Embedding "
            "as they are: pass what comes after the embedding, floating point (batch, n, d)"
        )
    return output, leaves


@contextmanager
def _undisturbed(function: Function, x: Tensor) -> Iterator[None]:
    """Random numbers and a module's buffers are afterwards what they were before."""
    buffers = list(function.buffers()) if isinstance(function, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)


def _check(function: Function, x: Tensor) -> None:
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x must hold floating-point numbers or integer token ids, got {x.dtype}")
    if x.ndim < 2 or (x.ndim != 2 and not x.is_floating_point()):
        expected = "(batch, n, …)" if x.is_floating_point() else "(batch, n) for token ids"
        raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one number, got shape {tuple(x.shape)}")


def _check_output(output: Tensor) -> None:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"function must return one floating-point tensor, got {kind}")
    if output.ndim < 2 or output.numel() == 0:
        raise ValueError(
            "function must return a tensor that is not empty, with time at axis 1, "
            f"(batch, n_out, …); got shape {tuple(output.shape)}"
        )
