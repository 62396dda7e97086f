"""What a native checkpoint loses with fewer key-value heads: merged, healed, uptrained; and its cache.

    python -m benchmarks.native_study SmolLM2-135M-Instruct --data ../data/textbooks --kv-heads 1 --tasks ../data/tasks
    python -m benchmarks.native_study SmolLM2-135M-Instruct --data ../data/textbooks --kv-heads auto --budget 0.5

Each state is a folder below --output, as the commands write it, with its figures in a file beside it. What is there is
not made again, so a study that was cut off goes on where it stopped. Bits per byte are those of `groupformer eval` in
windows of 512 tokens (by bfloat16 where the machine multiplies faster in it); the divergence is from the original, on
the first 512 tokens of each document. With --tasks each state also gets its points in `benchmarks.zero_shot`, with
--needle its finds in `benchmarks.needle`, with --cache-bits its bits per byte (and finds) through a quantized cache;
merges that are near chance get none of these.
"""

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import groupformer
from groupformer.commands.tables import print_table
from groupformer.conversion.loading import best_device
from groupformer.measuring.cache import cache_bytes_per_token, decoder_of, layer_caches
from groupformer.measuring.evaluation import evaluate
from groupformer.regrouping.heal_folders import heal_folder
from groupformer.regrouping.heal_jointly import divergence_on
from groupformer.regrouping.heal_recipe import HealRecipe, autocast
from groupformer.regrouping.moments import calibration_from_texts
from groupformer.regrouping.streaming import regroup_folder
from groupformer.training.data import read_column
from groupformer.training.uptraining import UptrainRecipe, uptrain

from .needle import needle
from .quantization import hqq_cache
from .zero_shot import zero_shot


WINDOW = 512
TOKENS_IN_STEP = 512  # of healing
METHODS = ("mean", "aligned", "svd")
NEAR_CHANCE = ("mean", "aligned")
NEEDLE_PROMPTS = 20  # for each context
TOKENS_BETWEEN_CHECKPOINTS = 200_000  # from which an uptraining that was cut off goes on


class NativeStudy:
    """A checkpoint, its texts, and the states of it that are ready."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.source = options, Path(options.checkpoint)
        share = "" if options.budget is None else f"-{options.budget}"
        self.folder = Path(options.output) / f"{self.source.name}-{options.kv_heads}{share}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.config = AutoConfig.from_pretrained(self.source)
        self.train_files = str(Path(options.data) / "train-*.parquet")
        self.documents = read_column([Path(options.data) / "test-*.parquet"])[: options.documents]
        self.device = best_device(None)
        self.rows: list[dict[str, Any]] = []

    def tokens(self, count: int, row_length: int = WINDOW) -> torch.Tensor:
        """So many tokens of the training text, in rows."""
        return calibration_from_texts(read_column([self.train_files]), self.tokenizer, self.config, count, row_length)

    def load(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()

    @torch.no_grad()
    def scores(self, folder: Path) -> dict[str, Any]:
        """Cache, bits per byte, and the divergence from the original."""
        model, original = self.load(folder), self.load(self.source)
        starts = [self.tokenizer(text, return_tensors="pt").input_ids[:, :WINDOW] for text in self.documents]
        starts = [row for row in starts if row.shape[1] == WINDOW]
        with autocast(model.device, None):
            bits_per_byte = evaluate(model, self.tokenizer, self.documents, window=WINDOW)["bits_per_byte"]
            divergence = divergence_on(model, original, starts)
        return {
            "kv_heads": statistics.mean(layer.kv_heads for layer in layer_caches(decoder_of(model.config))),
            "cache_bytes_per_token": cache_bytes_per_token(model.config, torch.bfloat16),
            "bits_per_byte": bits_per_byte,
            "divergence": divergence,
        }

    @torch.no_grad()
    def quantized_bits_per_byte(self, folder: Path) -> float:
        model = self.load(folder)
        with autocast(model.device, None):
            quantized = hqq_cache(model, self.options.cache_bits)
            # One window at a time: rows of padding would be in the caches too.
            return evaluate(quantized, self.tokenizer, self.documents, window=WINDOW, batch_size=1)["bits_per_byte"]

    def needle(self, folder: Path, cache_bits: int | None) -> dict[int, float]:
        text_ids = self.tokenizer(" ".join(self.documents), add_special_tokens=False).input_ids
        return needle(folder, self.tokenizer, text_ids, self.options.needle, NEEDLE_PROMPTS, cache_bits)

    def more_figures(self) -> dict[str, Callable[[Path], Any]]:
        """What the options ask for beside the scores, by name, each measured on a state's folder."""
        options, wanted = self.options, {}
        if options.tasks:
            wanted["points"] = partial(zero_shot, tasks=options.tasks)
        if options.needle:
            wanted["needle"] = partial(self.needle, cache_bits=None)
        if options.cache_bits:
            wanted[f"{options.cache_bits}-bit cache"] = self.quantized_bits_per_byte
            if options.needle:
                wanted[f"needle, {options.cache_bits}-bit cache"] = partial(self.needle, cache_bits=options.cache_bits)
        return wanted

    def state(self, name: str, make: Callable[[Path], Any] | None, tokens: int = 0) -> Path:
        """A state's folder: made by `make`, unless it is there, or the checkpoint itself; its figures are kept."""
        folder = self.source if make is None else self.folder / name
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.perf_counter(), time.process_time()
            figures: dict[str, Any] = {"name": name}
            if make is not None:
                if not folder.exists():
                    make(folder)
                seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
                figures |= {"tokens": tokens, "seconds": round(seconds), "cpu_seconds": round(cpu_seconds)}
            figures |= self.scores(folder)
            path.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        figures = json.loads(path.read_text(encoding="utf-8"))
        for figure, measure in self.more_figures().items():
            if figure not in figures and name not in NEAR_CHANCE:
                figures[figure] = measure(folder)
                path.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        self.rows.append(figures)
        print(name, f"{self.rows[-1]['bits_per_byte']:.4f}", flush=True)
        return folder


def run(study: NativeStudy) -> None:
    options = study.options
    study.state("original", None)
    for method in options.methods:

        def merge(folder: Path, method: str = method) -> None:
            calibration = study.tokens(options.calibration_tokens)
            how = dict(method=method, calibration=calibration, budget=options.budget)
            regroup_folder(study.source, folder, options.kv_heads, **how)

        study.state(method, merge, options.calibration_tokens)

    def heal(tokens: int, row_length: int = WINDOW, **fields: Any) -> Callable[[Path], Any]:
        recipe = HealRecipe(batch_size=max(1, TOKENS_IN_STEP // row_length), **fields)
        merged, read = study.folder / options.methods[-1], partial(study.tokens, tokens, row_length)
        return lambda folder: heal_folder(merged, study.source, folder, read(), recipe, resume=True)

    closed = options.closed_form_tokens
    if closed:
        study.state("closed form", heal(closed, layer_tokens=closed, epochs=0, joint_epochs=0), closed)
    row_length = options.heal_row_length
    rows = "" if row_length == WINDOW else f", rows of {row_length:,}"
    healed = study.state(f"healed{rows}", heal(options.heal_tokens, row_length), options.heal_tokens)
    for count in options.uptrain_tokens:
        study.state(f"uptrained on {count:,}{rows}", partial(uptrained, study, healed, count), count)


def uptrained(study: NativeStudy, healed: Path, tokens: int, folder: Path) -> None:
    work = folder.with_name(f"{folder.name}.work")
    recipe = UptrainRecipe(
        model=str(healed),
        teacher=str(study.source),
        train_files=[study.train_files],
        tokens=tokens,
        kl_weight=study.options.uptrain_kl_weight,
        ce_weight=study.options.uptrain_ce_weight,
        learning_rate=study.options.uptrain_learning_rate,
        batch_size=study.options.uptrain_batch_size,
        evaluations=max(1, tokens // TOKENS_BETWEEN_CHECKPOINTS),
    )
    uptrain(recipe, work, resume=True)
    shutil.move(work, folder)


def report(study: NativeStudy) -> None:
    config = study.config.get_text_config()
    summary = {
        "checkpoint": study.source.name,
        "layers": config.num_hidden_layers,
        "query_heads": config.num_attention_heads,
        "text": f"{len(study.documents)} documents of the test split",
        "context": WINDOW,
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in ("torch", "transformers")},
            "groupformer": groupformer.__version__,
        },
        "states": study.rows,
    }
    (study.folder / "study.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    columns = ["name", "tokens", "cpu_seconds", "cache_bytes_per_token", "bits_per_byte", "divergence"]
    columns += study.more_figures()
    print_table(study.source.name, columns, [[shown(row.get(name, "")) for name in columns] for row in study.rows])


def shown(figure: Any) -> Any:
    """As it is; of points in tasks their mean, and of finds by context all."""
    if not isinstance(figure, dict):
        return figure
    return figure["mean"] if "mean" in figure else " / ".join(f"{share:.0f}" for share in figure.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="Folder of a decoder, float32, with its tokenizer.")
    parser.add_argument("--data", required=True, help="Folder with train- and test-*.parquet.")
    parser.add_argument("--kv-heads", type=lambda text: text if text == "auto" else int(text), required=True)
    parser.add_argument("--budget", type=float, help="With --kv-heads auto, the share of the cache to keep.")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="Merges; the last one is healed.")
    parser.add_argument("--tasks", type=Path, help="Folder of zero-shot sets, see benchmarks.zero_shot.")
    parser.add_argument("--needle", type=int, nargs="+", metavar="TOKENS", help="Contexts to look for a number in.")
    parser.add_argument("--cache-bits", type=int, choices=(2, 4, 8), help="Of a quantized cache (pip install hqq).")
    parser.add_argument("--output", default="runs/native_study")
    parser.add_argument("--documents", type=int, default=8, help="Of the test split.")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--closed-form-tokens", type=int, default=65536, help="0: leave that out.")
    parser.add_argument("--heal-tokens", type=int, default=196_608)
    parser.add_argument("--heal-row-length", type=int, default=WINDOW, help="Tokens in a row of healing.")
    parser.add_argument("--uptrain-tokens", type=int, nargs="*", default=[49_152], help="A state for each.")
    parser.add_argument("--uptrain-kl-weight", type=float, default=0.5)
    parser.add_argument("--uptrain-ce-weight", type=float, default=1.0)
    parser.add_argument("--uptrain-learning-rate", type=float, default=1e-4)
    parser.add_argument("--uptrain-batch-size", type=int, default=2, help="Rows of 512 tokens in a step.")
    study = NativeStudy(parser.parse_args())
    run(study)
    report(study)


if __name__ == "__main__":
    main()
