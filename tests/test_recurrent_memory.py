"""Memories of layers: kept, split, compressed, looked at; and what compression learns from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from course_lib import layers, masks
from course_lib.layers import (
    Compression,
    MemoryLayer,
    compress,
    extend_memory,
    reconstruction_loss,
    split_memory,
)

D = 8


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind=MemoryLayer, **options):
    """A layer with weights large enough that everything matters."""
    layer = kind(D, 2, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    return layer


# -- keeping and splitting -------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(9))
def test_the_last_vectors_are_kept_oldest_first(length):
    before, now = numbers(2, 4, D), numbers(2, 3, D, seed=1)
    both = torch.cat([before, now], 1)
    assert torch.equal(extend_memory(now, before, length), both[:, 7 - min(length, 7) :])


def test_an_empty_memory_can_be_extended():
    now = numbers(2, 3, D)
    assert torch.equal(extend_memory(now, now[:, :0], 5), now)


def test_no_gradient_reaches_what_is_remembered():
    now, before = numbers(1, 3, D).requires_grad_(), numbers(1, 2, D).requires_grad_()
    assert not extend_memory(now, before, 4).requires_grad
    assert now.requires_grad  # the layer itself goes on learning from it


@given(st.integers(0, 20), st.integers(0, 8), st.integers(1, 5))
def test_whole_groups_leave_and_nothing_is_lost(m, length, rate):
    memory = torch.arange(m, dtype=torch.float64)[None, :, None]
    old, kept = split_memory(memory, length, rate)
    assert torch.equal(torch.cat([old, kept], 1), memory)
    assert old.shape[1] % rate == 0
    assert kept.shape[1] < length + rate
    assert kept.shape[1] >= min(m, length)


# -- compressing ---------------------------------------------------------------------------------


def test_neighbours_become_their_mean_or_their_max():
    old = torch.tensor([[[1.0, 9.0], [3.0, 5.0], [-2.0, 0.0], [0.0, -4.0]]])
    assert compress(old, 2).tolist() == [[[2.0, 7.0], [-1.0, -2.0]]]
    assert compress(old, 2, "max").tolist() == [[[3.0, 9.0], [0.0, 0.0]]]
    assert compress(old, 4).tolist() == [[[0.5, 2.5]]]


@pytest.mark.parametrize("how", layers.recurrent_memory.COMPRESSIONS)
def test_every_compression_keeps_batch_and_width(how):
    compression = Compression(D, 3, how).double()
    assert compression(numbers(2, 12, D)).shape == (2, 4, D)
    assert compression(numbers(2, 0, D)).shape == (2, 0, D)
    torch.testing.assert_close(compression(numbers(2, 6, D))[1:], compression(numbers(2, 6, D)[1:]))


@pytest.mark.parametrize("how", layers.recurrent_memory.COMPRESSIONS)
def test_a_rate_of_one_changes_nothing(how):
    assert torch.equal(Compression(D, 1, how).double()(numbers(2, 5, D)), numbers(2, 5, D))


def test_the_convolution_starts_as_the_mean():
    compression = Compression(D, 4, "conv").double()
    torch.testing.assert_close(compression(numbers(2, 8, D)), compress(numbers(2, 8, D), 4))


def test_the_convolution_is_pytorchs():
    compression, theirs = Compression(D, 3, "conv").double(), nn.Conv1d(D, D, 3, stride=3).double()
    nn.init.normal_(compression.mix.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # (d_out, rate · d_in) -> (d_out, rate, d_in) -> (d_out, d_in, rate)
        theirs.weight.copy_(compression.mix.weight.unflatten(1, (3, D)).transpose(1, 2))
        theirs.bias.copy_(compression.mix.bias)
    x = numbers(2, 9, D)
    torch.testing.assert_close(compression(x), theirs(x.transpose(1, 2)).transpose(1, 2))


def test_what_cannot_be_compressed_is_refused():
    for compression in (Compression(D, 2), Compression(D, 2, "conv")):
        with pytest.raises(ValueError, match="multiple of rate=2 memories, got 3"):
            compression(torch.zeros(1, 3, D))
    with pytest.raises(ValueError, match="how must be one of mean, max; got 'conv'"):
        compress(torch.zeros(1, 2, D), 2, "conv")
    with pytest.raises(ValueError, match="compression must be one of mean, max, conv; got 'sum'"):
        Compression(D, 2, "sum")
    with pytest.raises(ValueError, match="at least 1, got 8 and 0"):
        Compression(D, 0)


# -- the layer that looks back ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"norm_first": False}, {"norm": "rms_norm"}])
def test_with_a_memory_the_layer_gives_the_end_of_one_long_pass(options):
    layer, x = made(position=layers.TransformerXLPosition(D, 2), **options), numbers(2, 9, D)
    whole = layer(x, masks.causal())
    for cut in range(1, 9):
        found = layer(x[:, cut:], masks.causal(), memory=x[:, :cut])
        torch.testing.assert_close(found, whole[:, cut:], rtol=0, atol=1e-10)


def test_without_a_memory_it_is_an_encoder_layer():
    x = numbers(2, 5, D)
    want = made(layers.EncoderLayer)(x, masks.causal())
    assert torch.equal(made()(x, masks.causal()), want)
    torch.testing.assert_close(made()(x, masks.causal(), memory=x[:, :0]), want)


def test_each_token_sees_the_whole_memory_and_itself_and_no_later_one():
    _, weights = made()(numbers(1, 3, D), masks.causal(), memory=numbers(1, 4, D, seed=1),
                        return_weights=True)  # fmt: skip
    assert torch.equal(weights[0, 0] > 0, torch.ones(3, 7).tril(4).bool())


def test_a_cache_and_a_memory_cannot_both_be_given():
    layer, x = made(), numbers(1, 3, D)
    with pytest.raises(ValueError, match="cache and memory are both given"):
        layer(x, cache=layer.new_cache(), memory=x)


# -- what compression learns from ------------------------------------------------------------------


def test_the_loss_follows_the_equation_of_the_paper():
    layer = MemoryLayer(D, 1, norm_first=False, bias=False).double()
    h, old, few = numbers(2, 3, D), numbers(2, 4, D, seed=1), numbers(2, 2, D, seed=2)
    w_q, w_k, w_v = (getattr(layer.attention, f"{name}_proj").weight.T for name in "qkv")

    def find(m):
        return ((h @ w_q) @ (m @ w_k).mT / D**0.5).softmax(-1) @ (m @ w_v)

    want = (find(few) - find(old)).square().mean()
    torch.testing.assert_close(reconstruction_loss(layer, h, old, few), want)


@pytest.mark.parametrize("options", [{}, {"norm_first": False}, {"num_kv_heads": 1}])
def test_the_loss_is_nothing_where_nothing_is_compressed(options):
    layer, old = made(position=layers.RotaryPositionalEncoding(4), **options), numbers(1, 4, D)
    assert reconstruction_loss(layer, numbers(1, 3, D), old, old.clone()) == 0
    assert reconstruction_loss(layer, numbers(1, 3, D), old, compress(old, 2)) > 0


def test_nothing_but_the_compressed_memories_gets_a_gradient():
    layer, h, old = made(), numbers(1, 3, D).requires_grad_(), numbers(1, 4, D).requires_grad_()
    compressed = compress(old.detach(), 2).requires_grad_()
    reconstruction_loss(layer, h, old, compressed).backward()
    assert compressed.grad.abs().sum() > 0
    assert all(x.grad is None for x in (h, old, *layer.parameters()))


def test_the_convolution_learns_to_leave_out_memories_that_say_little():
    layer, compression = made(norm_first=False), Compression(D, 2, "conv").double()
    optimizer = torch.optim.Adam(compression.parameters(), lr=0.01)

    def loss(seed):
        x = numbers(16, 16, D, seed=seed)
        x[:, 1::2] *= 0.1  # the mean takes half its vectors from these
        return reconstruction_loss(layer, x[:, 8:], x[:, :8], compression(x[:, :8]))

    before = loss(999).item()
    for seed in range(60):
        optimizer.zero_grad()
        loss(seed).backward()
        optimizer.step()
    assert loss(999).item() < 0.7 * before


def test_the_gradient_of_the_loss_is_right():
    layer, h, old = made(), numbers(1, 2, D), numbers(1, 4, D, seed=1)
    few = compress(old, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda few: reconstruction_loss(layer, h, old, few), few)
