"""Healing's second phase: the attention of all layers together learns the original's distributions of next tokens.

A layer alone cannot take back what the layers before it have lost; together they share the work. The loss is the mean
over tokens of KL(original ‖ model) (Hinton et al. 2015, section 2). Both models are whole in memory, and nothing but
the parameters of the attention changes.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import find_attention
from .heal_recipe import HealRecipe, autocast, cosine_with_warmup, scaled_adamw
from .processes import ALONE, Processes


TOKENS_AT_ONCE = 256  # whose distributions are compared in one piece, so that few copies of the logits are held


@dataclass
class JointReport:
    """What the joint phase did.

    Args:
        before, after: KL(original ‖ model), the mean over the tokens of held-out rows, in nats, as it was measured.
        is_healed: False where the loss was not finite, or did not fall: the steps were taken back.
    """

    before: float
    after: float
    is_healed: bool


def heal_jointly(
    model: Any,
    original: Any,
    batches: list[torch.Tensor],
    recipe: HealRecipe,
    *,
    progress: Callable[[int, int], None] = lambda step, steps: None,
    processes: Processes = ALONE,
) -> JointReport:
    """Trains the attention of all layers, in place, in float32; the dtype of the model stays.

    Args:
        model, original: Both with a language modeling head.
        batches: Token ids (rows, seq), of several processes each one's own; the last ones are held out.
        recipe: `joint_epochs` passes, at most at `joint_learning_rate`.
        progress: Called after each step with its number and that of all.
        processes: Those that train the same model together.
    """
    student = model if has_dtype(model, torch.float32) else copy.deepcopy(model).float()
    paths = [layout.path for layout in find_attention(type(model), model.config)]
    trained = {
        f"{path}.{name}": parameter
        for path in paths
        for name, parameter in student.get_submodule(path).named_parameters()
    }
    learned = len(batches) - recipe.held_out_of(len(batches))
    with alone_trainable(student, list(trained.values())), autocast(student.device, recipe.bf16):
        before = processes.mean(divergence_on(student, original, batches[learned:]))
        kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
        is_finite = math.isfinite(before) and train(
            student, original, trained, batches[:learned], recipe, progress, processes
        )
        after = processes.mean(divergence_on(student, original, batches[learned:])) if is_finite else math.nan
        is_healed = after < before
    with torch.no_grad():
        for name, parameter in trained.items():
            if not is_healed:
                parameter.copy_(kept[name])
            if student is not model:
                model.get_parameter(name).copy_(parameter)
    return JointReport(before, after, is_healed)


def train(
    student: Any,
    original: Any,
    trained: dict[str, nn.Parameter],
    batches: list[torch.Tensor],
    recipe: HealRecipe,
    progress: Callable[[int, int], None],
    processes: Processes,
) -> bool:
    """AdamW with a cosine over all steps; stops, and says so, where the loss is not finite."""
    parameters = list(trained.values())
    optimizer = scaled_adamw(parameters, recipe.joint_learning_rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    order = [index for _ in range(recipe.joint_epochs) for index in torch.randperm(len(batches), generator=generator)]
    for step, index in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * cosine_with_warmup(step, len(order))
        loss = divergence(student, original, batches[index])
        if not math.isfinite(processes.mean(loss.item())):
            return False
        loss.backward()
        processes.average(parameter.grad for parameter in parameters if parameter.grad is not None)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, len(order))
    return True


@torch.no_grad()
def divergence_on(student: Any, original: Any, batches: list[torch.Tensor]) -> float:
    """The mean of `divergence` over batches of equal size."""
    return sum(float(divergence(student, original, batch)) for batch in batches) / len(batches)


def divergence(student: Any, original: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """KL(original ‖ student), the mean over the tokens of rows (rows, seq), in nats."""
    token_ids = token_ids.to(student.device)
    with torch.no_grad():
        taught = original(input_ids=token_ids, use_cache=False).logits.flatten(0, 1)
    logits = student(input_ids=token_ids, use_cache=False).logits.flatten(0, 1)
    pieces = zip(logits.split(TOKENS_AT_ONCE), taught.split(TOKENS_AT_ONCE))
    sums = [checkpoint(divergence_of_logits, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(sums).sum() / len(logits)


def divergence_of_logits(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """KL(taught ‖ logits), the sum over tokens (T, V)."""
    expected = taught.float().log_softmax(-1)
    return nn.functional.kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="sum")


def has_dtype(model: Any, dtype: torch.dtype) -> bool:
    """Whether all parameters are of a dtype."""
    return all(parameter.dtype == dtype for parameter in model.parameters())


@contextmanager
def alone_trainable(model: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Only these parameters of a model in evaluation mode have gradients; afterwards all is as before."""
    was_training, required = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter, value in zip(model.parameters(), required):
            parameter.grad = None
            parameter.requires_grad_(value)


__all__ = ["JointReport", "heal_jointly"]
