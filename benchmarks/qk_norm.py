"""Merging and healing under norms of queries and keys, which leave a merge next to no freedom.

    python -m benchmarks.qk_norm --data ../data/textbooks

The shipped checkpoint gets norms over queries and keys, each head by itself (Qwen 3) or all together (OLMo 2), and is
trained on until it works with them. Then its 8 KV heads are merged to 2 and healed. Printed are the losses in nats a
token on the test split, and the share of what the merge loses that is left after healing.
"""

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch

import groupformer
from groupformer import GroupFormerConfig, GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands.tables import print_table
from groupformer.regrouping.heal_recipe import autocast
from groupformer.regrouping.moments import calibration_from_texts
from groupformer.training.data import read_column


ROW = 256
BATCH = 16


def with_norms(shipped: GroupFormerForCausalLM, kind: str, rows: torch.Tensor) -> GroupFormerForCausalLM:
    """The model with norms whose weights begin as the root mean square of the queries or keys that they see."""
    fields = shipped.config.to_dict() | {"qk_norm": kind}
    model = GroupFormerForCausalLM(GroupFormerConfig(**fields))
    model.load_state_dict(shipped.state_dict(), strict=False)
    sizes: dict[str, torch.Tensor] = {}
    projections = [f"model.layers.{i}.self_attn.{name}" for i in range(len(shipped.model.layers)) for name in "qk"]
    hooks = [
        shipped.get_submodule(f"{path}_proj").register_forward_hook(
            lambda module, args, output, path=path: sizes.update({path: output.square().mean().sqrt()})
        )
        for path in projections
    ]
    with torch.no_grad():
        shipped(rows)
        for path in projections:
            model.get_submodule(f"{path}_norm").weight.fill_(sizes[path])
    for hook in hooks:
        hook.remove()
    return model


def train(model: GroupFormerForCausalLM, rows: torch.Tensor, steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for step, batch in enumerate(rows.split(BATCH)[:steps]):
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 20) * cosine
        with autocast(model.device, None):
            loss = model(input_ids=batch, labels=batch, use_cache=False, skip_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def loss_on(model: Any, rows: torch.Tensor) -> float:
    """The mean over batches, in nats a token."""
    batches = rows.split(8)
    with autocast(model.device, None):
        losses = [float(model(input_ids=batch, labels=batch, use_cache=False).loss) for batch in batches]
    return sum(losses) / len(losses)


def study(model: GroupFormerForCausalLM, calibration: torch.Tensor, text: torch.Tensor, test: torch.Tensor) -> list:
    """Losses of the original, merged by `mean`, by `svd`, healed; and the share that healing leaves."""
    merged = groupformer.regroup(model, 2, calibration=calibration)
    mean = groupformer.regroup(model, 2, calibration=calibration, method="mean", grouping="adjacent")
    healed = copy.deepcopy(merged)
    groupformer.heal(healed, model, text)
    original, *losses = [loss_on(each, test) for each in (model, mean, merged, healed)]
    return [original, *losses, (losses[-1] - original) / (losses[-2] - original)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Folder with train- and test-*.parquet.")
    parser.add_argument("--checkpoint", default="hub_card", help="A GroupFormer without norms of queries and keys.")
    parser.add_argument("--steps", type=int, default=80, help="Of 4,096 tokens, with the norms.")
    parser.add_argument("--heal-tokens", type=int, default=131_072)
    options = parser.parse_args()
    shipped = GroupFormerForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    tokenizer = GroupFormerTokenizer.from_pretrained(options.checkpoint)
    parts = {"train": options.steps * BATCH * ROW, "calibration": 64 * ROW, "heal": options.heal_tokens}
    texts = read_column([options.data / "train-*.parquet"])
    rows = calibration_from_texts(texts, tokenizer, shipped.config, sum(parts.values()), ROW)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    training, calibration, text = rows.split([size // ROW for size in parts.values()])
    documents = read_column([options.data / "test-*.parquet"])
    test = calibration_from_texts(documents, tokenizer, shipped.config, 119 * ROW, ROW)
    found = []
    for kind in ("head", "projection"):
        model = with_norms(shipped, kind, training[:8])
        train(model, training, options.steps, 1e-3)
        found.append([kind, *(f"{value:.3f}" for value in study(model, calibration, text, test))])
    print_table("8 KV heads to 2", ["norms", "original", "mean", "svd", "healed", "share left"], found)


if __name__ == "__main__":
    main()
