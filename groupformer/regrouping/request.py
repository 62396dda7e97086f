"""What is asked for, checked against a model's config before any work is done; and the config of the result."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral

import torch

from ..conversion.counts import regrouped_config  # noqa: F401  the config of the result
from ..model.configuration_groupformer import GroupFormerConfig, choices, divisors
from .budget import check_budget, choose_counts
from .grouping import GROUPINGS
from .heads import AttentionHeads, Geometry
from .layers import LayerProblem
from .merging import METHODS
from .moments import Moment


@dataclass(frozen=True)
class Request:
    """A checked request.

    Args:
        config: The present model's config.
        counts: The wanted count of each layer; `None` where the budget decides.
        method, grouping: Keys of `METHODS` and `GROUPINGS`.
        budget: With "auto", the share of the cache to keep.
        seed: Of the method "random".
    """

    config: GroupFormerConfig
    counts: list[int] | None
    method: str
    grouping: str
    budget: float | None
    seed: int

    @classmethod
    def checked(
        cls,
        config: GroupFormerConfig,
        num_key_value_heads: int | str | Mapping[int, int],
        method: str,
        grouping: str,
        budget: float | None,
        seed: int,
    ) -> "Request":
        """The request, if the model can fulfil it.

        Raises:
            ValueError: an unknown word, or a count that a layer cannot have; the message names it and the remedy.
        """
        for name, value, table in (("method", method, METHODS), ("grouping", grouping, GROUPINGS)):
            if value not in table:
                raise ValueError(f"{name} ({value!r}) is unknown; choose {choices(table)}")
        if grouping == "similar" and config.position_embedding_type == "alibi":
            raise ValueError(
                "grouping ('similar') moves heads, but with position_embedding_type='alibi' each place has its own "
                "slope; choose 'adjacent'"
            )
        if num_key_value_heads == "auto":
            return cls(config, None, method, grouping, check_budget(budget), seed)
        if budget is not None:
            raise ValueError(f"budget ({budget}) needs num_key_value_heads='auto', not {num_key_value_heads!r}")
        counts = wanted_counts(config, num_key_value_heads)
        return cls(config, counts, method, grouping, None, seed)

    def problem(self, layer_idx: int, tensors: Mapping[str, torch.Tensor], moment: Moment) -> LayerProblem:
        """The layer's tensors ("q_proj.weight", ...) and input moment as a problem for the method."""
        heads = AttentionHeads.from_tensors(tensors, Geometry.of_layer(self.config, layer_idx))
        return LayerProblem(heads, moment.matrix(heads.has_bias), self.method)

    def losses(self, problem: LayerProblem) -> dict[int, float]:
        """For each count that a layer can have, the energy that its best groups lose."""
        group = GROUPINGS[self.grouping]
        counts = divisors(problem.heads.geometry.num_key_value_heads)
        return {count: sum(map(problem.loss, group(problem, count))) for count in counts}

    def counts_for(self, losses: list[dict[int, float]]) -> list[int]:
        """With "auto", the counts under the budget."""
        return choose_counts(losses, check_budget(self.budget))

    def regroup_layer(
        self, layer_idx: int, count: int, tensors: Mapping[str, torch.Tensor], moment: Moment
    ) -> dict[str, torch.Tensor]:
        """The layer's attention tensors with `count` key-value heads."""
        problem = self.problem(layer_idx, tensors, moment)
        groups = GROUPINGS[self.grouping](problem, count)
        # A generator for each layer: the result does not depend on the order in which layers are done.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer_idx)
        return problem.merged(groups, generator).to_tensors(tensors)


def wanted_counts(config: GroupFormerConfig, wanted: int | str | Mapping[int, int]) -> list[int]:
    """The count of each layer; layers that a mapping does not name keep theirs.

    Raises:
        ValueError: not a count, an unknown layer, or a count that does not divide the layer's present one.
    """
    present = [layer.num_key_value_heads for layer in config.per_layer_config]
    if isinstance(wanted, Mapping):
        unknown = sorted(set(wanted) - set(range(len(present))), key=str)
        if unknown:
            raise ValueError(f"num_key_value_heads names layer {unknown[0]!r}; choose from 0 to {len(present) - 1}")
        counts = [wanted.get(layer_idx, count) for layer_idx, count in enumerate(present)]
    else:
        counts = [wanted] * len(present)
    for layer_idx, (count, now) in enumerate(zip(counts, present)):
        where = f" in layer {layer_idx}" if isinstance(wanted, Mapping) or config.is_heterogeneous else ""
        if isinstance(count, bool) or not isinstance(count, Integral):  # NumPy's whole numbers are some, too
            raise ValueError(
                f"num_key_value_heads ({count!r}){where} must be a number, a mapping of layers to numbers, or 'auto'"
            )
        if count > now:
            raise ValueError(
                f"num_key_value_heads ({count}){where} is more than the {now} there are; "
                f"choose {choices(divisors(now))}"
            )
        if count < 1 or now % count:
            raise ValueError(
                f"num_key_value_heads ({count}){where} must divide the {now} there are; "
                f"choose {choices(divisors(now))}"
            )
    return [int(count) for count in counts]
