"""Muon, and training with products in half precision."""

import pytest
import torch
from attention_cases import randn
from torch import nn

from course_lib import data, models, training
from course_lib.training.muon import orthogonal

TINY = models.TransformerConfig(vocab_size=94, d_model=16, num_layers=1, num_heads=2, max_length=32)


def matrices():
    return [
        nn.Parameter(randn(*s, seed=i)) for i, s in enumerate([(8, 8), (8, 8), (16, 4), (3, 9)])
    ]


def test_it_steps_as_the_muon_of_pytorch_does():
    ours, theirs = matrices(), matrices()
    muon = training.Muon(ours, 0.02, momentum=0.9, ns_steps=3)
    pytorch = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, ns_steps=3, weight_decay=0.0)
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=10 * step + i)
            b.grad = a.grad.clone()
        muon.step()
        pytorch.step()
    for a, b in zip(ours, theirs, strict=True):
        # Both orthogonalise in bfloat16, which keeps 8 bits, and steps are about 0.02 long.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_the_step_is_nearly_orthogonal_whatever_the_size_of_the_gradient():
    for size in (1e-6, 1.0, 1e6):
        step = orthogonal(size * randn(2, 12, 30), steps=5)
        values = torch.linalg.svdvals(step)
        assert (values > 0.5).all()
        assert (values < 1.3).all()


def test_matrices_without_a_gradient_stay():
    some = matrices()
    before = [p.detach().clone() for p in some]
    some[0].grad = torch.ones_like(some[0])
    training.Muon(some, 0.1).step()
    assert not torch.equal(some[0], before[0])
    for now, then in zip(some[1:], before[1:], strict=True):
        assert torch.equal(now, then)
    training.Muon(matrices(), 0.1).step()  # nobody has one


def test_its_momentum_survives_a_checkpoint():
    runs = []
    for interrupted in (False, True):
        (p, *_) = matrices()
        muon = training.Muon([p], 0.1)
        for step in range(4):
            if interrupted and step == 2:
                state = muon.state_dict()
                muon = training.Muon([p], 0.1)
                muon.load_state_dict(state)
            p.grad = randn(*p.shape, seed=step)
            muon.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got .*lr=0.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"ns_steps": 0}, "ns_steps"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        training.Muon(matrices(), **options)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"matrices, got one of shape \(3,\)"):
        training.Muon([nn.Parameter(torch.zeros(3))])


def test_products_in_half_precision_learn_the_same():
    ids = data.CharTokenizer(text := data.python_docs()[:20_000]).encode(text)
    losses = {}
    for autocast in (None, torch.bfloat16):
        torch.manual_seed(0)
        model = models.Decoder(TINY)
        batches = data.random_batches(
            ids, length=16, batch_size=8, steps=60, generator=torch.Generator().manual_seed(0)
        )
        history = training.fit(model, batches, steps=60, lr=0.01, progress=False, autocast=autocast)
        losses[autocast] = history.loss
        assert all(p.dtype == torch.float32 for p in model.parameters())
    first, second = losses.values()
    assert first != second
    assert second[-1] == pytest.approx(first[-1], abs=0.1)
    assert first[-1] < first[0] - 0.5
