"""The demo: adapts a model to a short text, saves it, loads it again in a fresh process, and shows what changed.

The text (`samples/river.txt`) was written for this project. Its last part is held out: the model never trains on it.
"""

import json
import math
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from .. import GroupFormerConfig, GroupFormerForCausalLM, GroupFormerTokenizer
from ..conversion.loading import load_checked
from ..model.cache_groupformer import CACHE_NAME


PROMPTS = (
    "The ferryman is called",
    "The ferry is painted",
    "Keep the perch, keep the eel, throw back",
    "The inn is called the Silver",
)
HELD_OUT_HEADING = "The school"  # from here to the end

# What a fresh process runs: nothing but transformers and the registration of the plugin.
RELOAD = """
import json, sys, torch, groupformer
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
answers = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    answers.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:]))
print(json.dumps({"class": type(model).__name__, "answers": answers}))
"""


def shipped_checkpoint() -> Path | None:
    """The reference checkpoint in `hub_card/`, where this is a checkout that has one."""
    folder = Path(__file__).parents[2] / "hub_card"
    return folder if (folder / "model.safetensors").is_file() else None


def load(model_path: str | Path | None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or Hub id; `None` is a small fresh model with the tokenizer of the package."""
    if model_path is not None:
        model = load_checked(AutoModelForCausalLM, model_path, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(model_path)
    tokenizer = GroupFormerTokenizer()
    config = GroupFormerConfig(
        num_hidden_layers=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GroupFormerForCausalLM(config), tokenizer


def sample_text() -> tuple[str, str]:
    """The text to adapt to, and its held-out end."""
    text = resources.files("groupformer").joinpath("samples/river.txt").read_text(encoding="utf-8")
    start = text.index(HELD_OUT_HEADING + "\n")
    return text[:start], text[start:]


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """Mean cross-entropy of the text's tokens in bits, over its UTF-8 bytes; the first token is given for free."""
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    loss = model.eval()(input_ids, labels=input_ids).loss.item()
    return loss * (input_ids.shape[1] - 1) / math.log(2) / len(text.encode())


@torch.no_grad()
def answers(model: Any, tokenizer: Any) -> list[str]:
    """Greedy continuations, ten tokens each, of the demo's prompts."""
    continuations = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.eval().generate(**inputs, max_new_tokens=10, do_sample=False)
        continuations.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
    return continuations


def judge(model: Any, tokenizer: Any, held_out: str) -> dict[str, Any]:
    """Bits per byte of the held-out text, and the answers to the prompts."""
    return {"bits_per_byte": bits_per_byte(model, tokenizer, held_out), "answers": answers(model, tokenizer)}


def adapt(model: Any, tokenizer: Any, text: str, output: Path, steps: int, seed: int) -> None:
    """Trains on windows of 128 tokens of the text with transformers' own Trainer."""
    input_ids = tokenizer(text)["input_ids"]
    windows = [input_ids[start : start + 128] for start in range(0, len(input_ids) - 127, 32)]
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.accelerator.is_available(),  # else torch warns
        seed=seed,
    )
    dataset = [{"input_ids": window, "labels": window} for window in windows]
    Trainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer).train()


def cache_bytes_per_token(model: Any, tokenizer: Any) -> int:
    """Bytes that one token of context really takes in the KV cache, measured on a cache."""
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    cache = model(**inputs, use_cache=True)[CACHE_NAME]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return size // inputs["input_ids"].shape[1]


def run(model_path: str | None, output: Path, steps: int, seed: int) -> dict[str, Any]:
    """Runs the demo, prints its story, and returns its numbers.

    Raises:
        RuntimeError: the saved model, loaded in a fresh process, does not say what it said before it was saved.
    """
    console, started = Console(), time.time()
    set_seed(seed)
    source = model_path or shipped_checkpoint()
    model, tokenizer = load(source)
    config = model.config
    console.print(f"[bold]1. Load[/] {source or 'a fresh model (no checkpoint ships with this installation)'}")
    console.print(
        f"   {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{config.num_attention_heads} query heads on {config.num_key_value_heads} KV heads, "
        f"{cache_bytes_per_token(model, tokenizer)} bytes of KV cache a token (float32)"
    )
    train_text, held_out = sample_text()
    before = judge(model, tokenizer, held_out)
    console.print(f"[bold]2. Adapt[/] to {len(train_text.encode())} bytes of samples/river.txt, {steps} steps")
    adapt(model, tokenizer, train_text, output, steps, seed)
    after = judge(model, tokenizer, held_out)

    console.print(f"[bold]3. Save[/] to {output}, and [bold]load[/] with the Auto classes in a fresh process")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    command = [sys.executable, "-c", RELOAD, str(output), json.dumps(PROMPTS)]
    reloaded = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    if reloaded["answers"] != after["answers"]:
        raise RuntimeError(
            f"The reloaded model says {reloaded['answers']}, but before saving it said {after['answers']}"
        )

    table = Table("prompt", "before", "after, reloaded", title="What the model says (greedy, 10 tokens)")
    for index, prompt in enumerate(PROMPTS):
        said = (" ".join(each["answers"][index].split()) for each in (before, reloaded))
        table.add_row(prompt, *said)
    console.print(table)
    console.print(
        f"Held-out part of the text: {before['bits_per_byte']:.3f} bits per byte before, "
        f"[bold]{after['bits_per_byte']:.3f}[/] after. {time.time() - started:.0f} s in all."
    )
    return {"before": before, "after": after, "reloaded": reloaded, "seconds": time.time() - started}
