"""`groupformer pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import (
    TRAIN,
    AsJson,
    Cost,
    KeepCheckpoints,
    Output,
    Overwrite,
    Resume,
    TrainingDevice,
    TrainingDtype,
    TrainingDtypeOption,
    check_tokenizer_source,
    describe_cache,
    describe_heads,
    plural,
    print_json,
    print_outcome,
    quoted,
    resumable,
    size_on_disk,
    stdout_for_results,
)


def add_commands(app: typer.Typer) -> None:
    app.command(rich_help_panel=TRAIN)(pretrain)


def pretrain(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A recipe in YAML, as in recipes/.")] = None,
    output: Output = Path("runs/pretrain"),
    train_file: Annotated[
        list[str] | None, typer.Option(help="Parquet, JSON, CSV or text files; patterns allowed; repeatable.")
    ] = None,
    validation_file: Annotated[list[str] | None, typer.Option(help="Held-out text to evaluate on.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Instead of files, a dataset on the Hub.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read and tokenize while training.")] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(callback=check_tokenizer_source, help="Folder, GGUF or Hub id. Default: the one that ships."),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per device in one forward pass.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate of the cosine.")] = None,
    dtype: TrainingDtypeOption = TrainingDtype.auto,
    device: TrainingDevice = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation and data order.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    keep_checkpoints: KeepCheckpoints = False,
    as_json: AsJson = False,
) -> None:
    """Train a fresh GroupFormer from scratch, by one recipe.

    Example: groupformer pretrain recipes/reference.yaml --train-file 'books/*.parquet' --output runs/reference
    """
    from ..conversion.sources import require

    require("datasets", "accelerate", what="pretrain")
    from ..training import pretraining

    cost = Cost()
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
        bf16=dtype.as_bf16(),
        device=device,
        seed=seed,
    )
    with stdout_for_results(as_json), resumable(output):
        results = pretraining.pretrain(
            plan, output, resume=resume, overwrite=overwrite, keep_checkpoints=keep_checkpoints
        )
    if as_json:
        print_json(results)
        return
    from ..conversion.loading import load_config

    config = load_config(output)
    facts = {"seen": f"{results['tokens']:,} tokens in {plural(results['steps'], 'step')}"}
    if "validation_bits_per_byte" in results:
        facts["loss"] = f"{results['validation_bits_per_byte']:.4f} bits per byte of validation text"
    facts |= {"cache": describe_cache(config), "size": size_on_disk(output), "took": str(cost)}
    print_outcome(
        f"{output}: {(config.architectures or [type(config).__name__])[0]}, {describe_heads(config)}",
        facts,
        [f'groupformer generate {quoted(output)} "The river"', f"groupformer eval {quoted(output)} --file TEXT"],
    )
