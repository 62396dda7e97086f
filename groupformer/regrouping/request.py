"""What is asked for, checked against the attention of a model before any work is done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from ..model.configuration_groupformer import choices, divisors
from .budget import check_budget, choose_counts
from .grouping import GROUPINGS
from .heads import AttentionHeads
from .layers import LayerProblem
from .layouts import AttentionLayout
from .merging import METHODS


ROUNDING = 1e-9  # losses below are none, so that redundant heads go rather than stay


@dataclass(frozen=True)
class Request:
    """How key-value heads are merged.

    Args:
        method, grouping: Keys of `METHODS` and `GROUPINGS`.
        budget: With "auto", the share of the cache to keep; else None.
        seed: Of the method "random".
    """

    method: str
    grouping: str
    budget: float | None
    seed: int

    @classmethod
    def checked(
        cls,
        layouts: Sequence[AttentionLayout],
        wanted: int | str | Mapping[int, int],
        method: str = "svd",
        grouping: str | None = None,
        budget: float | None = None,
        seed: int = 0,
    ) -> "Request":
        """The request, if a model with this attention can fulfil it.

        Raises:
            ValueError: an unknown word, or one that does not go with another; the message names it and the remedy.
        """
        can_move = all(layout.can_move for layout in layouts)
        if grouping is None:
            grouping = "similar" if can_move else "adjacent"
        for name, value, table in (("method", method, METHODS), ("grouping", grouping, GROUPINGS)):
            if value not in table:
                raise ValueError(f"{name} ({value!r}) is unknown; choose {choices(table)}")
        if grouping == "similar" and not can_move:
            raise ValueError(
                "grouping ('similar') moves heads, but with ALiBi each place has its own slope; choose 'adjacent'"
            )
        if wanted == "auto":
            budget = check_budget(budget)
        elif budget is not None:
            raise ValueError(f"budget ({budget}) needs num_key_value_heads='auto', not {wanted!r}")
        return cls(method, grouping, budget, seed)

    def losses(self, problem: LayerProblem) -> dict[int, float]:
        """For each count that a layer can have, the energy that its best groups lose."""
        group = GROUPINGS[self.grouping]
        counts = divisors(problem.heads.geometry.num_key_value_heads)
        return {count: sum(map(problem.loss, group(problem, count))) for count in counts}

    def choose_counts(self, losses: Sequence[Mapping[int, float]], tokens: Sequence[int]) -> list[int]:
        """With "auto", the counts under the budget, where each layer keeps so many tokens of a full context."""
        counted = [{count: 0.0 if loss < ROUNDING else loss for count, loss in layer.items()} for layer in losses]
        return choose_counts(counted, check_budget(self.budget), tokens)

    def merge(self, problem: LayerProblem, count: int, layer_idx: int) -> AttentionHeads:
        """The layer's heads with `count` key-value heads."""
        groups = GROUPINGS[self.grouping](problem, count)
        # A generator for each layer: the result does not depend on the order in which layers are done.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer_idx)
        return problem.merged(groups, generator)


def check_counts(present: Sequence[int], wanted: int | str | Mapping[int, int]) -> list[int] | None:
    """The wanted count of each layer, None with "auto"; layers that a mapping does not name keep theirs.

    Args:
        present: The count that each layer has.

    Raises:
        ValueError: not a count, an unknown layer, or a count that does not divide the layer's present one.
    """
    if wanted == "auto":
        return None
    if isinstance(wanted, Mapping):
        unknown = sorted(set(wanted) - set(range(len(present))), key=str)
        if unknown:
            raise ValueError(f"num_key_value_heads names layer {unknown[0]!r}; choose from 0 to {len(present) - 1}")
        counts = [wanted.get(layer_idx, count) for layer_idx, count in enumerate(present)]
    else:
        counts = [wanted] * len(present)  # type: ignore[list-item]
    for layer_idx, (count, now) in enumerate(zip(counts, present)):
        where = f" in layer {layer_idx}" if isinstance(wanted, Mapping) or len(set(present)) > 1 else ""
        check_is_number(count, where)
        if count > now:
            raise ValueError(
                f"num_key_value_heads ({count}){where} is more than the {now} there are; "
                f"choose {choices(divisors(now))}, or add heads with groupformer.expand"
            )
        if count < 1 or now % count:
            raise ValueError(
                f"num_key_value_heads ({count}){where} must divide the {now} there are; "
                f"choose {choices(divisors(now))}"
            )
    return [int(count) for count in counts]


def check_is_number(count: object, where: str = "") -> None:
    """Refuses what is no whole number; NumPy's are some, too."""
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise ValueError(
            f"num_key_value_heads ({count!r}){where} must be a number, a mapping of layers to numbers, or 'auto'"
        )
