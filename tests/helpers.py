"""What several tests need: tiny configurations and models."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from groupformer import GroupFormerConfig


def tiny_config(**overrides) -> GroupFormerConfig:
    """A config small enough to build and run in milliseconds; the pad token is 0."""
    defaults = dict(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return GroupFormerConfig(**{**defaults, **overrides})


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Random weights that matter: norms around 1, biases not zero. Returns the model, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std
        parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def random_ids(batch: int, length: int, vocab_size: int = 99, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, length) without the pad token 0."""
    return torch.randint(1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def leave() -> None:
    """Ends the process as soon as all have come here, without taking its process groups down.

    Torch can hang or abort there: a group's destructor waits for its thread with Python's lock held, while the thread
    wants that lock to give up the work it has done last.
    """
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
