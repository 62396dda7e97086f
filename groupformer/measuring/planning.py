"""What a checkpoint's KV cache costs, from its config alone: memory, what fits, and the bound on decoding speed.

The arithmetic. A token leaves in each layer a key and a value of `head_dim` numbers for every KV head:

    cache bytes per token = Σ_layers 2 · num_key_value_heads · head_dim · bytes per number

A layer with a sliding window keeps at most `window` tokens. Beside the weights fit
`floor((memory - weights) / cache of one sequence)` sequences. A decoding step reads every weight once (of untied input
embeddings one row a token, which is neglected) and the whole cache, so it cannot be faster than those bytes divided by
the memory's bandwidth (Ainslie et al. 2023, section 1, for why that bound is what is met).
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..conversion.configs import read_config
from ..families.registry import FAMILIES
from ..model.configuration_groupformer import GroupFormerConfig
from ..regrouping.request import regrouped_config


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}

# Layers of these types keep keys and values of single tokens; others (linear attention, state spaces, convolutions)
# keep something else.
WITH_CACHE = {"full_attention", "sliding_attention", "chunked_attention"}

# Fields that say that a model caches something else than the keys and values of its heads, and what that is.
NO_HEADS_CACHED = {
    "kv_lora_rank": "multi-head latent attention caches a compressed vector instead of heads",
    "state_size": "a state-space model keeps a state of fixed size",
    "ssm_state_size": "a state-space model keeps a state of fixed size",
    "mamba_d_state": "a state-space model keeps a state of fixed size",
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a token."""

    kv_heads: int
    head_dim: int
    window: int | None = None

    def numbers(self, tokens: int) -> int:
        """Numbers that the layer holds after so many tokens of one sequence."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return 2 * self.kv_heads * self.head_dim * kept


@dataclass(frozen=True)
class Hardware:
    """Bytes of memory, bytes a second that it is read with, and what numbers take."""

    memory: float = 24e9
    bandwidth: float = 1e12
    weight_bytes: float = 2
    cache_bytes: float = 2


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
        return AutoConfig.from_pretrained(config_file)
    return AutoConfig.from_pretrained(source)


def decoder_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text decoder's config, as a GroupFormer's where the bridge knows the family.

    Raises:
        ValueError: the model keeps no keys and values of heads, or not only of a decoder; the field is named.
    """
    if config.is_encoder_decoder:
        raise ValueError(f"model_type ({config.model_type}) is an encoder-decoder; plan knows decoders")
    config = config.get_text_config(decoder=True)
    for field, reason in NO_HEADS_CACHED.items():
        if getattr(config, field, None):
            raise ValueError(f"{field} ({getattr(config, field)}): {reason}, so there are no KV heads to plan")
    if config.model_type in FAMILIES:
        try:
            return read_config(config, FAMILIES[config.model_type])
        except ValueError:  # something that the bridge refuses, and that need not matter to the cache
            return config
    return config


def layer_caches(config: PreTrainedConfig) -> list[LayerCache]:
    """What each layer keeps; `config` is a decoder's.

    Raises:
        ValueError: a layer keeps something else than keys and values, or the config names no number of heads.
    """
    layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or default_types(config)
    for layer, layer_type in enumerate(types):
        if layer_type not in WITH_CACHE:
            raise ValueError(
                f"layer_types[{layer}] ({layer_type}) keeps no keys and values; plan knows attention layers"
            )
    per_layer = getattr(config, "per_layer_config", None) if isinstance(config, GroupFormerConfig) else None
    caches = []
    for layer in range(layers):
        fields = per_layer[layer] if per_layer is not None else config
        window = getattr(fields, "sliding_window", None) or getattr(fields, "attention_chunk_size", None)
        caches.append(
            LayerCache(kv_heads_of(fields), head_dim_of(config), window if types[layer] != "full_attention" else None)
        )
    return caches


def default_types(config: PreTrainedConfig) -> list[str]:
    """A window without layer_types is one of every layer (Mistral)."""
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


def kv_heads_of(config: Any) -> int:
    """Key-value heads: those of the config, or as many as query heads where it has no such field."""
    heads = getattr(config, "num_key_value_heads", None)
    if heads is None and getattr(config, "multi_query", False):
        return 1
    if heads is None:
        heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(
            f"num_attention_heads ({heads}) of model_type {getattr(config, 'model_type', None)} is not a number of "
            "heads; plan needs the config of a decoder with attention"
        )
    return heads


def head_dim_of(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def parameter_counts(config: PreTrainedConfig) -> tuple[int, int]:
    """All parameters, and those that a decoding step reads (without the untied input embeddings), without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is None or inputs.weight is outputs.weight
    return total, total if tied else total - inputs.weight.numel()


def possible_counts(config: PreTrainedConfig) -> list[int]:
    """The KV-head counts that divide the query heads, most first; none where the config has no such field."""
    if not isinstance(config, GroupFormerConfig) and not hasattr(config, "num_key_value_heads"):
        return []
    heads = config.num_attention_heads
    return [count for count in range(heads, 0, -1) if heads % count == 0]


def with_kv_heads(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The same model with another count in every layer."""
    if isinstance(config, GroupFormerConfig):
        return regrouped_config(config, [count] * config.num_hidden_layers)
    changed = copy.deepcopy(config)
    changed.num_key_value_heads = count
    return changed


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
    # A mixture of experts reads only some of its weights, how many depends on the batch: no bound is given.
    dense = not any((getattr(config, field, 0) or 0) > 1 for field in EXPERTS)
    step = (read * hardware.weight_bytes + batch * sequence) / hardware.bandwidth
    return Plan(
        kv_heads=kv_heads,
        is_present=is_present,
        bytes_per_token=sum(layer.numbers(1) for layer in caches) * hardware.cache_bytes,
        weights=weights,
        cache=batch * sequence,
        sequences=max(0, int((hardware.memory - weights) // sequence)),
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
