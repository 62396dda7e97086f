"""What a checkpoint's KV cache costs, from its config alone: memory, what fits, and the bound on decoding speed.

The cache's bytes are those of `cache`. Beside the weights fit `floor((memory - weights) / cache of one sequence)`
sequences, their cache in whole blocks where the engine allots blocks. A decoding step reads every weight once (of
untied input embeddings one row a token, which is neglected) and the whole cache, so it cannot be faster than those
bytes divided by the memory's bandwidth (Ainslie et al. 2023, section 1, for why that bound is what is met).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..conversion.counts import possible_counts, with_kv_heads
from ..conversion.loading import config_of_known_class, refused_by_library
from ..conversion.loading import load_config as read_config
from .cache import decoder_of, layer_caches, positions_of


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Hardware:
    """Bytes of memory, bytes a second that it is read with, what numbers take, and how an engine allots its cache."""

    memory: float = 24e9
    bandwidth: float = 1e12
    weight_bytes: float = 2
    cache_bytes: float = 2
    block_size: int = 1
    prefill_chunk: int = 1


def hardware(
    gpu_memory: float,
    bandwidth: float,
    dtype: str,
    cache_dtype: str | None = None,
    block_size: int = 1,
    prefill_chunk: int = 1,
) -> Hardware:
    """A GPU of so many GB and GB/s; numbers of the cache take as many bits as the weights, and 16 at least.

    Raises:
        ValueError: an unknown dtype.
    """
    for name, value in (("dtype", dtype), ("cache_dtype", cache_dtype)):
        if value is not None and value not in BYTES:
            raise ValueError(f"{name} ({value}) is unknown; choose {', '.join(BYTES)}")
    cache_bytes = BYTES[cache_dtype] if cache_dtype else max(2, BYTES[dtype])
    return Hardware(gpu_memory * 1e9, bandwidth * 1e9, BYTES[dtype], cache_bytes, block_size, prefill_chunk)


@dataclass(frozen=True)
class Plan:
    """One row of the table; bytes, and tokens a second. `None` where the model says nothing about it."""

    kv_heads: int | str
    is_present: bool
    bytes_per_token: float
    weights: float
    cache: float
    sequences: int
    tokens_per_second: float | None
    share: float


def load_config(source: str | Path | None, config_file: Path | None = None) -> PreTrainedConfig:
    """The config of a folder or Hub id, or of a file by itself; no weights are read.

    Raises:
        ValueError: neither or both were given, or the file is not there.
    """
    if (source is None) == (config_file is None):
        raise ValueError(
            f"source ({source}) and config ({config_file}): give one of them, a checkpoint or a config.json"
        )
    if source is None:
        assert config_file is not None
        if not config_file.is_file():
            raise ValueError(f"config ({config_file}) is not a file; give the path of a config.json")
        with refused_by_library(config_file):
            return config_of_known_class(config_file)
    return read_config(source)


def parameter_counts(config: PreTrainedConfig) -> tuple[int, int]:
    """All parameters, and those that a decoding step reads (without the untied input embeddings), without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is None or inputs.weight is outputs.weight
    return total, total if tied else total - inputs.weight.numel()


def plan(config: PreTrainedConfig, context: int, batch: int, hardware: Hardware) -> list[Plan]:
    """A row for the model as it is, and one for each other KV-head count that its query heads allow.

    Args:
        config: any decoder's; `decoder_of` is applied.
        context: tokens of each sequence.
        batch: sequences that are decoded together.

    Raises:
        ValueError: a number is not positive, or the model has no cache of heads; see `decoder_of` and `layer_caches`.
    """
    for name, value in {"context": context, "batch": batch, **vars(hardware)}.items():
        if not value > 0:
            raise ValueError(f"{name} ({value}) must be positive")
    config = decoder_of(config)
    present = layer_caches(config)
    uniform = present[0].kv_heads if len({layer.kv_heads for layer in present}) == 1 else None
    models: dict[int | str, PreTrainedConfig] = {
        count: with_kv_heads(config, count) for count in possible_counts(config)
    }
    label: int | str = uniform if uniform is not None else "by layer"
    models[label] = config
    order = sorted(models, key=lambda count: -sum(layer.kv_heads for layer in layer_caches(models[count])))
    numbers = sum(layer.numbers(context) for layer in present)
    return [row(models[count], count, count == label, context, batch, hardware, numbers) for count in order]


DEFAULT_CONTEXT = 4096


def check_context(config: PreTrainedConfig, context: int | None) -> int:
    """The tokens of a sequence that are planned for. Default: 4096, or the model's positions where it has fewer.

    Raises:
        ValueError: more than the model has positions.
    """
    limit = positions_of(decoder_of(config))
    if context is None:
        return min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if limit is not None and context > limit:
        raise ValueError(f"--context ({context:,}) exceeds the model's {limit:,} positions; choose at most {limit:,}")
    return context


def recommend(plans: list[Plan], batch: int) -> Plan | None:
    """The row with the most KV heads, at most the present ones, that regroup can reach and that fits the batch.

    `None` where none does.
    """
    return next((each for each in reachable(plans) if each.sequences >= batch), None)


def next_smaller(plans: list[Plan], above: Plan) -> Plan | None:
    """The row with the next fewer KV heads that regroup can reach; `None` where there is none."""
    return next((each for each in reachable(plans) if each.share < above.share), None)


def reachable(plans: list[Plan]) -> list[Plan]:
    """The row of the model as it is, and of the counts that regroup can give it, from many heads to few."""
    (present,) = [each for each in plans if each.is_present]
    now = present.kv_heads
    return [
        each
        for each in plans
        if each.is_present or (each.share < 1 and (not isinstance(now, int) or now % int(each.kv_heads) == 0))
    ]


def row(
    config: PreTrainedConfig,
    kv_heads: int | str,
    is_present: bool,
    context: int,
    batch: int,
    hardware: Hardware,
    present_numbers: int,
) -> Plan:
    caches = layer_caches(config)
    total, read = parameter_counts(config)
    numbers = sum(layer.numbers(context) for layer in caches)
    weights, sequence = total * hardware.weight_bytes, numbers * hardware.cache_bytes
    blocks = (hardware.block_size, hardware.prefill_chunk)
    allotted = sum(layer.numbers(context, *blocks) for layer in caches) * hardware.cache_bytes
    # A mixture of experts reads only some of its weights, how many depends on the batch: no bound is given.
    dense = not any((getattr(config, field, 0) or 0) > 1 for field in EXPERTS)
    step = (read * hardware.weight_bytes + batch * sequence) / hardware.bandwidth
    return Plan(
        kv_heads=kv_heads,
        is_present=is_present,
        bytes_per_token=sum(layer.numbers(1) for layer in caches) * hardware.cache_bytes,
        weights=weights,
        cache=batch * sequence,
        sequences=max(0, int((hardware.memory - weights) // allotted)),
        tokens_per_second=batch / step if dense else None,
        share=numbers / present_numbers,
    )


def figure_of(plans: list[Plan], title: str) -> Any:
    """Cache size, and the sequences that fit, over KV heads, as a matplotlib figure."""
    from matplotlib.figure import Figure

    names = [str(each.kv_heads) for each in plans]
    figure = Figure(figsize=(9, 3.5))
    left, right = figure.subplots(1, 2)
    colors = ["C1" if each.is_present else "C0" for each in plans]
    left.bar(names, [each.cache / 1e9 for each in plans], color=colors)
    left.set_ylabel("KV cache, GB")
    right.bar(names, [each.sequences for each in plans], color=colors)
    right.set_ylabel("sequences that fit")
    for axes in (left, right):
        axes.set_xlabel("key-value heads (orange: as it is)")
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    return figure


def draw(plans: list[Plan], title: str, path: Path) -> None:
    """Draws `figure_of` into a file."""
    figure_of(plans, title).savefig(path, dpi=150)
