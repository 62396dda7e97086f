"""Pictures and tables of README and docs, drawn from what was measured: python scripts/figures.py, or `make figures`.

The study's numbers are those of `make study`, one file in docs/data for each checkpoint. Where new cells lie in
runs/study, they are condensed into these files first; a checkout without them works from the files as they are. The
README's numbers are in benchmarks/results/smollm2.json. A report of `benchmarks.on_gpu` in runs/on-gpu is taken over
and becomes benchmarks/results/on_gpu.md and its picture. Generated tables and captions stand between two marks each;
the text around them is written by hand.
"""

import json
import re
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml


matplotlib.use("Agg")
from matplotlib import pyplot

from groupformer import GroupFormerConfig
from groupformer.measuring.cache import layer_caches


ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "runs" / "study"
PAGE = ROOT / "docs" / "regroup.md"
README = ROOT / "README.md"
REAL = ROOT / "benchmarks" / "results" / "smollm2.json"
REAL_PICTURE = ROOT / "docs" / "images" / "smollm2.png"
GPU_RUN = ROOT / "runs" / "on-gpu" / "on_gpu.json"
GPU = ROOT / "benchmarks" / "results" / "on_gpu.json"  # .md and .png beside it
BYTES_PER_NUMBER = 2  # bfloat16

SETTING = ("checkpoint", "documents")
LABELS = ("part", "kv_heads", "method", "grouping", "calibrated", "seed", "percent")
SCORES = {"bits_per_byte": 6, "tokens_per_second": 1, "cache_bytes_per_token": 0}  # and their decimals

# One light background and dark ink, so that the picture reads the same on a light and on a dark page.
PAPER, INK, GRID = "#f8fafc", "#1e293b", "#dbe2ea"
MEAN, SVD, UPTRAINED, SCRATCH = "#c2410c", "#1d4ed8", "#15803d", "#64748b"


@dataclass(frozen=True)
class Study:
    """One studied checkpoint: the folder of its cells, its recipe, the file of its numbers, its picture."""

    name: str
    recipe: Path
    data: Path
    picture: Path


STUDIES = [
    Study(name, ROOT / "recipes" / recipe, ROOT / "docs" / "data" / data, ROOT / "docs" / "images" / picture)
    for name, recipe, data, picture in (
        ("hub_card", "reference.yaml", "study.json", "quality_against_cache.png"),
        ("learned", "learned.yaml", "study_learned.json", "quality_against_cache_learned.png"),
    )
]


# Numbers -------------------------------------------------------------------------------------------------------------


def condense(folder: Path) -> dict[str, Any]:
    """What the page needs of a study's cells: the setting once, then the labels and the scores of each cell.

    Raises:
        ValueError: the cells are not of one checkpoint and one set of documents.
    """
    cells = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("part=*.json"))}
    settings = {tuple(cell[name] for name in SETTING) for cell in cells.values()}
    if len(settings) != 1:
        raise ValueError(f"{folder} holds cells of {len(settings)} settings of {SETTING}; keep those of one")
    rows = []
    for path, cell in cells.items():
        labels = {name: cell[name] for name in LABELS if name in cell}
        # What was trained on stands in the file's name alone: inside, "loss" is the evaluation's, in nats.
        if trained_on := re.search("_loss=([a-z-]+)_", path.name):
            labels["loss"] = trained_on[1]
        rows.append({**labels, **{name: round(cell[name], digits) for name, digits in SCORES.items() if name in cell}})
    return {**dict(zip(SETTING, settings.pop())), "cells": rows}


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A study with the cells of a later run: those of the same labels are replaced, the others stay.

    Raises:
        ValueError: the two are of different settings.
    """
    for name in SETTING:
        if old[name] != new[name]:
            raise ValueError(f"{name} is {old[name]} in the file and {new[name]} in the cells; remove one of them")

    def by_labels(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {json.dumps({k: v for k, v in cell.items() if k not in SCORES}): cell for cell in study["cells"]}

    cells = by_labels(old) | by_labels(new)
    return {**new, "cells": [cells[labels] for labels in sorted(cells)]}


def save(study: dict[str, Any], path: Path) -> None:
    """One cell a line, so that a change shows as what it is."""
    head = ",\n".join(f"  {json.dumps(name)}: {json.dumps(study[name])}" for name in SETTING)
    cells = ",\n".join(f"    {json.dumps(cell)}" for cell in study["cells"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{head},\n  "cells": [\n{cells}\n  ]\n}}\n', encoding="utf-8")


def scores(study: dict[str, Any], score: str = "bits_per_byte", **labels: Any) -> dict[int, list[float]]:
    """A score by KV heads, of the cells with these labels, one of each seed."""
    found: dict[int, list[float]] = {}
    for cell in study["cells"]:
        if score in cell and all(cell.get(name) == value for name, value in labels.items()):
            found.setdefault(cell["kv_heads"], []).append(cell[score])
    return {heads: found[heads] for heads in sorted(found, reverse=True)}


def points(study: dict[str, Any], **labels: Any) -> dict[int, float]:
    """Bits per byte by KV heads, of the cells with these labels: the mean over seeds."""
    return {heads: statistics.mean(values) for heads, values in scores(study, **labels).items()}


def merge_labels(method: str, kv_heads: int) -> dict[str, Any]:
    """The labels of a method at its best: calibrated and in similar groups, unless it is one of the paper's.

    With one KV head there is one group: "similar" is "adjacent" there, and the merge is not measured again.
    """
    if method in ("mean", "first", "random"):
        return {"method": method, "grouping": "adjacent"}
    return {"method": method, "grouping": "adjacent" if kv_heads == 1 else "similar", "calibrated": True}


def above(score: float, start: float) -> str:
    """By how much a score is above the original's, as "+1.4 %"."""
    return f"{score / start - 1:+.1%}".replace("%", " %")


# Pictures ------------------------------------------------------------------------------------------------------------


def cache_bytes_per_kv_head(recipe: Path) -> int:
    """What one KV head in each layer of a recipe's model keeps of a token."""
    layers = layer_caches(GroupFormerConfig(**yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]))
    return sum(layer.numbers(1) // layer.kv_heads for layer in layers) * BYTES_PER_NUMBER


def lines_of(study: dict[str, Any]) -> tuple[dict[int, float], ...]:
    """Bits per byte by KV heads: merged by the mean, merged by svd, and that after uptraining on 5 % of the tokens."""
    original = points(study, part="original")
    mean = points(study, part="merge", method="mean", grouping="adjacent")
    merged = {heads: points(study, part="merge", **merge_labels("svd", heads))[heads] for heads in mean}
    uptrained = points(study, part="uptrain", method="svd", percent=5.0, loss="distilled")
    return original | mean, original | merged, original | uptrained


def draw(study: dict[str, Any], size: int, path: Path) -> None:
    """Quality against cache: right after the merge, after uptraining, and trained from scratch.

    Args:
        size: Bytes that one KV head keeps of a token.
    """
    mean, merged, uptrained = lines_of(study)
    start = uptrained[max(uptrained)]

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
        fewest = min(line)
        share = above(line[fewest], start)
        place = (size * fewest, line[fewest])
        behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
        axes.annotate(
            share,
            place,
            bbox=behind,
            xytext=(12, -4),
            textcoords="offset points",
            color=color,
            weight="bold",
            zorder=9,
        )
    scratch = points(study, part="scratch")
    sizes = [size * heads for heads in scratch]
    axes.plot(sizes, scratch.values(), color=SCRATCH, marker="x", markersize=9, linewidth=0, label="from scratch")
    axes.set_xscale("log", base=2)
    axes.set_xlim(size * 9.5, size * 0.78)  # from much cache to little
    heads = sorted(mean, reverse=True)
    names = [f"{size * count:,}\n{kv_head_count(count)}" for count in heads]
    names[0], names[-1] = f"{names[0]}\n(multi-head)", f"{names[-1]}\n(multi-query)"
    axes.set_xticks([size * count for count in heads], names)
    highest = max(mean.values())
    axes.set_ylim(start - 0.15 * (highest - start), highest + 0.35 * (highest - start))  # room for the legend
    axes.minorticks_off()
    axes.set_xlabel("KV cache, bytes a token")
    axes.set_ylabel("held-out bits per byte (less is better)")
    axes.legend(loc="upper left", frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor=PAPER)
    pyplot.close(figure)


# Tables --------------------------------------------------------------------------------------------------------------


def cells_of(values: dict[int, list[float]], heads: list[int], start: float | None = None) -> list[str]:
    """Bits per byte for each count: the mean over seeds, by how much it is above the start, and the seeds' spread."""
    cells = []
    for count in heads:
        if count not in values:
            cells.append("")
            continue
        mean = statistics.mean(values[count])
        change = "" if start is None else f" ({above(mean, start)})"
        spread = f" ± {statistics.stdev(values[count]):.3f}" if len(values[count]) > 1 else ""
        cells.append(f"{mean:.3f}{spread}{change}")
    return cells


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def count_names(heads: list[int]) -> list[str]:
    return [kv_head_count(count) for count in heads]


def kv_head_count(count: int) -> str:
    return f"{count} KV head{'s' if count > 1 else ''}"


def merge_table(study: dict[str, Any]) -> str:
    """Right after the merge, by method, grouping and calibration."""
    heads = list(scores(study, part="merge"))
    rows = []
    for method in ("random", "first", "mean", "aligned", "svd"):
        for grouping in ("adjacent", "similar"):
            for calibrated in (False, True):
                labels = {"method": method, "grouping": grouping, "calibrated": calibrated}
                if values := scores(study, part="merge", **labels):
                    row = [f"`{method}`", grouping, "yes" if calibrated else "no"]
                    rows.append([*row, *cells_of(values, heads)])
    return markdown(["method", "grouping", "calibrated", *count_names(heads)], rows)


def uptrain_table(study: dict[str, Any]) -> str:
    """After uptraining, by merge, share of the tokens and loss; beside the original and models from scratch."""
    (start,) = points(study, part="original").values()
    heads = list(scores(study, part="merge"))
    rows = []
    for method, how in (
        ("svd", "similar, calibrated"),
        *((method, "adjacent") for method in ("mean", "first", "random")),
    ):
        if not scores(study, part="uptrain", method=method):
            continue
        name = f"`{method}`, {how}"
        merged = {count: scores(study, part="merge", **merge_labels(method, count))[count] for count in heads}
        rows.append([name, "none", *cells_of(merged, heads, start)])
        for loss in ("distilled", "text-only"):
            for percent in sorted({cell["percent"] for cell in study["cells"] if "percent" in cell}):
                if values := scores(study, part="uptrain", method=method, percent=percent, loss=loss):
                    by = "distilled from the original" if loss == "distilled" else "trained on the text alone"
                    rows.append([f"{name}; {by}", f"{percent:g} %", *cells_of(values, heads, start)])
    scratch = scores(study, part="scratch")
    rows.append(["the same shape from scratch", "100 %", *cells_of(scratch, heads, start)])
    return markdown(["what", "tokens, of pre-training's", *count_names(heads)], rows)


def decode_table(study: dict[str, Any]) -> str:
    """What decoding costs, by count."""
    sizes = scores(study, "cache_bytes_per_token", part="speed")
    speeds = scores(study, "tokens_per_second", part="speed")
    base = speeds[max(speeds)][0] if speeds else 1.0
    rows = [
        [str(count), f"{sizes[count][0]:,.0f}", f"{speed[0]:,.0f}", f"{speed[0] / base:.2f}"]
        for count, speed in speeds.items()
    ]
    return markdown(["KV heads", "cache, bytes a token (float32)", "tokens a second", "ratio"], rows)


def between_marks(page: str, name: str, content: str) -> str:
    """The page with `content` between `<!-- name: begin -->` and `<!-- name: end -->`."""
    begin, end = (f"<!-- {name}: {mark} -->" for mark in ("begin", "end"))
    before, rest = page.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


TABLES = {"merge": merge_table, "uptrain": uptrain_table, "decode": decode_table}


def write_tables(page: str, name: str, study: dict[str, Any]) -> str:
    """The page with a study's tables between their marks, `<!-- hub_card merge: begin -->` and so on."""
    for table, make in TABLES.items():
        page = between_marks(page, f"{name} {table}", make(study))
    return page


# The README's checkpoint ---------------------------------------------------------------------------------------------


def draw_states(states: list[dict[str, Any]], path: Path) -> None:
    """Two rows of bars, the cache and the bits per byte, with a bar for each state: original, merged, healed."""
    start = states[0]["bits_per_byte"]
    colors = [SCRATCH, MEAN, SVD, UPTRAINED]
    pyplot.rcParams.update({"font.size": 12, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK})
    pyplot.rcParams.update({"xtick.color": INK, "ytick.color": INK})
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(8.4, 3.8), facecolor=PAPER, sharey=True, width_ratios=(3, 4), layout="constrained"
    )
    rows = range(len(states))
    for axes, score, label in (
        (left, "cache_bytes_per_token", "cache, bytes a token"),
        (right, "bits_per_byte", "bits per byte (less is better)"),
    ):
        values = [state[score] for state in states]
        axes.set_facecolor(PAPER)
        axes.barh(rows, values, color=[colors[row % len(colors)] for row in rows], height=0.62)
        axes.set_xlim(0, max(values) * 1.35)  # room for the numbers
        axes.set_xlabel(label)
        axes.set_xticks([])
        axes.tick_params(left=False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        for row, value in enumerate(values):
            if axes is left:
                text = f"{value:,}"
            else:
                text = f"{value:.3f}" + (f"  {above(value, start)}" if row else "")
            axes.annotate(text, (value, row), xytext=(6, 0), textcoords="offset points", va="center", weight="bold")
        axes.axvline(values[0], color=INK, linewidth=1, linestyle=(0, (4, 4)), zorder=0)
    names = [textwrap.fill(f"{state['name']} ({kv_head_count(state['kv_heads'])})", 22) for state in states]
    left.set_yticks(rows, names)
    left.invert_yaxis()
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches
    figure.savefig(path, dpi=130, facecolor=PAPER)
    pyplot.close(figure)


def states_caption(real: dict[str, Any]) -> str:
    """What the picture shows, and on what it was measured."""
    first, _, *trained = real["states"]
    last, machine = trained[-1], real["machine"]
    steps = [
        f"{state['name']} on {state['tokens']:,} tokens of text in {state['cpu_seconds'] / 60:.0f} CPU minutes"
        for state in trained
    ]
    sizes = [f"{state['cache_bytes_per_token'] / 1024:g} KiB" for state in (first, last)]
    scores = [state["bits_per_byte"] for state in (first, last)]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    sentences = (
        f"*{real['checkpoint']}: {first['kv_heads']} KV heads merged to {last['kv_heads']}, {', then '.join(steps)}.",
        f"A token's cache goes from {sizes[0]} to {sizes[1]}, held-out bits per byte from {scores[0]:.3f} to",
        f"{scores[1]:.3f} ({above(scores[1], scores[0])}).",
        f"Measured on {real['text']}, in {real['dtype']}, on {threads} of an {machine['device']}",
        "([how](docs/log.md#smollm2)).*",
    )
    return textwrap.fill(" ".join(sentences), 119, break_on_hyphens=False)


def states_table(states: list[dict[str, Any]]) -> str:
    """A row for each state, the first being the original. Seconds are CPU seconds where the states have them."""
    start = states[0]["bits_per_byte"]
    seconds = "cpu_seconds" if any("cpu_seconds" in state for state in states) else "seconds"
    rows = [
        [
            f"{state['name']} ({kv_head_count(state['kv_heads'])})",
            f"{state['cache_bytes_per_token']:,} bytes",
            f"{state['tokens']:,}" if "tokens" in state else "",
            f"{state[seconds]:,.0f}" if seconds in state else "",
            f"{state['bits_per_byte']:.3f}" + (f" ({above(state['bits_per_byte'], start)})" if row else ""),
        ]
        for row, state in enumerate(states)
    ]
    names = {"cpu_seconds": "CPU seconds", "seconds": "seconds"}
    return markdown(["state", "cache a token (bfloat16)", "tokens read", names[seconds], "bits per byte"], rows)


def write_states(readme: str, real: dict[str, Any]) -> str:
    readme = between_marks(readme, "smollm2 caption", states_caption(real))
    return between_marks(readme, "smollm2 table", states_table(real["states"]))


# A GPU's report ------------------------------------------------------------------------------------------------------


def healing_states(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of the checkpoint that were reached: original, merged, healed, uptrained."""
    return [{"name": name, **state} for name, state in report.get("heal", {}).items() if isinstance(state, dict)]


def kernels_table(kernels: list[dict[str, Any]]) -> str:
    rows = [
        [row["case"], f"{row['error']:.4f}", f"{row['eager_error']:.4f}", "yes" if row["is_right"] else "**no**"]
        for row in kernels
    ]
    return markdown(["case", "largest error of a logit", "eager's", "right"], rows)


def speed_table(speed: dict[str, Any]) -> str:
    """Milliseconds and ratios to transformers' Llama, with quartiles."""
    rows = []
    for row in speed["rows"]:
        for name, run in row["runs"].items():
            low, high = run["ratio_quartiles"]
            memory = f"{run['memory_ratio']:.2f}" if "memory_ratio" in run else ""
            ratio = f"{run['ratio']:.2f} ({low:.2f} to {high:.2f})"
            rows.append([row["case"], name, f"{1e3 * run['seconds']:.1f}", ratio, memory])
    return markdown(["case", "model", "ms", "ratio", "peak memory, ratio"], rows)


def served_table(served: dict[str, Any]) -> str:
    rows = []
    for row in served["rows"]:
        first = row["models"][0]
        for model in row["models"]:
            predicted = f"{first['bytes_per_token'] / model['bytes_per_token']:.2f}"
            speed = [f"{model['tokens_per_second']:,.0f}", f"{model['ratio']:.2f}", predicted]
            times = [f"{model['next_ms']:.1f}", f"{model['first_ms']:,.0f}"]
            rows.append([f"{row['context']:,}", str(row["concurrency"]), model["name"], *speed, *times])
    header = ["context", "at once", "model", "tokens a second", "ratio", "predicted", "ms a token", "ms to the first"]
    return markdown(header, rows)


def gpu_page(report: dict[str, Any]) -> str:
    """A section for each step that was run; one that failed or was left out says so."""
    machine = report["machine"]
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    parts = ["# On a GPU", f"`python -m benchmarks.on_gpu`, on {machine['device']}; {versions}."]
    tables = {
        "kernels": ("Attention's kernels in bfloat16, against float32", kernels_table),
        "speed": ("Beside transformers' Llama", speed_table),
        "heal": ("Fewer KV heads, healed and uptrained", states_table),
        "served": ("In vLLM", served_table),
    }
    for step, (title, table) in tables.items():
        if step in report:
            failures = [f"{word}: {report[step][word]}" for word in ("failed", "left_out") if word in report[step]]
            result = healing_states(report) if step == "heal" else [] if failures else report[step]
            parts += [f"## {title}", *([table(result)] if result else []), *failures]
    return "\n\n".join(parts) + "\n"


def write_gpu(report: dict[str, Any], target: Path) -> None:
    """The report as JSON, its page, and the picture of its healed checkpoint where there is one."""
    target.write_text(json.dumps(report, indent=1), encoding="utf-8")
    target.with_suffix(".md").write_text(gpu_page(report), encoding="utf-8")
    if len(states := healing_states(report)) > 1:
        draw_states(states, target.with_suffix(".png"))


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for study in STUDIES:
        known = json.loads(study.data.read_text(encoding="utf-8")) if study.data.exists() else None
        if (CELLS / study.name).is_dir():
            new = condense(CELLS / study.name)
            known = new if known is None else joined(known, new)
            save(known, study.data)
        if known is not None:
            draw(known, cache_bytes_per_kv_head(study.recipe), study.picture)
            page = write_tables(page, study.name, known)
    PAGE.write_text(page, encoding="utf-8")
    real = json.loads(REAL.read_text(encoding="utf-8"))
    draw_states(real["states"], REAL_PICTURE)
    README.write_text(write_states(README.read_text(encoding="utf-8"), real), encoding="utf-8")
    if GPU_RUN.exists():
        report = json.loads(GPU_RUN.read_text(encoding="utf-8"))
        if report["machine"]["device"] == "cpu":
            print(f"{GPU_RUN} was measured on a CPU, which only shows that the script works; left out")
        else:
            write_gpu(report, GPU)


if __name__ == "__main__":
    main()
