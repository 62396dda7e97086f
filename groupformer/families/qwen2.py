"""Qwen 1.5, 2 and 2.5: Llama with biases on queries, keys and values, and windows in the upper layers."""

from .family import (
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    ROPE_EXAMPLES,
    TINY_LLAMA,
    WINDOWS,
    Family,
    Irrelevant,
    head_dim_row,
)


FAMILY = Family(
    model_type="qwen2",
    fields={
        **LLAMA_FIELDS,
        **WINDOWS,
        "head_dim": head_dim_row(),
        "max_window_layers": Irrelevant("only a default for layer_types"),
    },
    constants={"attention_bias": True},
    weights=LLAMA_WEIGHTS,
    tiny=TINY_LLAMA,
    examples={
        "no window": {},
        "windows in the upper layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "windows below": {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "window in no layer": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        "tied, wide heads": {"tie_word_embeddings": True, "head_dim": 6},
        **ROPE_EXAMPLES,
    },
    refused={"use_sliding_window": {"layer_types": ["full_attention", "sliding_attention"]}},
)
