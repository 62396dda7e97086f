"""Draws docs/images/quality_against_cache.png: python scripts/figures.py, or `make figures`.

The numbers are those of `make study`. Where its cells lie in runs/study, docs/data/study.json is condensed from them
first; a checkout without them draws from that file.
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot

from groupformer.planning import layer_caches, load_config


ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "hub_card"
CELLS = ROOT / "runs" / "study" / CHECKPOINT.name
DATA = ROOT / "docs" / "data" / "study.json"
FIGURE = ROOT / "docs" / "images" / "quality_against_cache.png"
BYTES_PER_NUMBER = 2  # bfloat16

SETTING = ("checkpoint", "documents", "window", "stride")
LABELS = ("part", "kv_heads", "method", "grouping", "calibrated", "seed", "percent")

# One light background and dark ink, so that the picture reads the same on a light and on a dark page.
PAPER, INK, GRID = "#f8fafc", "#1e293b", "#dbe2ea"
MEAN, SVD, UPTRAINED = "#c2410c", "#1d4ed8", "#15803d"


def condense(folder: Path) -> dict[str, Any]:
    """What the figure needs of a study's cells: the setting once, then the labels and the score of each cell.

    Raises:
        ValueError: the cells are not of one checkpoint, measured in one way.
    """
    cells = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("part=*.json"))}
    cells = {path: cell for path, cell in cells.items() if "bits_per_byte" in cell}
    settings = {tuple(cell[name] for name in SETTING) for cell in cells.values()}
    if len(settings) != 1:
        raise ValueError(f"{folder} holds cells of {len(settings)} settings of {SETTING}; keep those of one")
    rows = []
    for path, cell in cells.items():
        labels = {name: cell[name] for name in LABELS if name in cell}
        # What was trained on stands in the file's name alone: inside, "loss" is the evaluation's, in nats.
        if trained_on := re.search("_loss=([a-z-]+)_", path.name):
            labels["loss"] = trained_on[1]
        rows.append({**labels, "bits_per_byte": round(cell["bits_per_byte"], 6)})
    return {**dict(zip(SETTING, settings.pop())), "cells": rows}


def save(study: dict[str, Any], path: Path) -> None:
    """One cell a line, so that a change shows as what it is."""
    head = ",\n".join(f"  {json.dumps(name)}: {json.dumps(study[name])}" for name in SETTING)
    cells = ",\n".join(f"    {json.dumps(cell)}" for cell in study["cells"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{head},\n  "cells": [\n{cells}\n  ]\n}}\n', encoding="utf-8")


def points(study: dict[str, Any], **labels: Any) -> dict[int, float]:
    """Bits per byte by KV heads, of the cells with these labels."""
    chosen = [cell for cell in study["cells"] if all(cell.get(name) == value for name, value in labels.items())]
    return {cell["kv_heads"]: cell["bits_per_byte"] for cell in sorted(chosen, key=lambda cell: -cell["kv_heads"])}


def cache_bytes_per_kv_head() -> int:
    """What one KV head in each layer of the checkpoint keeps of a token."""
    layers = layer_caches(load_config(CHECKPOINT))
    return sum(layer.numbers(1) // layer.kv_heads for layer in layers) * BYTES_PER_NUMBER


def lines_of(study: dict[str, Any]) -> tuple[dict[int, float], ...]:
    """Bits per byte by KV heads: merged by the mean, merged by svd, and that after uptraining on 5 % of the tokens."""
    original = points(study, part="original")
    mean = points(study, part="merge", method="mean", grouping="adjacent")
    svd = {"part": "merge", "method": "svd", "calibrated": True}
    # With one KV head there is one group: "similar" is "adjacent" there, and was not measured again.
    merged = points(study, **svd, grouping="similar") | {1: points(study, **svd, grouping="adjacent")[1]}
    uptrained = points(study, part="uptrain", method="svd", percent=5.0, loss="distilled")
    return original | mean, original | merged, original | uptrained


def draw(study: dict[str, Any], path: Path) -> None:
    """Quality against cache: right after the merge, and after uptraining."""
    mean, merged, uptrained = lines_of(study)
    size, start = cache_bytes_per_kv_head(), uptrained[max(uptrained)]

    pyplot.rcParams.update({"font.size": 12, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK})
    pyplot.rcParams.update(
        {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = pyplot.subplots(figsize=(9, 5), facecolor=PAPER)
    axes.set_facecolor(PAPER)
    axes.grid(color=GRID)
    axes.axhline(start, color=INK, linewidth=1, linestyle=(0, (4, 4)))
    for line, color, marker, label in (
        (mean, MEAN, "s", "merged by the mean"),
        (merged, SVD, "o", "merged by svd, in closed form"),
        (uptrained, UPTRAINED, "D", "svd, then uptrained on 5 % of the tokens"),
    ):
        sizes = [size * heads for heads in line]
        axes.plot(sizes, line.values(), color=color, marker=marker, markersize=8, linewidth=2.5, label=label)
        share = f"+{line[1] / start - 1:.1%}".replace("%", " %")
        axes.annotate(share, (size, line[1]), xytext=(12, -4), textcoords="offset points", color=color, weight="bold")
    axes.set_xscale("log", base=2)
    axes.set_xlim(size * 9.5, size * 0.78)  # from much cache to little
    heads = sorted(mean, reverse=True)
    names = [f"{size * count:,}\n{count} KV head{'s' if count > 1 else ''}" for count in heads]
    names[0], names[-1] = f"{names[0]}\n(multi-head)", f"{names[-1]}\n(multi-query)"
    axes.set_xticks([size * count for count in heads], names)
    axes.set_ylim(bottom=1.6)
    axes.minorticks_off()
    axes.set_xlabel("KV cache, bytes a token")
    axes.set_ylabel("held-out bits per byte (less is better)")
    axes.legend(loc="upper left", frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor=PAPER)
    pyplot.close(figure)


def main() -> None:
    if CELLS.is_dir():
        save(condense(CELLS), DATA)
    draw(json.loads(DATA.read_text(encoding="utf-8")), FIGURE)


if __name__ == "__main__":
    main()
