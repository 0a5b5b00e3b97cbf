"""Our Longformer and BigBird against those of Hugging Face's transformers, with the same weights.

One layer of attention, 12 heads, d_model 768 (the size of the released models), batch 1, float32,
forward, and forward with backward. Outputs are compared before times are.

    python benchmarks/hugging_face.py [--write]

writes benchmarks/results/hugging_face.json. The extra "test" brings transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.big_bird import modeling_big_bird
from transformers.models.longformer import modeling_longformer

from course_lib import layers, masks

WINDOW, BLOCK = 512, 64  # as in the released models: 256 keys on each side; blocks of 64
LENGTHS = (2048, 4096)
Call = Callable[[Tensor], Tensor]


def longformer_pair(
    d_model: int, heads: int, window: int, global_tokens: list[int], n: int
) -> tuple[nn.Module, Call, nn.Module, Call]:
    """Their layer and ours with its weights, and how each is called on (1, n, d_model)."""
    config = transformers.LongformerConfig(
        hidden_size=d_model, num_attention_heads=heads, attention_window=[window],
        attention_probs_dropout_prob=0.0, num_hidden_layers=1,
    )  # fmt: skip
    theirs = modeling_longformer.LongformerSelfAttention(config, layer_id=0).eval()
    ours = layers.LongformerAttention(
        d_model, heads, window=window // 2, global_tokens=global_tokens
    )
    names = {"query": "q", "key": "k", "value": "v"}
    copy(theirs, ours, {theirs: f"{ours}_proj" for theirs, ours in names.items()})
    if global_tokens:
        copy(theirs, ours, {f"{theirs}_global": f"{ours}_global" for theirs, ours in names.items()})
    is_global = torch.zeros(1, n, dtype=torch.bool)
    is_global[:, global_tokens] = True
    options = {
        "attention_mask": torch.where(is_global, 10_000.0, 0.0),
        "is_index_masked": torch.zeros(1, n, dtype=torch.bool),
        "is_index_global_attn": is_global, "is_global_attn": bool(global_tokens),
    }  # fmt: skip
    return theirs, lambda x: theirs(x, **options)[0], ours, ours


def bigbird_pair(
    d_model: int, heads: int, block: int, random_blocks: int, n: int
) -> tuple[nn.Module, Call, nn.Module, Call]:
    """The same for BigBird: ours is given the random blocks that theirs draws."""
    config = transformers.BigBirdConfig(
        hidden_size=d_model, num_attention_heads=heads, block_size=block, use_bias=True,
        num_random_blocks=random_blocks, attention_probs_dropout_prob=0.0,
        max_position_embeddings=n,
    )  # fmt: skip
    # In evaluation mode theirs draws nothing and looks at block 0 once more in place of each
    # random block; so it runs in training mode, without dropout.
    theirs = modeling_big_bird.BigBirdBlockSparseAttention(config, seed=0).train()
    ours = layers.MultiHeadAttention(d_model, heads)
    copy(theirs, ours, {"query": "q_proj", "key": "k_proj", "value": "v_proj"})
    make = modeling_big_bird.BigBirdModel.create_masks_for_block_sparse_attn
    blocked, band, of_query, of_key = make(torch.ones(1, n), block)
    options = {
        "band_mask": band, "from_mask": of_query, "to_mask": of_key,
        "from_blocked_mask": blocked, "to_blocked_mask": blocked,
    }  # fmt: skip
    drawn = []
    for name in ("_bigbird_block_rand_mask", "_bigbird_block_rand_mask_with_head"):
        real = getattr(theirs, name)
        setattr(theirs, name, lambda *a, real=real, **k: (drawn.append(r := real(*a, **k)), r)[1])
    theirs(torch.zeros(1, n, d_model), **options)
    chosen = drawn[0] if isinstance(drawn[0], list) else drawn  # (n / block - 2, random) per head
    table = torch.stack([block_table(n // block, torch.as_tensor(rows)) for rows in chosen])
    seen = table.repeat_interleave(block, 1).repeat_interleave(block, 2)[None]
    mask = masks.from_dense(seen)
    return theirs, lambda x: theirs(x, **options)[0], ours, lambda x: ours(x, mask=mask)


def block_table(blocks: int, random: Tensor) -> Tensor:
    """Who sees whom among blocks: first and last are global, three in a window, some at random."""
    place = torch.arange(blocks)
    table = (place[:, None] - place).abs() <= 1
    ends = (place == 0) | (place == blocks - 1)
    table |= ends[:, None] | ends
    for row, columns in enumerate(random.tolist(), start=1):
        table[row, columns] = True
    return table


def copy(theirs: nn.Module, ours: nn.Module, names: dict[str, str]) -> None:
    """Give ours the weights of theirs, and no output projection: theirs has it elsewhere."""
    for their_name, our_name in names.items():
        getattr(ours, our_name).load_state_dict(getattr(theirs, their_name).state_dict())
    ours.out_proj = nn.Identity()


def compare(theirs: Call, ours: Call, x: Tensor, repeats: int) -> dict[str, float]:
    """The largest difference of the outputs, and seconds of both."""
    from common import medians

    def training(call: Call) -> Any:
        y = x.clone().requires_grad_()
        return torch.autograd.grad(call(y).sum(), y)

    with torch.no_grad():
        difference = (theirs(x) - ours(x)).abs().max().item()
        forward = medians({"theirs": lambda: theirs(x), "ours": lambda: ours(x)}, repeats)
    both = medians({"theirs": lambda: training(theirs), "ours": lambda: training(ours)}, repeats)
    row = {"largest_difference": difference}
    for way, seconds in (("forward", forward), ("training", both)):
        row |= {f"{way}_{who}": round(s, 4) for who, s in seconds.items()}
        row[f"{way}_times_faster"] = round(seconds["theirs"] / seconds["ours"], 2)
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Against Hugging Face's sparse attention.")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    from common import write

    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows: dict[str, dict[int, Any]] = {"longformer": {}, "bigbird": {}}
    for n in LENGTHS:
        x = torch.randn(1, n, 768, generator=torch.Generator().manual_seed(0))
        _, theirs, _, ours = longformer_pair(768, 12, WINDOW, [0], n)
        rows["longformer"][n] = compare(theirs, ours, x, 5)
        _, theirs, _, ours = bigbird_pair(768, 12, BLOCK, 3, n)
        rows["bigbird"][n] = compare(theirs, ours, x, 5)
        print(n, {name: row[n] for name, row in rows.items()}, flush=True)
    if options.write:
        write("hugging_face", {"transformers": transformers.__version__, **rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
