"""How healing trains: its recipe, and what both of its phases share."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conversion.loading import has_fast_bf16


@dataclass
class HealRecipe:
    """How a model is healed: each layer alone, then all of them together.

    Args:
        epochs: Passes of each layer over its rows, at most; 0 is the closed form alone.
        layer_tokens: So many tokens a layer alone reads at most, in all passes: of a longer text its first ones, once.
            The joint phase reads all.
        learning_rate: Highest of the cosine, as a share of the root mean square of each weight.
        joint_epochs: Passes of all layers together; 0 leaves this phase out, whose models are whole in memory.
        joint_learning_rate: Its learning rate, likewise.
        batch_size: Rows in one step.
        ridge: Of the closed form, as a share of the mean energy of the attention's features.
        held_out: Share of the batches, at least one, on which the error is measured and no step is made.
        patience: Epochs in a row without a lower error after which a layer is done.
        bf16: Autocast in bfloat16. `None`: on GPUs and CPUs with matrix units for it.
        seed: Of the order of the batches.
    """

    epochs: int = 4
    layer_tokens: int = 131_072
    learning_rate: float = 0.03
    joint_epochs: int = 1
    joint_learning_rate: float = 0.004
    batch_size: int = 1
    ridge: float = 0.01
    held_out: float = 0.08
    patience: int = 2
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "layer_tokens", "joint_epochs", "batch_size", "patience"):
            least = 0 if name in ("epochs", "joint_epochs") else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")
        for name in ("learning_rate", "joint_learning_rate", "ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0, and finite")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out ({self.held_out}) must be above 0 and below 1, a share of the batches")

    def passes(self, tokens: int) -> int:
        """How many passes a layer makes over so many tokens. Few tokens, read often, are learned by heart."""
        return min(self.epochs, max(1, self.layer_tokens // tokens))

    def held_out_of(self, batches: int) -> int:
        """How many of so many batches are held out."""
        return max(1, round(self.held_out * batches))


def as_recipe(fields: HealRecipe | Mapping[str, Any] | None) -> HealRecipe | None:
    """A recipe as it is, or made from its fields.

    Raises:
        ValueError: an unknown field, by name, or a value that makes no sense.
    """
    if fields is None or isinstance(fields, HealRecipe):
        return fields
    known = [field.name for field in dataclasses.fields(HealRecipe)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"heal has no field {unknown[0]!r}; choose from {', '.join(known)}")
    return HealRecipe(**fields)


def cosine_with_warmup(step: int, steps: int, warmup: int = 5) -> float:
    """The share of the highest learning rate at a step."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def scaled_adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW whose highest learning rate, in each group's "highest", is a share of each weight's root mean square."""
    sizes = [max(float(parameter.detach().square().mean().sqrt()), 1e-3) for parameter in parameters]
    groups = [{"params": [parameter], "highest": learning_rate * size} for parameter, size in zip(parameters, sizes)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)


def autocast(device: torch.device, bf16: bool | None) -> Any:
    """Autocast in bfloat16, by default where the device multiplies faster in it."""
    if bf16 is None:
        bf16 = has_fast_bf16(device.type)
    # Its cache of weights would not see them change.
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)
