"""The steps of regrouping, each of which takes what the one before returned; in memory and from folder to folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..measuring.cache import decoder_of, layer_caches, positions_of
from .attention import find_attention
from .calibration import measure_moments, moment_of_norm
from .heads import AttentionHeads
from .layers import LayerProblem
from .layouts import AttentionLayout
from .moments import Moment
from .probing import build_on_meta
from .processes import ALONE, Processes
from .request import Request, check_counts
from .result import Result, find_result, short_counts, with_provenance
from .sensitivity import measured_losses
from .sources import Source


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is asked of a model whose attention is understood.

    Args:
        layouts: The attention of each layer.
        request: How to merge.
        counts: The wanted count of each layer; None where the budget decides.
    """

    layouts: list[AttentionLayout]
    request: Request
    counts: list[int] | None

    @property
    def example_counts(self) -> list[int]:
        """Counts as the result may have them; with a budget they can differ by layer."""
        if self.counts is not None:
            return self.counts
        present = [layout.geometry.num_key_value_heads for layout in self.layouts]
        return [*present[:-1], 1]


def plan_regrouping(
    source: Source,
    num_key_value_heads: int | str | Mapping[int, int],
    method: str,
    grouping: str | None,
    budget: float | None,
    seed: int,
) -> Plan:
    """Attention and request, understood and checked before any work.

    Raises:
        ValueError: as `groupformer.regroup`.
    """
    layouts = find_attention(source.model_class, source.config)
    request = Request.checked(layouts, num_key_value_heads, method, grouping, budget, seed)
    counts = check_counts([layout.geometry.num_key_value_heads for layout in layouts], num_key_value_heads)
    return Plan(layouts, request, counts)


class Moments(Protocol):
    """One moment for each layer."""

    def __getitem__(self, layer_idx: int) -> Moment: ...


class StoredMoments:
    """Moments that wait in files, one for each layer."""

    def __init__(self, folder: Path, moments: Iterator[Moment], processes: Processes):
        self.paths: list[Path] = []
        for layer_idx, moment in enumerate(moments):
            self.paths.append(folder / f"moment-{layer_idx}.pt")
            if processes.is_first:
                torch.save(vars(moment), self.paths[-1])
        processes.wait()

    def __getitem__(self, layer_idx: int) -> Moment:
        return Moment(**torch.load(self.paths[layer_idx], weights_only=True))


class NormMoments:
    """Moments derived from the norms before attention, each when it is asked for."""

    def __init__(self, source: Source, layouts: Sequence[AttentionLayout]):
        self.source, self.layouts = source, layouts
        self.model = build_on_meta(source.model_class, source.config)

    def __getitem__(self, layer_idx: int) -> Moment:
        return moment_of_norm(self.source, self.model, self.layouts[layer_idx])


def find_moments(
    source: Source,
    plan: Plan,
    token_ids: torch.Tensor | None,
    scratch: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    processes: Processes = ALONE,
) -> Moments:
    """The moment of each layer's inputs, measured on token ids (batch, seq) or derived from the norms.

    Args:
        scratch: Where measured moments wait in files; without it they stay in memory.
    """
    if token_ids is None:
        if plan.request.method in ("aligned", "svd"):
            logger.warning(
                "without calibration the norms' weights stand for the inputs, which can cost everything: SmolLM2-135M "
                "with 1 of its 3 KV heads went from perplexity 27 to 96,661 (0.83 to 1.50 bits per byte with 16,384 "
                "tokens); give calibration=token_ids, or --calibration FILE"
            )
        return NormMoments(source, plan.layouts)
    rows = processes.rows(token_ids)
    measured = processes.added(measure_moments(source, plan.layouts, rows, device=device, dtype=dtype))
    return list(measured) if scratch is None else StoredMoments(scratch, measured, processes)


def choose_counts(
    source: Source,
    plan: Plan,
    moments: Moments,
    token_ids: torch.Tensor | None = None,
    device: str = "cpu",
    processes: Processes = ALONE,
) -> list[int]:
    """The count of each layer: the wanted one, or the best under the budget.

    With token ids what a count loses is measured; without them it is the share of energy that the merge loses.
    """
    if plan.counts is not None:
        return plan.counts
    problems = (layer_problem(source, plan, moments, layer_idx) for layer_idx in range(len(plan.layouts)))
    if token_ids is None:
        losses = [plan.request.losses(problem) for problem in problems]
    else:
        losses = measured_losses(
            source, plan.layouts, plan.request, problems, token_ids, device=device, processes=processes
        )
    return plan.request.choose_counts(losses, tokens_kept(source.config))


def tokens_kept(config: PreTrainedConfig) -> list[int]:
    """Tokens of a full context that each layer keeps: all, or as many as its sliding window holds."""
    decoder = decoder_of(config)
    context = positions_of(decoder) or 1
    return [min(context, layer.window or context) for layer in layer_caches(decoder)]


def layer_problem(source: Source, plan: Plan, moments: Moments, layer_idx: int) -> LayerProblem:
    """A layer's heads and inputs, ready to be merged."""
    layout = plan.layouts[layer_idx]
    heads = layout.read_heads(source.read_module(layout.path))
    return LayerProblem(heads, moments[layer_idx].matrix(heads.has_bias), plan.request.method)


def merge_layer(source: Source, plan: Plan, moments: Moments, layer_idx: int, count: int) -> AttentionHeads:
    """Groups and merge: a layer's heads with `count` key-value heads."""
    return plan.request.merge(layer_problem(source, plan, moments, layer_idx), count, layer_idx)


def describe_result(
    source: Source, plan: Plan, counts: Sequence[int], token_ids: torch.Tensor | None, healing: object = None
) -> Result | None:
    """The new config, which records what was done, and the attention of its model; None where the class has none."""
    result = find_result(source.model_class, source.config, plan.layouts, counts)
    if result is None:
        return None
    return with_provenance(
        result,
        plan.layouts,
        method=plan.request.method,
        grouping=plan.request.grouping,
        budget=plan.request.budget,
        calibration_tokens=None if token_ids is None else token_ids.numel(),
        healing=healing,
    )


def warn_that_class_changes(source: Source, layouts: Sequence[AttentionLayout], counts: Sequence[int]) -> None:
    """Warn before any work that the result is a GroupFormer, and why."""
    wanted = f"{counts[0]} instead of {short_counts(layouts)}" if len(set(counts)) == 1 else "other counts by layer of"
    logger.warning(
        f"{source.model_class.__name__} has no config field for {wanted} key-value heads; the result is a GroupFormer"
    )
