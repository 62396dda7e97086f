"""Uptraining: a short training of a regrouped model that wins back what the merge lost, distilling from the original.

The GQA paper (Ainslie et al. 2023, section 2.1) goes on with pre-training for 5 % of its tokens. Here the original
teaches as well: its whole distribution over the next token says more than the one token that came.

TRL (1.16) was looked at first. Its `GKDTrainer` has the divergences, but passes no position_ids on, so that packed
documents would see each other, and it has no cross-entropy beside them; its `DistillationTrainer` learns from texts
that the student generates, for prompts and rewards. What is needed is one loss on transformers' own Trainer.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed

from ..conversion.loading import (
    best_device,
    check_token_ids,
    has_fast_bf16,
    load_checked,
    load_config,
    load_tokenizer,
)
from ..conversion.sources import check_source, check_tokenizer_source, require
from ..conversion.token_limit import limit_tokenizer
from .data import all_ids, expand, load_files, tokenize_and_pack
from .distillation import DistillationTrainer
from .pretraining import PackedTrainer, bytes_per_token, packed_collator
from .readiness import (
    ATTENTION_MODULES,
    check_has_projections,
    check_ids_fit,
    check_keeps_documents_apart,
    check_same_settings,
    check_same_vocabulary,
    keep_settings,
    settings_of,
)
from .recipes import hardware_arguments
from .run import (
    SaveOnInterrupt,
    check_output_is_no_source,
    check_resumable,
    last_checkpoint,
    prepare_output,
    write_results,
)


@dataclass
class UptrainRecipe:
    """What `groupformer uptrain` needs to know.

    Args:
        model: Folder or Hub id of the regrouped model.
        teacher: Folder or Hub id of the original, with the same vocabulary. Needed unless `kl_weight` is 0.
        train_files, validation_files: Paths or patterns of parquet, JSON, CSV or text files. Without validation files,
            rows of the training text are held out: every 20th, but no more than a tenth of the run's time reads.
        tokens: How many tokens to train on; the data are repeated where they are fewer.
        kl_weight: Of KL(teacher ‖ student), the mean over tokens (Hinton et al. 2015, section 2).
        ce_weight: Of the text's own cross-entropy.
        temperature: Of both distributions in the KL, which is multiplied by its square (likewise).
        lora: Train low-rank adapters of the attention projections, merged into the weights at the end.
        lora_rank: Their rank; alpha is twice that.
        attention_only: Train the attention's own parameters, and nothing else.
        text_column: The column with the text.
        tokenizer: Folder or Hub id; by default the model's.
        row_length: Tokens in a packed row.
        batch_size: Rows per device in one forward pass.
        gradient_accumulation_steps: Forward passes in one optimizer step.
        learning_rate: Highest of the cosine. Default: 5e-4, with LoRA 1e-3.
        warmup_ratio, weight_decay: Of AdamW with betas 0.9 and 0.95, gradients clipped at norm 1.
        evaluations: How often to evaluate, and to save, on the way.
        bf16: Autocast in bfloat16. `None`: on GPUs that have it, and on CPUs with matrix units for it.
        device: "cpu", or the kind of accelerator that is there. `None`: the best there is.
        seed: Of data order and adapters.
    """

    model: str
    teacher: str | None = None
    train_files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    tokens: int = 1_000_000
    kl_weight: float = 1.0
    ce_weight: float = 0.1
    temperature: float = 1.0
    lora: bool = False
    lora_rank: int = 16
    attention_only: bool = False
    text_column: str = "text"
    tokenizer: str | None = None
    row_length: int = 512
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    warmup_ratio: float = 0.05
    weight_decay: float = 0.1
    evaluations: int = 10
    bf16: bool | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self):
        hardware_arguments(self.device, self.bf16)
        check_source(self.model)
        check_source(self.teacher)
        check_tokenizer_source(self.tokenizer)
        counts = ("tokens", "row_length", "batch_size", "gradient_accumulation_steps", "lora_rank", "evaluations")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("kl_weight", "ce_weight", "weight_decay", "warmup_ratio"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        for name in ("temperature", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} ({value}) must be above 0, and finite")
        if self.lora and self.attention_only:
            raise ValueError("lora (True) and attention_only (True) train different parameters; choose one of them")
        if self.kl_weight == 0 and self.ce_weight == 0:
            raise ValueError("kl_weight (0) and ce_weight (0) leave nothing to learn from; set one above 0")
        if self.kl_weight > 0 and self.teacher is None:
            raise ValueError(
                f"teacher (None) is needed with kl_weight ({self.kl_weight}); name the original, or set kl_weight to 0"
            )

    @property
    def rows_per_step(self) -> int:
        """Of all processes that torchrun or `accelerate launch` has started."""
        return self.batch_size * self.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))

    @property
    def tokens_per_step(self) -> int:
        return self.row_length * self.rows_per_step

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)


def load_models(recipe: UptrainRecipe) -> tuple[Any, Any, torch.dtype | None]:
    """The student in float32, the teacher or `None`, and the dtype of the student's checkpoint.

    Raises:
        ValueError: a bidirectional student, another vocabulary, rows that are longer than the positions, a model in
            which packed documents see each other, or one that has not the projections that adapters train.
    """
    configs: dict[str, Any] = {
        name: load_config(source)
        for name, source in (("model", recipe.model), ("teacher", recipe.teacher if recipe.kl_weight else None))
        if source is not None
    }
    for name, config in configs.items():
        if getattr(config, "is_causal", True) is False:
            raise ValueError(f"{name} ({getattr(recipe, name)}) has is_causal=False: it predicts no next token")
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and recipe.row_length > limit:
            raise ValueError(
                f"row_length ({recipe.row_length}) is longer than max_position_embeddings ({limit}) of {name}; "
                "choose a shorter row"
            )
    sizes = {name: config.vocab_size for name, config in configs.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"teacher has vocab_size {sizes['teacher']}, but model has {sizes['model']}; "
            "distillation needs one vocabulary: choose the model that this one was made from"
        )
    student: Any = load_checked(AutoModelForCausalLM, recipe.model, dtype=torch.float32)
    teacher: Any = None
    if recipe.teacher is not None and "teacher" in configs:
        teacher = load_checked(AutoModelForCausalLM, recipe.teacher, dtype="auto").requires_grad_(False)
    check_keeps_documents_apart("model", recipe.model, student)
    if teacher is not None:
        check_keeps_documents_apart("teacher", str(recipe.teacher), teacher)
    if recipe.lora:
        check_has_projections(recipe.model, student)
    return student, teacher, configs["model"].dtype


def load_shared_tokenizer(recipe: UptrainRecipe) -> Any:
    """The recipe's tokenizer, or the model's.

    Raises:
        ValueError: it has no tokens, or the teacher's gives tokens other ids.
    """
    tokenizer = load_tokenizer(recipe.model, recipe.tokenizer)
    if recipe.teacher is not None and recipe.kl_weight:
        check_same_vocabulary(recipe.teacher, tokenizer)
    return tokenizer


def load_rows(recipe: UptrainRecipe, tokenizer: Any) -> tuple[Any, Any]:
    """Packed rows to train and to validate on; without validation files, every 20th row (at least one) is held out, of
    which as many are read as take a tenth of the run's time.

    Raises:
        ValueError: files that cannot be read, or too little text for the rows.
    """
    rows = tokenize_and_pack(load_files(recipe.train_files), tokenizer, recipe.row_length, recipe.text_column)
    if recipe.validation_files:
        texts = load_files(recipe.validation_files)
        validation = tokenize_and_pack(texts, tokenizer, recipe.row_length, recipe.text_column)
    else:
        held_out = range(0, len(rows), 20)
        most = validation_rows_at_most(recipe)
        validation = rows.select(held_out[:: max(1, math.ceil(len(held_out) / most))])
        rows = rows.select([index for index in range(len(rows)) if index % 20])
    for name, split in (("training", rows), ("validation", validation)):
        if not len(split):
            raise ValueError(
                f"row_length ({recipe.row_length}) leaves no row of {name} text; choose shorter rows or give more text"
            )
        check_token_ids(all_ids(split), tokenizer, f"the {name} text")
    return repeat_to_length(rows, recipe), validation


def validation_rows_at_most(recipe: UptrainRecipe) -> int:
    """Rows whose evaluations together take about a tenth of the run's time.

    A step reads each token forwards and backwards and once more as the teacher: four times what evaluating it takes.
    """
    evaluations = recipe.evaluations + 2  # the first of the student, and the original's
    return max(1, int(0.4 * recipe.tokens / recipe.row_length / evaluations))


def repeat_to_length(rows: Any, recipe: UptrainRecipe) -> Any:
    """Repeat the rows where they are fewer than the steps read.

    Trainer would end each pass over them with a batch that is not full, and see fewer tokens than it was asked to.
    """
    needed = recipe.steps * recipe.rows_per_step
    return rows if len(rows) >= needed else rows.select([index % len(rows) for index in range(needed)])


def wants_bf16(recipe: UptrainRecipe) -> bool | None:
    """The recipe's `bf16`; on a CPU by default whether it has matrix units, which multiply several times as fast."""
    if recipe.bf16 is not None or best_device(recipe.device) != "cpu":
        return recipe.bf16
    return has_fast_bf16("cpu")


def training_arguments(recipe: UptrainRecipe, output: Path, resumed: bool) -> TrainingArguments:
    """The recipe in Trainer's words."""
    every = math.ceil(recipe.steps / recipe.evaluations)  # rounded up: no more evaluations than were asked for
    return TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate if recipe.learning_rate is not None else 1e-3 if recipe.lora else 5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup_ratio * recipe.steps),
        weight_decay=recipe.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_on_start=not resumed,
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, every // 5),
        **hardware_arguments(recipe.device, wants_bf16(recipe)),
        prediction_loss_only=True,
        report_to=[],
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def add_lora(model: Any, recipe: UptrainRecipe) -> Any:
    """The model with low-rank adapters (Hu et al. 2021) on its attention projections."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        target_modules=ATTENTION_MODULES,
    )
    return get_peft_model(model, lora)


def uptrain(
    recipe: UptrainRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
) -> dict[str, Any]:
    """Trains a regrouped model by a recipe and saves it, merged and in its checkpoint's dtype, to `output`.

    Args:
        recipe: What to train, from whom, on what, and how.
        output: Folder of checkpoints, log and the final model.
        resume: Go on from the last whole checkpoint in `output`, if there is one.
        overwrite: Replace what is in `output`.
        keep_checkpoints: Keep the last checkpoints when the final model is saved, to go on later with more tokens.
            They hold float32 weights and the optimizer's state.

    Returns:
        Steps and tokens seen; validation loss and bits per byte at the end; "curve", these figures by tokens seen,
        from 0 on; and "original", the teacher's loss and bits per byte on the same rows, where there is a teacher.

    Raises:
        ValueError: a recipe that cannot be run, or an output folder that is not empty, is one of the inputs, or holds
            a run of other settings. Nothing is written or deleted then.
        KeyboardInterrupt: after Ctrl-C; a checkpoint to resume from has been saved.
    """
    require("datasets", "accelerate", *(("peft",) if recipe.lora else ()), what="uptraining")
    output = Path(output)
    if resume:
        check_resumable(output)
    sources = [source for source in (recipe.model, recipe.teacher) if source is not None]
    check_output_is_no_source(output, sources)
    set_seed(recipe.seed)
    tokenizer = load_shared_tokenizer(recipe)
    student, teacher, dtype = load_models(recipe)
    train_rows, validation_rows = load_rows(recipe, tokenizer)
    for name, rows in (("training", train_rows), ("validation", validation_rows)):
        check_ids_fit(rows, name, tokenizer, student.config.get_text_config().vocab_size)
    settings, checkpoint = settings_of(recipe, student), last_checkpoint(output) if resume else None
    if checkpoint is not None:
        check_same_settings(output, settings)
    # Whatever can fail comes first: an output that is overwritten is gone.
    model = add_lora(student, recipe) if recipe.lora else student
    if recipe.attention_only:
        train_attention_only(student)
    arguments = training_arguments(recipe, output, resumed=checkpoint is not None)
    inputs: list[str | Path] = [*expand([*recipe.train_files, *recipe.validation_files]), *sources]
    inputs.append(recipe.tokenizer or recipe.model)
    with arguments.main_process_first(local=False):
        prepare_output(output, resume=resume, overwrite=overwrite, inputs=inputs)
    on_interrupt = SaveOnInterrupt()
    shared: dict[str, Any] = dict(
        args=arguments,
        eval_dataset=validation_rows.with_format("numpy"),
        data_collator=packed_collator(student),
        processing_class=tokenizer,
        validation_bytes_per_token=bytes_per_token(validation_rows, tokenizer),
    )
    trainer = DistillationTrainer(
        model=model,
        train_dataset=train_rows.with_format("numpy"),
        callbacks=[on_interrupt],
        teacher=teacher,
        recipe=recipe,
        **shared,
    )
    if checkpoint is None:
        trainer.accelerator.wait_for_everyone()  # a process that comes late would find the output not empty
        if trainer.is_world_process_zero():
            keep_settings(output, settings)
    original = None if teacher is None else evaluate_alone(teacher, shared)
    with on_interrupt:
        trainer.train(resume_from_checkpoint=checkpoint)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    is_done = bool(evaluations) and evaluations[-1]["step"] == trainer.state.global_step
    scores = evaluations[-1] if is_done else trainer.evaluate()
    results: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * recipe.tokens_per_step,
        "validation_loss": scores["eval_loss"],
        "validation_bits_per_byte": scores["eval_bits_per_byte"],
        "curve": evaluation_curve(trainer.state.log_history, recipe),
    }
    if original is not None:
        results["original"] = {"loss": original["eval_loss"], "bits_per_byte": original["eval_bits_per_byte"]}
    whole = gather(trainer, recipe)
    if trainer.is_world_process_zero():
        save(whole, tokenizer, output, dtype)
    write_results(trainer, output, results, keep_checkpoints=keep_checkpoints)
    trainer.accelerator.wait_for_everyone()  # to whoever comes later, the output is whole
    return results


def evaluate_alone(model: Any, shared: dict[str, Any]) -> dict[str, float]:
    """Scores of a model that is not trained."""
    trainer = PackedTrainer(model=model, **shared)
    trainer.is_fsdp_enabled = False  # what is sharded already; accelerate shards a model with its optimizer only
    return trainer.evaluate()


def gather(trainer: DistillationTrainer, recipe: UptrainRecipe) -> Any:
    """The trained model, whole; where FSDP shards it, the first process builds it anew from what all processes hold,
    and the others get `None`."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_fsdp_enabled:
        return model
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return None
    whole: Any = load_checked(AutoModelForCausalLM, recipe.model, dtype=torch.float32)
    whole = add_lora(whole, recipe) if recipe.lora else whole
    whole.load_state_dict(state)
    return whole


def train_attention_only(model: Any) -> None:
    """Freezes all parameters but those of attention modules.

    Raises:
        ValueError: the model has no attention module.
    """
    attention = [module for module in model.modules() if "Attention" in type(module).__name__]
    if not attention:
        raise ValueError(f"attention_only (True) finds no attention module in {type(model).__name__}")
    model.requires_grad_(False)
    for module in attention:
        module.requires_grad_(True)


def evaluation_curve(log: list[dict[str, Any]], recipe: UptrainRecipe) -> list[dict[str, float]]:
    """Tokens seen, validation loss and bits per byte of each evaluation, each number of tokens once."""
    curve = {
        entry["step"]: {
            "tokens": entry["step"] * recipe.tokens_per_step,
            "loss": entry["eval_loss"],
            "bits_per_byte": entry["eval_bits_per_byte"],
        }
        for entry in log
        if "eval_bits_per_byte" in entry
    }
    return [curve[step] for step in sorted(curve)]


def save(model: Any, tokenizer: Any, output: Path, dtype: torch.dtype | None) -> None:
    """The plain model, adapters merged, and its tokenizer."""
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    plain.config.use_cache = True  # Trainer turns it off for training, and would save that
    plain.to(dtype or torch.float32).save_pretrained(output)
    limit_tokenizer(tokenizer, plain.config)
    tokenizer.save_pretrained(output)
