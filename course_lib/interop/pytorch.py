"""`torch.nn`'s attention, norms and Transformer as our modules, with the same weights.

What differs between the two is not the mathematics but the conventions:

    torch.nn                                        here
    (query, key, value)                             (x, context): keys and values have one source
    (length, batch, d_model) unless batch_first     (batch, length, d_model), or `LengthFirst`
    bool masks: True = may NOT attend               True = may attend: `mask_from_torch`
    float masks, added to the scores                bias
    weights averaged over heads                     weights of every head
    a query that may see no key: NaN                0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import layers, masks


def from_torch(module: nn.Module, *, batch_first: bool | None = None) -> nn.Module:
    """Our equal of a module of `torch.nn`: the same numbers from the same tensors.

        torch.nn.MultiheadAttention         layers.MultiHeadAttention
        LayerNorm, RMSNorm                  layers.LayerNorm, layers.RMSNorm
        TransformerEncoderLayer             layers.EncoderLayer
        TransformerDecoderLayer             layers.DecoderLayer
        TransformerEncoder, …Decoder        layers.Stack
        Transformer                         layers.EncoderDecoderStack

    Args:
        module: of exactly one of these classes; it is copied, not changed.
        batch_first: None keeps the module's layout: one with batch_first=False comes back inside
            `LengthFirst`, which takes and returns (length, batch, d_model). True gives the bare
            module, which takes (batch, length, d_model).

    Returns:
        Our module, with copies of the parameters in their dtypes, on their devices and as trainable
        as they were, in the same mode (training or not).

    Raises:
        TypeError: there is no equal of this class.
        ValueError: an option that we do not support, by its name (add_bias_kv, add_zero_attn, vdim
            other than kdim, another activation, a norm of another kind or over several dimensions,
            a custom_encoder or custom_decoder of another class).
    """
    # On "meta", modules are made without drawing numbers that the copies would replace.
    with torch.device("meta"), torch.enable_grad():
        ours = _convert(module).train(module.training)
    keeps_layout = batch_first is None and not _is_batch_first(module)
    return LengthFirst(ours) if keeps_layout or batch_first is False else ours


class LengthFirst(nn.Module):
    """One of our modules behind PyTorch's older layout: (length, batch, d_model) in and out.

    Masks, biases and weights are as the module inside has them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        """The module's forward; x, context, source and target are turned around."""
        tokens = ("x", "context", "source", "target")
        result = self.module(
            *map(_turn, args[:2]), *args[2:],
            **{name: _turn(o) if name in tokens else o for name, o in options.items()},
        )  # fmt: skip
        return (_turn(result[0]), *result[1:]) if isinstance(result, tuple) else _turn(result)


def mask_from_torch(
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    *,
    num_heads: int | None = None,
) -> masks.Mask | None:
    """PyTorch's two masks as one of ours; None where both are None.

    Args:
        attn_mask: (n_q, n_k) or (batch · heads, n_q, n_k), bool with True = may NOT attend, or
            floating point with 0 and -inf. Other numbers are a bias: give them as `bias`.
        key_padding_mask: (batch, n_k), bool with True = is padding, or 0 and -inf.
        num_heads: needed for an attn_mask of three dimensions, to tell batch from heads.

    Raises:
        TypeError, ValueError: a mask of another dtype, shape or content.
    """
    visible: list[masks.Mask] = []
    if attn_mask is not None:
        shown = _visible("attn_mask", attn_mask)
        visible.append(masks.from_dense(_per_head(shown, num_heads)))
    if key_padding_mask is not None:
        shown = _visible("key_padding_mask", key_padding_mask)
        if shown.ndim != 2:
            raise ValueError(f"key_padding_mask must be (batch, n_k), got {tuple(shown.shape)}")
        visible.append(masks.from_dense(shown[:, None, None]))  # (batch, 1, 1, n_k)
    if not visible:
        return None
    return visible[0] if len(visible) == 1 else visible[0] & visible[1]


def _visible(name: str, mask: Tensor) -> Tensor:
    """PyTorch's "may not attend" as our "may attend"."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool or floating-point tensor, got {kind}")
    if mask.dtype == torch.bool:
        return ~mask
    hidden = mask == -math.inf
    if not (hidden | (mask == 0)).all():
        raise ValueError(
            f"{name} holds numbers other than 0 and -inf, which are a bias and no mask: give them "
            "as bias, which is added to the scores"
        )
    return ~hidden


def _per_head(shown: Tensor, num_heads: int | None) -> Tensor:
    if shown.ndim == 2:
        return shown
    if shown.ndim != 3:
        raise ValueError(
            f"attn_mask must be (n_q, n_k) or (batch · heads, n_q, n_k), got {tuple(shown.shape)}"
        )
    if num_heads is None or num_heads < 1 or shown.shape[0] % num_heads:
        raise ValueError(
            f"num_heads must divide the first size of attn_mask {tuple(shown.shape)}, which is "
            f"batch · heads; got {num_heads}"
        )
    return shown.unflatten(0, (-1, num_heads))  # (b · h, n_q, n_k) -> (b, h, n_q, n_k)


# --- one function per class -----------------------------------------------------------------------


def _convert(module: nn.Module) -> nn.Module:
    # The class itself: a subclass may compute something else.
    if type(module) not in CONVERTERS:
        known = ", ".join(kind.__name__ for kind in CONVERTERS)
        raise TypeError(f"module must be one of torch.nn's {known}; got {type(module).__name__}")
    return CONVERTERS[type(module)](module)


def _attention(module: nn.MultiheadAttention) -> layers.MultiHeadAttention:
    if module.bias_k is not None or module.bias_v is not None:
        raise ValueError("add_bias_kv=True is not supported")
    if module.add_zero_attn:
        raise ValueError("add_zero_attn=True is not supported")
    if module.kdim != module.vdim:
        raise ValueError(
            f"vdim={module.vdim} other than kdim={module.kdim} is not supported: keys and values "
            "come from one context"
        )
    ours = layers.MultiHeadAttention(
        module.embed_dim, module.num_heads, d_context=module.kdim, dropout=module.dropout,
        bias=module.in_proj_bias is not None,
    )  # fmt: skip
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module.in_proj_weight is not None:  # query, key and value of one width: one matrix
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    for linear, weight, bias in zip(
        (ours.q_proj, ours.k_proj, ours.v_proj), weights, biases, strict=True
    ):
        _fill(linear, weight, bias)
    _fill(ours.out_proj, module.out_proj.weight, module.out_proj.bias)
    return ours


def _layer_norm(module: nn.LayerNorm) -> layers.LayerNorm:
    ours = layers.LayerNorm(_width(module), eps=module.eps)
    _fill(ours, module.weight, module.bias)
    return ours


def _rms_norm(module: nn.RMSNorm) -> layers.RMSNorm:
    ours = layers.RMSNorm(_width(module), eps=module.eps)
    ours.weight = _parameter(module.weight)
    return ours


def _encoder_layer(module: nn.TransformerEncoderLayer) -> layers.EncoderLayer:
    ours = layers.EncoderLayer(module.self_attn.embed_dim, module.self_attn.num_heads)
    ours.attention = _attention(module.self_attn)
    ours.feed_forward = _feed_forward(module)
    ours.attention_residual = _residual(module, 1)
    ours.feed_forward_residual = _residual(module, 2)
    return ours


def _decoder_layer(module: nn.TransformerDecoderLayer) -> layers.DecoderLayer:
    ours = layers.DecoderLayer(module.self_attn.embed_dim, module.self_attn.num_heads)
    ours.self_attention = _attention(module.self_attn)
    ours.cross_attention = _attention(module.multihead_attn)
    ours.feed_forward = _feed_forward(module)
    ours.self_attention_residual = _residual(module, 1)
    ours.cross_attention_residual = _residual(module, 2)
    ours.feed_forward_residual = _residual(module, 3)
    return ours


def _stack(module: nn.TransformerEncoder | nn.TransformerDecoder) -> layers.Stack:
    norm = None if module.norm is None else _norm("norm", module.norm)
    return layers.Stack([_convert(layer) for layer in module.layers], norm)


def _transformer(module: nn.Transformer) -> layers.EncoderDecoderStack:
    for name, part, kind in (
        ("custom_encoder", module.encoder, nn.TransformerEncoder),
        ("custom_decoder", module.decoder, nn.TransformerDecoder),
    ):
        if type(part) is not kind:
            raise ValueError(
                f"{name} of class {type(part).__name__} is not supported, only {kind.__name__}"
            )
    return layers.EncoderDecoderStack(_stack(module.encoder), _stack(module.decoder))


CONVERTERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.MultiheadAttention: _attention,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _stack,
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerDecoder: _stack,
    nn.Transformer: _transformer,
}


# --- their parts ----------------------------------------------------------------------------------


def _feed_forward(module: Any) -> layers.FeedForward:
    up, down = module.linear1, module.linear2
    ours = layers.FeedForward(
        up.in_features, up.out_features, dropout=module.dropout.p,
        activation=_activation(module.activation),
    )  # fmt: skip
    _fill(ours.up, up.weight, up.bias)
    _fill(ours.down, down.weight, down.bias)
    return ours


def _residual(module: Any, number: int) -> layers.Residual:
    """What PyTorch calls norm1 and dropout1, norm2 and dropout2, …"""
    norm = _norm(f"norm{number}", getattr(module, f"norm{number}"))
    dropout = getattr(module, f"dropout{number}").p
    return layers.Residual(norm, norm_first=module.norm_first, dropout=dropout)


def _norm(name: str, module: nn.Module) -> nn.Module:
    if type(module) not in (nn.LayerNorm, nn.RMSNorm):
        raise ValueError(
            f"{name} of class {type(module).__name__} is not supported, only LayerNorm and RMSNorm"
        )
    return _convert(module)


def _activation(activation: Callable[[Tensor], Tensor]) -> str:
    if activation in (F.relu, torch.relu) or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    name = getattr(activation, "__name__", repr(activation))
    raise ValueError(f"activation {name} is not supported, only relu and gelu")


def _width(module: nn.LayerNorm | nn.RMSNorm) -> int:
    if len(module.normalized_shape) != 1:
        raise ValueError(
            f"normalized_shape={tuple(module.normalized_shape)} is not supported: the norm is over "
            "one dimension, the last"
        )
    return module.normalized_shape[0]


def _fill(ours: Any, weight: Tensor | None, bias: Tensor | None) -> None:
    ours.weight, ours.bias = _parameter(weight), _parameter(bias)


def _parameter(source: Tensor | None) -> nn.Parameter | None:
    """A copy, on the same device and as trainable as the original."""
    if source is None:
        return None
    return nn.Parameter(source.detach().clone(), requires_grad=source.requires_grad)


def _is_batch_first(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        module = module.layers[0]
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    return getattr(module, "batch_first", True)  # norms take any layout


def _turn(tokens: Any) -> Any:
    """(length, batch, d_model) <-> (batch, length, d_model); what is no such tensor stays."""
    is_tokens = isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.is_floating_point()
    return tokens.transpose(0, 1) if is_tokens else tokens
