"""The blockwise backend: what it looks at, what it holds, and when "auto" takes it."""

import math

import pytest
import torch
from attention_cases import qkv, randn
from largest import Largest
from torch._subclasses.fake_tensor import FakeTensorMode

from course_lib import BackendUnsupportedError, attention, explain_backends, masks
from course_lib.ops.attention import tiled

LONG = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(40, 0),
    "two-sided": masks.sliding_window(30, 30),
    "longformer": masks.longformer(20, [0, 150]),
    "bigbird": masks.bigbird(32, random_blocks=1),
    "causal bigbird": masks.bigbird(32, random_blocks=1) & masks.causal(),
    "padding": masks.padding([200, 3]) & masks.causal(),
    "documents": masks.documents((torch.arange(600) // 70).view(2, 300)) & masks.causal(),
    "heads": masks.from_dense(torch.rand(1, 4, 1, 300, generator=torch.Generator()) > 0.5),
}
each_mask = pytest.mark.parametrize("mask", LONG.values(), ids=LONG.keys())


@each_mask
@pytest.mark.parametrize("n_q", [300, 290, 1])
def test_many_tiles_give_what_the_definition_gives_with_every_gradient(mask, n_q):
    bias = (randn(2, 1, n_q, 300), randn(300), randn(4, n_q, 1))[n_q % 3].requires_grad_()
    inputs = [t.requires_grad_() for t in qkv(n_q=n_q, n_k=300, d_k=8, d_v=5)]
    results = []
    for backend in ("tiled", "reference"):
        output, lse = attention(*inputs, mask, bias, return_lse=True, backend=backend)
        seen = lse > -math.inf
        loss = (output * torch.linspace(-1, 1, 5)).sum() + lse[seen].sin().sum()
        results.append((output, lse, *torch.autograd.grad(loss, (*inputs, bias))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_memory_grows_with_the_length_and_not_with_its_square():
    numbers = []
    for n in (4096, 8192):
        inputs = [randn(1, 1, n, 8).requires_grad_() for _ in range(3)]
        with Largest() as made:
            attention(*inputs, masks.sliding_window(64, 0), backend="tiled").sum().backward()
        numbers.append(made.numbers)
    assert numbers[1] <= 2.3 * numbers[0]
    assert numbers[1] < 8192**2 / 8


def test_the_walk_over_the_keys_gives_what_softmax_gives():
    q, k, v = (x[0, 0] for x in qkv(n_q=50, n_k=77, d_k=8, d_v=5, dtype=torch.float64))
    seen = masks.sliding_window(20, 0).dense(50, 77)[0, 0]
    want = attention(q[None, None], k[None, None], v[None, None], seen, backend="reference")
    for block in (1, 16, 77, 100):
        got = tiled.online_softmax(q, k, v, seen, block=block)
        torch.testing.assert_close(got, want[0, 0], rtol=0, atol=1e-12)
    huge = tiled.online_softmax(q * 1e6, k, v, block=16)
    assert huge.isfinite().all()
    hidden = tiled.online_softmax(q, k, v, torch.zeros(50, 77, dtype=torch.bool))
    assert (hidden == 0).all()


def test_rows_that_look_alike_are_one_group():
    groups = tiled.make_plan(masks.sliding_window(256, 0), 4096, 4096, torch.device("cpu")).groups
    assert len(groups) <= 4  # the first rows see less
    assert max(len(group.row) for group in groups) >= 4096 / 128 - 3


def test_a_plan_is_kept_until_somebody_writes_to_its_mask():
    lengths = torch.tensor([300, 120])
    mask, device = masks.padding(lengths), torch.device("cpu")
    first = tiled.make_plan(mask, 300, 300, device)
    assert tiled.make_plan(mask, 300, 300, device) is first
    q, k, v = qkv(n_q=300, n_k=300)
    before = attention(q, k, v, mask, backend="tiled")
    mask.lengths[1] = 10
    after = attention(q, k, v, mask, backend="tiled")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, attention(q, k, v, mask, backend="reference"))


def test_auto_takes_tiles_where_most_is_hidden_and_the_sequence_is_long():
    def first(n, mask):
        return next(iter(explain_backends(*[randn(1, 1, n, 8)] * 3, mask)))

    assert first(2048, masks.sliding_window(100, 0)) == "tiled"
    assert first(2048, masks.causal()) == "sdpa"
    assert first(256, masks.sliding_window(10, 0)) == "sdpa"
    assert first(2048, None) == "sdpa"


def test_dropout_is_the_same_in_the_backward_pass():
    q, k, v = (t.requires_grad_() for t in qkv(n_q=40, n_k=40, dtype=torch.float64))

    def call(q, k, v):
        g = torch.Generator().manual_seed(1)
        return attention(q, k, v, masks.causal(), dropout_p=0.4, backend="tiled", generator=g)

    assert torch.autograd.gradcheck(call, (q, k, v))


def under_fake_tensors(call, q):
    with FakeTensorMode() as mode:
        return call(mode.from_tensor(q))


WITHOUT_NUMBERS = {
    "fake": under_fake_tensors,
    "vmap": lambda call, q: torch.func.vmap(call)(q[None])[0],
    "grad": lambda call, q: torch.func.grad(lambda q: call(q).sum())(q),
    "meta": lambda call, q: call(q.to("meta")),
}


@pytest.mark.parametrize("way", WITHOUT_NUMBERS.values(), ids=WITHOUT_NUMBERS.keys())
def test_where_nobody_can_look_at_tiles_it_says_so_and_auto_serves(way):
    q, mask = randn(1, 1, 1200, 4), masks.sliding_window(9, 0)
    assert next(iter(explain_backends(q, q, q, mask))) == "tiled"
    assert way(lambda q: attention(q, q, q, mask), q).shape == (1, 1, 1200, 4)
    with pytest.raises(BackendUnsupportedError, match="blockwise"):
        way(lambda q: attention(q, q, q, mask, backend="tiled"), q)
