"""Phi 3, 3.5 and 4 (mini): Llama with fused projections."""

from typing import Any

from .family import (
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    QKV,
    TINY_LLAMA,
    WINDOW,
    Computed,
    Family,
    Irrelevant,
    Weights,
    head_dim_row,
    rope_row,
)
from .operations import Stacked


ROPE = rope_row(partial=True)


def read_rope(native: Any) -> dict[str, Any]:
    if native.rope_parameters.get("rope_type") == "longrope":
        raise ValueError(
            "rope_parameters['rope_type'] ('longrope') of phi3 throws the cache away when a text grows past "
            "original_max_position_embeddings, which GroupFormer does not; only 'default' is exact"
        )
    return ROPE.read(native)


FAMILY = Family(
    model_type="phi3",
    fields={
        **LLAMA_FIELDS,
        **WINDOW,
        "head_dim": head_dim_row(),
        "resid_pdrop": "hidden_dropout",
        "embd_pdrop": Irrelevant("declared, but no longer used"),
        "rope_parameters": Computed(read_rope, ROPE.write),
        "original_max_position_embeddings": Irrelevant("only read for longrope"),
    },
    constants={},
    weights={
        **{name: ours for name, ours in LLAMA_WEIGHTS.items() if not name.endswith(("q_proj", "k_proj", "v_proj"))},
        "layers.*.self_attn.qkv_proj": Weights(QKV, Stacked()),
        "layers.*.mlp.gate_up_proj": Weights(("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"), Stacked()),
    },
    tiny=TINY_LLAMA,
    examples={
        "grouped queries": {},
        "window shorter than the prompt, tied": {"sliding_window": 5, "tie_word_embeddings": True},
        "half rotated, one layer": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "num_hidden_layers": 1,
        },
        "one key head": {"num_key_value_heads": 1},
    },
    refused={
        "rope_type": {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 3.0],
            }
        }
    },
)
