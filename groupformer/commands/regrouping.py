"""`groupformer regroup` and `groupformer uptrain`: fewer key-value heads, and what they lost won back."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import (
    CONVERT,
    AsJson,
    Output,
    Overwrite,
    ReplaceTarget,
    Resume,
    ShardSize,
    Source,
    Target,
    TextColumn,
    TrainingDevice,
    TrainingDtype,
    TrainingDtypeOption,
    bytes_bar,
    checkpoint,
    print_json,
    stdout_for_results,
)


def add_commands(app: typer.Typer) -> None:
    app.command("regroup", rich_help_panel=CONVERT)(regroup_command)
    app.command(rich_help_panel=CONVERT)(uptrain)


def regroup_command(
    source: Source,
    target: Target,
    kv_heads: Annotated[str, typer.Option(help="New number of key-value heads; or by layer, e.g. 0:4,1:1; or auto.")],
    budget: Annotated[float | None, typer.Option(help="With auto: the share of the present cache to keep.")] = None,
    method: Annotated[str, typer.Option(help="first, random, mean, aligned or svd.")] = "svd",
    grouping: Annotated[
        str, typer.Option(help="adjacent, or similar: the heads that lose least together.")
    ] = "adjacent",
    calibration: Annotated[
        list[str] | None, typer.Option(help="Text to measure the inputs on: files, patterns; repeatable.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of it to read.")] = 16384,
    text_column: TextColumn = "text",
    seed: Annotated[int, typer.Option(help="Seed of the method random.")] = 0,
    overwrite: ReplaceTarget = False,
    max_shard_size: ShardSize = 5.0,
) -> None:
    """Give a GroupFormer checkpoint fewer key-value heads: multi-head becomes grouped- or multi-query.

    It streams: memory stays near one layer. Without calibration text, the norms' weights stand for the inputs.

    Example: groupformer regroup big small --kv-heads 2 --calibration book.txt
    """
    from ..regrouping.streaming import regroup_folder

    with bytes_bar("regrouping") as progress:
        config = regroup_folder(
            source,
            target,
            wanted_heads(kv_heads),
            method=method,
            grouping=grouping,
            calibration=calibration_reader(calibration, text_column, calibration_tokens) if calibration else None,
            budget=budget,
            seed=seed,
            overwrite=overwrite,
            max_shard_bytes=int(max_shard_size * 1e9),
            progress=progress,
        )
    counts = [layer.num_key_value_heads for layer in config.per_layer_config]
    shown = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts)) + " by layer"
    typer.echo(f"{target}: {config.num_attention_heads} query heads, key-value heads: {shown}")


def wanted_heads(text: str) -> int | str | dict[int, int]:
    """What --kv-heads asks for: a count, counts by layer ("0:4,1:1"), or "auto".

    Raises:
        ValueError: something else, or a layer that is named twice.
    """
    if text == "auto":
        return text
    if re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    if not re.fullmatch(r"[0-9]+:[0-9]+(,[0-9]+:[0-9]+)*", text):
        raise ValueError(f"--kv-heads ({text!r}) must be a whole number, counts by layer such as 0:4,1:1, or auto")
    pairs = [(int(layer), int(count)) for layer, count in (pair.split(":") for pair in text.split(","))]
    layers = [layer for layer, _ in pairs]
    twice = [layer for layer in layers if layers.count(layer) > 1]
    if twice:
        raise ValueError(f"--kv-heads ({text!r}) names layer {twice[0]} twice; name it once")
    return dict(pairs)


def calibration_reader(files: list[str], text_column: str, tokens: int) -> Any:
    """A function that tokenizes calibration text with the model folder's tokenizer; missing files are refused now."""
    from transformers import AutoTokenizer

    from ..regrouping.moments import calibration_from_texts
    from ..training.data import read_column

    texts = read_column(files, text_column)
    return lambda folder, config: calibration_from_texts(texts, AutoTokenizer.from_pretrained(folder), config, tokens)


def uptrain(
    source: Source,
    data: Annotated[list[str], typer.Option(help="Text to train on: files, patterns; repeatable.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on; 5 % of pre-training is a good start.")],
    teacher: Annotated[str | None, typer.Option(callback=checkpoint, help="The original: folder or Hub id.")] = None,
    output: Output = Path("runs/uptrain"),
    validation_file: Annotated[list[str] | None, typer.Option(help="Likewise. Default: a 20th of the rows.")] = None,
    kl_weight: Annotated[float, typer.Option(help="Of the divergence from the teacher.")] = 1.0,
    ce_weight: Annotated[float, typer.Option(help="Of the text's own cross-entropy.")] = 0.1,
    temperature: Annotated[float, typer.Option(help="Of both distributions in the divergence.")] = 1.0,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters, merged at the end.")] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    text_column: TextColumn = "text",
    row_length: Annotated[int, typer.Option(min=2, help="Tokens in a packed row.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per device in one forward pass.")] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 5e-4, with LoRA 1e-3.")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="How often to evaluate and save on the way.")] = 10,
    dtype: TrainingDtypeOption = TrainingDtype.auto,
    device: TrainingDevice = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and adapters.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Win back what a merge lost: train a regrouped model on text, distilling from the original.

    Example: groupformer uptrain small --teacher big --data 'books/*.parquet' --tokens 1000000 --output runs/uptrain
    """
    from ..training import uptraining

    recipe = uptraining.UptrainRecipe(
        model=source,
        teacher=teacher,
        train_files=data,
        validation_files=validation_file or [],
        tokens=tokens,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        lora=lora,
        lora_rank=lora_rank,
        text_column=text_column,
        row_length=row_length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        evaluations=evaluations,
        bf16=dtype.as_bf16(),
        device=device,
        seed=seed,
    )
    with stdout_for_results(as_json):
        results = uptraining.uptrain(recipe, output, resume=resume, overwrite=overwrite)
    if as_json:
        print_json(results)
        return
    from .tables import print_table

    curve = [list(point.values()) for point in results["curve"]]
    print_table(f"Uptraining, saved to {output}", ["tokens", "validation loss", "bits per byte"], curve)
