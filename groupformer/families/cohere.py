"""Command R: attention and MLP side by side on one LayerNorm, and RoPE that rotates neighbouring features."""

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
    Weights,
    head_dim_row,
)
from .operations import InterleavedRope


def read_logit_scale(native: Any) -> dict[str, Any]:
    """Their logits are multiplied, ours divided."""
    if not native.logit_scale:
        raise ValueError(f"logit_scale ({native.logit_scale}) must be a number other than 0")
    return {"logits_scaling": 1 / native.logit_scale}


FAMILY = Family(
    model_type="cohere",
    fields={
        **{name: row for name, row in LLAMA_FIELDS.items() if name != "rms_norm_eps"},
        "head_dim": head_dim_row(),
        "layer_norm_eps": "norm_eps",
        "attention_bias": ATTENTION_BIAS,
        "logit_scale": Computed(read_logit_scale, lambda ours: 1 / ours.logits_scaling),
        "use_qk_norm": Required((False, None), "its norms have other weights for each head"),
    },
    constants={
        "norm_type": "layer_norm",
        "norm_bias": False,
        "parallel_residual": True,
        "shared_parallel_norm": True,
    },
    weights={
        **{name: ours for name, ours in LLAMA_WEIGHTS.items() if "post_attention" not in name},
        **{
            f"layers.*.self_attn.{name}": Weights(f"layers.*.self_attn.{name}", InterleavedRope())
            for name in ("q_proj", "k_proj")
        },
    },
    tiny=TINY_LLAMA,
    examples={
        "tied": {},
        "untied, biases, an odd scale": {"tie_word_embeddings": False, "attention_bias": True, "logit_scale": 0.3},
        "wide heads, one layer": {"head_dim": 6, "num_hidden_layers": 1},
        "linear rope": ROPE_EXAMPLES["linear rope"],
    },
    refused={"use_qk_norm": {"use_qk_norm": True}, "logit_scale": {"logit_scale": 0.0}},
)
