"""OLMo 3: OLMo 2 with windows in three of four layers."""

from typing import Any

from .family import ABSENT, ROPE_TYPES, TINY_LLAMA, WINDOW, Computed, Family
from .olmo2 import FAMILY as OLMO2


def read_rope(native: Any) -> dict[str, Any]:
    """It has RoPE parameters for each type of layer; ours are one for all."""
    kinds = {kind: native.rope_parameters[kind] for kind in sorted(set(native.layer_types))}
    first, *others = kinds.values()
    if any(other != first for other in others):
        raise ValueError(
            f"rope_parameters ({kinds}) of olmo3 differ between layers with and without a window; GroupFormer has one "
            "set for all layers"
        )
    return {"rope_parameters": dict(first)}


def write_rope(ours: Any) -> Any:
    kinds = ("full_attention", "sliding_attention")
    return ABSENT if ours.rope_parameters is None else {kind: dict(ours.rope_parameters) for kind in kinds}


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
        "no window, tied, one layer": {
            "layer_types": ["full_attention"],
            "tie_word_embeddings": True,
            "num_hidden_layers": 1,
        },
    },
    refused={
        "rope_parameters": {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": ROPE_TYPES["yarn rope"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        }
    },
)
