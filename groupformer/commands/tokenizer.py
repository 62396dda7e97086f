"""`groupformer tokenizer train` and `groupformer tokenizer eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import TRAIN, AsJson, Overwrite, TextColumn, print_json, resumable


tokenizer_app = typer.Typer(help="Train a tokenizer, or measure one.", no_args_is_help=True)


def add_commands(app: typer.Typer) -> None:
    app.add_typer(tokenizer_app, name="tokenizer", rich_help_panel=TRAIN)


@tokenizer_app.command()
def train(
    prose: Annotated[list[str], typer.Option(help="Files of natural language; patterns allowed; repeatable.")],
    output: Annotated[Path, typer.Option(help="Folder to save the tokenizer to.")],
    code: Annotated[list[str] | None, typer.Option(help="Files of source code, likewise.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, special ones included.")] = 16384,
    text_column: TextColumn = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE tokenizer; on the textbooks and code sets, this gives the one that ships.

    Example: groupformer tokenizer train --prose 'textbooks/train-*.parquet' --code code/train.parquet --output tok
    """
    from ..training.data import read_column
    from ..training.run import prepare_output
    from ..training.tokenizer import train_tokenizer

    texts = read_column(prose, text_column)
    sources = read_column(code, text_column) if code else []
    with resumable(output):
        prepare_output(output, resume=False, overwrite=overwrite)
        tokenizer = train_tokenizer(texts, sources, vocab_size)
        tokenizer.save_pretrained(output)
    typer.echo(f"{len(tokenizer)} tokens, saved to {output}")


@tokenizer_app.command("eval")
def evaluate(
    file: Annotated[list[str], typer.Argument(metavar="FILE", help="Files of text; each is one row of the table.")],
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: the one that ships.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Another tokenizer, to show the ratio to it.")] = None,
    text_column: TextColumn = "text",
    as_json: AsJson = False,
) -> None:
    """Measure how many bytes of a text a token holds; more is better.

    Example: groupformer tokenizer eval textbooks/test-*.parquet --baseline path/to/gpt2
    """
    from .. import GroupFormerTokenizer
    from ..conversion.loading import load_tokenizer
    from ..training.data import read_column
    from ..training.tokenizer import evaluate_tokenizer

    chosen = load_tokenizer(tokenizer, tokenizer) if tokenizer else GroupFormerTokenizer()
    texts = {name: read_column([name], text_column) for name in file}
    rows = evaluate_tokenizer(chosen, texts)
    if baseline is not None:
        for name, row in evaluate_tokenizer(load_tokenizer(baseline, baseline), texts).items():
            rows[name]["ratio_to_baseline"] = rows[name]["bytes_per_token"] / row["bytes_per_token"]
    if as_json:
        print_json(rows)
        return
    from .tables import print_table

    columns = list(next(iter(rows.values())))
    print_table("Compression", ["file", *columns], [[name, *row.values()] for name, row in rows.items()])
