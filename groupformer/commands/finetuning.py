"""`groupformer finetune`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import (
    TRAIN,
    AsJson,
    Output,
    Overwrite,
    Resume,
    Tokenizer,
    TrainingDevice,
    TrainingDtype,
    TrainingDtypeOption,
    print_json,
    stdout_for_results,
)


def add_commands(app: typer.Typer) -> None:
    app.command(rich_help_panel=TRAIN)(finetune)


def finetune(
    task: Annotated[str, typer.Option(help="sequence-classification, token-classification or causal-lm.")],
    output: Output = Path("runs/finetune"),
    train_file: Annotated[
        list[str] | None, typer.Option(help="Parquet, JSON, CSV or text files; patterns allowed; repeatable.")
    ] = None,
    validation_file: Annotated[list[str] | None, typer.Option(help="Likewise. Default: a tenth of train.")] = None,
    test_file: Annotated[list[str] | None, typer.Option(help="Likewise, scored once at the end.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Instead of files, a dataset on the Hub.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: a fresh model.")] = None,
    config: Annotated[str, typer.Option(help="Fields of a fresh model, as JSON.")] = "{}",
    tokenizer: Tokenizer = None,
    text_column: Annotated[str | None, typer.Option(help="Default: text, or tokens.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: label, or tags.")] = None,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Let tokens see what follows.")] = False,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters only.")] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapters into the saved model.")] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per device in one step.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 3e-4, with LoRA 1e-3.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut texts to so many tokens.")] = None,
    dtype: TrainingDtypeOption = TrainingDtype.auto,
    device: TrainingDevice = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model, or train a fresh one, on labelled data or text.

    Example: groupformer finetune --task sequence-classification --train-file train.parquet --test-file test.parquet
    """
    from ..training import finetuning

    recipe = finetuning.FinetuneRecipe(
        task=task,
        train_files=train_file or [],
        validation_files=validation_file or [],
        test_files=test_file or [],
        dataset=dataset,
        model=model,
        config=parse_fields(config),
        tokenizer=tokenizer,
        text_column=text_column,
        label_column=label_column,
        bidirectional=bidirectional,
        lora=lora,
        lora_rank=lora_rank,
        merge=merge,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        bf16=dtype.as_bf16(),
        device=device,
        seed=seed,
    )
    with stdout_for_results(as_json):
        results = finetuning.finetune(recipe, output, resume=resume, overwrite=overwrite)
    if as_json:
        print_json(results)
        return
    from .tables import print_table

    print_table(f"{task}, saved to {output}", ["figure", "value"], [list(item) for item in results.items()])


def parse_fields(text: str) -> Any:
    """The fields of a model, as `--config` gives them.

    Raises:
        ValueError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config ({text}) is not JSON ({error}); write it like '{{\"hidden_size\": 256}}'") from error
