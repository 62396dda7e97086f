"""Everything that needs a GPU, in one call that ends in time: it checks first, then measures, and writes one JSON.

    python -m benchmarks.on_gpu --checkpoint runs/smollm2 --train 'books/train-*.parquet' --test 'books/test-*.parquet'
    python -m benchmarks.on_gpu --device cpu --tiny --checkpoint hub_card --train text.txt --test text.txt

The steps come in this order; one that the time does not allow, or that fails, does not stop the rest:

1. `kernels`: flash attention's own kernels (and sdpa's) give what float32 gives, for MHA, GQA and MQA, with left
   padding and with windows;
2. `speed`: GroupFormer beside transformers' Llama, eager and compiled, prompts, decoding, training and memory
   (`benchmarks.speed.gpu`);
3. `heal`: the checkpoint with one KV head: merged, healed, and uptrained on as many tokens as the time allows;
4. `served`: the checkpoint and the healed one in vLLM (`benchmarks.served`), where vLLM is installed.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from groupformer import GroupFormerConfig, GroupFormerForCausalLM
from groupformer.measuring.cache import cache_bytes_per_token


KV_HEADS = {"MHA": 8, "GQA": 2, "MQA": 1}
TOKENS_PER_SECOND = {"cuda": 20_000, "cpu": 300}  # of uptraining 135 M parameters: a first guess, to choose its length


def kernel_cases(device: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A name, a backend, and fields of a config, for each case."""
    backends = ["sdpa"]
    if device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        backends.append("flash_attention_2")
    for backend in backends:
        for sharing, kv_heads in KV_HEADS.items():
            for window in (None, 64):
                name = f"{sharing}, {backend}{', window' if window else ''}"
                yield name, backend, {"num_key_value_heads": kv_heads, "sliding_window": window}


@torch.no_grad()
def check_kernels(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest error of each backend's logits in bfloat16, beside that of the plain operations in bfloat16.

    Both are errors against float32, of a left-padded batch of two rows, and of a further token with the cache.
    """
    rows = []
    for name, backend, fields in kernel_cases(options.device):
        torch.manual_seed(0)
        config = GroupFormerConfig(vocab_size=512, hidden_size=512, num_hidden_layers=4, **fields)
        exact = GroupFormerForCausalLM(config).to(options.device).eval()
        exact.set_attn_implementation("eager")
        errors = {}
        for kind in ("eager", backend):
            model = GroupFormerForCausalLM(config).to(options.device, torch.bfloat16).eval()
            model.load_state_dict(exact.state_dict())
            model.set_attn_implementation(kind)
            pairs = zip(padded_logits(exact), padded_logits(model))
            errors[kind] = max((own - true).abs().max().item() for true, own in pairs)
        is_right = errors[backend] < 2 * errors["eager"] + 1e-2
        rows.append({"case": name, "error": errors[backend], "eager_error": errors["eager"], "is_right": is_right})
        print(rows[-1], flush=True)
    return rows


def padded_logits(model: Any) -> list[torch.Tensor]:
    """Logits of the real tokens of a left-padded batch, and of a token after them."""
    ids = torch.randint(0, 512, (2, 201), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    first = model(ids[:, :200], attention_mask=mask[:, :200], use_cache=True)
    last = model(ids[:, 200:], attention_mask=mask, past_key_values=first.past_key_values)
    return [first.logits[0, 50:].float(), first.logits[1].float(), last.logits.float()]


def run(name: str, options: argparse.Namespace, *command: str, until: float) -> float:
    """Runs a program, its output in NAME.log, and returns its seconds.

    Raises:
        subprocess.TimeoutExpired, subprocess.CalledProcessError: it took too long, or failed.
    """
    started = time.monotonic()
    with open(options.output / f"{name}.log", "w") as log:
        subprocess.run(
            [sys.executable, "-m", *command], stdout=log, stderr=log, check=True, timeout=max(5, until - started)
        )
    return time.monotonic() - started


def evaluate(name: str, folder: Path, options: argparse.Namespace, until: float) -> float:
    """Bits per byte of the test files."""
    words = ["eval", str(folder), "--file", options.test, "--max-documents", "8", "--window", "512", "--json"]
    run(name, options, "groupformer", *words, "--device", options.device, until=until)
    text = (options.output / f"{name}.log").read_text()
    return json.loads(text[text.index("{") : text.rindex("}") + 1])["bits_per_byte"]


def measure_speed(options: argparse.Namespace, until: float) -> dict[str, Any]:
    folder = options.output / "speed"
    sizes = (
        ["--tiny"] if options.tiny else ["--shapes", "125m", "1b", "--minutes", str((until - time.monotonic()) / 90)]
    )
    run(
        "speed",
        options,
        "benchmarks.speed.gpu",
        "--device",
        options.device,
        "--output",
        str(folder),
        *sizes,
        until=until,
    )
    return json.loads((folder / "speed-gpu.json").read_text())


def measure_healing(options: argparse.Namespace, until: float, states: dict[str, Any]) -> dict[str, Any]:
    """Of each state, original, merged, healed and uptrained: bits per byte, KV heads, cache, seconds, tokens read.

    They are written into `states` one by one, so that those are kept that a failure or the time's end leaves.
    """
    original, folder = options.checkpoint, options.output
    merged, healed, uptrained = (folder / name for name in ("merged", "healed", "uptrained"))
    text = ["--text", options.train, "--device", options.device]
    tokens = "2048" if options.tiny else "200000"
    calibration = ["--calibration", options.train, "--device", options.device, "--overwrite"]

    def record(name: str, target: Path, **costs: float) -> None:
        config = AutoConfig.from_pretrained(target)
        bits_per_byte = evaluate(f"eval-{name}", target, options, until)
        cache = cache_bytes_per_token(config, torch.bfloat16)
        heads = config.num_key_value_heads
        states[name] = {"bits_per_byte": bits_per_byte, "kv_heads": heads, "cache_bytes_per_token": cache, **costs}

    def state(name: str, target: Path, *words: str, **costs: float) -> None:
        record(name, target, seconds=run(name, options, "groupformer", *words, until=until), **costs)

    record("original", original)
    state("merged", merged, "regroup", str(original), str(merged), "--kv-heads", "1", *calibration)
    words = ["heal", str(merged), str(original), str(healed), *text, "--tokens", tokens, "--overwrite"]
    state("healed", healed, *words, tokens=int(tokens))
    left = until - time.monotonic()
    tokens = "2048" if options.tiny else str(int(0.6 * left * TOKENS_PER_SECOND[options.device]))
    words = ["uptrain", str(healed), "--teacher", str(original), "--data", options.train, "--tokens", tokens]
    words += ["--output", str(uptrained), "--device", options.device, "--overwrite", "--evaluations", "1"]
    words += ["--kl-weight", "0.5", "--ce-weight", "1", "--learning-rate", "1.5e-4"]
    words += ["--row-length", "64"] if options.tiny else []
    state("uptrained", uptrained, *words, tokens=int(tokens))
    return states


def measure_serving(options: argparse.Namespace, until: float) -> dict[str, Any]:
    """The checkpoint and the healed one, in the vLLM of this environment."""
    if importlib.util.find_spec("vllm") is None:
        return {"left_out": "vLLM is not installed"}
    folder = options.output / "served"
    words = ["benchmarks.served", str(options.checkpoint), str(options.output / "healed"), "--output", str(folder)]
    words += ["--cache-mib", "1024", "--concurrency", "1", "16", "64", "--vllm", str(Path(sys.prefix))]
    run("served", options, *words, until=until)
    return json.loads((folder / "served.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Folder of a decoder, e.g. of SmolLM2-135M.")
    parser.add_argument("--train", required=True, help="Text to calibrate, heal and uptrain on: a file or pattern.")
    parser.add_argument("--test", required=True, help="Text to evaluate on; its first 8 documents.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=9.5, help="All ends by then.")
    parser.add_argument("--steps", nargs="+", default=["kernels", "speed", "heal", "served"])
    parser.add_argument("--output", type=Path, default=Path("runs/on-gpu"))
    parser.add_argument("--tiny", action="store_true", help="Sizes that only show that it works.")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --device cpu --tiny shows that the script works")
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # When each step must have ended, as a share of the time.
    steps = {
        "kernels": (0.1, lambda until: check_kernels(options)),
        "speed": (0.45, lambda until: measure_speed(options, until)),
        "heal": (0.8, lambda until: measure_healing(options, until, report.setdefault("heal", {}))),
        "served": (1.0, lambda until: measure_serving(options, until)),
    }
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    report: dict[str, Any] = {
        "machine": {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    }
    for name in options.steps:
        share, step = steps[name]
        try:
            report[name] = step(started + share * options.minutes * 60)
        except (subprocess.SubprocessError, RuntimeError, ValueError) as error:
            report[name] = report.get(name, {}) | {"failed": str(error)[-2000:]}
        print(f"{name}: {time.monotonic() - started:.0f} s, {str(report[name])[:300]}", flush=True)
        (options.output / "on_gpu.json").write_text(json.dumps(report, indent=1))
    print(f"{options.output / 'on_gpu.json'} is written")


if __name__ == "__main__":
    main()
