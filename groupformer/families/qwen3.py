"""Qwen 3: Llama with a norm on each head's queries and keys, and windows in the upper layers."""

from .family import (
    ATTENTION_BIAS,
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    ROPE_EXAMPLES,
    TINY_LLAMA,
    WINDOWS,
    Family,
    Irrelevant,
)


FAMILY = Family(
    model_type="qwen3",
    fields={
        **LLAMA_FIELDS,
        **WINDOWS,
        "head_dim": "head_dim",
        "attention_bias": ATTENTION_BIAS,
        "max_window_layers": Irrelevant("only a default for layer_types"),
    },
    constants={"qk_norm": "head"},
    weights={
        **LLAMA_WEIGHTS,
        "layers.*.self_attn.q_norm": "layers.*.self_attn.q_norm",
        "layers.*.self_attn.k_norm": "layers.*.self_attn.k_norm",
    },
    tiny={**TINY_LLAMA, "head_dim": 8},
    examples={
        "wide heads": {},
        "biases, tied": {"attention_bias": True, "tie_word_embeddings": True},
        "windows in the upper layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 24, "num_hidden_layers": 1},
        "yarn rope": ROPE_EXAMPLES["yarn rope"],
    },
)
