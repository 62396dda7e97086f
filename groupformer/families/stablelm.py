"""StableLM 2 and StableLM 3B: Llama with LayerNorm and RoPE on a quarter of each head."""

from .family import (
    LAYER_NORM,
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    TINY_LLAMA,
    Computed,
    Family,
    Required,
    rope_row,
)


FAMILY = Family(
    model_type="stablelm",
    fields={
        **{name: row for name, row in LLAMA_FIELDS.items() if name != "rms_norm_eps"},
        "layer_norm_eps": "norm_eps",
        "hidden_dropout": "hidden_dropout",
        "rope_parameters": rope_row(partial=True),
        "use_qkv_bias": "attention_bias",
        "use_parallel_residual": Computed(
            lambda native: dict.fromkeys(("parallel_residual", "shared_parallel_norm"), native.use_parallel_residual),
            lambda ours: ours.parallel_residual,
        ),
        "qk_layernorm": Required((False,), "its norms have other weights for each head"),
    },
    constants=LAYER_NORM,
    weights=LLAMA_WEIGHTS,
    tiny={**TINY_LLAMA, "hidden_size": 48, "num_attention_heads": 6},
    examples={
        "in sequence, a quarter rotated": {},
        "parallel, biases": {"use_parallel_residual": True, "use_qkv_bias": True},
        "half rotated, tied, one layer": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
            "num_hidden_layers": 1,
        },
    },
    refused={"qk_layernorm": {"qk_layernorm": True}},
)
