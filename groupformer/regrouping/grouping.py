"""Which key-value heads become one: equal groups, by neighbourhood or by what merging them loses."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator

from .layers import LayerProblem


MOST_PARTITIONS = 20_000  # more ways to split the heads into groups are not listed
COMPARED_PARTITIONS = 8  # those with the best pairs; in 12 layers of random correlated heads the best was among them


def adjacent(problem: LayerProblem, count: int) -> list[list[int]]:
    """Neighbours: heads 0 … n-1, n … 2n-1 and so on (Ainslie et al. 2023, figure 2)."""
    heads = problem.heads.geometry.num_key_value_heads
    size = heads // count
    return [list(range(start, start + size)) for start in range(0, heads, size)]


def similar(problem: LayerProblem, count: int) -> list[list[int]]:
    """The equal groups that lose the least energy under the method, whatever heads they hold.

    A group's loss is first taken as the sum over its pairs, which costs a small part of the groups' own losses. Where
    all partitions can be listed, the best few by pairs are compared by their own losses. Otherwise pairs decide:
    groups grow around the head that is farthest from all others, then heads are swapped while that helps.
    """
    heads = problem.heads.geometry.num_key_value_heads
    size = heads // count
    if size == 1 or count == 1:
        return adjacent(problem, count)
    partitions = math.factorial(heads) // (math.factorial(size) ** count * math.factorial(count))
    losses = [[problem.loss([a, b]) if a != b else 0.0 for b in range(heads)] for a in range(heads)]
    if partitions <= MOST_PARTITIONS:
        by_pairs = heapq.nsmallest(
            COMPARED_PARTITIONS,
            partitions_of(list(range(heads)), size),
            key=lambda groups: sum(losses[a][b] for group in groups for a, b in itertools.combinations(group, 2)),
        )
        best = min(by_pairs, key=lambda groups: sum(map(problem.loss, groups)))
        return [list(group) for group in best]
    groups = swapped(grown(losses, size), losses)
    return sorted(sorted(group) for group in groups)


def partitions_of(heads: list[int], size: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to split heads into groups of a size, each once."""
    if not heads:
        yield []
        return
    for others in itertools.combinations(heads[1:], size - 1):
        group = (heads[0], *others)
        rest = [head for head in heads if head not in group]
        for groups in partitions_of(rest, size):
            yield [group, *groups]


def grown(losses: list[list[float]], size: int) -> list[list[int]]:
    """Groups that start with the head farthest from all that are left, and take the nearest heads one by one."""
    left = list(range(len(losses)))
    groups = []
    while left:
        group = [max(left, key=lambda head: sum(losses[head][other] for other in left))]
        left.remove(group[0])
        while len(group) < size:
            nearest = min(left, key=lambda head: sum(losses[head][member] for member in group))
            group.append(nearest)
            left.remove(nearest)
        groups.append(group)
    return groups


def swapped(groups: list[list[int]], losses: list[list[float]]) -> list[list[int]]:
    """Groups after all swaps of two heads that lower the sum over pairs; it ends, because the sum falls each time."""

    def cost(head: int, group: list[int], without: int) -> float:
        return sum(losses[head][member] for member in group if member not in (head, without))

    improved = True
    while improved:
        improved = False
        for first, second in itertools.combinations(groups, 2):
            for i, j in itertools.product(range(len(first)), range(len(second))):
                a, b = first[i], second[j]
                gain = cost(a, first, b) + cost(b, second, a) - cost(a, second, b) - cost(b, first, a)
                if gain > 1e-12:
                    first[i], second[j] = b, a
                    improved = True
    return groups


GROUPINGS: dict[str, Callable[[LayerProblem, int], list[list[int]]]] = {"adjacent": adjacent, "similar": similar}
