"""OLMo 3: OLMo 2 with windows in three of four layers."""

from typing import Any

from ..model.configuration_groupformer import LAYER_TYPES
from .family import ABSENT, ROPE_TYPES, TINY_LLAMA, WINDOW, Computed, Family
from .olmo2 import FAMILY as OLMO2


def read_rope(native: Any) -> dict[str, Any]:
    """It has RoPE parameters for each type of layer; where they are the same in all layers, ours are one set."""
    used = [native.rope_parameters[kind] for kind in sorted(set(native.layer_types))]
    return {"rope_parameters": dict(used[0] if all(each == used[0] for each in used) else native.rope_parameters)}


def write_rope(ours: Any) -> Any:
    if ours.rope_parameters is None:
        return ABSENT
    return {kind: dict(ours.rope_parameters.get(kind, ours.rope_parameters)) for kind in LAYER_TYPES}


def both(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": parameters, "sliding_attention": parameters}}


FAMILY = Family(
    model_type="olmo3",
    fields={
        **OLMO2.fields,
        **WINDOW,
        "layer_types": "layer_types",
        "rope_parameters": Computed(read_rope, write_rope),
    },
    constants=OLMO2.constants,
    weights=OLMO2.weights,
    tiny={**TINY_LLAMA, "sliding_window": 4},
    examples={
        "every fourth layer sees all": {"num_hidden_layers": 5},
        "every head its own keys, biases": {"num_key_value_heads": 6, "attention_bias": True},
        "windows in the upper layer, yarn rope": {
            "layer_types": ["full_attention", "sliding_attention"],
            **both(ROPE_TYPES["yarn rope"]),
        },
        "yarn rope where no window is": {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": ROPE_TYPES["yarn rope"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "no window, tied, one layer": {
            "layer_types": ["full_attention"],
            "tie_word_embeddings": True,
            "num_hidden_layers": 1,
        },
    },
)
