"""Gemma 3 (text): Gemma with norms around each sublayer and on each head, windows, and RoPE by layer type."""

from typing import Any

from .family import ROPE_TYPES, TINY_LLAMA, WINDOW, Computed, Family, Required
from .gemma import GEMMA_CONSTANTS, GEMMA_FIELDS
from .olmo2 import FAMILY as OLMO2
from .olmo3 import read_rope, write_rope


def read_scale(native: Any) -> dict[str, Any]:
    return {"attention_multiplier": native.query_pre_attn_scalar**-0.5}


def write_scale(ours: Any) -> int:
    return ours.head_dim if ours.attention_multiplier is None else round(ours.attention_multiplier**-2)


ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

FAMILY = Family(
    model_type="gemma3_text",
    fields={
        **{name: row for name, row in GEMMA_FIELDS.items() if name != "hidden_act"},
        **WINDOW,
        "hidden_activation": "hidden_act",
        "layer_types": "layer_types",
        "rope_parameters": Computed(read_rope, write_rope),
        "query_pre_attn_scalar": Computed(read_scale, write_scale),
        "final_logit_softcapping": Required((None,), "GroupFormer caps no logits"),
        "attn_logit_softcapping": Required((None,), "GroupFormer caps no scores"),
    },
    constants={**GEMMA_CONSTANTS, "norm_position": "both", "qk_norm": "head"},
    weights={
        **OLMO2.weights,
        "layers.*.input_layernorm": "layers.*.input_layernorm",
        "layers.*.pre_feedforward_layernorm": "layers.*.pre_feedforward_layernorm",
    },
    tiny={**TINY_LLAMA, "head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 5},
    examples={
        "every sixth layer sees all": {"num_hidden_layers": 7},
        "windows below, RoPE by layer type, scaled (4B and larger)": {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": ROPES,
        },
        "one key head, biases, untied": {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        "one RoPE, no window, one layer": {
            "layer_types": ["full_attention"],
            "num_hidden_layers": 1,
            "rope_parameters": dict.fromkeys(ROPES, ROPE_TYPES["llama3 rope"]),
        },
    },
    refused={
        "final_logit_softcapping": {"final_logit_softcapping": 30.0},
        "attn_logit_softcapping": {"attn_logit_softcapping": 50.0},
        "use_bidirectional_attention": {"use_bidirectional_attention": True},
    },
)
