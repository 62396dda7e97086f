"""What the tests of the bridge share: tiny native models of every family, from the families' own examples."""

import warnings

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from groupformer.conversion.configs import config_class_of
from groupformer.conversion.weights import native_class
from groupformer.families.family import Family
from groupformer.families.registry import FAMILIES

from .helpers import random_ids, randomize


# Options that transformers' own classes fail on below a version: Phi forgets the share of RoPE that its config says,
# and generation configs refuse the pad token -1.
WORKS_SINCE = {
    ("phi", "a quarter rotated, linear rope"): "5.23",
    ("llama", "pad token outside the vocabulary"): "5.23",
}


def cases(table: str = "examples") -> list[tuple[str, str]]:
    """(family, option) for every option in the families' tables that the installed transformers can compute."""
    every = [(name, option) for name, family in FAMILIES.items() for option in getattr(family, table)]
    installed = Version(transformers.__version__)
    return [case for case in every if installed >= Version(WORKS_SINCE.get(case, "5"))]


def native_config(family: Family, option: str, table: str = "examples", **changes) -> PreTrainedConfig:
    fields = {**family.tiny, **getattr(family, table)[option], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class_of(family)(**fields)


def native_model(name: str, option: str, kind: str = "ForCausalLM", **changes) -> PreTrainedModel:
    """A native model with random weights, norms and biases."""
    family = FAMILIES[name]
    model = native_class(family, kind)(native_config(family, option, **changes))
    return around_one(randomize(model))


@torch.no_grad()
def around_one(model: nn.Module) -> nn.Module:
    """`randomize` knows norms by their names; some families abbreviate them, so their weights get the missing 1."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and "norm" not in name:
            module.weight.add_(1)
    return model


def left_padded(vocab_size: int, lengths=(9, 4, 7), pad: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and positions (B, T) of prompts of several lengths, padded on the left."""
    longest = max(lengths)
    ids = random_ids(len(lengths), longest, vocab_size)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    ids = ids.masked_fill(mask == 0, pad)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
