"""Timing: in alternation, since a machine's speed drifts; medians and quartiles, since its noise has a long tail."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


Run = Callable[[], float]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call, the GPU's work included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def alternate(runs: dict[str, Run], rounds: int, twice: bool = False) -> dict[str, list[float]]:
    """Calls each run once to warm up and then `rounds` times in turn; every other round neighbours change places.

    A run that comes after another process's can be a fifth slower. So the first two, which are compared, come there
    equally often; with `twice`, the second of two calls in a row is timed.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    swapped = [name for place in range(0, len(names), 2) for name in reversed(names[place : place + 2])]
    for index in range(rounds):
        for name in (names, swapped)[index % 2]:
            if twice:
                runs[name]()
            seconds[name].append(runs[name]())
    return seconds


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """For each run its median, quartiles, and the median of its round-by-round ratios to `base` (above 1: faster)."""
    table = {}
    for name, values in seconds.items():
        low, middle, high = quartiles(values)
        ratios = [other / own for other, own in zip(seconds[base], values)] if base in seconds else []
        table[name] = {"seconds": middle, "quartiles": [low, high]}
        if ratios:
            table[name] |= {"ratio": statistics.median(ratios), "ratio_quartiles": quartiles(ratios)[::2]}
    return table


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def copy_bandwidth(device: str, megabytes: int = 512) -> float:
    """Bytes a second that a copy reads and writes, the best of a few: the ceiling of decoding."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(7))


def read_bandwidth(device: str, megabytes: int = 512) -> float:
    """Bytes a second of the faster of a sum and a matrix-vector product, both too large for any cache.

    Decoding does little else than such products; on some CPUs torch's own reads at half the speed of its sum.
    """
    matrix = torch.ones(megabytes * 2**20 // 4 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    ways: list[Callable[[], Any]] = [lambda: matrix @ vector, matrix.sum]
    return matrix.nbytes / min(timed(way) for way in ways for _ in range(7))


def gemm_flops(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square matrix product, the best of a few: the ceiling of prefill."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: left @ right) for _ in range(7))
