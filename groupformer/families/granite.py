"""Granite 3 and 4 (dense): Llama with factors on embeddings, scores, residuals and logits."""

from .family import (
    ATTENTION_BIAS,
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    ROPE_EXAMPLES,
    TINY_LLAMA,
    Computed,
    Family,
    head_dim_row,
)


FAMILY = Family(
    model_type="granite",
    fields={
        **LLAMA_FIELDS,
        "head_dim": head_dim_row(),
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": "mlp_bias",
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_scaling": "logits_scaling",
        "attention_multiplier": Computed(
            lambda native: {"attention_multiplier": native.attention_multiplier},
            lambda ours: ours.head_dim**-0.5 if ours.attention_multiplier is None else ours.attention_multiplier,
        ),
    },
    constants={},
    weights=LLAMA_WEIGHTS,
    tiny=TINY_LLAMA,
    examples={
        "scores not scaled": {},
        "all factors, tied": {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
        "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
        "llama3 rope": ROPE_EXAMPLES["llama3 rope"],
    },
)
