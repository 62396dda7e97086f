"""`groupformer import` and `groupformer export`: native checkpoints in, and out again."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Format(str, Enum):
    """File formats of an export."""

    safetensors = "safetensors"
    gguf = "gguf"


Source = Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub id.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="What to write; it appears when it is whole.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")]
ShardSize = Annotated[float, typer.Option(min=0.001, help="Largest file of weights to write, in GB (1e9 bytes).")]


def add_commands(app: typer.Typer) -> None:
    app.command("import")(import_command)
    app.command("export")(export_command)


def import_command(
    source: Source, target: Target, overwrite: Overwrite = False, max_shard_size: ShardSize = 5.0
) -> None:
    """Turn a native checkpoint (Llama, Qwen, GPT-2, Pythia, BLOOM ...) into a GroupFormer with the same logits.

    It streams: memory stays near one tensor, whatever the checkpoint's size. Tokenizer files travel along as they are.
    """
    from ..families import import_folder

    with progress_bar("importing") as progress:
        conversion = import_folder(
            source, target, overwrite=overwrite, max_shard_bytes=int(max_shard_size * 1e9), progress=progress
        )
    config = conversion.our_config
    typer.echo(f"{target}: {conversion.model_class.__name__}, {config.num_hidden_layers} layers, from {config.family}")


def export_command(
    source: Source,
    target: Target,
    family: Annotated[
        str | None, typer.Option(help="Family to export to, e.g. llama. Default: the one it was imported from.")
    ] = None,
    file_format: Annotated[
        Format, typer.Option("--format", help="gguf: one file for llama.cpp.")
    ] = Format.safetensors,
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer/--no-tokenizer", help="Whether a GGUF file holds the tokenizer too.")
    ] = True,
    overwrite: Overwrite = False,
    max_shard_size: ShardSize = 5.0,
) -> None:
    """Turn a GroupFormer into a native checkpoint again, bit for bit, for the tools that know only those."""
    if file_format is Format.gguf:
        from ..families.gguf_writer import export_gguf

        with progress_bar("writing GGUF") as progress:
            architecture = export_gguf(
                source, target, family=family, overwrite=overwrite, tokenizer=tokenizer, progress=progress
            )
        typer.echo(f"{target}: GGUF of architecture {architecture}")
        return
    from ..families import export_folder

    with progress_bar("exporting") as progress:
        conversion = export_folder(
            source,
            target,
            family=family,
            overwrite=overwrite,
            max_shard_bytes=int(max_shard_size * 1e9),
            progress=progress,
        )
    typer.echo(f"{target}: {conversion.model_class.__name__}, bit for bit")


@contextmanager
def progress_bar(verb: str) -> Iterator[Any]:
    """A bar on stderr that shows shards and bytes; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=None)

        def advance(shard: int, shards: int, written: int, total: int) -> None:
            bar.update(task, description=f"{verb} shard {shard}/{shards}", total=total, advance=written)

        yield advance
