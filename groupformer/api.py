"""What the commands do, as functions with the commands' defaults: results instead of tables.

Training needs packages of the extra `training`, so it is imported where it is used.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .measuring import evaluation, planning


def evaluate(
    model: PreTrainedModel | str | Path, texts: Iterable[str], *, tokenizer: Any = None, **options: Any
) -> dict[str, float]:
    """Bits per byte and perplexity of a causal language model on texts, as `groupformer eval` measures them.

    Args:
        model: A model in memory, or a folder or Hub id.
        texts: Documents; empty ones are passed over.
        tokenizer: The tokenizer of a model in memory; for a checkpoint a folder or Hub id, by default its own.
        options: `window`, `stride` and `batch_size`, and for a checkpoint `device` and `dtype`, as the command's.

    Returns:
        "bits_per_byte", "perplexity" (per token), "loss" (nats per token), "tokens", "bytes", "documents", "window"
        and "stride".

    Raises:
        ValueError: a model in memory without a tokenizer; else as `measuring.evaluation.evaluate`.
    """
    if not isinstance(model, PreTrainedModel):
        return evaluation.evaluate_checkpoint(str(model), list(texts), tokenizer=tokenizer, **options)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        raise ValueError(f"tokenizer ({tokenizer}) of a model in memory must be a loaded one: AutoTokenizer's")
    return evaluation.evaluate(model, tokenizer, texts, **options)


def plan(
    source: PreTrainedConfig | PreTrainedModel | str | Path,
    *,
    context: int | None = None,
    batch: int = 1,
    gpu_memory: float = 24.0,
    bandwidth: float = 1000.0,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
) -> list[planning.Plan]:
    """What a decoder's KV cache costs at each number of KV heads, as `groupformer plan` counts it.

    Args:
        source: A config, a model, a folder or a Hub id; no weights are read.
        context: Tokens of each sequence. Default: 4096, or all positions where there are fewer.
        batch: Sequences decoded together.
        gpu_memory: Memory of the GPU, in GB (1e9 bytes).
        bandwidth: Bandwidth of that memory, in GB/s.
        dtype: Of the weights: "float32", "bfloat16", "float16", "int8" or "int4".
        cache_dtype: Of the cache. Default: as the weights, at least 16 bits.

    Raises:
        ValueError: an unknown dtype, a number that is not positive, or a model without a cache of heads.
    """
    config: Any = planning.load_config(source) if isinstance(source, (str, Path)) else source
    config = getattr(config, "config", config)
    context = planning.check_context(config, context)
    return planning.plan(config, context, batch, planning.hardware(gpu_memory, bandwidth, dtype, cache_dtype))


def uptrain(
    model: str | Path, output: str | Path, *, resume: bool = False, overwrite: bool = False, **fields: Any
) -> dict[str, Any]:
    """Train a regrouped checkpoint to answer as the original does, as `groupformer uptrain`.

    Args:
        model: Folder or Hub id of the regrouped model.
        output: Folder of checkpoints, log and the final model.
        resume: Go on from the last whole checkpoint in `output`, if there is one.
        overwrite: Replace what is in `output`.
        fields: Of `training.uptraining.UptrainRecipe`: `teacher`, `train_files`, `validation_files`, `tokens` ...

    Returns:
        Steps and tokens seen, validation loss and bits per byte, and their curve.

    Raises:
        ValueError: a recipe that cannot be run, or an output folder that is not empty. Nothing is written then.
    """
    from .training import uptraining

    recipe = uptraining.UptrainRecipe(model=str(model), **fields)
    return uptraining.uptrain(recipe, output, resume=resume, overwrite=overwrite)
