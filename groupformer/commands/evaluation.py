"""`groupformer eval`: bits per byte and perplexity on held-out text."""

from typing import Annotated

import typer

from .shared import (
    TRAIN,
    AsJson,
    Device,
    Dtype,
    DtypeOption,
    TextColumn,
    Tokenizer,
    bar_for_large,
    checkpoint,
    counting_bar,
    print_json,
)


def add_commands(app: typer.Typer) -> None:
    app.command("eval", rich_help_panel=TRAIN)(eval_command)


def eval_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PATH|HUB_ID",
            callback=checkpoint,
            help="A causal language model: folder, GGUF, adapter, Hub id.",
        ),
    ],
    file: Annotated[list[str], typer.Option(help="Parquet, JSON, CSV or text files; patterns allowed; repeatable.")],
    text_column: TextColumn = "text",
    tokenizer: Tokenizer = None,
    window: Annotated[int | None, typer.Option(help="Tokens seen at once. Default: 1024, or all positions.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens the window moves on. Default: half a window.")] = None,
    max_documents: Annotated[int | None, typer.Option(min=1, help="Score the first so many documents.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = 4,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure bits per byte and perplexity on held-out text, with sliding windows.

    Example: groupformer eval runs/reference --file 'books/test-*.parquet'
    """
    from ..conversion.loading import best_device
    from ..measuring.evaluation import evaluate_checkpoint
    from ..training.data import read_column

    bar_for_large(model)
    device = best_device(device)  # refused before a file is read
    texts = read_column(file, text_column)[:max_documents]
    with counting_bar("scoring", None, "tokens") as advance:
        results = evaluate_checkpoint(
            model,
            texts,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype.value,
            window=window,
            stride=stride,
            batch_size=batch_size,
            progress=advance,
        )
    if as_json:
        print_json(results)
        return
    from .tables import print_table

    print_table(f"{model} on {', '.join(file)}", ["figure", "value"], [list(item) for item in results.items()])
