"""`groupformer import` and `groupformer export`: native checkpoints in, and out again."""

from enum import Enum
from typing import Annotated

import typer

from .shared import CONVERT, ReplaceTarget, ShardSize, Source, Target, bytes_bar


class Format(str, Enum):
    """File formats of an export."""

    safetensors = "safetensors"
    gguf = "gguf"


def add_commands(app: typer.Typer) -> None:
    app.command("import", rich_help_panel=CONVERT)(import_command)
    app.command("export", rich_help_panel=CONVERT)(export_command)


def import_command(
    source: Source, target: Target, overwrite: ReplaceTarget = False, max_shard_size: ShardSize = 5.0
) -> None:
    """Turn a native checkpoint (Llama, Qwen, GPT-2, Pythia, BLOOM ...) into a GroupFormer with the same logits.

    It streams: memory stays near one tensor, whatever the checkpoint's size. Tokenizer files travel along as they are.

    Example: groupformer import HuggingFaceTB/SmolLM2-135M smol
    """
    from ..conversion import import_folder

    with bytes_bar("importing") as progress:
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
    overwrite: ReplaceTarget = False,
    max_shard_size: ShardSize = 5.0,
) -> None:
    """Turn a GroupFormer into a native checkpoint again, bit for bit, for the tools that know only those.

    Example: groupformer export smol smol.gguf --format gguf
    """
    if file_format is Format.gguf:
        from ..conversion.gguf.writer import export_gguf

        with bytes_bar("writing GGUF") as progress:
            architecture = export_gguf(
                source, target, family=family, overwrite=overwrite, tokenizer=tokenizer, progress=progress
            )
        typer.echo(f"{target}: GGUF of architecture {architecture}")
        return
    from ..conversion import export_folder

    with bytes_bar("exporting") as progress:
        conversion = export_folder(
            source,
            target,
            family=family,
            overwrite=overwrite,
            max_shard_bytes=int(max_shard_size * 1e9),
            progress=progress,
        )
    typer.echo(f"{target}: {conversion.model_class.__name__}, bit for bit")
