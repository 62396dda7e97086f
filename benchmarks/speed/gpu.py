"""The same on a GPU, in one call: builds the models, checks that they agree, and times them.

    python -m benchmarks.speed.gpu                            # 1B and 125M, bfloat16, GQA, MHA and MQA
    python -m benchmarks.speed.gpu --shapes 1b --heads MHA --only-compile &     # fills the compiler's cache first
    python -m benchmarks.speed.gpu --shapes 1b --output DIR
    python -m benchmarks.speed.gpu --device cpu --tiny        # shows on any machine that it works

For each shape and head count: prefill of 2,048 tokens, decoding at 1,024 eager through `generate` and compiled with a
static cache, a training step eager and compiled, each for every attention backend that is installed; beside
transformers' Llama with the same weights. Model FLOPs utilisation (MFU) is the share of --peak-tflops, and decoding's
share that of --peak-bandwidth (bytes a second). Without them the vendor's are taken where the GPU is in `PEAKS`, and
elsewhere what it reaches in the script's own measurement. kernels.txt has profiles of compiled tokens and training.

Compiling takes most of the time: half a minute a model, two minutes for `--tuned`. On a GPU that is lent by the
minute, compile everything in processes side by side before. Numbers of an H200 and an H100: docs/benchmarks.md.
"""

import argparse
import copy
import gc
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from . import torch_runs
from .__main__ import add_shares, ceilings, lines, machine, markdown
from .cases import LLAMA, OURS
from .measure import alternate, summary
from .shapes import SHAPES, Shape, llama, ours


VOCABULARY = 32768
COMPILED, TUNED = f"{OURS}, compiled", f"{OURS}, tuned"

# Dense bfloat16 TFLOP/s and bytes a second, as the vendor states them, by a part of the GPU's name.
PEAKS = {"H100 80GB HBM3": (989, 3.35e12), "H100 PCIe": (756, 2.0e12), "H200": (989, 4.8e12)}


def backends() -> list[str]:
    """sdpa, and flash attention where it is installed and there is a GPU for it."""
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return ["sdpa", "flash_attention_2"] if flash else ["sdpa"]


def head_counts(shape_name: str) -> dict[str, int]:
    """MHA, GQA (four query heads to one) and MQA of a shape."""
    heads = SHAPES[shape_name]["num_attention_heads"]
    return {"MHA": heads, "GQA": heads // 4, "MQA": 1}


def shapes(options: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    """What to build, each with its label, e.g. "1b GQA"; the usual sharing first, at every size."""
    for kind in options.heads:
        for name in options.shapes:
            heads, vocabulary = head_counts(name)[kind], 512 if options.tiny else VOCABULARY
            yield f"{name} {kind}", Shape(name, heads, vocabulary, "bfloat16")


def decoding_size(options: argparse.Namespace) -> tuple[int, int]:
    """Tokens of context, and new ones."""
    return (32, 4) if options.tiny else (1024, 64)


def training_size(options: argparse.Namespace) -> tuple[int, int]:
    """Rows of a training step, and the tokens of each."""
    return (2, 32) if options.tiny else (options.training_batch, 2048)


@torch.no_grad()
def same_logits(models: dict[str, Any]) -> None:
    """A comparison of speeds is worth nothing if the results differ: GroupFormer's logits, of a prompt and of a token
    after it, must be as near to those of float32 as transformers' Llama's are."""
    prompt = torch_runs.random_prompt(models[LLAMA], 1, 64)
    exact = copy.deepcopy(models[LLAMA]).float()
    answers: list[list[torch.Tensor]] = []
    for model in (exact, *models.values()):
        first = model(prompt, use_cache=True)
        second = model(prompt[:, :1], past_key_values=first.past_key_values)
        answers.append([first.logits.float(), second.logits.float()])
    for true, theirs, own in zip(*answers):
        their_error, own_error = ((it - true).norm() / true.norm() for it in (theirs, own))
        if not own_error < 1.5 * their_error + 1e-4:  # NaN too
            raise RuntimeError(
                f"GroupFormer's logits are {own_error:.4f} of their size away from float32's, "
                f"transformers' Llama's {their_error:.4f}"
            )


def inference(shape: Shape, options: argparse.Namespace, label: str) -> Iterator[dict[str, Any]]:
    """Prefill and decoding, eager and compiled."""
    length, (context, tokens) = 64 if options.tiny else 2048, decoding_size(options)
    native = llama(shape, options.device)
    models = {LLAMA: native, OURS: ours(native)}
    for backend in backends():
        for model in models.values():
            model.set_attn_implementation(backend)
        same_logits(models)
        kinds = {
            f"prefill {length}": {name: torch_runs.prefill(model, length) for name, model in models.items()},
            f"decode at {context}, eager": {
                name: torch_runs.decode(model, context, tokens) for name, model in models.items()
            },
        }
        if backend == "sdpa":
            kinds[f"decode at {context}, compiled, static cache"] = static_decoding(
                models, context, tokens, label in options.tuned
            )
        for kind, runs in kinds.items():
            bound = (
                {"flops": shape.prefill_flops(length), "dtype": shape.dtype}
                if kind.startswith("prefill")
                else {"bytes": shape.decode_bytes(context)}
            )
            table = summary(alternate(runs, options.rounds), LLAMA)
            for name, run in runs.items():
                if isinstance(run, torch_runs.StaticDecoding) and options.device == "cuda":
                    table[name]["kernel_seconds"], lines = torch_runs.kernels(run.one, times=4)
                    keep_profile(options, f"{label}, {kind}, {name}", lines)
            yield {"case": f"{label}, {backend}, {kind}", "base": LLAMA, **bound, "runs": table}


def static_decoding(
    models: dict[str, Any], context: int, tokens: int, tuned: bool
) -> dict[str, torch_runs.StaticDecoding]:
    """Both compiled as most would, and with `tuned` ours as a compiler does it that is asked to try."""
    runs = {name: torch_runs.StaticDecoding(model, context, tokens, compiled=True) for name, model in models.items()}
    if tuned:
        runs[TUNED] = torch_runs.StaticDecoding(models[OURS], context, tokens, compiled=True, tuned=True)
    return runs


def training(shape: Shape, options: argparse.Namespace, label: str) -> Iterator[dict[str, Any]]:
    """A training step, one model at a time, for the memory's sake: eager both, compiled ours."""
    batch, length = training_size(options)
    names = [LLAMA, OURS, *([COMPILED] if label in options.compiled_training else [])]
    for backend in backends():
        seconds, peaks = {}, {}
        for name in names:
            model = llama(shape, options.device)
            model = model if name == LLAMA else ours(model)
            model.set_attn_implementation(backend)
            step = torch_runs.training_step(model, batch, length, compiled=name == COMPILED)
            seconds |= alternate({name: step}, options.rounds)
            if options.device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated()
                keep_profile(options, f"{label}, training, {name}", torch_runs.kernels(step)[1])
                torch.cuda.reset_peak_memory_stats()
            del model, step
            gc.collect()
            torch.cuda.empty_cache()
        row = {
            "case": f"{label}, {backend}, training step {batch}x{length}",
            "base": LLAMA,
            "flops": shape.training_flops(batch, length),
            "dtype": shape.dtype,
            "runs": summary(seconds, LLAMA),
        }
        for name, peak in peaks.items():
            row["runs"][name] |= {"peak_mib": peak / 2**20, "memory_ratio": peak / peaks[LLAMA]}
        yield row


def fill_cache(shape: Shape, options: argparse.Namespace, label: str) -> None:
    """Calls once what is compiled, so that a later process finds it in the compiler's cache."""
    wanted = options.only_compile or (LLAMA, OURS, TUNED, COMPILED)
    native = llama(shape, options.device)
    if "inference" in options.parts:
        models = {LLAMA: native, OURS: ours(native)}
        for model in models.values():
            model.set_attn_implementation("sdpa")
        for name, run in static_decoding(models, *decoding_size(options), label in options.tuned).items():
            if name in wanted:
                run()
    if "training" in options.parts and label in options.compiled_training and COMPILED in wanted:
        model = ours(native)
        model.set_attn_implementation("sdpa")
        torch_runs.training_step(model, *training_size(options), compiled=True)()


def keep_profile(options: argparse.Namespace, name: str, lines: str) -> None:
    """Appends the kernels of a run to the file of profiles."""
    with open(options.output / "kernels.txt", "a") as file:
        file.write(f"{name}\n{lines}\n\n")


def limits_of(options: argparse.Namespace) -> dict[str, Any]:
    """The ceilings: as given, else the vendor's, else measured."""
    limits = ceilings(options.device, options.tiny)
    name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    tflops, bandwidth = next((peaks for part, peaks in PEAKS.items() if part in name), (None, None))
    tflops, bandwidth = options.peak_tflops or tflops, options.peak_bandwidth or bandwidth
    if tflops:
        limits["flops"]["bfloat16"] = tflops * 1e12
    if bandwidth:
        limits["read_bandwidth"] = bandwidth
    return limits


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=["1b", "125m"], choices=SHAPES)
    parser.add_argument("--heads", nargs="+", default=["GQA", "MHA", "MQA"], choices=["MHA", "GQA", "MQA"])
    parser.add_argument("--parts", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument(
        "--tuned", nargs="*", default=["1b GQA"], help="Also decoded by a tuned compiler, e.g. '1b GQA'."
    )
    parser.add_argument("--compiled-training", nargs="*", default=["1b GQA", "125m GQA"], help="Likewise, training.")
    parser.add_argument(
        "--only-compile", nargs="*", metavar="RUN", help="Fill the compiler's cache, of these runs or all; time none."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--training-batch", type=int, default=8)
    parser.add_argument("--peak-tflops", type=float, help="e.g. 989 for an H100 SXM in bfloat16")
    parser.add_argument("--peak-bandwidth", type=float, help="e.g. 3.35e12 for an H100 SXM")
    parser.add_argument("--minutes", type=float, default=7, help="No new case is begun after so long.")
    parser.add_argument("--output", type=Path, default=Path("runs/speed-gpu"))
    parser.add_argument("--tiny", action="store_true", help="Sizes that only show that it works.")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: --device cuda: torch finds no GPU here; --device cpu --tiny shows that the script works"
        )
    transformers.logging.set_verbosity_error()
    if options.tiny:
        options.shapes, options.rounds = ["tiny"], 2
    options.output.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = 64  # one code for all models
    if options.only_compile is not None:
        for label, shape in shapes(options):
            fill_cache(shape, options, label)
        return
    limits = limits_of(options)
    report: dict[str, Any] = {
        "machine": machine(options.device, torch.get_num_threads()),
        "ceilings": limits,
        "rows": [],
    }
    started = time.monotonic()
    for label, shape in shapes(options):
        for part in options.parts:
            if time.monotonic() - started > options.minutes * 60:
                print(f"left out, no time: {label} {part}", flush=True)
                continue
            for row in {"inference": inference, "training": training}[part](shape, options, label):
                report["rows"].append(add_shares(row, limits))
                (options.output / "speed-gpu.json").write_text(json.dumps(report, indent=1))
                print(*(" | ".join(line) for line in lines([row])), sep="\n", flush=True)
            gc.collect()
    (options.output / "speed-gpu.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
