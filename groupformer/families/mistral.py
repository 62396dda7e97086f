"""Mistral 7B and its descendants: Llama without biases, and a window in all layers or in none."""

from .family import LLAMA_FIELDS, LLAMA_WEIGHTS, ROPE_EXAMPLES, TINY_LLAMA, WINDOW, Family


FAMILY = Family(
    model_type="mistral",
    fields={**LLAMA_FIELDS, **WINDOW, "head_dim": "head_dim"},
    constants={},
    weights=LLAMA_WEIGHTS,
    tiny=TINY_LLAMA,
    examples={
        "no window": {"sliding_window": None},
        "window shorter than the prompt": {"sliding_window": 5},
        "window, wide heads, one layer": {"sliding_window": 3, "head_dim": 8, "num_hidden_layers": 1},
        "tied, yarn": {"sliding_window": None, "tie_word_embeddings": True, **ROPE_EXAMPLES["yarn rope"]},
    },
    refused={"layer_types": {"layer_types": ["full_attention", "sliding_attention"]}},
)
