"""Pre-training from scratch: one recipe file, one call, on transformers' Trainer.

Documents are packed into rows of fixed length without seeing each other; the schedule is a cosine with warmup; a run
that was cut off goes on from its last whole checkpoint, on the same data, to the same losses.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments, set_seed

from ..conversion.loading import check_token_ids, load_tokenizer
from ..conversion.sources import check_on_hub, check_tokenizer_source, require
from ..conversion.token_limit import limit_tokenizer
from ..model.configuration_groupformer import GroupFormerConfig
from ..model.modeling_groupformer import GroupFormerForCausalLM
from ..model.tokenization_groupformer import GroupFormerTokenizer
from .data import all_ids, collate_flat, collate_rows, expand, load_files, tokenize_and_pack
from .recipes import check_model_fields, check_recipe, hardware_arguments, pick_train
from .run import SaveOnInterrupt, check_resumable, last_checkpoint, prepare_output, write_results


COUNTS = ("row_length", "max_steps", "batch_size", "gradient_accumulation_steps", "eval_steps", "save_steps")
RANGES = {
    **dict.fromkeys((*COUNTS, "logging_steps"), (1, math.inf)),
    **dict.fromkeys(("learning_rate", "weight_decay", "seed"), (0, math.inf)),
    "warmup_ratio": (0, 1),
}


@dataclass
class PretrainRecipe:
    """What `groupformer pretrain` needs to know; a YAML file holds the same fields.

    Args:
        model: Fields of `GroupFormerConfig`. Special tokens come from the tokenizer.
        train_files, validation_files: Paths or patterns of parquet, JSON, CSV or text files.
        dataset: Instead of files, a dataset on the Hub, whose `train` and `validation` splits are used.
        text_column: The column with the text.
        streaming: Read while training, instead of tokenizing everything before.
        tokenizer: Folder or Hub id; by default the one that ships in the package.
        row_length: Tokens in a packed row.
        max_steps: Optimizer steps.
        batch_size: Rows per device in one forward pass.
        gradient_accumulation_steps: Forward passes in one optimizer step.
        learning_rate, warmup_ratio, weight_decay: Of AdamW with betas 0.9 and 0.95, gradients clipped at norm 1.
        eval_steps, save_steps, logging_steps: How often, in optimizer steps.
        bf16: Autocast in bfloat16. `None`: on GPUs that have it, and not on the CPU.
        device: "cpu", or the kind of accelerator that is there. `None`: the best there is.
        seed: Of initialisation and data order.
    """

    model: dict[str, Any] = field(default_factory=dict)
    train_files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    dataset: str | None = None
    text_column: str = "text"
    streaming: bool = False
    tokenizer: str | None = None
    row_length: int = 512
    max_steps: int = 1000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    warmup_ratio: float = 0.05
    weight_decay: float = 0.1
    eval_steps: int = 200
    save_steps: int = 200
    logging_steps: int = 10
    bf16: bool | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self):
        check_recipe(self, RANGES)
        hardware_arguments(self.device, self.bf16)
        check_model_fields(self.model)
        check_tokenizer_source(self.tokenizer)
        if self.learning_rate == 0:
            raise ValueError("learning_rate (0.0) must be above 0, or nothing is learnt")

    @classmethod
    def from_file(cls, path: str | Path | None, **overrides: Any) -> "PretrainRecipe":
        """The recipe of a YAML file (none: the defaults), with the overrides that are not `None`.

        Raises:
            ValueError: the file is not there or not a mapping, or names a field that no recipe has.
        """
        fields = {}
        if path is not None:
            if not Path(path).is_file():
                raise ValueError(f"recipe ({path}) is not there; check the path")
            require("yaml", what="a recipe file")
            import yaml

            try:
                fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ValueError(f"recipe ({path}) is not YAML: {error}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"recipe ({path}) must be a mapping of fields to values")
        fields.update({name: value for name, value in overrides.items() if value is not None})
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"recipe has unknown fields ({', '.join(unknown)}); choose from {', '.join(known)}")
        return cls(**fields)


def build_model(recipe: PretrainRecipe, tokenizer: Any) -> GroupFormerForCausalLM:
    """A fresh model of the recipe, with the tokenizer's special tokens."""
    config = GroupFormerConfig(
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **recipe.model,
        }
    )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"vocab_size ({config.vocab_size}) is below the tokenizer's {len(tokenizer)} tokens; choose at least that"
        )
    limited = config.position_embedding_type in ("learned", "sinusoidal")
    if limited and recipe.row_length > config.max_position_embeddings:
        raise ValueError(
            f"row_length ({recipe.row_length}) is longer than max_position_embeddings "
            f"({config.max_position_embeddings}), all that position_embedding_type="
            f"{config.position_embedding_type!r} has; choose a shorter row"
        )
    return GroupFormerForCausalLM(config)


def load_splits(recipe: PretrainRecipe, tokenizer: Any) -> tuple[Any, Any]:
    """Packed training and validation rows; validation may be `None`."""
    if bool(recipe.train_files) == (recipe.dataset is not None):
        raise ValueError("train_files or dataset must be given, and not both: pass --train-file, or --dataset")
    if recipe.dataset is not None:
        check_on_hub(recipe.dataset, "dataset")
        from datasets import load_dataset

        splits = pick_train(load_dataset(recipe.dataset, streaming=recipe.streaming), recipe.dataset)
        train, validation = splits["train"], splits.get("validation")
    else:
        train = load_files(recipe.train_files, streaming=recipe.streaming)
        validation = load_files(recipe.validation_files) if recipe.validation_files else None
    rows: list[Any] = [
        None if split is None else tokenize_and_pack(split, tokenizer, recipe.row_length, recipe.text_column)
        for split in (train, validation)
    ]
    for name, split in zip(("training", "validation"), rows):
        if hasattr(split, "__len__") and not len(split):
            raise ValueError(
                f"row_length ({recipe.row_length}) is longer than all the {name} text; choose a shorter row"
            )
        if hasattr(split, "__len__"):
            check_token_ids(all_ids(split), tokenizer, f"the {name} text")
    return rows[0], rows[1]


def bytes_per_token(rows: Any, tokenizer: Any) -> float:
    """UTF-8 bytes of text behind each predicted token of packed rows, to turn losses into bits per byte.

    Only predicted tokens count: the first of each row and document is neither in the loss nor in the bytes.
    """
    predicted = [[label for label in labels if label != -100] for labels in rows["labels"]]
    texts = tokenizer.batch_decode(predicted, skip_special_tokens=True)
    return sum(len(text.encode("utf-8")) for text in texts) / max(1, sum(map(len, predicted)))


class PackedTrainer(Trainer):
    """Trainer that logs the validation loss in bits per byte as well, comparable across tokenizers."""

    def __init__(self, *args, validation_bytes_per_token: float | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.validation_bytes_per_token = validation_bytes_per_token
        if isinstance(self.model, GroupFormerForCausalLM):  # the loss alone is read: its logits need not be kept
            self.model.skip_logits = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs and self.validation_bytes_per_token:
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2) / self.validation_bytes_per_token
        super().log(logs, start_time)


def packed_collator(model: Any) -> Callable:
    """How packed rows become a batch, for the model's attention backend."""
    is_flash = "flash" in (model.config._attn_implementation or "")
    return collate_flat if is_flash else collate_rows


def training_arguments(recipe: PretrainRecipe, output: Path, evaluates: bool) -> TrainingArguments:
    """The recipe in Trainer's words."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup_ratio * recipe.max_steps),
        weight_decay=recipe.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.eval_steps,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=recipe.logging_steps,
        **hardware_arguments(recipe.device, recipe.bf16),
        prediction_loss_only=True,
        report_to=[],
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def pretrain(
    recipe: PretrainRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
) -> dict[str, Any]:
    """Trains a fresh GroupFormer by a recipe and saves model and tokenizer to `output`.

    Args:
        recipe: What to train, on what, and how.
        output: Folder of checkpoints, log and the final model.
        resume: Go on from the last whole checkpoint in `output`, if there is one.
        overwrite: Replace what is in `output`.
        keep_checkpoints: Keep the last checkpoints when the final model is saved, to go on later with more steps.

    Returns:
        Steps and tokens seen, training loss, and validation loss and bits per byte where there is validation data.

    Raises:
        ValueError: a recipe that cannot be run, an output folder that is not empty, or a finished run to resume.
        KeyboardInterrupt: after Ctrl-C; a checkpoint to resume from has been saved.
    """
    require("datasets", "accelerate", what="pre-training")
    output = Path(output)
    if resume:
        check_resumable(output)
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.tokenizer) if recipe.tokenizer else GroupFormerTokenizer()
    model = build_model(recipe, tokenizer)
    train_rows, validation_rows = load_splits(recipe, tokenizer)
    limit_tokenizer(tokenizer, model.config, fresh=True)
    countable = hasattr(validation_rows, "__len__")
    inputs = expand([*recipe.train_files, *recipe.validation_files]) if recipe.train_files else []
    prepare_output(output, resume=resume, overwrite=overwrite, inputs=inputs)
    on_interrupt = SaveOnInterrupt()
    trainer = PackedTrainer(
        model=model,
        args=training_arguments(recipe, output, validation_rows is not None),
        train_dataset=train_rows.with_format("numpy"),
        eval_dataset=None if validation_rows is None else validation_rows.with_format("numpy"),
        data_collator=packed_collator(model),
        processing_class=tokenizer,
        callbacks=[on_interrupt],
        validation_bytes_per_token=bytes_per_token(validation_rows, tokenizer) if countable else None,
    )
    with on_interrupt:
        trainer.train(resume_from_checkpoint=last_checkpoint(output) if resume else None)

    tokens_per_step = recipe.batch_size * recipe.gradient_accumulation_steps * recipe.row_length
    results: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * tokens_per_step,
        "parameters": model.num_parameters(),
    }
    if validation_rows is not None:
        scores = trainer.evaluate()
        results["validation_loss"] = scores["eval_loss"]
        if "eval_bits_per_byte" in scores:
            results["validation_bits_per_byte"] = scores["eval_bits_per_byte"]
    model.config.use_cache = True  # Trainer turns it off for training, and would save that
    trainer.save_model(str(output))
    write_results(trainer, output, results, keep_checkpoints=keep_checkpoints)
    return results
