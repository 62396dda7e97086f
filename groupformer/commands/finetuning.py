"""`groupformer finetune`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import (
    TRAIN,
    AsJson,
    Cost,
    KeepCheckpoints,
    Output,
    Overwrite,
    Resume,
    Tokenizer,
    TrainingDevice,
    TrainingDtype,
    TrainingDtypeOption,
    check_source,
    print_json,
    print_outcome,
    quoted,
    resumable,
    size_on_disk,
    stdout_for_results,
)


class Task(str, Enum):
    """The tasks of `training.tasks`."""

    causal_lm = "causal-lm"
    sequence_classification = "sequence-classification"
    token_classification = "token-classification"


def add_commands(app: typer.Typer) -> None:
    app.command(rich_help_panel=TRAIN)(finetune)


def finetune(
    task: Annotated[Task, typer.Option(help="What to learn.")],
    output: Output = Path("runs/finetune"),
    train_file: Annotated[
        list[str] | None, typer.Option(help="Parquet, JSON, CSV or text files; patterns allowed; repeatable.")
    ] = None,
    validation_file: Annotated[
        list[str] | None, typer.Option(help="Held-out rows. Default: a tenth of --train-file.")
    ] = None,
    test_file: Annotated[list[str] | None, typer.Option(help="Rows that are scored once, at the end.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Instead of files, a dataset on the Hub.")] = None,
    model: Annotated[
        str | None,
        typer.Option(callback=check_source, help="Folder, GGUF, adapter or Hub id. Default: a fresh model."),
    ] = None,
    config: Annotated[str, typer.Option(help="Fields of a fresh model, as JSON.")] = "{}",
    tokenizer: Tokenizer = None,
    text_column: Annotated[
        str | None, typer.Option(help="Default: text, messages, sentence, utterance, tokens or words.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Default: label, labels, intent, tags, ner_tags or pos_tags.")
    ] = None,
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
    keep_checkpoints: KeepCheckpoints = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model, or train a fresh one, on labelled data or text.

    Example: groupformer finetune --task sequence-classification --train-file train.parquet --test-file test.parquet
    """
    from ..conversion.sources import require

    require("datasets", "accelerate", what="finetune")
    from ..training import finetuning

    cost = Cost()
    recipe = finetuning.FinetuneRecipe(
        task=task.value,
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
    with stdout_for_results(as_json), resumable(output):
        results = finetuning.finetune(
            recipe, output, resume=resume, overwrite=overwrite, keep_checkpoints=keep_checkpoints
        )
    if as_json:
        print_json(results)
        return
    from .tables import print_table

    print_table(f"Fine-tuning, {task.value}", ["figure", "value"], [list(item) for item in results.items()])
    made = "the adapter alone" if lora and not merge else "the whole model"
    next_line = (
        f'groupformer generate {quoted(output)} "The river"'
        if task is Task.causal_lm
        else f"groupformer info {quoted(output)}"
    )
    print_outcome(f"{output}: {made}", {"size": size_on_disk(output), "took": cost}, [next_line])


def parse_fields(text: str) -> Any:
    """The fields of a model, as `--config` gives them.

    Raises:
        ValueError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--config ({text}) is not JSON ({error}); write it like '{{\"hidden_size\": 256}}'"
        ) from error
