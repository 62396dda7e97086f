"""The study behind docs/regroup.md: what fewer key-value heads cost, right after the merge and after uptraining.

    python benchmarks/study.py --checkpoint runs/reference --data ../data/textbooks --parts merge speed
    python benchmarks/study.py --checkpoint runs/reference --data ../data/textbooks   # everything: hours on a GPU

Every cell of the study (one model, one figure) is a JSON file below --output, named after what it measures and the
checkpoint's hash; a cell that is there is not computed again, so a study that was cut off goes on where it stopped.
At the end all cells are gathered in study.json, printed as tables, and drawn as quality against cache size.
"""

import argparse
import functools
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import groupformer
from groupformer import GroupFormerForCausalLM
from groupformer.commands.tables import print_table
from groupformer.measuring.evaluation import evaluate
from groupformer.measuring.speed import measure
from groupformer.regrouping.attention import find_attention
from groupformer.regrouping.merging import METHODS
from groupformer.regrouping.moments import calibration_from_texts
from groupformer.training.data import read_column
from groupformer.training.uptraining import UptrainRecipe, uptrain


PERCENTS = (1.0, 2.0, 5.0, 10.0)
LOSSES = {"distilled": {"kl_weight": 1.0, "ce_weight": 0.1}, "text only": {"kl_weight": 0.0, "ce_weight": 1.0}}
# What a cell depends on beside its labels: of calibrated merges, and by the part.
CALIBRATED = ("calibration_tokens", "calibration_every")
MATTERS = {"uptrain": ("batch_size", "tokenizer"), "scratch": ("recipe",)}
DECODING = {"batch": 8, "context": 256, "new_tokens": 64}


class Study:
    """One checkpoint, its texts, and the cells that are ready."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.source = Path(options.checkpoint)
        weights = (self.source / "model.safetensors").read_bytes()
        self.fingerprint = hashlib.sha256(weights).hexdigest()[:12]
        self.folder = Path(options.output) / self.source.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        data = Path(options.data)
        self.train_files, self.validation_files = str(data / "train-*.parquet"), str(data / "validation-*.parquet")
        self.test_texts = read_column([data / "test-*.parquet"])[: options.documents]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.cells: dict[str, dict[str, Any]] = {}

    def model(self) -> GroupFormerForCausalLM:
        model = GroupFormerForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        return model.to(self.device).eval()  # type: ignore[arg-type]

    def calibration(self) -> torch.Tensor:
        texts = read_column([self.train_files])[:: self.options.calibration_every]
        config = self.model().config
        return calibration_from_texts(texts, self.tokenizer, config, self.options.calibration_tokens)

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Held-out bits per byte of a model in memory, in windows of 512 tokens that move by 256."""
        batch_size = self.options.evaluation_batch
        model = model.to(self.device)
        return evaluate(model, self.tokenizer, self.test_texts, window=512, stride=256, batch_size=batch_size)

    def cell(self, compute: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any]:
        """The cell of these labels: read, or computed and kept.

        Raises:
            ValueError: the cell that is there was made with other options.
        """
        setting = {**labels, "documents": len(self.test_texts), "checkpoint": self.fingerprint}
        name = "_".join(f"{key}={value}" for key, value in setting.items()).replace(" ", "-").replace("/", "-")
        path = self.folder / f"{name}.json"
        options = self.options_of(labels)
        if path.exists():
            self.check_same_options(path, options)
        else:
            started = time.time()
            result = {**setting, **compute(), "options": options, "seconds": round(time.time() - started, 1)}
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(result, indent=2))
            aside.rename(path)
        self.cells[name] = {**json.loads(path.read_text()), **setting}  # labels win: an evaluation has a "loss" too
        print(name, f"{self.cells[name].get('bits_per_byte', float('nan')):.4f}", flush=True)
        return self.cells[name]

    def options_of(self, labels: dict[str, Any]) -> dict[str, Any]:
        """The options that a cell depends on, files by their names; those that were not given are left out."""
        names = (*(CALIBRATED if labels.get("calibrated") else ()), *MATTERS.get(labels.get("part", ""), ()))
        given = {name: getattr(self.options, name, None) for name in names}
        return {
            name: Path(value).name if isinstance(value, str) else value
            for name, value in given.items()
            if value is not None
        }

    def check_same_options(self, path: Path, options: dict[str, Any]) -> None:
        """Refuses a kept cell of other options; older ones do not say theirs, and are taken."""
        kept = json.loads(path.read_text()).get("options", {})
        for name, value in options.items():
            if kept.get(name, value) != value:
                raise ValueError(
                    f"{name} ({value}) was {kept[name]} when {path.name} was measured; "
                    "give it as it was, or another --output"
                )


# Parts ---------------------------------------------------------------------------------------------------------------


def original(study: Study) -> None:
    """The checkpoint as it is."""
    model = study.model()
    heads = model.config.num_key_value_heads
    study.cell(lambda: study.evaluate(model), part="original", kv_heads=heads)


def merges(heads: list[int], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Every merge: counts, methods, groupings, with and without calibration, and seeds where randomness enters."""
    for kv_heads in heads:
        for method in METHODS:
            for grouping in ("adjacent", "similar") if kv_heads > 1 and method != "random" else ("adjacent",):
                # The paper's methods look at no inputs; adjacent groups leave them nothing to calibrate.
                knows_inputs = method in ("aligned", "svd") or grouping == "similar"
                for calibrated in (False, True) if knows_inputs else (False,):
                    for seed in seeds if method == "random" else (0,):
                        yield {
                            "kv_heads": kv_heads,
                            "method": method,
                            "grouping": grouping,
                            "calibrated": calibrated,
                            "seed": seed,
                        }


def regrouped(study: Study, calibration: torch.Tensor, merge: dict[str, Any]) -> GroupFormerForCausalLM:
    return groupformer.regroup(
        study.model(),
        merge["kv_heads"],
        method=merge["method"],
        grouping=merge["grouping"],
        calibration=calibration if merge["calibrated"] else None,
        seed=merge["seed"],
    )


def merge_part(study: Study) -> None:
    """Bits per byte right after each merge."""
    calibration = study.calibration()
    for merge in merges(study.options.kv_heads, study.options.seeds):
        study.cell(lambda merge=merge: study.evaluate(regrouped(study, calibration, merge)), part="merge", **merge)


def with_another_first(model: GroupFormerForCausalLM, kv_heads: int, head: int) -> GroupFormerForCausalLM:
    """The same function, the heads of each group that is to become one turned until that number comes first."""
    for layout in find_attention(type(model), model.config):
        attention = model.get_submodule(layout.path)
        tensors = {name: tensor.detach() for name, tensor in attention.state_dict().items()}
        heads = layout.read_heads(tensors)
        groups = torch.arange(len(heads.key)).view(kv_heads, -1)
        order = groups.roll(-head, dims=1).flatten().tolist()
        attention.load_state_dict(layout.write_heads(heads.permuted(order), tensors))
    return model


def single_part(study: Study) -> None:
    """Bits per byte with any one head for its group: `first` takes head 0, which may be a lucky choice or not."""
    present = study.model().config.num_key_value_heads
    for kv_heads in study.options.kv_heads:
        for head in range(present // kv_heads):
            study.cell(
                lambda kv_heads=kv_heads, head=head: study.evaluate(
                    groupformer.regroup(
                        with_another_first(study.model(), kv_heads, head),
                        kv_heads,
                        method="first",
                        grouping="adjacent",
                    )
                ),
                part="single",
                kv_heads=kv_heads,
                head=head,
            )


def uptrain_part(study: Study) -> None:
    """Bits per byte after uptraining on shares of the pre-training tokens, with and without a teacher."""
    calibration = study.calibration()
    # Ours at its best, the paper's as they are.
    ways = {method: {"grouping": "adjacent", "calibrated": False} for method in ("mean", "first", "random")}
    ways["svd"] = {"grouping": "similar", "calibrated": True}
    chosen = [{"method": method, **ways[method]} for method in study.options.methods]
    for kv_heads in study.options.kv_heads:
        for choice in chosen:
            for percent in study.options.percents:
                for loss in study.options.losses:
                    for seed in study.options.seeds:
                        merge = {"kv_heads": kv_heads, **choice, "seed": seed}
                        study.cell(
                            lambda merge=merge, percent=percent, loss=loss: uptrained(
                                study, calibration, merge, percent, loss
                            ),
                            part="uptrain",
                            **merge,
                            percent=percent,
                            loss=loss,
                        )


def uptrained(
    study: Study, calibration: torch.Tensor, merge: dict[str, Any], percent: float, loss: str
) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(dir=study.folder, prefix="work-"))  # processes can share the cells
    regrouped(study, calibration, merge).save_pretrained(work / "merged")
    study.tokenizer.save_pretrained(work / "merged")
    # The curve needs few pages; what is reported is measured on the test documents, below.
    pages = work / "validation.txt"
    pages.write_text("\n".join(text[:4000] for text in read_column([study.validation_files])[:20]), encoding="utf-8")
    recipe = UptrainRecipe(
        model=str(work / "merged"),
        tokenizer=study.options.tokenizer or str(study.source),  # one path: texts are tokenized once for all cells
        teacher=str(study.source),
        train_files=[study.train_files],
        validation_files=[str(pages)],
        evaluations=4,
        batch_size=study.options.batch_size,
        tokens=int(pretraining_tokens(study) * percent / 100),
        seed=merge["seed"],
        bf16=study.options.bf16 or None,
        **LOSSES[loss],
    )
    outcome = uptrain(recipe, work / "uptrained")
    model = GroupFormerForCausalLM.from_pretrained(work / "uptrained", dtype=torch.float32)
    result = {**study.evaluate(model), "tokens_trained": outcome["tokens"], "curve": outcome["curve"]}
    shutil.rmtree(work)
    return result


def pretraining_tokens(study: Study) -> int:
    """From the option, or from what `groupformer pretrain` wrote beside the checkpoint."""
    if study.options.pretraining_tokens is not None:
        return study.options.pretraining_tokens
    path = study.source / "results.json"
    if not path.exists():
        raise ValueError(f"{path} is not there, so --pretraining-tokens is needed for the uptrain part")
    return json.loads(path.read_text())["tokens"]


def scratch_part(study: Study) -> None:
    """Models of the same shape trained from scratch with fewer key-value heads, by the checkpoint's own recipe."""
    from groupformer.training.pretraining import PretrainRecipe, pretrain

    if study.options.recipe is None:
        raise ValueError("--recipe (None) is needed for the scratch part: the YAML that trained the checkpoint")
    for kv_heads in study.options.kv_heads:
        for seed in study.options.seeds:

            def compute(kv_heads: int = kv_heads, seed: int = seed) -> dict[str, Any]:
                fields = PretrainRecipe.from_file(study.options.recipe).model
                recipe = PretrainRecipe.from_file(
                    study.options.recipe,
                    model={**fields, "num_key_value_heads": kv_heads},
                    train_files=[study.train_files],
                    validation_files=[study.validation_files],
                    seed=seed,
                )
                work = study.folder / f"scratch-{kv_heads}-{seed}"
                pretrain(recipe, work, resume=True)
                result = study.evaluate(GroupFormerForCausalLM.from_pretrained(work, dtype=torch.float32))
                shutil.rmtree(work)
                return result

            study.cell(compute, part="scratch", kv_heads=kv_heads, seed=seed)


def speed_part(study: Study) -> None:
    """Decode speed and cache size of each count, timed in turn; the method does not matter."""
    counts = [study.model().config.num_key_value_heads, *study.options.kv_heads]

    @functools.cache
    def measured() -> dict[str, dict[str, Any]]:
        models = {
            str(count): groupformer.regroup(study.model(), count, method="first", grouping="adjacent")
            for count in counts
        }
        return {row["model"]: row for row in measure(models, **DECODING, rounds=5)}

    def decoding(count: int) -> dict[str, float]:
        row = measured()[str(count)]
        tokens = DECODING["batch"] * (DECODING["context"] + DECODING["new_tokens"] - 1)
        return {
            "tokens_per_second": row["decode_tokens_per_second"],
            "cache_bytes_per_token": row["cache_bytes"] / tokens,
        }

    for count in counts:
        study.cell(
            lambda count=count: decoding(count),
            part="speed",
            kv_heads=count,
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            **DECODING,
        )


PARTS = {
    "merge": merge_part,
    "single": single_part,
    "uptrain": uptrain_part,
    "scratch": scratch_part,
    "speed": speed_part,
}


# Results -------------------------------------------------------------------------------------------------------------


def describe(cell: dict[str, Any]) -> str:
    """What was done to a model, as a line of a table."""
    if cell["part"] in ("original", "scratch"):
        return cell["part"]
    if cell["part"] == "single":
        return f"head {cell['head']} of each group"
    calibrated = ", calibrated" if cell["calibrated"] else ""
    trained = f" + {cell['percent']} % {cell['loss']}" if cell["part"] == "uptrain" else ""
    return f"{cell['method']}, {cell['grouping']}{calibrated}{trained}"


def table(cells: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of what was done, and the mean over seeds of bits per byte for each count of heads."""
    heads = sorted({cell["kv_heads"] for cell in cells}, reverse=True)
    names = list(dict.fromkeys(describe(cell) for cell in cells))
    rows = []
    for name in names:
        row: list[Any] = [name]
        for count in heads:
            values = [c["bits_per_byte"] for c in cells if describe(c) == name and c["kv_heads"] == count]
            row.append(statistics.mean(values) if values else "")
        rows.append(row)
    return [["", *(f"{count} KV heads" for count in heads)], *rows]


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Quality against cache size: bits per byte over key-value heads, a line for each thing that was done."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    header, *rows = table(cells)
    heads = [int(column.split()[0]) for column in header[1:]]
    start = next((cell for cell in cells if cell["part"] == "original"), None)
    for row in rows:
        points = [(count, value) for count, value in zip(heads, row[1:]) if value != ""]
        if row[0] == "original":
            axes.axhline(points[0][1], color="grey", linestyle=":", label="original")
            continue
        if start is not None and row[0] != "scratch":
            points.insert(0, (start["kv_heads"], start["bits_per_byte"]))
        axes.plot(*zip(*points), marker="o", label=row[0])
    axes.set_xscale("log", base=2)
    axes.set_xticks(heads, [str(count) for count in heads])
    axes.set_xlabel("key-value heads (the cache is proportional to them)")
    axes.set_ylabel("held-out bits per byte")
    axes.legend(fontsize="x-small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(study: Study) -> None:
    cells = list(study.cells.values())
    summary = {"checkpoint": str(study.source.name), "fingerprint": study.fingerprint, "cells": cells}
    (study.folder / "study.json").write_text(json.dumps(summary, indent=2))
    scored = [cell for cell in cells if "bits_per_byte" in cell]
    header, *rows = table(scored)
    print_table("Held-out bits per byte", header, rows)
    speeds = [cell for cell in cells if cell["part"] == "speed"]
    if speeds:
        columns = ["kv_heads", "cache_bytes_per_token", "tokens_per_second"]
        print_table("Decoding", columns, [[cell[column] for column in columns] for cell in speeds])
    if study.options.plot is not None:
        draw(scored, Path(study.options.plot))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="Folder of a multi-head GroupFormer.")
    parser.add_argument("--tokenizer", default=None, help="Where the checkpoint's own tokenizer lies as well.")
    parser.add_argument("--data", required=True, help="Folder with train-, validation- and test-*.parquet.")
    parser.add_argument("--output", default="runs/study", help="Folder of the cells.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[4, 2, 1])
    parser.add_argument("--percents", nargs="+", type=float, default=list(PERCENTS))
    to_uptrain = ["svd", "mean", "first", "random"]
    parser.add_argument("--methods", nargs="+", choices=to_uptrain, default=["svd", "mean"], help="To uptrain.")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="To uptrain with.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Where randomness enters.")
    parser.add_argument("--batch-size", type=int, default=8, help="Rows of 512 tokens in a step of uptraining.")
    parser.add_argument("--evaluation-batch", type=int, default=4, help="Windows in a forward pass of the evaluation.")
    parser.add_argument("--bf16", action="store_true", help="Uptrain in bfloat16 on a CPU that multiplies it fast.")
    parser.add_argument("--documents", type=int, default=None, help="Test documents. Default: all.")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--calibration-every", type=int, default=97, help="Take every so many-th training document.")
    parser.add_argument("--pretraining-tokens", type=int, default=None)
    parser.add_argument("--recipe", default=None, help="The YAML that trained the checkpoint, for the scratch part.")
    parser.add_argument("--plot", default=None, help="File of the plot, e.g. docs/regroup.png.")
    study = Study(parser.parse_args())
    original(study)
    for part in study.options.parts:
        PARTS[part](study)
    report(study)


if __name__ == "__main__":
    main()
