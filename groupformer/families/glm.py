"""GLM 4 9B and GLM Edge: Llama with RoPE on neighbours of a part of each head, and a fused MLP."""

from .family import LLAMA_FIELDS, LLAMA_WEIGHTS, QKV, TINY_LLAMA, Family, Weights, rope_row
from .operations import InterleavedRope, Stacked


FAMILY = Family(
    model_type="glm",
    fields={
        **LLAMA_FIELDS,
        "head_dim": "head_dim",
        "attention_bias": "attention_bias",
        "rope_parameters": rope_row(partial=True),
    },
    constants={},
    weights={
        **{name: ours for name, ours in LLAMA_WEIGHTS.items() if "gate_proj" not in name and "up_proj" not in name},
        **{name: Weights(name, InterleavedRope()) for name in QKV[:2]},
        "layers.*.mlp.gate_up_proj": Weights(("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"), Stacked()),
    },
    tiny={**TINY_LLAMA, "head_dim": 8, "eos_token_id": [2, 3]},
    examples={
        "half of each head rotated": {},
        "whole heads rotated, no biases, tied": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
        "odd heads, one layer": {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 1},
        "linear rope": {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
            }
        },
    },
)
