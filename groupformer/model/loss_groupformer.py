# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Next-token loss without the logits: a few rows at a time, with their gradients.

This file travels to the Hub with the modeling file, so it imports only torch.
"""

from typing import Any

import torch
from torch import nn


CHUNK_SIZE = 256 * 49_152  # logits at a time: 48 MiB in float32
FEW_LOGITS = 2**19  # holding these costs 2 MiB and less time than autograd's call of a function of ours
GPU_CHUNK_SIZE = 4 * CHUNK_SIZE  # there, each chunk's pass over the head's gradient takes a third of its time


class HeadCrossEntropy(torch.autograd.Function):
    """The sum of next-token cross-entropies of hidden states, whose logits are computed a few rows at a time.

    The gradients of the head and of the hidden states are computed with the logits, while these are there: nothing of
    the size (rows, vocab_size) is kept. Cf. Wijmans et al. 2024 (Cut Your Losses) and Hsu et al. 2024 (Liger Kernel);
    unlike torch's `linear_cross_entropy`, the logits are computed once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        logits_scaling: float,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (rows, hidden_size), in the dtype of the product.
            weight, bias: (vocab_size, hidden_size) and (vocab_size,), likewise.
            labels: (rows,), each in 0 … vocab_size - 1.
            logits_scaling: What logits are divided by.
        """
        rows = max(1, (CHUNK_SIZE if weight.is_cpu else GPU_CHUNK_SIZE) // weight.shape[0])
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_states) if wants_hidden else None
        grad_weight = None  # the first chunk's, and from the second on the sum in float32
        grad_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if wants_bias else None
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        # Memory for every chunk in turn: new memory of this size comes from the system page by page.
        products = hidden_states.new_empty(min(rows, len(labels)), weight.shape[0])
        log_probabilities = torch.empty_like(products, dtype=torch.float32)

        for start in range(0, len(labels), rows):
            hidden, targets = hidden_states[start : start + rows], labels[start : start + rows, None]
            product, chunk = products[: len(hidden)], log_probabilities[: len(hidden)]
            if bias is None:
                torch.mm(hidden, weight.t(), out=product)
            else:
                torch.addmm(bias, hidden, weight.t(), out=product)
            logits = product.float()
            if logits_scaling != 1.0:
                logits = logits / logits_scaling
            torch.log_softmax(logits, dim=-1, out=chunk)
            loss -= chunk.gather(1, targets).sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            # The gradient of a row's loss by its logits: probabilities, less 1 at the label.
            grad = chunk.exp_().scatter_add_(1, targets, chunk.new_full((), -1.0).expand_as(targets))
            if logits_scaling != 1.0:
                grad = grad / logits_scaling
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad if grad.dtype == hidden.dtype else product.copy_(grad)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if not wants_weight:
                continue
            if grad_weight is None:
                grad_weight = grad.t() @ hidden
                if not weight.is_cpu:  # a GPU rounds what gradients are multiplied by to their dtype
                    grad_weight = grad_weight.float()
            elif hidden.dtype in (torch.float32, torch.float64):
                grad_weight.addmm_(grad.t(), hidden)
            else:
                grad_weight = grad_weight.float().add_(grad.t() @ hidden)
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.save_for_backward(hidden_states, weight, bias, labels)
        ctx.gradients, ctx.logits_scaling = (grad_hidden, grad_weight, grad_bias), logits_scaling
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None or torch.is_grad_enabled():
            return *gradients_again(ctx, grad_output), None, None
        # In place, to hold no second gradient of the head; so they serve once.
        gradients, ctx.gradients, dtype = ctx.gradients, None, ctx.saved_tensors[1].dtype
        return *(None if it is None else it.mul_(grad_output).to(dtype) for it in gradients), None, None


def gradients_again(ctx: Any, grad_output: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of a second backward pass, or ones that have gradients themselves, by way of all logits."""
    hidden_states, weight, bias, labels = ctx.saved_tensors
    needed, differentiable = ctx.needs_input_grad[:3], torch.is_grad_enabled()
    with torch.enable_grad():
        logits = nn.functional.linear(hidden_states, weight, bias).float() / ctx.logits_scaling
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        inputs = [it for it, needs in zip((hidden_states, weight, bias), needed) if needs]
        gradients = iter(torch.autograd.grad(loss, inputs, grad_output, create_graph=differentiable))
    return [next(gradients) if needs else None for needs in needed]


def head_cross_entropy(
    head: nn.Linear,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    logits_scaling: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Transformers' causal language modeling loss of `head(hidden_states)`, without holding all logits.

    Args:
        hidden_states: (B, T, hidden_size).
        labels: (B, T), not shifted; `ignore_index` is not scored.
        num_items_in_batch: What the sum is divided by. Default: the number of labels scored.
        shift_labels: (B, T), shifted already; instead of `labels`.
        kwargs: Those of the model that came along; ignored, as in transformers' loss.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden_states.device)
    scored = shift_labels != ignore_index
    weight: torch.Tensor = head.weight
    bias: torch.Tensor | None = head.bias
    count = scored.sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, torch.Tensor):
        count = count.to(hidden_states.device)
    if shift_labels.numel() * weight.shape[0] <= FEW_LOGITS:
        logits = nn.functional.linear(hidden_states.to(weight.dtype), weight, bias).float() / logits_scaling
        targets = shift_labels.flatten().long()
        total = nn.functional.cross_entropy(logits.flatten(0, -2), targets, ignore_index=ignore_index, reduction="sum")
        return total / count
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = hidden_states[scored].to(weight.dtype)
    with torch.autocast(device_type, enabled=False):
        loss = HeadCrossEntropy.apply(rows, weight, bias, shift_labels[scored], logits_scaling)
    return loss / count
