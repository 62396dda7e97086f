"""`groupformer bench`: how fast checkpoints generate here, one beside the other."""

import json
from typing import Annotated, Any

import typer

from .generate import best_device


def add_commands(app: typer.Typer) -> None:
    app.command("bench")(bench_command)


def bench_command(
    source: Annotated[
        list[str], typer.Argument(metavar="PATH|HUB_ID...", help="Causal language models; the first is the base.")
    ],
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often to time each; medians are shown.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps ... Default: the best there is.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random prompt.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time prefill and decoding of one or more checkpoints in turn, and weigh their caches.

    Example: groupformer bench big small --context 2048
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype ({dtype}) is unknown; choose auto, float32, bfloat16 or float16")
    from rich.console import Console
    from rich.progress import Progress
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.utils import logging

    import groupformer  # noqa: F401  registers the architecture

    from .. import speed
    from ..loading import load_checked
    from ..tables import print_table

    logging.disable_progress_bar()
    models: dict[str, Any] = {}
    for path in source:
        models[path] = load_checked(AutoModelForCausalLM, path, dtype=dtype).to(device or best_device())
        limit = getattr(models[path].config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and context + new_tokens > limit:
            raise ValueError(f"context + new_tokens ({context + new_tokens}) exceeds the {limit} positions of {path}")
    set_seed(seed)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("timing", total=len(models) * (rounds + 1))
        rows = speed.measure(
            models,
            context=context,
            batch=batch,
            new_tokens=new_tokens,
            rounds=rounds,
            on_round=lambda: bar.advance(task),
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    columns = ["model", "prefill tokens/s", "decode tokens/s", "ms/step", "cache bytes", "ratio"]
    cells = [
        [
            row["model"],
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.1f}",
            f"{row['milliseconds_per_step']:,.2f}",
            f"{row['cache_bytes']:,}",
            f"{row['decode_ratio']:.2f}",
        ]
        for row in rows
    ]
    print_table(f"{batch} x {context:,} tokens, then {new_tokens:,} decoded", columns, cells)
