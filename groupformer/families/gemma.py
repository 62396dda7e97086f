"""Gemma 1: Llama with RMS norms around one, and embeddings times the root of their size."""

from typing import Any

from .family import (
    ATTENTION_BIAS,
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    ROPE_EXAMPLES,
    TINY_LLAMA,
    Computed,
    Family,
    Required,
    Row,
)


def read_hidden_size(native: Any) -> dict[str, Any]:
    return {"hidden_size": native.hidden_size, "embedding_multiplier": native.hidden_size**0.5}


# What Gemma 1 and 3 have in common.
GEMMA_FIELDS: dict[str, Row] = {
    **LLAMA_FIELDS,
    "hidden_size": Computed(read_hidden_size, lambda ours: ours.hidden_size),
    "head_dim": "head_dim",
    "attention_bias": ATTENTION_BIAS,
    "use_bidirectional_attention": Required((False, None), "an encoder of Gemma's weights is no decoder any more"),
}
GEMMA_CONSTANTS = {"norm_type": "rms_norm_1p", "round_embedding_multiplier": True}

FAMILY = Family(
    model_type="gemma",
    fields=GEMMA_FIELDS,
    constants=GEMMA_CONSTANTS,
    weights=LLAMA_WEIGHTS,
    tiny={**TINY_LLAMA, "head_dim": 6},
    examples={
        "grouped queries, tied": {},
        "one key head, biases": {"num_key_value_heads": 1, "attention_bias": True},
        "every head its own keys, untied, one layer": {
            "num_key_value_heads": 6,
            "tie_word_embeddings": False,
            "num_hidden_layers": 1,
        },
        "another activation": {"hidden_act": "silu"},
        "linear rope": ROPE_EXAMPLES["linear rope"],
    },
    refused={"use_bidirectional_attention": {"use_bidirectional_attention": True}},
)
