# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Losses that transformers' own do not cover: next tokens without all logits, and classes over accumulated batches."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import CausalLMOutputWithPast


# Logits at a time: 64 MiB in float32. Blocks above 32 MiB go back to the system when they are freed; smaller ones stay
# in the heap, whose gaps cost more memory than larger chunks do.
CHUNK_LOGITS = 2**24


class CausalLMOutputWithoutLogits(CausalLMOutputWithPast):
    """A loss whose logits were not kept: they are `None`, and so is their place in the tuple."""

    def to_tuple(self) -> tuple:
        loss, *rest = super().to_tuple()
        return loss, None, *rest


def chunked_causal_lm_loss(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    logits_scaling: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Transformers' causal language modeling loss of `lm_head(hidden_states)`, without holding all logits.

    The head is called for a few rows at a time, and again in the backward pass (Chen et al. 2016, arXiv 1604.06174):
    nothing of the size (rows, vocab_size) is kept.

    Args:
        lm_head: Any module from (rows, hidden_size) to (rows, vocab_size).
        hidden_states: (B, T, hidden_size).
        labels: (B, T), not shifted; `ignore_index` is not scored.
        vocab_size: Of the head.
        logits_scaling: What logits are divided by.
        num_items_in_batch: What the sum is divided by. Default: the number of labels scored.
        shift_labels: (B, T), shifted already; instead of `labels`.
        kwargs: Those of the model that came along; ignored, as in transformers' loss.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden_states.device)
    scored = shift_labels != ignore_index
    count = scored.sum() if num_items_in_batch is None else num_items_in_batch
    count = torch.as_tensor(count, device=hidden_states.device)

    def summed_loss(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = lm_head(rows).float()
        logits = logits if logits_scaling == 1.0 else logits / logits_scaling
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    chunk_rows = max(1, CHUNK_LOGITS // vocab_size)
    chunks = zip(hidden_states[scored].split(chunk_rows), shift_labels[scored].long().split(chunk_rows))
    return torch.stack([checkpoint(summed_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum() / count


def sequence_classification_loss(
    labels: torch.Tensor,
    pooled_logits: torch.Tensor,
    config: Any,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Transformers' loss of sequence classification, whose sum is divided by `num_items_in_batch` where it is given.

    Transformers itself does so for single labels only. Trainer counts all labels of the batches that it accumulates
    and then leaves the division to the model; a mean over each batch would make the gradient as many times too large.

    Args:
        labels: `(B,)` class ids, or floats of the logits' shape.
        pooled_logits: `(B, num_labels)`.
        config: Its `problem_type` is set where it is `None`.
        num_items_in_batch: Labels in all accumulated batches. Default: those of this one.
    """
    loss = ForSequenceClassificationLoss(labels, pooled_logits, config, num_items_in_batch=num_items_in_batch)
    if num_items_in_batch is None or config.problem_type == "single_label_classification":
        return loss
    return loss * labels.numel() / torch.as_tensor(num_items_in_batch, device=loss.device)
