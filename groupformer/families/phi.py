"""Phi 1, 1.5 and 2: attention and MLP side by side on one LayerNorm, RoPE on part of each head, biases everywhere."""

from .family import (
    ALL_BIASES,
    LAYER_NORM,
    LLAMA_FIELDS,
    TINY_LLAMA,
    Computed,
    Family,
    head_dim_row,
    rope_row,
)


FAMILY = Family(
    model_type="phi",
    fields={
        **{name: row for name, row in LLAMA_FIELDS.items() if name != "rms_norm_eps"},
        "head_dim": head_dim_row(),
        "layer_norm_eps": "norm_eps",
        "resid_pdrop": "hidden_dropout",
        "embd_pdrop": "embedding_dropout",
        "rope_parameters": rope_row(partial=True),
        "qk_layernorm": Computed(
            lambda native: {"qk_norm": "head" if native.qk_layernorm else None},
            lambda ours: ours.qk_norm == "head",
        ),
    },
    constants={
        **LAYER_NORM,
        **ALL_BIASES,
        "mlp_type": "plain",
        "parallel_residual": True,
        "shared_parallel_norm": True,
        "lm_head_bias": True,
    },
    weights={
        "embed_tokens": "embed_tokens",
        "layers.*.input_layernorm": "layers.*.input_layernorm",
        "layers.*.self_attn.q_proj": "layers.*.self_attn.q_proj",
        "layers.*.self_attn.k_proj": "layers.*.self_attn.k_proj",
        "layers.*.self_attn.v_proj": "layers.*.self_attn.v_proj",
        "layers.*.self_attn.q_layernorm": "layers.*.self_attn.q_norm",
        "layers.*.self_attn.k_layernorm": "layers.*.self_attn.k_norm",
        "layers.*.self_attn.dense": "layers.*.self_attn.o_proj",
        "layers.*.mlp.fc1": "layers.*.mlp.up_proj",
        "layers.*.mlp.fc2": "layers.*.mlp.down_proj",
        "final_layernorm": "norm",
    },
    tiny={**TINY_LLAMA, "num_attention_heads": 3, "num_key_value_heads": 3},
    examples={
        "half of each head rotated": {},
        "norms on queries and keys": {"qk_layernorm": True},
        "grouped queries, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
        "a quarter rotated, linear rope": {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "partial_rotary_factor": 0.25,
            }
        },
        "wide heads, one layer": {"head_dim": 12, "num_hidden_layers": 1},
    },
)
