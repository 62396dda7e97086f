"""`auto`: the counts of key-value heads, layer by layer, that fit a cache and lose the least energy."""

import math
from collections.abc import Mapping, Sequence


def check_budget(budget: float | None) -> float:
    """The budget, after refusing what is not a share of the cache."""
    if budget is None or not 0 < budget <= 1:
        raise ValueError(
            f"budget ({budget}) must be above 0 and at most 1: the share of the present cache to keep, e.g. 0.25"
        )
    return budget


def choose_counts(losses: Sequence[Mapping[int, float]], budget: float) -> list[int]:
    """One count for each layer, at the least sum of losses, such that all counts fit the budget.

    The cache of a layer is proportional to its count (sliding windows are not taken into account), so this is a
    knapsack with small integer weights, solved exactly by dynamic programming.

    Args:
        losses: For each layer, the loss for each possible count; the greatest count is the layer's present one.
        budget: Share of the present cache to keep.

    Raises:
        ValueError: not even the smallest counts fit.
    """
    present, smallest = sum(map(max, losses)), sum(map(min, losses))
    capacity = math.floor(budget * present + 1e-9)
    if capacity < smallest:
        raise ValueError(
            f"budget ({budget}) leaves {capacity} key-value heads, but {len(losses)} layers need at least {smallest}; "
            f"choose at least {math.ceil(1000 * smallest / present) / 1000}"
        )
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # heads spent -> least loss, and its counts
    for layer in losses:
        following: dict[int, tuple[float, list[int]]] = {}
        for spent, (lost, counts) in best.items():
            for count, loss in layer.items():
                total = spent + count
                if total <= capacity and lost + loss < following.get(total, (math.inf, []))[0]:
                    following[total] = (lost + loss, [*counts, count])
        best = following
    return min(best.items(), key=lambda item: (item[1][0], item[0]))[1][1]  # of equal losses, the fewest heads
