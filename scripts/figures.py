"""Draws the README's picture, quality against cache size, from the measured cells of the study.

    python scripts/figures.py

Reads docs/data/study.json, which `--update runs/study/hub_card` condenses from the cells that `make study` wrote.
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


ROOT = Path(__file__).parent.parent
DATA = ROOT / "docs" / "data" / "study.json"
PICTURE = ROOT / "docs" / "images" / "quality_against_cache.png"
FIELDS = ("part", "kv_heads", "method", "grouping", "calibrated", "percent", "seed", "bits_per_byte")
LAYERS, HEAD_DIM, NUMBER = 8, 32, 2  # of the reference checkpoint, in bfloat16

# Label, colour, and which cells belong to it.
LINES = [
    ("merged by the mean", "C7", {"part": "merge", "method": "mean", "grouping": "adjacent", "calibrated": False}),
    ("merged by svd", "C0", {"part": "merge", "method": "svd", "grouping": "similar", "calibrated": True}),
    (
        "svd, then 5 % of the training tokens, distilled",
        "C2",
        {"part": "uptrain", "method": "svd", "percent": 5.0, "distilled": True},
    ),
]


def condensed(folder: Path) -> list[dict]:
    """What is drawn of each cell; whether it was distilled stands in its file's name."""
    cells = []
    for path in sorted(folder.glob("part=*.json")):
        cell = json.loads(path.read_text())
        cells.append(
            {name: cell[name] for name in FIELDS if name in cell} | {"distilled": "loss=distilled" in path.name}
        )
    return cells


def cache_bytes(kv_heads: int) -> int:
    """Of one token."""
    return 2 * LAYERS * kv_heads * HEAD_DIM * NUMBER


def belongs(cell: dict, wanted: dict) -> bool:
    """A single group is the same however heads are grouped."""
    fields = {name: value for name, value in wanted.items() if name != "grouping" or cell["kv_heads"] > 1}
    return all(cell.get(name) == value for name, value in fields.items())


def draw(cells: list[dict], path: Path) -> None:
    original = next(cell["bits_per_byte"] for cell in cells if cell["part"] == "original")
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for label, color, wanted in LINES:
        chosen = [cell for cell in cells if belongs(cell, wanted)]
        points = {8: original} | {cell["kv_heads"]: cell["bits_per_byte"] for cell in chosen}
        heads = sorted(points)
        axes.plot(
            [cache_bytes(count) for count in heads], [points[count] for count in heads], "o-", c=color, label=label
        )
    axes.axhline(original, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8]
    names = {1: "1 KV head (MQA)", 8: "8 KV heads (MHA)"}
    axes.set_xticks([cache_bytes(count) for count in ticks])
    axes.set_xticklabels([f"{cache_bytes(count):,} bytes\n{names.get(count, f'{count} KV heads')}" for count in ticks])
    axes.set_ylabel("bits per byte, held-out text (less is better)")
    axes.set_xlabel("KV cache of a token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", type=Path, help="Folder of the study's cells to condense first.")
    options = parser.parse_args()
    if options.update is not None:
        DATA.parent.mkdir(exist_ok=True)
        DATA.write_text(json.dumps(condensed(options.update), indent=1) + "\n")
    draw(json.loads(DATA.read_text()), PICTURE)


if __name__ == "__main__":
    main()
