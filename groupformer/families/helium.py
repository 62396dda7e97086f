"""Helium 1: Llama with RoPE on neighbouring features."""

from typing import Any

from .family import LLAMA_FIELDS, LLAMA_WEIGHTS, QKV, ROPE_EXAMPLES, TINY_LLAMA, Computed, Family, Weights
from .operations import InterleavedRope


def read_head_dim(native: Any) -> dict[str, Any]:
    """Its output projection has hidden_size inputs, whatever head_dim is."""
    if native.head_dim * native.num_attention_heads != native.hidden_size:
        raise ValueError(
            f"head_dim ({native.head_dim}) of helium must be hidden_size / num_attention_heads "
            f"({native.hidden_size} / {native.num_attention_heads}), or its output projection does not fit"
        )
    return {"head_dim": native.head_dim}


FAMILY = Family(
    model_type="helium",
    fields={
        **LLAMA_FIELDS,
        "head_dim": Computed(read_head_dim, lambda ours: ours.head_dim),
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    constants={},
    weights={**LLAMA_WEIGHTS, **{name: Weights(name, InterleavedRope()) for name in QKV[:2]}},
    tiny={**TINY_LLAMA, "head_dim": 4},
    examples={
        "grouped queries": {},
        "every head its own keys, biases": {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
        "odd heads, tied, one layer": {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "num_hidden_layers": 1,
        },
        "linear rope": ROPE_EXAMPLES["linear rope"],
    },
    refused={"head_dim": {"head_dim": 6}},
)
