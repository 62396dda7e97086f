"""Fine-tuning, full or with LoRA, for the tasks of `tasks.py`, on transformers' Trainer."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from ..conversion.loading import check_token_ids, load_checked, load_config, load_tokenizer
from ..conversion.sources import check_on_hub, check_source, check_tokenizer_source, require
from ..conversion.token_limit import limit_tokenizer
from ..model.configuration_groupformer import GroupFormerConfig
from ..model.tokenization_groupformer import GroupFormerTokenizer
from .data import all_ids, expand, load_files, require_column
from .pretraining import packed_collator
from .recipes import check_model_fields, check_recipe, hardware_arguments, pick_train
from .run import (
    LengthGroupedTrainer,
    SaveOnInterrupt,
    check_resumable,
    last_checkpoint,
    prepare_output,
    write_results,
)
from .tasks import TASKS


RANGES = {
    **dict.fromkeys(("batch_size", "lora_rank", "max_length"), (1, math.inf)),
    **dict.fromkeys(("epochs", "learning_rate", "weight_decay", "seed"), (0, math.inf)),
    "warmup_ratio": (0, 1),
}


@dataclass
class FinetuneRecipe:
    """What `groupformer finetune` needs to know.

    Args:
        task: "sequence-classification", "token-classification" or "causal-lm".
        train_files, validation_files, test_files: Paths or patterns of parquet, JSON, CSV or text files. Without
            validation files, a tenth of the training rows is held out by the seed.
        dataset: Instead of files, a dataset on the Hub with the splits `train`, `validation` and `test`.
        model: Folder or Hub id of a checkpoint. Without one, a fresh GroupFormer with the fields of `config`.
        config: Fields of `GroupFormerConfig` for a fresh model.
        tokenizer: Folder or Hub id; by default the model's own, or the one that ships in the package.
        text_column, label_column: By default, the first known name that the data has.
        bidirectional: Let every token see all others (`is_causal=False`); not for causal-lm.
        lora: Train low-rank adapters (Hu et al. 2021) instead of all weights.
        lora_rank: Their rank; alpha is twice that.
        merge: Merge the adapters into the saved model; otherwise the adapter alone is saved, which needs `model`.
        epochs, batch_size, learning_rate, weight_decay, warmup_ratio: As usual. The learning rate defaults to 1e-3
            with LoRA and to 3e-4 without.
        max_length: Cut texts to so many tokens; by default they stay whole. Of causal-lm, the length of packed rows.
        bf16: Autocast in bfloat16. `None`: on GPUs that have it, and not on the CPU.
        device: "cpu", or the kind of accelerator that is there. `None`: the best there is.
        seed: Of initialisation, data order and dropout.
    """

    task: str
    train_files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    test_files: list[str] = field(default_factory=list)
    dataset: str | None = None
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    bidirectional: bool = False
    lora: bool = False
    lora_rank: int = 16
    merge: bool = False
    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    max_length: int | None = None
    bf16: bool | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task ({self.task!r}) is unknown; choose from {', '.join(TASKS)}")
        if self.bidirectional and self.task == "causal-lm":
            raise ValueError(
                "bidirectional (True) would let causal-lm see the tokens that it is to predict; leave it out"
            )
        if self.merge and not self.lora:
            raise ValueError("merge (True) needs lora=True: without adapters there is nothing to merge")
        if self.lora and self.model is None and not self.merge:
            raise ValueError(
                "lora (True) saves the adapter alone, and its fresh base would be lost; give model or merge"
            )
        if self.model is not None and self.config:
            raise ValueError("--config is for fresh models, but --model is given; leave one of the two out")
        check_recipe(self, RANGES)
        hardware_arguments(self.device, self.bf16)
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} (0.0) must be above 0, or nothing is learnt")
        check_model_fields(self.config)
        check_source(self.model)
        check_tokenizer_source(self.tokenizer)


def load_splits(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The raw rows of train and, where given, validation and test."""
    if bool(recipe.train_files) == (recipe.dataset is not None):
        raise ValueError("train_files or dataset must be given, and not both: pass --train-file, or --dataset")
    if recipe.dataset is not None:
        check_on_hub(recipe.dataset, "dataset")
        from datasets import load_dataset

        splits = pick_train(load_dataset(recipe.dataset), recipe.dataset)
    else:
        files = {"train": recipe.train_files, "validation": recipe.validation_files, "test": recipe.test_files}
        splits = {name: load_files(paths) for name, paths in files.items() if paths}
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def hold_out(splits: dict[str, Any], seed: int) -> dict[str, Any]:
    """The splits, with a tenth of train as validation where there is none."""
    if "validation" in splits:
        return splits
    if len(splits["train"]) < 2:
        raise ValueError("train has 1 row, too few to hold some out; give more rows, or validation files")
    parts = splits["train"].train_test_split(test_size=max(1, len(splits["train"]) // 10), seed=seed)
    return {**splits, "train": parts["train"], "validation": parts["test"]}


def find_column(dataset: Any, wanted: str | None, known: tuple[str, ...], what: str) -> str:
    """The wanted column, or the first known one that the data has.

    Raises:
        ValueError: the data has no such column.
    """
    if wanted is not None:
        require_column(dataset, wanted)
        return wanted
    found = [name for name in known if name in dataset.column_names]
    if not found:
        raise ValueError(
            f"the data has no column named {' or '.join(known)}; pass {what} with one of: "
            f"{', '.join(dataset.column_names)}"
        )
    return found[0]


def load_padding_tokenizer(recipe: FinetuneRecipe) -> Any:
    """The tokenizer, with a pad token."""
    fresh = recipe.model is None and recipe.tokenizer is None
    tokenizer = GroupFormerTokenizer() if fresh else load_tokenizer(str(recipe.model), recipe.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(recipe: FinetuneRecipe, task: Any, tokenizer: Any) -> Any:
    """A checkpoint with the task's head, or a fresh model."""
    options: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if task.labels:
        names = dict(enumerate(task.labels))
        options |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    if recipe.bidirectional:
        options["is_causal"] = False
    if recipe.model is None:
        tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = GroupFormerConfig(**{"vocab_size": len(tokenizer), **tokens, **options, **recipe.config})
        return task.auto_class.from_config(config)
    native = load_config(recipe.model, **options)
    fresh_head = recipe.task != "causal-lm"
    return load_checked(task.auto_class, recipe.model, fresh_head=fresh_head, config=native, dtype=torch.float32)


def check_lengths(model: Any, rows: dict[str, Any]) -> None:
    """Refuses rows that are longer than learned or sinusoidal positions; RoPE warns by itself."""
    config = model.config
    if getattr(config, "position_embedding_type", None) not in ("learned", "sinusoidal"):
        return
    for name, split in rows.items():
        longest = max(len(input_ids) for input_ids in split["input_ids"])
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"{name} has a row of {longest} tokens, but max_position_embeddings "
                f"({config.max_position_embeddings}) is all that position_embedding_type="
                f"{config.position_embedding_type!r} has; pass a max_length of at most that"
            )


def add_lora(model: Any, recipe: FinetuneRecipe, task: Any) -> Any:
    """The model with low-rank adapters on PEFT's default modules; a new head is trained whole."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type=task.peft_task_type, r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank)
    return get_peft_model(model, lora)


def training_arguments(recipe: FinetuneRecipe, task: Any, output: Path, steps: int) -> TrainingArguments:
    """The recipe in Trainer's words: evaluated and saved each epoch, the best checkpoint kept."""
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate or (1e-3 if recipe.lora else 3e-4),
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup_ratio * steps),
        weight_decay=recipe.weight_decay,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=task.best_metric,
        greater_is_better=task.greater_is_better,
        logging_steps=max(1, steps // 20),
        prediction_loss_only=recipe.task == "causal-lm",
        **hardware_arguments(recipe.device, recipe.bf16),
        report_to=[],
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def best_answers(logits: Any, labels: Any) -> torch.Tensor:
    """The best label of each row or token, so that evaluation keeps no logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def finetune(
    recipe: FinetuneRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
) -> dict[str, Any]:
    """Fine-tunes a model by a recipe and saves model (or adapter) and tokenizer to `output`.

    Args:
        recipe: What to train, on what, and how.
        output: Folder of checkpoints and of the final model.
        resume: Go on from the last whole checkpoint in `output`, if there is one.
        overwrite: Replace what is in `output`.
        keep_checkpoints: Keep the best checkpoint when the final model is saved, to go on later with more epochs.

    Returns:
        The scores on validation and test, the number of parameters and of trained ones, and the seconds of training.

    Raises:
        ValueError: a recipe or data that cannot be trained on, an output folder that is not empty, or a finished run
            to resume.
        KeyboardInterrupt: after Ctrl-C; a checkpoint to resume from has been saved.
    """
    metrics = () if recipe.task == "causal-lm" else ("sklearn", "seqeval")
    require("datasets", "accelerate", *metrics, *(("peft",) if recipe.lora else ()), what="fine-tuning")
    output = Path(output)
    if resume:
        check_resumable(output)
    set_seed(recipe.seed)
    splits = load_splits(recipe)
    tokenizer = load_padding_tokenizer(recipe)
    task = build_task(recipe, splits, tokenizer)
    rows = encode(task, hold_out(splits, recipe.seed))
    model = load_model(recipe, task, tokenizer)
    check_lengths(model, rows)
    limit_tokenizer(tokenizer, model.config, fresh=recipe.model is None)
    files = [*recipe.train_files, *recipe.validation_files, *recipe.test_files]
    inputs: list[str | Path] = [*(expand(files) if files else [])]
    inputs += [source for source in (recipe.model, recipe.tokenizer) if source is not None]
    prepare_output(output, resume=resume, overwrite=overwrite, inputs=inputs)
    if recipe.lora:
        model = add_lora(model, recipe, task)

    steps = max(1, math.ceil(recipe.epochs * math.ceil(len(rows["train"]) / recipe.batch_size)))
    predicts_text = recipe.task == "causal-lm"
    on_interrupt = SaveOnInterrupt()
    trainer = (Trainer if predicts_text else LengthGroupedTrainer)(
        model=model,
        args=training_arguments(recipe, task, output, steps),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=packed_collator(model) if predicts_text else task.collator,
        processing_class=tokenizer,
        compute_metrics=None if predicts_text else task.compute_metrics,
        preprocess_logits_for_metrics=None if predicts_text else best_answers,
        callbacks=[on_interrupt],
    )
    with on_interrupt:
        outcome = trainer.train(resume_from_checkpoint=last_checkpoint(output) if resume else None)
    results: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "train_seconds": outcome.metrics["train_runtime"],
    }
    for name in rows:
        if name != "train":
            scores = trainer.evaluate(rows[name], metric_key_prefix=name)
            results |= {key: value for key, value in scores.items() if is_score(key, name)}
    model.config.use_cache = True  # Trainer turns it off for training, and would save that
    save(trainer, recipe, output)
    write_results(trainer, output, results, keep_checkpoints=keep_checkpoints)
    return results


def build_task(recipe: FinetuneRecipe, splits: dict[str, Any], tokenizer: Any) -> Any:
    """The task with the columns and labels of the training rows, all of them: also those to be held out.

    Raises:
        ValueError: a column that is not there, in any split.
    """
    task_class = TASKS[recipe.task]
    text_column = find_column(splits["train"], recipe.text_column, task_class.text_columns, "--text-column")
    label_column = ""
    if task_class.label_columns:
        label_column = find_column(splits["train"], recipe.label_column, task_class.label_columns, "--label-column")
    for split in splits.values():
        for column in filter(None, (text_column, label_column)):
            require_column(split, column)
    task = task_class(tokenizer, text_column, label_column, recipe.max_length, causal=not recipe.bidirectional)
    task.learn_labels(splits["train"])
    return task


def encode(task: Any, splits: dict[str, Any]) -> dict[str, Any]:
    """The splits as token ids and labels.

    Raises:
        ValueError: a row or label that the task cannot use, or a split of which nothing is left.
    """
    rows = {name: task.encode(split, name) for name, split in splits.items()}
    for name, split in rows.items():
        if not len(split):
            raise ValueError(
                f"the {name} text fills no row after tokenizing; give more text, or a smaller --max-length"
            )
        check_token_ids(all_ids(split), task.tokenizer, f"the {name} text")
    return rows


def is_score(key: str, split: str) -> bool:
    """Whether a figure of Trainer's evaluation is a score, and not a timing."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return key.startswith(split) and not key.endswith(timings)


def save(trainer: Trainer, recipe: FinetuneRecipe, output: Path) -> None:
    """Model or adapter, and tokenizer, to the output folder."""
    if recipe.merge:
        merged: Any = trainer.model
        merged.merge_and_unload().save_pretrained(str(output))
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(str(output))
    else:
        trainer.save_model(str(output))
