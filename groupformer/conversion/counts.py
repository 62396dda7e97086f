"""Other numbers of key-value heads: the config with them, and the classes and files that can hold the result.

Nothing here reads weights, so commands say before any work where a result will run.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..families.registry import FAMILIES, is_groupformer, own_config
from ..model.configuration_groupformer import GroupFormerConfig
from .configs import read_config
from .convert import families_for
from .gguf.shapes import exact_architecture
from .weights import native_class


@dataclass(frozen=True)
class Formats:
    """What can hold a model besides GroupFormer's own class.

    Args:
        native: Causal language models of transformers, e.g. "LlamaForCausalLM": the checkpoint's own class, or all
            others that can hold it.
        gguf: Architectures of llama.cpp that `export --format gguf` writes, e.g. "llama".
    """

    native: tuple[str, ...]
    gguf: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """The class that a regrouped model gets."""
        return self.native[0] if self.native else "GroupFormerForCausalLM"

    def __str__(self) -> str:
        names = [*self.native[:1], *(f"GGUF {name}" for name in self.gguf[:1])]
        return ", ".join(names) if names else "GroupFormerForCausalLM only"


def classes_for(config: PreTrainedConfig, counts: int | Sequence[int] | None = None) -> Formats:
    """The classes and files that can hold a decoder with these numbers of key-value heads, from its config alone.

    Args:
        config: Of a native decoder or of a GroupFormer.
        counts: Of all layers, or of each. Default: those that it has.
    """
    ours = as_groupformer(config)
    if ours is None:
        return Formats(own_class(config, counts))
    if counts is not None:
        counts = [counts] * ours.num_hidden_layers if isinstance(counts, int) else list(counts)
        ours = regrouped_config(ours, counts)
    families = families_for(ours, [ours.family]) if ours.family else []
    families = families or families_for(ours)  # slower, and only asked for where its own family cannot hold it
    architectures = []
    for name in families:
        try:
            architectures.append(exact_architecture(ours, name).name)
        except ValueError:
            continue
    native = [native_class(FAMILIES[name], "ForCausalLM").__name__ for name in families]
    return Formats(tuple(native), tuple(dict.fromkeys(architectures)))


def as_groupformer(config: PreTrainedConfig) -> GroupFormerConfig | None:
    """The config as a GroupFormer's, where the bridge can express it."""
    if is_groupformer(config):
        return own_config(config)
    if config.model_type not in FAMILIES:
        return None
    try:
        return read_config(config, FAMILIES[config.model_type])
    except ValueError:
        return None


def own_class(config: PreTrainedConfig, counts: int | Sequence[int] | None) -> tuple[str, ...]:
    """A native class by itself: it holds other counts where its config has a field for one count of all layers."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        return ()
    is_uniform = counts is None or isinstance(counts, int) or len(set(counts)) == 1
    if not is_uniform or (counts is not None and not hasattr(config, "num_key_value_heads")):
        return ()
    return (model_class.__name__,)


def possible_counts(config: PreTrainedConfig) -> list[int]:
    """The KV-head counts that divide the query heads, most first; none where the config has no such field."""
    if not is_groupformer(config) and not hasattr(config, "num_key_value_heads"):
        return []
    heads = config.num_attention_heads
    return [count for count in range(heads, 0, -1) if heads % count == 0]


def with_kv_heads(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The same model with another count in every layer."""
    if is_groupformer(config):
        return regrouped_config(own_config(config), [count] * config.num_hidden_layers)
    changed = copy.deepcopy(config)
    changed.num_key_value_heads = count
    return changed


def regrouped_config(config: GroupFormerConfig, counts: Sequence[int]) -> GroupFormerConfig:
    """A config with these counts: one number where all layers have the same, `per_layer_config` where not."""
    fields = copy.deepcopy(config.to_dict())
    overrides = {int(layer): dict(items) for layer, items in (fields.pop("per_layer_config", None) or {}).items()}
    counts = list(counts)
    common = max(set(counts), key=counts.count)
    for layer_idx, count in enumerate(counts):
        layer = overrides.setdefault(layer_idx, {})
        layer.pop("num_key_value_heads", None)
        if count != common:
            layer["num_key_value_heads"] = count
    overrides = {layer: items for layer, items in overrides.items() if items}
    fields["num_key_value_heads"] = common
    if overrides:
        fields["per_layer_config"] = overrides
    fields["attn_implementation"] = config._attn_implementation
    return GroupFormerConfig(**fields)


def without_counts(config: GroupFormerConfig) -> GroupFormerConfig:
    """The same config, as if all layers had the first one's key-value heads and MLP width."""
    fields, first = config.to_dict(), list(config.per_layer_config)[0]
    layers = fields.pop("per_layer_config", None) or {}
    uniform = {name: getattr(first, name) for name in ("num_key_value_heads", "intermediate_size")}
    layers = {
        layer: {name: value for name, value in overrides.items() if name not in uniform}
        for layer, overrides in layers.items()
    }
    if any(layers.values()):
        fields["per_layer_config"] = {layer: overrides for layer, overrides in layers.items() if overrides}
    return GroupFormerConfig(**{**fields, **uniform})
