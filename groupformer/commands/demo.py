"""`groupformer demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import LOOK, AsJson, checkpoint, print_json, stdout_for_results


def add_commands(app: typer.Typer) -> None:
    app.command(rich_help_panel=LOOK)(demo)


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            callback=checkpoint, help="Folder or Hub id. Default: the checkpoint that ships, or a fresh small model."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to save the adapted model. Default: runs/demo.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier --output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a model to a short text, save it, load it again in a fresh process, and compare.

    Example: groupformer demo --steps 30 --output runs/river
    """
    folder = output or Path("runs/demo")
    if output is not None and folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"--output ({folder}) is not empty; choose another folder, or pass --overwrite")
    from ..training.demo import run

    with stdout_for_results(as_json):
        results = run(model, folder, steps, seed)
    if as_json:
        print_json(results)
