"""`groupformer import` and `groupformer export`: native checkpoints in, and out again."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .shared import (
    CONVERT,
    Cost,
    ReplaceTarget,
    ShardSize,
    Source,
    Target,
    bytes_bar,
    describe_cache,
    describe_heads,
    print_outcome,
    quoted,
    size_on_disk,
)


class Format(str, Enum):
    """File formats of an export."""

    safetensors = "safetensors"
    gguf = "gguf"
    decilm = "decilm"


def add_commands(app: typer.Typer) -> None:
    app.command("import", rich_help_panel=CONVERT)(import_command)
    app.command("export", rich_help_panel=CONVERT)(export_command)


def import_command(
    source: Source, target: Target, overwrite: ReplaceTarget = False, max_shard_size: ShardSize = 5.0
) -> None:
    """Turn a native checkpoint (Llama, Qwen, GPT-2, Pythia, BLOOM ...) into a GroupFormer with the same logits.

    It streams: memory stays near two tensors whatever the checkpoint's size. Tokenizer files travel along as they are.

    Example: groupformer import HuggingFaceTB/SmolLM2-135M smol
    """
    from ..conversion import import_folder
    from ..conversion.loading import has_tokenizer

    cost = Cost()
    with bytes_bar("importing") as progress:
        conversion = import_folder(
            source, target, overwrite=overwrite, max_shard_bytes=int(max_shard_size * 1e9), progress=progress
        )
    config = conversion.our_config
    facts = {"cache": describe_cache(config), "size": size_on_disk(target), "took": cost}
    print_outcome(
        f"{target}: {conversion.model_class.__name__} from {config.family}, {describe_heads(config)}",
        facts,
        [
            f"groupformer plan {quoted(target)}",
            f"groupformer regroup {quoted(target)} DST --kv-heads N --calibration TEXT",
        ],
    )
    if not has_tokenizer(target):
        typer.echo(
            f"warning: {source} has no tokenizer; copy its files to {target}, or pass --tokenizer to the commands "
            "that read text",
            err=True,
        )


def export_command(
    source: Source,
    target: Target,
    family: Annotated[
        str | None, typer.Option(help="Family to export to, e.g. llama. Default: the one it was imported from.")
    ] = None,
    file_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="gguf: one file for llama.cpp. decilm: Llama with KV heads by layer, for vLLM.",
        ),
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
    cost = Cost()
    if file_format is Format.gguf:
        from ..conversion.gguf.writer import export_gguf

        with bytes_bar("writing GGUF") as progress:
            architecture = export_gguf(
                source, target, family=family, overwrite=overwrite, tokenizer=tokenizer, progress=progress
            )
        print_outcome(
            f"{target}: GGUF of architecture {architecture}",
            {"size": size_on_disk(target), "took": cost},
            [f'llama-cli -m {target} -p "The river"'],
        )
        return
    if file_format is Format.decilm:
        export_decilm_command(source, target, family, overwrite, max_shard_size, cost)
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
    config = conversion.native_config
    print_outcome(
        f"{target}: {conversion.model_class.__name__}, bit for bit, {describe_heads(config)}",
        {"cache": describe_cache(config), "size": size_on_disk(target), "took": cost},
        [f"vllm serve {target}"],
    )


def export_decilm_command(
    source: str, target: Path, family: str | None, overwrite: bool, max_shard_size: float, cost: Cost
) -> None:
    from ..conversion.decilm.writer import export_decilm

    if family is not None:
        raise ValueError(f"--family ({family}) names a class of transformers; leave it out with --format decilm")
    with bytes_bar("exporting") as progress:
        config = export_decilm(
            source, target, overwrite=overwrite, max_shard_bytes=int(max_shard_size * 1e9), progress=progress
        )
    queries = config["num_attention_heads"]
    heads = [queries // block["attention"]["n_heads_in_group"] for block in config["block_configs"]]
    print_outcome(
        f"{target}: DeciLMForCausalLM, {queries} query heads on {min(heads)} to {max(heads)} KV heads by layer",
        {"size": size_on_disk(target), "took": cost},
        [f"vllm serve {target} --trust-remote-code"],
    )
