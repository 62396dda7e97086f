"""OLMo 2: norms after the sublayers, and on all queries and all keys together."""

from .family import (
    ATTENTION_BIAS,
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    ROPE_EXAMPLES,
    TINY_LLAMA,
    Family,
    head_dim_row,
)


FAMILY = Family(
    model_type="olmo2",
    fields={**LLAMA_FIELDS, "head_dim": head_dim_row(), "attention_bias": ATTENTION_BIAS},
    constants={"qk_norm": "projection", "norm_position": "after"},
    weights={
        **{name: ours for name, ours in LLAMA_WEIGHTS.items() if "input_layernorm" not in name},
        "layers.*.self_attn.q_norm": "layers.*.self_attn.q_norm",
        "layers.*.self_attn.k_norm": "layers.*.self_attn.k_norm",
        "layers.*.post_feedforward_layernorm": "layers.*.post_feedforward_layernorm",
    },
    tiny=TINY_LLAMA,
    examples={
        "grouped queries": {},
        "every head its own keys, biases": {"num_key_value_heads": 6, "attention_bias": True},
        "odd heads, wide, one layer": {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "hidden_size": 25,
            "num_hidden_layers": 1,
        },
        "linear rope": ROPE_EXAMPLES["linear rope"],
    },
)
