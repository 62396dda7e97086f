"""`groupformer demo`: a checkpoint with a quarter of its cache, measured before and after."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import LOOK, AsJson, Tokenizer, checkpoint, print_json, stdout_for_results


PROMPT = "The cell membrane is"
NEW_TOKENS = 16
SEQUENCES, CONTEXT, DECODED, ROUNDS = 8, 512, 16, 5  # of which speed is measured
ROW = 64  # tokens of a row that healing reads
FINE_TUNING_STEPS = 30

# What a fresh process runs: transformers' Auto classes, after the import that registers the architecture.
RELOAD = """
import json, sys, groupformer
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=new_tokens, do_sample=False)
print(json.dumps({"class": type(model).__name__, "text": tokenizer.decode(tokens[0])}))
"""

YOUR_OWN = """The same with a decoder of yours, a folder or a Hub id:
  groupformer plan PATH
  groupformer regroup PATH small --kv-heads N --calibration TEXT
  groupformer heal small PATH healed --text TEXT"""


def add_commands(app: typer.Typer) -> None:
    app.command(rich_help_panel=LOOK)(demo)


def demo(
    model: Annotated[
        str | None, typer.Option(callback=checkpoint, help="Folder or Hub id. Default: the checkpoint of the clone.")
    ] = None,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key-value heads to merge to.")] = 2,
    tokenizer: Tokenizer = None,
    output: Annotated[Path | None, typer.Option(help="Where to save the small model. Default: runs/demo.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier --output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a checkpoint's key-value heads, heal it, and measure quality, cache and speed before and after.

    Example: groupformer demo --kv-heads 4 --output runs/half
    """
    folder = output or Path("runs/demo")
    if output is not None and folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"--output ({folder}) is not empty; choose another folder, or pass --overwrite")
    with stdout_for_results(as_json):
        results = run(model, kv_heads, folder, tokenizer)
    if as_json:
        print_json(results)


def run(source: str | None, kv_heads: int, folder: Path, tokenizer_source: str | None = None) -> dict[str, Any]:
    """Runs the demo, prints each step, and returns what was measured.

    Raises:
        ValueError: no checkpoint, or one that cannot have that many key-value heads.
        RuntimeError: the saved model, loaded in a fresh process, gives another answer than before it was saved.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import groupformer

    from ..conversion.loading import check_token_ids, load_checked, load_tokenizer
    from ..measuring.cache import positions_of
    from ..samples import sample_text, shipped_checkpoint

    started = time.perf_counter()
    logging.disable_progress_bar()
    source = source or str(shipped_checkpoint())
    original = load_checked(AutoModelForCausalLM, source, dtype=torch.float32)
    tokenizer = load_tokenizer(source, tokenizer_source)
    heads = f"{original.config.num_attention_heads} query heads on {original.config.num_key_value_heads} KV heads"
    typer.echo(f"1. Load {source}: {original.num_parameters() / 1e6:.1f} M parameters, {heads}")
    text, held_out = sample_text()
    token_ids = tokenizer(text, return_tensors="pt").input_ids
    check_token_ids(token_ids[0].tolist(), tokenizer, "the sample text", original.config.vocab_size)

    length = min(token_ids.shape[1], positions_of(original.config) or token_ids.shape[1])
    calibration = token_ids[:, : token_ids.shape[1] // length * length].view(-1, length)
    merged, seconds = timed(groupformer.regroup, original, kv_heads, calibration=calibration)
    typer.echo(f"2. Merge to {kv_heads} KV heads, in closed form, without training: {seconds:.1f} s")
    healed = copy.deepcopy(merged)
    rows = token_ids[:, : token_ids.shape[1] // ROW * ROW].reshape(-1, ROW)
    _, seconds = timed(groupformer.heal, healed, original, rows)
    typer.echo(f"3. Heal the attention, layer by layer, on {rows.numel():,} tokens: {seconds:.1f} s")

    typer.echo("4. Measure")
    table = measure_all({"original": original, "merged": merged, "healed": healed}, tokenizer, held_out)
    print_rows(table)

    healed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    typer.echo(f"5. Save to {folder}, load it in a fresh process through the Auto classes, and let both answer:")
    answers = {"original": answer(original, tokenizer), "healed": answer(healed, tokenizer)}
    reloaded = reload_and_answer(folder)
    if reloaded["text"] != answers["healed"]:
        raise RuntimeError(
            f"{folder} answers {reloaded['text']!r} after loading, and {answers['healed']!r} before saving"
        )
    typer.echo(f"   original: {answers['original']}\n   {kv_heads} KV heads: {reloaded['text']}")
    tuned, seconds = timed(fine_tune, healed, tokenizer, rows, held_out, folder)
    before = table[-1]["bits_per_byte"]
    typer.echo(
        f"6. Fine-tune it on the text, {FINE_TUNING_STEPS} steps of transformers' Trainer: {seconds:.1f} s\n"
        f"   {before:.3f} bits per byte before, {tuned:.3f} after"
    )
    seconds = time.perf_counter() - started
    typer.echo(f"{seconds:.0f} s in all.\n\n{YOUR_OWN}")
    return {"rows": table, "answers": answers, "reloaded": reloaded, "fine_tuned": tuned, "seconds": seconds}


def timed(work: Any, *arguments: Any, **options: Any) -> tuple[Any, float]:
    """A function's result, and the seconds that it took."""
    started = time.perf_counter()
    return work(*arguments, **options), time.perf_counter() - started


def measure_all(models: dict[str, Any], tokenizer: Any, held_out: str) -> list[dict[str, Any]]:
    """A row for each model: KV heads, bytes of cache a token, bits per byte, and decoding speed, timed in turn."""
    from ..measuring.evaluation import evaluate
    from ..measuring.speed import measure

    speeds = measure(models, context=CONTEXT, batch=SEQUENCES, new_tokens=DECODED, rounds=ROUNDS)
    cached_tokens = SEQUENCES * (CONTEXT + DECODED - 1)  # the last token is not read again
    return [
        {
            "model": name,
            "kv_heads": model.config.num_key_value_heads,
            "cache_bytes_per_token": speed["cache_bytes"] / cached_tokens,
            "cache_ratio": speed["cache_bytes"] / speeds[0]["cache_bytes"],
            "bits_per_byte": evaluate(model, tokenizer, [held_out])["bits_per_byte"],
            "tokens_per_second": speed["decode_tokens_per_second"],
            "speed_ratio": speed["decode_ratio"],
        }
        for (name, model), speed in zip(models.items(), speeds)
    ]


def print_rows(rows: list[dict[str, Any]]) -> None:
    from .tables import print_table

    columns = ["model", "KV heads", "cache a token", "of it", "bits per byte", "tokens/s", "speed"]
    print_table(
        f"{SEQUENCES} x {CONTEXT} tokens in float32; bits per byte (less is better) on held-out text",
        columns,
        [
            [
                row["model"],
                row["kv_heads"],
                f"{row['cache_bytes_per_token']:,.0f} B",
                f"{row['cache_ratio']:.0%}",
                f"{row['bits_per_byte']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['speed_ratio']:.2f} x",
            ]
            for row in rows
        ],
    )


def answer(model: Any, tokenizer: Any) -> str:
    """The prompt and its likeliest continuation."""
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(tokens[0])


def reload_and_answer(folder: Path) -> dict[str, str]:
    """The class and the answer of the saved model, in a process of its own."""
    command = [sys.executable, "-c", RELOAD, str(folder), PROMPT, str(NEW_TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def fine_tune(model: Any, tokenizer: Any, rows: Any, held_out: str, folder: Path) -> float:
    """Bits per byte of the held-out text after a short training on rows of tokens; the saved model stays as it is."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from ..measuring.evaluation import evaluate

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=FINE_TUNING_STEPS,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,  # else torch warns where there is no accelerator
        report_to=[],
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows.tolist()]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return evaluate(model, tokenizer, [held_out])["bits_per_byte"]
