"""Healing: layer by layer, the attention of a regrouped model learns to give what the original's attention gave.

Student and original read the same rows of tokens, one layer after the other, each on its own residual stream. Let h be
the original's stream before a layer, s the student's, and a what the original's attention adds to h. The student's
attention is to add `a + h - s`: then both streams are equal after it, whatever the layers before have lost. The error
of each token counts in relation to its streams, |error|² / (|h + a|² + |h - s|²), because the next norm divides by
that.

First the output projection is solved for in closed form (`Problem.solve`), then all of the attention's parameters are
trained by AdamW on that error. Only one layer of each model is at work at a time, no logits are computed, and nothing
but the attention changes. Then all layers learn together (`heal_jointly`), unless the recipe leaves that out. Any
decoder of transformers can be healed whose layers have an attention module.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..conversion import import_model
from ..families.registry import is_groupformer
from .attention import find_attention
from .heal_jointly import JointReport, heal_jointly
from .heal_recipe import HealRecipe, autocast, cosine_with_warmup, scaled_adamw
from .layer_by_layer import Call, DecoderLayers, Layer, State, Streams
from .moments import check_token_ids, longest_row
from .processes import ALONE, Processes
from .sources import ModelSource, Source


CLOSE = 1e-5  # relative error below which nothing has been lost, and nothing is to be won back
BACKOFF = 0.3  # the learning rate's factor after an epoch that did not help


@dataclass
class LayerReport:
    """What healing did to a layer alone.

    Args:
        layer_idx: Its number.
        merged, solved, healed: Errors on held-out rows, |error|² / |a|² with both weighted as above: before, after the
            closed form, and at the end.
        is_healed: False where the loss was not finite, or did not fall: the layer keeps its merged weights.
    """

    layer_idx: int
    merged: float
    solved: float
    healed: float
    is_healed: bool


@dataclass
class HealReport:
    """What healing did: to each layer alone, and then to all of them together, if they were."""

    layers: list[LayerReport]
    joint: JointReport | None = None

    @property
    def lost_something(self) -> bool:
        """Whether any layer's attention differed from the original's."""
        return any(report.merged > CLOSE for report in self.layers)

    @property
    def failed(self) -> list[str]:
        """What kept its weights, because a loss was not finite or did not fall."""
        failed = [f"layer {report.layer_idx}" for report in self.layers if not report.is_healed]
        return failed + (["all layers together"] if self.joint is not None and not self.joint.is_healed else [])


# Called with what is done ("layers" or "steps" of all layers together), how many are, and of how many.
Progress = Callable[[str, int, int], None]


def ignore_progress(what: str, done: int, total: int) -> None:
    """The default `progress`."""


def heal(
    model: Any,
    original: Any,
    token_ids: torch.Tensor,
    recipe: HealRecipe | None = None,
    *,
    progress: Progress = ignore_progress,
) -> HealReport:
    """Win back what a merge lost: train the attention of a regrouped model, in place.

    Args:
        model: The regrouped model; only the parameters of its attention change. Its dtype stays.
        original: The model that it was made from, of the same class. The native original of a GroupFormer (a GPT-2,
            say) is imported first, which copies it.
        token_ids: LongTensor (rows, seq) of text like that which the model is for; 50,000 to 200,000 tokens.
        recipe: How. Default: `HealRecipe()`.
        progress: Called after each layer and each step of all layers together.

    Returns:
        What it did. Layers without loss are left as they are.

    Raises:
        ValueError: an original of another class or shape, or token ids that are too few or not the model's.
    """
    recipe = recipe or HealRecipe()
    if model is original:
        raise ValueError("original is the model itself; give the model from before the merge")
    if is_groupformer(model) and not is_groupformer(original):
        original = import_model(original)
    reports = HealReport([])
    layers = heal_layers(ModelSource(model), ModelSource(original), token_ids, recipe, device=str(model.device))
    for report, path, state in layers:
        with torch.no_grad():
            for name, parameter in model.get_submodule(path).named_parameters():
                parameter.copy_(state[name])
        reports.layers.append(report)
        progress("layers", len(reports.layers), model.config.get_text_config().num_hidden_layers)
    if is_joint(recipe, model) and reports.lost_something:
        batches = split_batches(token_ids, model.config, recipe)
        reports.joint = heal_jointly(model, original, batches, recipe, progress=partial(progress, "steps"))
    return reports


def is_joint(recipe: HealRecipe, model: Any) -> bool:
    """Whether the joint phase follows: it is asked for, and the model predicts tokens."""
    return recipe.joint_epochs > 0 and model.get_output_embeddings() is not None


@torch.no_grad()
def heal_layers(
    student: Source,
    teacher: Source,
    token_ids: torch.Tensor,
    recipe: HealRecipe,
    *,
    device: str = "cpu",
    ready: Callable[[int], tuple[LayerReport, State] | None] = lambda layer_idx: None,
    processes: Processes = ALONE,
) -> Iterator[tuple[LayerReport, str, State]]:
    """Heals a model's layers, one after the other, with one layer of each model in memory.

    Args:
        student, teacher: The regrouped model and the original; neither is changed.
        token_ids, recipe: As in `heal`.
        device: Where the layers are computed; the residual streams wait in the CPU's memory.
        ready: Gives the report and the attention of a layer that was healed before.
        processes: Those that heal the same model together, each of which calls this function with all token ids.

    Yields:
        For each layer its report, the name of its attention, and the attention's parameters in float32.

    Raises:
        ValueError: as `heal`.
    """
    check_pair(student, teacher)
    rows = max(2, recipe.layer_tokens // token_ids.shape[1])
    batches = processes.rows_of_batches(split_batches(token_ids[:rows], student.config, recipe))
    recipe = replace(recipe, epochs=recipe.passes(token_ids[:rows].numel()))
    layouts = find_attention(student.model_class, student.config)
    own, other = (DecoderLayers(source, layouts, device) for source in (student, teacher))
    with autocast(torch.device(device), recipe.bf16):
        streams, expected = own.embed(batches), other.embed(batches)
        for layer_idx, layout in enumerate(layouts):
            with own.layer(layer_idx) as layer, other.layer(layer_idx) as original:
                known = ready(layer_idx)
                if known is None:
                    report, following = heal_layer(layer, original, streams, expected, recipe, processes)
                else:
                    report, following = known[0], original.run(expected)[0]
                    layer.load(known[1])
                streams, expected = layer.run(streams)[0], following
                state = layer.state()
            yield report, layout.path, state


def check_pair(student: Source, teacher: Source) -> None:
    """Refuses an original that the model cannot have been made from.

    Raises:
        ValueError: another class, or another value of a field of its shape, by name.
    """
    if student.config.model_type != teacher.config.model_type:
        raise ValueError(
            f"original is a {teacher.config.model_type!r}, but model a {student.config.model_type!r}; "
            "give the model that this one was made from"
        )
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        own, other = (getattr(each.config.get_text_config(), name, None) for each in (student, teacher))
        if own != other:
            raise ValueError(f"original has {name} {other}, but model has {own}; give the model it was made from")


def split_batches(token_ids: torch.Tensor, config: PreTrainedConfig, recipe: HealRecipe) -> list[torch.Tensor]:
    """The rows as batches; there are at least two, one to learn from and one to measure the error on."""
    check_token_ids("token_ids", token_ids, config)
    size = min(recipe.batch_size, token_ids.shape[0] // 2)
    if size < 1 or token_ids.shape[1] < 2:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)}, but healing needs at least 2 rows of 2 tokens; "
            "give more text, or shorter rows"
        )
    longest = longest_row(config)
    if longest is not None and token_ids.shape[1] > longest:
        raise ValueError(
            f"token_ids has rows of {token_ids.shape[1]} tokens, more than max_position_embeddings ({longest}); "
            "give shorter rows"
        )
    return [batch for batch in token_ids.split(size) if len(batch) == size]


# One layer -----------------------------------------------------------------------------------------------------------


def heal_layer(
    own: "Layer", other: "Layer", streams: Streams, expected: Streams, recipe: HealRecipe, processes: Processes
) -> tuple[LayerReport, Streams]:
    """Heals one layer for the residual streams, lists of batches (B, T, E), that enter it; returns what leaves the
    original's."""
    following, added = other.run(expected)
    # In a layer whose norm comes after attention, the solution is for what the norm reads.
    outputs = [each.raw for each in added]
    goals = [a.added + h - s for a, h, s in zip(added, expected, streams)]
    # Where the streams have parted (a token of huge features that only one of them has), little can be won back.
    weights = [
        1 / ((h + a.added).square() + (h - s).square()).mean(-1, keepdim=True).clamp(min=1e-12)
        for a, h, s in zip(added, expected, streams)
    ]
    energies = [float((w * a.added.square()).mean()) for w, a in zip(weights, added)]
    energy = max(processes.mean(sum(energies) / len(energies)), 1e-30)
    problem = Problem(own, own.calls(streams), goals, weights, energy, recipe, processes)
    merged = best = problem.error()
    solved = healed = merged
    kept = own.state()
    if math.isfinite(merged) and merged > CLOSE:
        problem.solve(goals if not own.has_norm_after else outputs)
        solved = problem.error()
        if solved < best:
            kept, best = own.state(), solved
        else:
            own.load(kept)
        kept, healed = problem.train(kept, best)
        own.load(kept)
    report = LayerReport(own.layer_idx, merged, solved, healed, healed < merged or merged <= CLOSE)
    return report, following


class Problem:
    """One layer's attention calls, what they are to add, and how errors are weighed; the last batches are held out."""

    def __init__(
        self,
        layer: "Layer",
        calls: list["Call"],
        goals: Streams,
        weights: Streams,
        energy: float,
        recipe: HealRecipe,
        processes: Processes,
    ):
        self.layer, self.calls, self.goals, self.weights = layer, calls, goals, weights
        self.energy, self.recipe, self.processes = energy, recipe, processes
        self.learned = len(calls) - recipe.held_out_of(len(calls))

    def loss(self, index: int) -> torch.Tensor:
        """The relative error of a batch."""
        added = self.layer.attend(self.calls[index]).added
        error = (added - self.goals[index].to(added.device)).square()
        return (self.weights[index].to(added.device) * error).mean() / self.energy

    @torch.no_grad()
    def error(self) -> float:
        """The mean relative error of the batches held out."""
        held_out = range(self.learned, len(self.calls))
        return self.processes.mean(sum(float(self.loss(index)) for index in held_out) / len(held_out))

    @torch.no_grad()
    def solve(self, goals: Streams) -> None:
        """Sets the output projection to the solution of `solve_output`, where the layer has one that can be set."""
        projection = self.layer.output_projection(self.calls[0])
        if projection is None:
            return
        features = LeastSquares(projection)
        for index in range(self.learned):
            with features.recorded() as inputs:
                output = self.layer.attend(self.calls[index]).raw
            features.add(inputs[0], goals[index].to(output.device) - output, self.weights[index].to(output.device))
        features.solve(self.recipe.ridge, self.processes)

    def train(self, kept: State, best: float) -> tuple[State, float]:
        """Trains the attention's parameters; returns the best weights on the way and their error.

        An epoch that does not lower the error is taken back, and the next ones make smaller steps. Stops after
        `patience` such epochs in a row, and at once where the loss is not finite.
        """
        recipe, parameters = self.recipe, list(self.layer.attention.parameters())
        if not recipe.epochs:
            return kept, best
        share, epochs_without = 1.0, 0
        optimizer = scaled_adamw(parameters, recipe.learning_rate)
        steps = recipe.epochs * self.learned
        generator = torch.Generator().manual_seed(recipe.seed)
        for step in range(steps):
            if step % self.learned == 0:
                order = torch.randperm(self.learned, generator=generator).tolist()
            for group in optimizer.param_groups:
                group["lr"] = share * group["highest"] * cosine_with_warmup(step, steps)
            with torch.enable_grad():
                loss = self.loss(order[step % self.learned])
            if not math.isfinite(self.processes.mean(loss.item())):
                break
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            self.processes.average(gradient for gradient in gradients if gradient is not None)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if (step + 1) % self.learned:
                continue
            error = self.error()
            if error < best:
                kept, best, epochs_without = self.layer.state(), error, 0
                continue
            # Steps were too large: go on from the best weights, more carefully.
            epochs_without += 1
            if epochs_without >= recipe.patience:
                break
            self.layer.load(kept)
            optimizer, share = scaled_adamw(parameters, recipe.learning_rate), share * BACKOFF
        return kept, best


class LeastSquares:
    """The change D of a linear layer that takes its weighted error away.

    With inputs u, weights w and errors r of the output, the D that minimises Σ w |D u - r|² + λ |D|² is
    (Σ w r uᵀ) (Σ w u uᵀ + λ)⁻¹, with λ a share of the mean of Σ w u² over features. A bias is one more feature of 1.
    A batch's products are taken in float32 where the layer is, and added up in float64 on the CPU: MPS has no float64.
    """

    def __init__(self, projection: nn.Module):
        self.projection = projection
        self.gram: torch.Tensor | float = 0.0
        self.cross: torch.Tensor | float = 0.0

    @contextmanager
    def recorded(self) -> Iterator[list[torch.Tensor]]:
        """The inputs of the layer's calls inside the context."""
        inputs: list[torch.Tensor] = []
        hook = self.projection.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            yield inputs
        finally:
            hook.remove()

    def add(self, inputs: torch.Tensor, errors: torch.Tensor, weights: torch.Tensor) -> None:
        """Counts a batch: inputs (B, T, F), errors (B, T, E) and weights (B, T, 1)."""
        features = inputs.flatten(0, 1).float()
        if getattr(self.projection, "bias", None) is not None:
            features = torch.cat((features, features.new_ones(len(features), 1)), dim=1)
        weighted = (features * weights.flatten(0, 1)).T
        with autocast(features.device, bf16=False):
            gram, cross = weighted @ features, weighted @ errors.flatten(0, 1)
        self.gram = self.gram + gram.cpu().double()
        self.cross = self.cross + cross.cpu().double()

    def solve(self, ridge: float, processes: Processes) -> None:
        """Adds the solution, for what all processes have counted, to the layer's weight and bias."""
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        processes.sum((gram, cross))
        penalty = ridge * gram.diagonal().mean().clamp(min=1e-30)
        change = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), cross).float()
        weight, bias = self.projection.weight, getattr(self.projection, "bias", None)
        change, size = change.to(weight.device), len(change) - (bias is not None)
        weight += change[:size] if isinstance(self.projection, Conv1D) else change[:size].T
        if bias is not None:
            bias += change[size]


__all__ = ["HealRecipe", "HealReport", "LayerReport", "heal"]
