"""`groupformer pretrain`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    app.command()(pretrain)


def pretrain(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML, as in recipes/.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of checkpoints and of the final model.")] = Path(
        "runs/pretrain"
    ),
    train_file: Annotated[
        list[str] | None, typer.Option(help="Parquet, JSON, CSV or text files; patterns allowed; repeatable.")
    ] = None,
    validation_file: Annotated[list[str] | None, typer.Option(help="Likewise, to evaluate on.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Instead of files, a dataset on the Hub.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read and tokenize while training.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: the one that ships.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per device in one forward pass.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate of the cosine.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation and data order.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train a fresh GroupFormer from scratch, by one recipe.

    Example: groupformer pretrain recipes/reference.yaml --train-file 'books/*.parquet' --output runs/reference
    """
    from ..training import pretraining

    plan = pretraining.PretrainRecipe.from_file(
        recipe,
        train_files=train_file,
        validation_files=validation_file,
        dataset=dataset,
        text_column=text_column,
        streaming=streaming or None,
        tokenizer=tokenizer,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    # Trainer prints what it logs; with --json, stdout holds the results alone.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        results = pretraining.pretrain(plan, output, resume=resume, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(results))
        return
    from ..tables import print_table

    print_table("Pre-training", ["figure", "value"], [[name, value] for name, value in results.items()])
