"""`groupformer push`: a checkpoint folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import RUN


def add_commands(app: typer.Typer) -> None:
    app.command("push", rich_help_panel=RUN)(push_command)


def push_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Push a checkpoint to the Hub, with the code that loads it and a card; log in first with `hf auth login`.

    Weights, configs, tokenizer, code and card go; training state and logs stay at home.

    Example: groupformer push runs/regrouped me/llama-2-kv-heads
    """
    if repo_id.count("/") != 1 or repo_id.startswith(("/", ".")) or repo_id.endswith("/"):
        raise ValueError(f"repository ({repo_id}) must be USER/NAME")
    from ..integrations.hub import push_folder

    typer.echo(push_folder(source, repo_id, private=private, revision=revision, message=message))
