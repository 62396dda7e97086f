"""What is timed, part by part. Each part yields rows: {"case", "runs", "base", and the ceiling of the case}."""

import contextlib
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import groupformer

from . import torch_runs
from .measure import alternate, summary, timed
from .peers import Peer, interpreter, write_gguf
from .shapes import Shape, fast_dtypes, llama, ours


LLAMA, OURS = "transformers' Llama", "GroupFormer"
WITHOUT_LOGITS = f"{OURS}, skip_logits"

# Longer prompts take the other engines minutes a round before they decode their first token.
PEERS_UP_TO = 1024


@dataclass
class Setting:
    """How to run: the size, how often, on how many threads."""

    shape: str = "small"
    device: str = "cpu"
    rounds: int = 7
    tokens: int = 48
    threads: int = 2
    vocab_size: int = 16384
    kv_heads: int = 3
    contexts: tuple[int, ...] = (128, 1024, 4096)
    prompts: tuple[int, ...] = (512, 2048)
    batch: int = 8
    batch_context: int = 512
    training_batch: int = 4
    training_length: int = 512
    training_vocab: int = 49152

    def of(self, kv_heads: int | None = None, vocab_size: int | None = None, dtype: str = "float32") -> Shape:
        return Shape(self.shape, kv_heads or self.kv_heads, vocab_size or self.vocab_size, dtype)


TINY = {
    "shape": "tiny",
    "rounds": 2,
    "tokens": 6,
    "vocab_size": 256,
    "kv_heads": 2,
    "contexts": (16, 32),
    "prompts": (16,),
    "batch": 2,
    "batch_context": 16,
    "training_batch": 2,
    "training_length": 16,
    "training_vocab": 512,
}


def pair(shape: Shape, device: str) -> dict[str, Any]:
    """Transformers' Llama and a GroupFormer with the same weights, each with memory of its own."""
    native = llama(shape, device)
    return {LLAMA: native, OURS: ours(native)}


def row(case: str, seconds: dict[str, list[float]], base: str = LLAMA, **ceiling: float) -> dict[str, Any]:
    return {"case": case, "base": base, **ceiling, "runs": summary(seconds, base)}


def same_tokens(models: dict[str, Any]) -> None:
    """A comparison of speeds is worth nothing if the results differ."""
    prompt = torch_runs.random_prompt(models[LLAMA], 1, 16)
    first, second = (torch_runs.generate(model, prompt, torch.ones_like(prompt), 8) for model in models.values())
    if not torch.equal(first, second):
        raise RuntimeError("GroupFormer and transformers' Llama chose different tokens from the same weights")


def prefill(setting: Setting) -> Iterator[dict[str, Any]]:
    """Prompts, in float32 and bfloat16, beside litgpt and llama.cpp in float32 where they are installed."""
    for dtype in fast_dtypes(setting.device):
        shape = setting.of(dtype=dtype)
        models = pair(shape, setting.device)
        with engines(models[LLAMA], shape, setting, {"llama.cpp F32": None} if dtype == "float32" else None) as peers:
            for length in setting.prompts:
                runs = {name: torch_runs.prefill(model, length) for name, model in models.items()}
                runs |= {name: peer.run("prefill", length) for name, peer in peers.items()}
                case = f"prefill {length}, {dtype}"
                seconds = alternate(runs, setting.rounds, twice=True)
                yield row(case, seconds, flops=shape.prefill_flops(length), dtype=dtype)


def decode(setting: Setting) -> Iterator[dict[str, Any]]:
    """Greedy `generate` at batch 1; at the longest context also without sharing. In bfloat16 where that is fast."""
    for kv_heads in (setting.kv_heads, setting.of().config.num_attention_heads):
        shape = setting.of(kv_heads)
        models = pair(shape, setting.device)
        same_tokens(models)
        contexts = setting.contexts if kv_heads == setting.kv_heads else setting.contexts[-1:]
        with engines(models[LLAMA], shape, setting, {"llama.cpp F32": None}) as peers:
            for context in contexts:
                runs = {name: torch_runs.decode(model, context, setting.tokens) for name, model in models.items()}
                if context <= PEERS_UP_TO:
                    runs |= {name: peer.run("decode", context, setting.tokens) for name, peer in peers.items()}
                case = f"decode at {context}, {kv_heads} KV heads, float32"
                yield row(case, alternate(runs, setting.rounds), bytes=shape.decode_bytes(context))
    if "bfloat16" in fast_dtypes(setting.device):
        shape = setting.of(dtype="bfloat16")
        models = pair(shape, setting.device)
        for context in setting.contexts:
            runs = {name: torch_runs.decode(model, context, setting.tokens) for name, model in models.items()}
            case = f"decode at {context}, {setting.kv_heads} KV heads, bfloat16"
            yield row(case, alternate(runs, setting.rounds), bytes=shape.decode_bytes(context))


def batch(setting: Setting) -> Iterator[dict[str, Any]]:
    """Greedy `generate` of a batch of left-padded prompts."""
    shape = setting.of()
    runs = {
        name: torch_runs.decode_batch(model, setting.batch, setting.batch_context, setting.tokens)
        for name, model in pair(shape, setting.device).items()
    }
    case = f"decode, batch {setting.batch}, left-padded prompts to {setting.batch_context}, float32"
    yield row(case, alternate(runs, setting.rounds), bytes=shape.decode_bytes(setting.batch_context, setting.batch))


def compiled(setting: Setting) -> Iterator[dict[str, Any]]:
    """Decoding with a static cache and the step compiled as one graph, and what the first token then costs."""
    context = setting.contexts[min(1, len(setting.contexts) - 1)]
    shape = setting.of()
    models = pair(shape, setting.device)
    runs = {
        f"{name}, compiled": torch_runs.StaticDecoding(model, context, setting.tokens, True)
        for name, model in models.items()
    }
    runs[f"{OURS}, eager"] = torch_runs.StaticDecoding(models[OURS], context, setting.tokens, False)
    runs[f"{OURS}, generate"] = torch_runs.decode(models[OURS], context, setting.tokens)
    first = {name: timed(run) for name, run in runs.items()}
    base = f"{LLAMA}, compiled"
    with engines(models[LLAMA], shape, setting, {"llama.cpp F32": None}) as peers:
        runs |= {name: peer.run("decode", context, setting.tokens) for name, peer in peers.items()}
        result = row(f"decode at {context}, static cache, float32", alternate(runs, setting.rounds), base)
    for name, seconds in first.items():
        result["runs"][name]["first_call"] = seconds
    yield result | {"bytes": shape.decode_bytes(context)}


def int8(setting: Setting) -> Iterator[dict[str, Any]]:
    """Weights of eight bits: torchao's weight-only quantization, where installed, beside llama.cpp's Q8_0.

    Eager, torchao multiplies each weight out; compiled in bfloat16, torch's product with eight-bit weights is used.
    """
    context = setting.contexts[min(1, len(setting.contexts) - 1)]
    shape = setting.of()
    native = llama(shape, setting.device)
    runs = {f"{OURS}, float32": torch_runs.decode(ours(native), context, setting.tokens)}
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = ours(native)
        quantize_(model, Int8WeightOnlyConfig())
        runs[f"{OURS}, int8 by torchao"] = torch_runs.decode(model, context, setting.tokens)
        if "bfloat16" in fast_dtypes(setting.device):
            narrow = ours(llama(setting.of(dtype="bfloat16"), setting.device))
            quantize_(narrow, Int8WeightOnlyConfig())
            run = torch_runs.StaticDecoding(narrow, context, setting.tokens, compiled=True)
            runs[f"{OURS}, int8 by torchao, bfloat16, compiled"] = run
    with engines(native, shape, setting, {"llama.cpp Q8_0": "q8_0"}) as peers:
        runs |= {name: peer.run("decode", context, setting.tokens) for name, peer in peers.items() if name != "litgpt"}
        yield row(f"decode at {context}, int8 weights", alternate(runs, setting.rounds), f"{OURS}, float32")


def training(setting: Setting) -> Iterator[dict[str, Any]]:
    """A training step with a large vocabulary: its time, and the peak memory of a process that does nothing else."""
    size = (setting.training_batch, setting.training_length)
    shape = setting.of(vocab_size=setting.training_vocab)
    models = pair(shape, setting.device)
    models[WITHOUT_LOGITS] = ours(models[LLAMA])
    models[WITHOUT_LOGITS].skip_logits = True
    runs = {name: torch_runs.training_step(model, *size) for name, model in models.items()}
    seconds = alternate(runs, max(2, setting.rounds // 2))
    case = f"training step, {size[0]} rows of {size[1]}, vocabulary {shape.vocab_size}, float32"
    result = row(case, seconds, flops=shape.training_flops(*size), dtype="float32")
    peaks = {name: child("memory", setting, name) for name in runs}
    for name, peak in peaks.items():
        result["runs"][name] |= {"peak_mib": peak / 2**20, "memory_ratio": peak / peaks[LLAMA]}
    yield result


def loading(setting: Setting) -> Iterator[dict[str, Any]]:
    """`from_pretrained` from safetensors, the file in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        for name, model in pair(setting.of(), "cpu").items():
            model.save_pretrained(Path(folder) / name)
        classes = {LLAMA: LlamaForCausalLM, OURS: groupformer.GroupFormerForCausalLM}
        runs = {
            name: lambda name=name, kind=kind: timed(lambda: kind.from_pretrained(Path(folder) / name))
            for name, kind in classes.items()
        }
        yield row("loading from safetensors", alternate(runs, setting.rounds))


IMPORTS = """
import time
started = time.perf_counter()
from transformers import LlamaForCausalLM, AutoModelForCausalLM, PreTrainedTokenizerFast
theirs = time.perf_counter()
import groupformer
print(theirs - started, time.perf_counter() - theirs)
"""


def importing(setting: Setting) -> Iterator[dict[str, Any]]:
    """Fresh processes: what `import groupformer` adds to importing transformers' own Llama, timed inside."""
    seconds: dict[str, list[float]] = {LLAMA: [], OURS: []}
    for _ in range(setting.rounds):
        done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
        theirs, added = map(float, done.stdout.split())
        seconds[LLAMA].append(theirs)
        seconds[OURS].append(theirs + added)
    result = row("importing the package", seconds)
    result["added_seconds"] = statistics.median(b - a for a, b in zip(seconds[LLAMA], seconds[OURS]))
    yield result


PARTS = {
    "prefill": prefill,
    "decode": decode,
    "batch": batch,
    "training": training,
    "loading": loading,
    "importing": importing,
    "compiled": compiled,
    "int8": int8,
}


# Processes of their own ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engines(
    native: Any, shape: Shape, setting: Setting, quantizations: dict[str, str | None] | None
) -> Iterator[dict]:
    """The engines outside transformers that are installed, as running peers by name; none on a GPU."""
    folder = Path(tempfile.mkdtemp())
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        found: dict[str, Peer] = {}
        if setting.device == "cpu" and quantizations is not None:
            if python := interpreter("llama_cpp"):
                path = write_gguf(native, folder)
                for name, kind in quantizations.items():
                    arguments = [path, setting.threads, *([kind] if kind else [])]
                    found[name] = stack.enter_context(Peer(python, "worker_llama_cpp.py", *arguments))
            if python := interpreter("litgpt"):
                (folder / "config.json").write_text(json.dumps(shape.config.to_dict(), default=str))
                arguments = [folder / "config.json", setting.threads]
                found["litgpt"] = stack.enter_context(Peer(python, "worker_litgpt.py", *arguments))
        yield found


def child(task: str, setting: Setting, name: str) -> float:
    """One number from a process of its own."""
    request = json.dumps({"task": task, "setting": asdict(setting), "name": name})
    command = [sys.executable, "-m", "benchmarks.speed", "--child", request]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak_memory(setting: Setting, name: str) -> float:
    """Peak bytes of a process (on a GPU: of its tensors) that makes a model and does three training steps."""
    shape = setting.of(vocab_size=setting.training_vocab)
    model = llama(shape, setting.device)
    if name != LLAMA:
        model = ours(model)
        model.skip_logits = name == WITHOUT_LOGITS
    step = torch_runs.training_step(model, setting.training_batch, setting.training_length)
    if setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    if setting.device != "cpu":
        return torch.cuda.max_memory_allocated()
    # Linux's own count for this program alone: the peak that `resource` knows begins at what the parent process held.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def answer(request: str) -> None:
    """The other end of `child`."""
    fields = json.loads(request)
    setting = Setting(**fields["setting"])
    torch.set_num_threads(setting.threads)
    print({"memory": peak_memory}[fields["task"]](setting, fields["name"]))
