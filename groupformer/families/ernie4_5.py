"""ERNIE 4.5 (dense): Llama with RoPE on neighbouring features, and biases everywhere or nowhere."""

from .family import LLAMA_FIELDS, LLAMA_WEIGHTS, QKV, ROPE_EXAMPLES, TINY_LLAMA, Computed, Family, Weights
from .operations import InterleavedRope


BIASES = ("attention_bias", "attention_output_bias", "mlp_bias")

FAMILY = Family(
    model_type="ernie4_5",
    fields={
        **LLAMA_FIELDS,
        "head_dim": "head_dim",
        "use_bias": Computed(
            lambda native: dict.fromkeys(BIASES, bool(native.use_bias)), lambda ours: ours.attention_bias
        ),
    },
    constants={},
    weights={**LLAMA_WEIGHTS, **{name: Weights(name, InterleavedRope()) for name in QKV[:2]}},
    tiny={**TINY_LLAMA, "head_dim": 6},
    examples={
        "wide heads, tied": {},
        "biases, untied": {"use_bias": True, "tie_word_embeddings": False},
        "one key head, one layer": {"num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 1},
        "linear rope": ROPE_EXAMPLES["linear rope"],
    },
)
