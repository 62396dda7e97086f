"""`auto`: the counts of key-value heads, layer by layer, that fit a cache and lose the least."""

import math
from collections.abc import Mapping, Sequence


def check_budget(budget: float | None) -> float:
    """The budget, after refusing what is not a share of the cache."""
    if budget is None or not 0 < budget <= 1:
        raise ValueError(
            f"budget ({budget}) must be above 0 and at most 1: the share of the present cache to keep, e.g. 0.25"
        )
    return budget


def choose_counts(losses: Sequence[Mapping[int, float]], budget: float, tokens: Sequence[int]) -> list[int]:
    """One count for each layer, at the least sum of losses, such that the cache fits the budget.

    The cache of a layer is its count times the tokens that it keeps, so this is a knapsack with integer weights,
    solved exactly by dynamic programming.

    Args:
        losses: For each layer, the loss for each possible count; the greatest count is the layer's present one.
        budget: Share of the present cache to keep.
        tokens: That each layer keeps of a full context: all, or those in its sliding window.

    Raises:
        ValueError: not even the smallest counts fit.
    """
    present = sum(size * max(layer) for size, layer in zip(tokens, losses))
    smallest = sum(size * min(layer) for size, layer in zip(tokens, losses))
    capacity = math.floor(budget * present + 1e-9)
    if capacity < smallest:
        raise ValueError(
            f"budget ({budget}) is less than {len(losses)} layers with the fewest key-value heads need; "
            f"choose at least {math.ceil(1000 * smallest / present) / 1000}"
        )
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # cache spent -> least loss, and its counts
    for size, layer in zip(tokens, losses):
        following: dict[int, tuple[float, list[int]]] = {}
        for spent, (lost, counts) in best.items():
            for count, loss in layer.items():
                total = spent + size * count
                if total <= capacity and lost + loss < following.get(total, (math.inf, []))[0]:
                    following[total] = (lost + loss, [*counts, count])
        best = least_for_more(following)
    return min(best.values())[1]


def least_for_more(states: Mapping[int, tuple[float, list[int]]]) -> dict[int, tuple[float, list[int]]]:
    """The states that lose less than every one that spends less; no other can be part of a solution."""
    kept, least = {}, math.inf
    for spent in sorted(states):
        if states[spent][0] < least:
            kept[spent], least = states[spent], states[spent][0]
    return kept
