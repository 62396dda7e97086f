"""`groupformer finetune`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def add_commands(app: typer.Typer) -> None:
    app.command()(finetune)


def finetune(
    task: Annotated[str, typer.Option(help="sequence-classification, token-classification or causal-lm.")],
    output: Annotated[Path, typer.Option(help="Folder of checkpoints and of the final model.")] = Path(
        "runs/finetune"
    ),
    train_file: Annotated[
        list[str] | None, typer.Option(help="Parquet, JSON, CSV or text files; patterns allowed; repeatable.")
    ] = None,
    validation_file: Annotated[list[str] | None, typer.Option(help="Likewise. Default: a tenth of train.")] = None,
    test_file: Annotated[list[str] | None, typer.Option(help="Likewise, scored once at the end.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Instead of files, a dataset on the Hub.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: a fresh model.")] = None,
    config: Annotated[str, typer.Option(help="Fields of a fresh model, as JSON.")] = "{}",
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: the model's.")] = None,
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
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
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
        seed=seed,
    )
    # Trainer prints what it logs; with --json, stdout holds the results alone.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        results = finetuning.finetune(recipe, output, resume=resume, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(results))
        return
    from ..tables import print_table

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
