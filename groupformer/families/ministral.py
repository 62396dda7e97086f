"""Ministral 8B: Mistral with windows in chosen layers."""

from .family import LLAMA_FIELDS, LLAMA_WEIGHTS, ROPE_EXAMPLES, TINY_LLAMA, WINDOW, Family


FAMILY = Family(
    model_type="ministral",
    fields={**LLAMA_FIELDS, **WINDOW, "layer_types": "layer_types", "head_dim": "head_dim"},
    constants={},
    weights=LLAMA_WEIGHTS,
    tiny={**TINY_LLAMA, "head_dim": 6, "sliding_window": 4},
    examples={
        "windows in chosen layers": {"layer_types": ["sliding_attention", "full_attention"]},
        "windows everywhere, one layer": {"sliding_window": 5, "num_hidden_layers": 1},
        "no window, tied": {"layer_types": ["full_attention", "full_attention"], "tie_word_embeddings": True},
        "yarn rope": ROPE_EXAMPLES["yarn rope"],
    },
)
