"""`groupformer bench`: how fast checkpoints generate here, one beside the other."""

from typing import Annotated, Any

import typer

from .shared import RUN, AsJson, Device, Dtype, DtypeOption, bar_for_large, checkpoint, counting_bar, print_json


def add_commands(app: typer.Typer) -> None:
    app.command("bench", rich_help_panel=RUN)(bench_command)


def checkpoints(sources: list[str]) -> list[str]:
    for source in sources:
        checkpoint(source)
    return sources


def bench_command(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH|HUB_ID", callback=checkpoints, help="Causal language models; the first is the base."
        ),
    ],
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often to time each; medians are shown.")] = 3,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Seed of the random prompt.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Time prefill and decoding of one or more checkpoints in turn, and measure their caches.

    Example: groupformer bench big small --context 2048
    """
    from transformers import AutoModelForCausalLM, set_seed

    import groupformer  # noqa: F401  registers the architecture

    from ..conversion.loading import best_device, load_checked
    from ..measuring import speed
    from ..measuring.cache import positions_of
    from .tables import print_table

    device = best_device(device)
    models: dict[str, Any] = {}
    for path in source:
        bar_for_large(path)
        models[path] = load_checked(AutoModelForCausalLM, path, dtype=dtype.value).to(device)
        limit = positions_of(models[path].config)
        if limit is not None and context + new_tokens > limit:
            raise ValueError(
                f"--context and --new-tokens ({context:,} + {new_tokens:,}) exceed the {limit:,} positions of {path}; "
                "choose a shorter context"
            )
    set_seed(seed)
    with counting_bar("timing", len(models) * (rounds + 1), "rounds") as advance:
        rows = speed.measure(
            models,
            context=context,
            batch=batch,
            new_tokens=new_tokens,
            rounds=rounds,
            on_round=lambda: advance(1),
        )
    if as_json:
        print_json(rows)
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
