"""Our Longformer and BigBird give what Hugging Face's give, with the same weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from attention_cases import randn

pytest.importorskip("transformers")
SOURCE = Path(__file__).parents[1] / "benchmarks" / "hugging_face.py"
SPEC = importlib.util.spec_from_file_location("hugging_face", SOURCE)
hugging_face = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hugging_face)


@pytest.mark.parametrize("global_tokens", [[], [0], [0, 5, 100]], ids=str)
def test_longformer_gives_the_output_and_the_gradient_of_theirs(global_tokens):
    torch.manual_seed(0)
    agree(*hugging_face.longformer_pair(32, 4, 32, global_tokens, 128))


@pytest.mark.parametrize("n", [192, 1024])  # they draw random blocks in another way for 1024
def test_bigbird_gives_the_output_and_the_gradient_of_theirs(n):
    torch.manual_seed(0)
    agree(*hugging_face.bigbird_pair(32, 4, 16, 2, n), n=n)


def agree(theirs, call_theirs, ours, call_ours, n=128):
    x = randn(1, n, 32)
    torch.testing.assert_close(call_ours(x), call_theirs(x), rtol=0, atol=2e-6)
    gradients = []
    for module, call in ((theirs, call_theirs), (ours, call_ours)):
        y = x.clone().requires_grad_()
        weight = next(p for name, p in module.named_parameters() if name.startswith("q"))
        loss = (call(y) * torch.linspace(-1, 1, 32)).sum()
        gradients.append(torch.autograd.grad(loss, (y, weight)))
    for got, want in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
