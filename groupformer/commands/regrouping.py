"""`groupformer regroup`, `expand` and `uptrain`: fewer key-value heads, more of them, and what was lost won back."""

import os
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import (
    CONVERT,
    AsJson,
    Cost,
    Device,
    Dtype,
    KeepCheckpoints,
    Output,
    Overwrite,
    ReplaceTarget,
    Resume,
    ShardSize,
    Source,
    Target,
    TextColumn,
    Tokenizer,
    TrainingDevice,
    TrainingDtype,
    bytes_bar,
    checkpoint,
    describe_cache,
    describe_heads,
    phases_bar,
    print_json,
    print_outcome,
    quoted,
    resumable,
    resumable_healing,
    size_on_disk,
    stdout_for_results,
    tokenizer_option,
)


HEAL_TOKENS, ROW_LENGTH = 196_608, 512


class Method(str, Enum):
    """The keys of `groupformer.regrouping.merging.METHODS`, which is not imported before it is needed."""

    first = "first"
    random = "random"
    mean = "mean"
    aligned = "aligned"
    svd = "svd"


class Grouping(str, Enum):
    """The keys of `groupformer.regrouping.grouping.GROUPINGS`."""

    adjacent = "adjacent"
    similar = "similar"


def add_commands(app: typer.Typer) -> None:
    app.command("regroup", rich_help_panel=CONVERT)(regroup_command)
    app.command("expand", rich_help_panel=CONVERT)(expand_command)
    app.command(rich_help_panel=CONVERT)(uptrain)


def regroup_command(
    source: Source,
    target: Target,
    kv_heads: Annotated[str, typer.Option(help="New number of key-value heads; or by layer, e.g. 0:4,1:1; or auto.")],
    budget: Annotated[float | None, typer.Option(help="With auto: the share of the present cache to keep.")] = None,
    method: Annotated[Method, typer.Option(help="How a group of heads becomes one.")] = Method.svd,
    grouping: Annotated[
        Grouping | None,
        typer.Option(help="Neighbours, or the heads that lose least together. Default: similar, if they can move."),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure inputs on: files, patterns; repeatable; or sample: a page of the package."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of it to read.")] = 16384,
    heal: Annotated[
        bool, typer.Option("--heal", help="Win back most of what is lost, by training on the text; minutes or more.")
    ] = False,
    heal_tokens: Annotated[int, typer.Option(min=2, help="Tokens of it to read for that.")] = HEAL_TOKENS,
    heal_row_length: Annotated[
        int, typer.Option(min=2, help="Tokens in a row of it; as long as your contexts, if time allows.")
    ] = ROW_LENGTH,
    text_column: TextColumn = "text",
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the calibration. auto: float32.")] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Seed of the method random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="With --heal: go on with an interrupted run.")] = False,
    overwrite: ReplaceTarget = False,
    max_shard_size: ShardSize = 5.0,
) -> None:
    """Merge a checkpoint's key-value heads into fewer; any decoder of transformers keeps its class and format.

    The merge streams, with about one layer in memory.
    Where the class has no field for the counts (GPT-2, BLOOM; counts by layer), the result is a GroupFormer.
    `--heal` runs `groupformer heal` with its defaults; that command has more options.
    Processes started by torchrun or `accelerate launch` share the work.

    Example: groupformer regroup HuggingFaceTB/SmolLM2-135M small --kv-heads 1 --calibration book.txt --heal
    """
    import torch

    from ..conversion.loading import best_device
    from ..measuring.planning import load_config
    from ..regrouping.heal_folders import regroup_and_heal_folder
    from ..regrouping.processes import Processes
    from ..regrouping.streaming import regroup_folder

    if heal and not calibration:
        raise ValueError("--heal needs --calibration: the text to learn from")
    if resume and not heal:
        raise ValueError("--resume needs --heal: a merge alone begins again")
    processes = Processes.from_environment()
    if heal and processes.count > 1:
        raise ValueError("--heal works in one process; regroup without it, then start `groupformer heal` in several")
    cost = Cost()
    heads, before = wanted_heads(kv_heads), load_config(source)
    if processes.is_first:
        typer.echo(f"Classes and files that can hold the result: {result_formats(before, heads)}", err=True)
    reader = calibration_reader(calibration, text_column, calibration_tokens, tokenizer) if calibration else None
    options: dict[str, Any] = dict(
        method=method.value,
        grouping=None if grouping is None else grouping.value,
        calibration=reader,
        budget=budget,
        seed=seed,
        device=best_device(device),
        dtype=torch.float32 if dtype is Dtype.auto else getattr(torch, dtype.value),
        overwrite=overwrite,
        max_shard_bytes=int(max_shard_size * 1e9),
    )
    facts: dict[str, Any] = {}
    if calibration and heal:
        text = calibration_reader(calibration, text_column, heal_tokens, tokenizer, heal_row_length)
        with resumable_healing(target), phases_bar("healing") as progress:

            def merged(shard: int, shards: int, written: int, total: int) -> None:
                progress("merged shards", shard, shards)

            report = regroup_and_heal_folder(
                source, target, heads, text, resume=resume, merge_progress=merged, progress=progress, **options
            )
        facts = healed_facts(report)
    else:
        with bytes_bar("regrouping") as merge_progress:
            regroup_folder(source, target, heads, progress=merge_progress, processes=processes, **options)
    if not processes.is_first:
        return
    print_made(target, load_config(str(target)), before, cost, source, tokenizer, facts)


def healed_facts(report: Any) -> dict[str, str]:
    """Figures of a healing; prints what could not be healed."""
    if report.failed:
        typer.echo(f"no better, so taken back (loss not finite, or not lower): {', '.join(report.failed)}", err=True)
    if report.joint is None or not report.joint.is_healed:
        return {}
    return {"KL": f"{report.joint.before:.3f} -> {report.joint.after:.3f} nats a token, by all layers together"}


def expand_command(
    source: Source,
    target: Target,
    kv_heads: Annotated[int, typer.Option(min=1, help="New number of key-value heads, of all layers.")],
    overwrite: ReplaceTarget = False,
    max_shard_size: ShardSize = 5.0,
) -> None:
    """Give a checkpoint more key-value heads that compute exactly the same, e.g. for tensor parallel ranks.

    Example: groupformer expand Qwen/Qwen2.5-0.5B eight --kv-heads 8
    """
    from ..measuring.planning import load_config
    from ..regrouping.streaming import expand_folder

    cost = Cost()
    with bytes_bar("expanding") as progress:
        config = expand_folder(
            source,
            target,
            kv_heads,
            overwrite=overwrite,
            max_shard_bytes=int(max_shard_size * 1e9),
            progress=progress,
        )
    print_made(target, config, load_config(source), cost, source)


def print_made(
    target: Path,
    config: Any,
    before: Any,
    cost: Cost,
    source: str,
    tokenizer: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """How both commands end."""
    name = config.architectures[0] if config.architectures else type(config).__name__
    facts = {"cache": describe_cache(config, before), "size": size_on_disk(target), **(more or {}), "took": cost}
    entry, option = config.regrouping[-1], tokenizer_option(tokenizer)
    lines = [f"groupformer eval {quoted(target)} --file TEXT{option}"]
    if entry["method"] != "expand":
        if not entry.get("healing"):
            lines.append(f"groupformer heal {quoted(target)} {quoted(source)} DST --text TEXT{option}")
        lines.append(uptrain_line(target, source, tokenizer, is_healed=bool(entry.get("healing"))))
    print_outcome(f"{target}: {name}, {describe_heads(config)}", facts, lines)


def uptrain_line(target: Path, original: str, tokenizer: str | None, is_healed: bool) -> str:
    """What to type to win back the rest; a healed model wants a lower rate than the default, which suits a merge."""
    rate = " --learning-rate 1e-4" if is_healed else ""
    line = f"groupformer uptrain {quoted(target)} --teacher {quoted(original)} --data TEXT --tokens N"
    return line + rate + tokenizer_option(tokenizer)


def result_formats(config: Any, wanted: int | str | dict[int, int]) -> Any:
    """What can hold the model with the wanted counts, from its config alone; "auto" gives counts by layer.

    Raises:
        ValueError: counts that the model cannot have, or a model without a cache of heads.
    """
    from ..conversion.formats import classes_for
    from ..measuring.cache import decoder_of, layer_caches
    from ..regrouping.request import check_counts

    present = [layer.kv_heads for layer in layer_caches(decoder_of(config))]
    counts = check_counts(present, wanted)
    return classes_for(config, [*present[:-1], 1] if counts is None else counts)


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


def calibration_reader(
    files: list[str], text_column: str, tokens: int, tokenizer: str | None, row_length: int = ROW_LENGTH
) -> Any:
    """A function that tokenizes calibration text with the model folder's tokenizer; missing files are refused now.

    Args:
        files: Paths and patterns; or "sample" alone, for the text that ships.
    """
    from ..conversion.loading import check_token_ids, load_tokenizer
    from ..regrouping.moments import calibration_from_texts
    from ..samples import sample_text
    from ..training.data import read_column

    texts = ["".join(sample_text())] if files == ["sample"] else read_column(files, text_column)

    def read(folder: Path, config: Any) -> Any:
        loaded = load_tokenizer(folder, tokenizer)
        token_ids = calibration_from_texts(texts, loaded, config, tokens, row_length)
        check_token_ids(token_ids.flatten().tolist(), loaded, "the calibration text", config.vocab_size)
        return token_ids

    return read


def uptrain(
    source: Source,
    data: Annotated[list[str], typer.Option(help="Text to train on: files, patterns; repeatable.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on; 5 % of pre-training is a good start.")],
    teacher: Annotated[str | None, typer.Option(callback=checkpoint, help="The original: folder or Hub id.")] = None,
    output: Output = Path("runs/uptrain"),
    validation_file: Annotated[
        list[str] | None, typer.Option(help="Held-out text. Default: some rows of --data.")
    ] = None,
    kl_weight: Annotated[float, typer.Option(help="Weight of the divergence from the teacher.")] = 1.0,
    ce_weight: Annotated[float, typer.Option(help="Weight of the text's own cross-entropy.")] = 0.1,
    temperature: Annotated[float, typer.Option(help="Softens both distributions in the divergence.")] = 1.0,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters, merged at the end.")] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    attention_only: Annotated[bool, typer.Option("--attention-only", help="Train the attention alone.")] = False,
    tokenizer: Tokenizer = None,
    text_column: TextColumn = "text",
    row_length: Annotated[int, typer.Option(min=2, help="Tokens in a packed row.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per device in one forward pass.")] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 5e-4, with LoRA 1e-3.")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="How often to evaluate and save on the way.")] = 10,
    dtype: Annotated[
        TrainingDtype,
        typer.Option(help="bfloat16 is autocast. auto: bfloat16 on a GPU or a CPU's matrix units, else float32."),
    ] = TrainingDtype.auto,
    device: TrainingDevice = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and adapters.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    keep_checkpoints: KeepCheckpoints = False,
    as_json: AsJson = False,
) -> None:
    """Win back what a merge lost: train a regrouped model on text, distilling from the original.

    Example: groupformer uptrain small --teacher big --data 'books/*.parquet' --tokens 1000000 --output runs/uptrain
    """
    from ..conversion.sources import require

    require("datasets", "accelerate", what="uptrain")
    from ..conversion.loading import load_config
    from ..training import uptraining

    cost = Cost()
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
        attention_only=attention_only,
        tokenizer=tokenizer,
        text_column=text_column,
        row_length=row_length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        evaluations=evaluations,
        bf16=dtype.as_bf16(),
        device=device,
        seed=seed,
    )
    with stdout_for_results(as_json), resumable(output):
        results = uptraining.uptrain(
            recipe, output, resume=resume, overwrite=overwrite, keep_checkpoints=keep_checkpoints
        )
    if os.environ.get("RANK", "0") != "0":  # torchrun's and accelerate's: the first process prints
        return
    if as_json:
        print_json(results)
        return
    from .tables import print_table

    curve: list[list[Any]] = [list(point.values()) for point in results["curve"]]
    if "original" in results:
        curve.append(["original", *results["original"].values()])
    print_table(f"Uptraining of {source}", ["tokens", "validation loss", "bits per byte"], curve)
    config = load_config(output)
    first, last = results["curve"][0], results["curve"][-1]
    facts = {
        "loss": f"{first['bits_per_byte']:.4f} -> {last['bits_per_byte']:.4f} bits per byte of validation text",
        "cache": describe_cache(config),
        "size": size_on_disk(output),
        "took": cost,
    }
    print_outcome(
        f"{output}: {(config.architectures or [type(config).__name__])[0]}, {describe_heads(config)}",
        facts,
        [
            f"groupformer eval {quoted(output)} --file TEXT",
            f"groupformer bench {quoted(teacher or source)} {quoted(output)}",
        ],
    )
