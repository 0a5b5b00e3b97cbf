"""PyTorch's modules and our equals of them: the same numbers, forward and backward."""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import interop, layers, masks
from course_lib.interop import from_torch, mask_from_torch

D, HEADS, BATCH, N_Q, N_K = 8, 2, 3, 4, 5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
each_layout = pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "length"])


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random: PyTorch begins with biases 0 and norms 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return module


def tokens(dtype, length=N_Q, width=D, batch_first=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, length, width, generator=generator, dtype=torch.float64).to(dtype)
    return x if batch_first else x.transpose(0, 1)


def same(got, want):
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def gradients(call, *inputs):
    """Output and gradients with respect to the inputs, of a loss that looks at every entry."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = call(*leaves)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weight).sum().backward()
    return output, [leaf.grad for leaf in leaves]


def same_forward_and_backward(theirs, call_theirs, call_ours, *inputs):
    """Outputs, gradients of the inputs and gradients of all parameters agree."""
    ours = from_torch(theirs)
    want, want_grads = gradients(lambda *x: call_theirs(theirs, *x), *inputs)
    got, got_grads = gradients(lambda *x: call_ours(ours, *x), *inputs)
    same(got, want)
    for g, w in zip(got_grads, want_grads, strict=True):
        same(g, w)
    holds_gradients = copy.deepcopy(theirs)
    for parameter, original in zip(holds_gradients.parameters(), theirs.parameters(), strict=True):
        parameter.data = original.grad
    want_grads = dict(from_torch(holds_gradients).named_parameters())
    got_grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert got_grads.keys() == want_grads.keys()
    for name, want_grad in want_grads.items():
        same(got_grads[name], want_grad.detach())


# --- attention -----------------------------------------------------------------------------------


@each_dtype
@each_layout
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_equal(dtype, batch_first, bias):
    theirs = lively(
        nn.MultiheadAttention(D, HEADS, bias=bias, batch_first=batch_first, dtype=dtype)
    )
    x = tokens(dtype, batch_first=batch_first)
    same_forward_and_backward(
        theirs, lambda m, x: m(x, x, x, need_weights=False)[0], lambda m, x: m(x), x
    )


@each_dtype
@each_layout
@pytest.mark.parametrize("width", [D, 5])
def test_cross_attention_is_equal_also_for_a_context_of_another_width(dtype, batch_first, width):
    theirs = nn.MultiheadAttention(
        D, HEADS, kdim=width, vdim=width, batch_first=batch_first, dtype=dtype
    )
    x = tokens(dtype, batch_first=batch_first)
    context = tokens(dtype, N_K, width, batch_first, seed=1)
    same_forward_and_backward(
        lively(theirs), lambda m, x, c: m(x, c, c)[0], lambda m, x, c: m(x, c), x, context
    )


@each_layout
def test_weights_are_equal_head_by_head(batch_first):
    theirs = lively(nn.MultiheadAttention(D, HEADS, batch_first=batch_first, dtype=torch.float64))
    x = tokens(torch.float64, batch_first=batch_first)
    want = theirs(x, x, x, average_attn_weights=False)
    for g, w in zip(from_torch(theirs)(x, return_weights=True), want, strict=True):
        same(g, w)


# --- norms ---------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: nn.LayerNorm(D, **o),
        lambda **o: nn.LayerNorm([D], eps=0.1, bias=False, **o),
        lambda **o: nn.LayerNorm(D, elementwise_affine=False, **o),
        lambda **o: nn.RMSNorm(D, **o),
        lambda **o: nn.RMSNorm(D, eps=0.1, **o),
        lambda **o: nn.RMSNorm((D,), elementwise_affine=False, **o),
    ],
    ids=["layer", "layer-no-bias", "layer-no-affine", "rms", "rms-eps", "rms-no-affine"],
)
def test_norms_are_equal(dtype, make):
    theirs = lively(make(dtype=dtype))
    same_forward_and_backward(theirs, lambda m, x: m(x), lambda m, x: m(x), tokens(dtype) / 30)


# --- layers and stacks ---------------------------------------------------------------------------

ACTIVATIONS = ["relu", "gelu", F.relu, F.gelu, nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh")]
OPTIONS = [
    {"norm_first": norm_first, "activation": activation, "bias": bias, "layer_norm_eps": eps}
    for norm_first, (activation, bias, eps) in itertools.product(
        [True, False], [("relu", True, 1e-5), ("gelu", True, 1e-2), ("gelu", False, 1e-5)]
    )
]
OPTIONS += [{"activation": activation} for activation in ACTIVATIONS[2:]]


def option_id(options):
    """The options by name, a function by its own: an address would differ between workers."""
    return " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()) or "default"


each_option = pytest.mark.parametrize("options", OPTIONS, ids=option_id)
CAUSAL = torch.ones(N_Q, N_Q, dtype=torch.bool).triu(1)  # PyTorch's: True = may not attend
PADDED = torch.arange(N_K) >= torch.tensor([[3], [5], [1]])


def options_for(dtype, batch_first, options):
    return {
        "dim_feedforward": 12,
        "dropout": 0.0,
        "batch_first": batch_first,
        "dtype": dtype,
    } | options


@each_dtype
@each_layout
@each_option
def test_an_encoder_layer_is_equal(dtype, batch_first, options):
    theirs = nn.TransformerEncoderLayer(D, HEADS, **options_for(dtype, batch_first, options))
    same_forward_and_backward(
        lively(theirs),
        lambda m, x: m(x, src_mask=CAUSAL),
        lambda m, x: m(x, masks.causal()),
        tokens(dtype, batch_first=batch_first),
    )


@each_dtype
@each_layout
@each_option
def test_a_decoder_layer_is_equal(dtype, batch_first, options):
    theirs = nn.TransformerDecoderLayer(D, HEADS, **options_for(dtype, batch_first, options))
    same_forward_and_backward(
        lively(theirs),
        lambda m, x, c: m(x, c, tgt_mask=CAUSAL, memory_key_padding_mask=PADDED),
        lambda m, x, c: m(
            x, c, mask=masks.causal(), context_mask=mask_from_torch(key_padding_mask=PADDED)
        ),
        tokens(dtype, batch_first=batch_first),
        tokens(dtype, N_K, batch_first=batch_first, seed=1),
    )


@each_dtype
@each_layout
@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("norm_first", [True, False])
def test_stacks_are_equal_with_and_without_a_last_norm(dtype, batch_first, norm, norm_first):
    options = options_for(dtype, batch_first, {"norm_first": norm_first})
    last = (lambda: None) if norm is None else (lambda: norm(D, dtype=dtype))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, HEADS, **options), 2, last())
    same_forward_and_backward(
        lively(encoder),
        lambda m, x: m(x, src_key_padding_mask=PADDED),
        lambda m, x: m(x, mask_from_torch(key_padding_mask=PADDED)),
        tokens(dtype, N_K, batch_first=batch_first),
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, HEADS, **options), 2, last())
    same_forward_and_backward(
        lively(decoder),
        lambda m, x, c: m(x, c, tgt_mask=CAUSAL),
        lambda m, x, c: m(x, context=c, mask=masks.causal()),
        tokens(dtype, batch_first=batch_first),
        tokens(dtype, N_K, batch_first=batch_first, seed=1),
    )


@each_dtype
@each_layout
@pytest.mark.parametrize("options", OPTIONS[::2], ids=option_id)
def test_a_whole_transformer_is_equal(dtype, batch_first, options):
    theirs = nn.Transformer(D, HEADS, 2, 1, **options_for(dtype, batch_first, options))
    seen = mask_from_torch(key_padding_mask=PADDED)
    same_forward_and_backward(
        lively(theirs),
        lambda m, s, t: m(
            s, t, tgt_mask=CAUSAL, src_key_padding_mask=PADDED, memory_key_padding_mask=PADDED
        ),
        lambda m, s, t: m(s, t, seen, masks.causal(), seen),
        tokens(dtype, N_K, batch_first=batch_first),
        tokens(dtype, batch_first=batch_first, seed=1),
    )


def test_pytorchs_fast_path_in_eval_mode_is_equal():
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, HEADS, 12, dropout=0.4, batch_first=True), 2
    )
    lively(theirs).eval()
    x, ours = tokens(torch.float32, N_K), from_torch(theirs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        want = theirs(x, src_key_padding_mask=PADDED)
        got = ours(x, mask_from_torch(key_padding_mask=PADDED))
    torch.testing.assert_close(got[~PADDED], want[~PADDED], atol=1e-5, rtol=1e-5)


def test_what_comes_back_is_built_of_our_layers():
    encoder_layer = nn.TransformerEncoderLayer(D, HEADS, batch_first=True)
    decoder_layer = nn.TransformerDecoderLayer(D, HEADS, batch_first=True)
    for theirs, kind in (
        (nn.MultiheadAttention(D, HEADS, batch_first=True), layers.MultiHeadAttention),
        (nn.LayerNorm(D), layers.LayerNorm),
        (nn.RMSNorm(D), layers.RMSNorm),
        (encoder_layer, layers.EncoderLayer),
        (decoder_layer, layers.DecoderLayer),
        (nn.TransformerEncoder(encoder_layer, 2), layers.Stack),
        (nn.TransformerDecoder(decoder_layer, 2), layers.Stack),
        (nn.Transformer(D, HEADS, 1, 1, batch_first=True), layers.EncoderDecoderStack),
    ):
        assert type(from_torch(theirs)) is kind


# --- layout, copies, modes -----------------------------------------------------------------------


def test_the_layout_can_be_chosen():
    theirs = lively(nn.MultiheadAttention(D, HEADS, dtype=torch.float64))
    x = tokens(torch.float64, batch_first=False)
    want = theirs(x, x, x)[0]
    assert isinstance(from_torch(theirs), interop.LengthFirst)
    same(from_torch(theirs)(x), want)
    bare = from_torch(theirs, batch_first=True)
    assert type(bare) is layers.MultiHeadAttention
    same(bare(x.transpose(0, 1)).transpose(0, 1), want)
    theirs.batch_first = True
    same(from_torch(theirs, batch_first=False)(x), want)


def test_the_length_first_wrapper_turns_tokens_and_nothing_else():
    theirs = lively(nn.TransformerDecoderLayer(D, HEADS, 12, 0.0, dtype=torch.float64))
    x, context = (tokens(torch.float64, n, batch_first=False) for n in (N_Q, N_K))
    ours, bias = from_torch(theirs), torch.zeros(HEADS, N_Q, N_Q, dtype=torch.float64)
    want = theirs(x, context, tgt_mask=CAUSAL)
    same(ours(x, context, masks.causal()), want)
    same(ours(x, context=context, mask=~CAUSAL, bias=bias), want)
    output, (own, across) = ours(x, context, mask=masks.causal(), return_weights=True)
    same(output, want)
    assert own.shape == (BATCH, HEADS, N_Q, N_Q)
    assert across.shape == (BATCH, HEADS, N_Q, N_K)


def test_parameters_are_copies():
    theirs = lively(nn.TransformerEncoderLayer(D, HEADS, batch_first=True))
    before = copy.deepcopy(theirs.state_dict())
    ours = from_torch(theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in theirs.state_dict().items())


def test_converting_draws_no_random_numbers():
    theirs, state = nn.Transformer(D, HEADS, 1, 1), torch.random.get_rng_state()
    from_torch(theirs)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_frozen_parameters_stay_frozen():
    theirs = nn.TransformerEncoderLayer(D, HEADS, batch_first=True)
    theirs.self_attn.in_proj_weight.requires_grad_(False)
    theirs.norm1.weight.requires_grad_(False)
    with torch.no_grad():
        ours = from_torch(theirs)
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    projections = {f"attention.{n}_proj.weight" for n in "qkv"}
    assert frozen == {*projections, "attention_residual.norm.weight"}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_every_dropout_are_kept(training):
    theirs = nn.TransformerDecoderLayer(D, HEADS, dropout=0.3).train(training)
    theirs.dropout2.p = 0.1
    ours = from_torch(theirs, batch_first=True)
    assert all(module.training == training for module in ours.modules())
    assert ours.self_attention.dropout == ours.cross_attention.dropout == 0.3
    assert ours.feed_forward.dropout.p == ours.self_attention_residual.dropout.p == 0.3
    assert ours.cross_attention_residual.dropout.p == 0.1


def test_dtype_and_device_are_kept():
    theirs = nn.TransformerEncoderLayer(D, HEADS, dtype=torch.bfloat16)
    assert {p.dtype for p in from_torch(theirs).parameters()} == {torch.bfloat16}
    assert {p.device.type for p in from_torch(theirs).parameters()} == {"cpu"}
    assert {p.device.type for p in from_torch(theirs.to("meta")).parameters()} == {"meta"}


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_pytorchs_masks_are_translated(kind, per_head, padded):
    theirs = lively(nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64))
    x, context = tokens(torch.float64), tokens(torch.float64, N_K, seed=1)
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH * HEADS, N_Q, N_K) if per_head else (N_Q, N_K)
    hidden = torch.rand(shape, generator=generator) < 0.4
    hidden[..., 0] = False  # PyTorch gives NaN where a query sees nothing
    padding = PADDED if padded else None
    if kind == "float":
        hidden = torch.zeros(shape).double().masked_fill(hidden, -math.inf)
        padding = (
            None
            if padding is None
            else torch.zeros(padding.shape).double().masked_fill(padding, -math.inf)
        )
    want = theirs(x, context, context, attn_mask=hidden, key_padding_mask=padding)[0]
    mask = mask_from_torch(hidden, padding, num_heads=HEADS)
    same(from_torch(theirs)(x, context, mask), want)


def test_a_float_mask_of_other_numbers_is_our_bias():
    theirs = lively(nn.TransformerEncoderLayer(D, HEADS, 12, 0.0, batch_first=True)).double()
    x = tokens(torch.float64)
    bias = torch.randn(N_Q, N_Q, dtype=torch.float64).masked_fill(CAUSAL, -math.inf)
    same(from_torch(theirs)(x, bias=bias), theirs(x, src_mask=bias))


def test_no_masks_are_no_mask():
    assert mask_from_torch() is None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (torch.ones(2, 2).long(),),
            TypeError,
            "attn_mask must be a bool or floating-point tensor",
        ),
        ((None, [True]), TypeError, "key_padding_mask must be a bool .* got list"),
        ((torch.ones(2, 2),), ValueError, "attn_mask holds numbers other than 0 and -inf"),
        ((torch.ones(2).bool(),), ValueError, r"attn_mask must be \(n_q, n_k\) or .*got \(2,\)"),
        ((torch.ones(4, 2, 2).bool(),), ValueError, "num_heads must divide .* got None"),
        ((torch.ones(4, 2, 2).bool(), None, 3), ValueError, "num_heads must divide .* got 3"),
        ((None, torch.ones(2).bool()), ValueError, r"key_padding_mask must be \(batch, n_k\)"),
    ],
)
def test_masks_of_another_kind_are_refused_by_name(args, error, message):
    attn_mask, padding, heads = (*args, None, None)[:3]
    with pytest.raises(error, match=message):
        mask_from_torch(attn_mask, padding, num_heads=heads)


# --- what we do not support ----------------------------------------------------------------------


def encoder_with(norm=None, **options):
    layer = nn.TransformerEncoderLayer(D, HEADS, **options)
    return nn.TransformerEncoder(layer, 1, norm)


class Own(nn.TransformerEncoderLayer):
    """May compute something else."""


def with_other_norm():
    layer = nn.TransformerDecoderLayer(D, HEADS)
    layer.norm3 = nn.Identity()
    return layer


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.MultiheadAttention(D, HEADS, add_bias_kv=True), ValueError, "add_bias_kv=True"),
        (
            lambda: nn.MultiheadAttention(D, HEADS, add_zero_attn=True),
            ValueError,
            "add_zero_attn=T",
        ),
        (lambda: nn.MultiheadAttention(D, HEADS, vdim=3), ValueError, "vdim=3 other than kdim=8"),
        (lambda: nn.LayerNorm((2, D)), ValueError, r"normalized_shape=\(2, 8\)"),
        (lambda: nn.RMSNorm((2, D)), ValueError, r"normalized_shape=\(2, 8\)"),
        (lambda: encoder_with(activation=F.silu), ValueError, "activation silu is not supported"),
        (
            lambda: encoder_with(activation=nn.ELU()),
            ValueError,
            r"activation ELU\(.* not supported",
        ),
        (lambda: encoder_with(nn.BatchNorm1d(D)), ValueError, "norm of class BatchNorm1d"),
        (with_other_norm, ValueError, "norm3 of class Identity"),
        (
            lambda: nn.Transformer(D, HEADS, 1, 1, custom_encoder=nn.Identity()),
            ValueError,
            "custom_e",
        ),
        (
            lambda: nn.Transformer(D, HEADS, 1, 1, custom_decoder=nn.Identity()),
            ValueError,
            "custom_d",
        ),
        (lambda: nn.Linear(2, 2), TypeError, "module must be one of torch.nn's .* got Linear"),
        (lambda: Own(D, HEADS), TypeError, "module must be one of .* got Own"),
    ],
)
def test_an_option_we_do_not_support_is_named(make, error, message):
    with pytest.raises(error, match=message):
        from_torch(make())
