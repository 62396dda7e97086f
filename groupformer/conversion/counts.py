"""Other numbers of key-value heads: those that a config can have, and the config with them."""

import copy
from collections.abc import Sequence

from transformers import PreTrainedConfig

from ..families.registry import is_groupformer, own_config
from ..model.configuration_groupformer import GroupFormerConfig


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
