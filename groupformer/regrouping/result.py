"""Which class and config can hold other counts of key-value heads, and what its config records."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion.counts import regrouped_config
from ..families.registry import is_groupformer
from ..model.configuration_groupformer import GroupFormerConfig
from ..version import __version__
from .attention import find_attention
from .layouts import AttentionLayout
from .probing import build_on_meta


@dataclass(frozen=True)
class Result:
    """A config with other counts, and the attention that its model has.

    Args:
        config: The new config.
        layouts: Of each layer.
        fields: What changed in a native config, by name.
    """

    config: PreTrainedConfig
    layouts: list[AttentionLayout]
    fields: dict[str, Any]


def find_result(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    layouts: Sequence[AttentionLayout],
    counts: Sequence[int],
    num_heads: int | None = None,
) -> Result | None:
    """A config of the same class with these counts; None where the class has none.

    The class itself decides: a config counts when the attention of its model, proved anew, has the wanted heads, and
    all tensors outside attention keep their shapes.

    Args:
        layouts: The present attention.
        counts: Key-value heads of each layer.
        num_heads: Query heads; by default as many as now.
    """
    heads = num_heads or layouts[0].geometry.num_heads
    wanted = [
        (layout.path, heads, count, layout.geometry.head_dim, layout.geometry.rotary_dim, layout.is_interleaved)
        for layout, count in zip(layouts, counts)
    ]
    for new, fields in candidates(config, counts, layouts, num_heads):
        try:
            type(new).from_dict(new.to_dict())  # as a file of it will be read
            found = find_attention(model_class, new)
        except (ValueError, RuntimeError, StrictDataclassError):  # no config of this class, or none with such layers
            continue
        shapes = [(x.path, x.geometry.num_heads, x.geometry.num_key_value_heads, x.geometry.head_dim) for x in found]
        rotations = [(x.geometry.rotary_dim, x.is_interleaved) for x in found]
        if [(*shape, *rotation) for shape, rotation in zip(shapes, rotations)] != wanted:
            continue
        if other_shapes(model_class, new, found) == other_shapes(model_class, config, layouts):
            return Result(new, found, fields)
    return None


def candidates(
    config: PreTrainedConfig, counts: Sequence[int], layouts: Sequence[AttentionLayout], num_heads: int | None
) -> Iterator[tuple[PreTrainedConfig, dict[str, Any]]]:
    """Configs that may have these counts, and the fields in which they differ."""
    more: dict[str, Any] = {}
    if num_heads not in (None, layouts[0].geometry.num_heads):
        more = {"num_attention_heads": num_heads, "head_dim": layouts[0].geometry.head_dim}
    if is_groupformer(config):
        yield groupformer_config(with_fields(config, more), counts), {}
        return
    common = max(set(counts), key=list(counts).count)
    by_layer = {layer: {"num_key_value_heads": count} for layer, count in enumerate(counts) if count != common}
    if by_layer:
        changes: list[dict[str, Any]] = [{"num_key_value_heads": common, "per_layer_config": by_layer}]
    else:
        changes = [{"num_key_value_heads": common}, {"num_kv_heads": common}, {"multi_query": common == 1}]
    for fields in changes:
        if all(hasattr(config, name) for name in fields if name != "per_layer_config"):
            yield with_fields(config, {**fields, **more}), {**fields, **more}


def with_fields(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    """A copy of a config with other fields."""
    new = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def groupformer_config(config: PreTrainedConfig, counts: Sequence[int]) -> PreTrainedConfig:
    """A GroupFormer's config with these counts, of the same class: a repository's own code has one, too."""
    new = regrouped_config(cast(GroupFormerConfig, config), counts)
    return new if type(config) is GroupFormerConfig else type(config).from_dict(new.to_dict())


def other_shapes(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, layouts: Sequence[AttentionLayout]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors outside attention."""
    stems = tuple(f"{layout.path}." for layout in layouts)
    state_dict = build_on_meta(model_class, config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items() if not name.startswith(stems)}


# Provenance ----------------------------------------------------------------------------------------------------------


def short_counts(layouts: Sequence[AttentionLayout]) -> int | list[int]:
    """The key-value heads of the layers: one number where all have the same."""
    counts = [layout.geometry.num_key_value_heads for layout in layouts]
    return counts[0] if len(set(counts)) == 1 else counts


def with_provenance(result: Result, layouts: Sequence[AttentionLayout], **facts: Any) -> Result:
    """The result, its config recording what was done: `config.regrouping` gets one more entry.

    Args:
        result: As found.
        layouts: The attention before.
        facts: Method, grouping, calibration (in tokens), healing, ...; those that are None are left out.
    """
    config = copy.deepcopy(result.config)
    entry = {"from": short_counts(layouts), "to": short_counts(result.layouts)}
    entry |= {name: value for name, value in facts.items() if value is not None}
    regrouping = [*(getattr(config, "regrouping", None) or []), {**entry, "version": __version__}]
    config.regrouping = regrouping
    return Result(config, result.layouts, {**result.fields, "regrouping": regrouping})
