"""Code World Model 32B: Llama 3 with windows in chosen layers."""

from .family import LLAMA_FIELDS, LLAMA_WEIGHTS, ROPE_EXAMPLES, TINY_LLAMA, WINDOW, Family, Irrelevant


FAMILY = Family(
    model_type="cwm",
    fields={
        **LLAMA_FIELDS,
        **WINDOW,
        "layer_types": "layer_types",
        "head_dim": "head_dim",
        "mlp_bias": "mlp_bias",
        "pretraining_tp": Irrelevant("transformers no longer computes in slices"),
    },
    constants={},
    weights=LLAMA_WEIGHTS,
    tiny={**TINY_LLAMA, "head_dim": 6, "sliding_window": 4},
    examples={
        "every fourth layer sees all": {"num_hidden_layers": 5},
        "windows in the upper layers": {"layer_types": ["full_attention", "sliding_attention"]},
        "biases in the MLP, default rope": {
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "llama3 rope, tied": {**ROPE_EXAMPLES["llama3 rope"], "tie_word_embeddings": True},
    },
)
