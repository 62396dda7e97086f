"""GPT-NeoX, Pythia, and the models of its class (Dolly, RedPajama): two LayerNorms, side by side or in sequence."""

from .family import (
    ATTENTION_BIAS,
    LAYER_NORM,
    PLAIN_MLP,
    QKV,
    SIZES,
    Computed,
    Family,
    Irrelevant,
    Weights,
    rope_row,
)
from .operations import GroupedHeads


FAMILY = Family(
    model_type="gpt_neox",
    fields={
        **SIZES,
        "intermediate_size": "intermediate_size",
        "hidden_act": "hidden_act",
        "attention_dropout": "attention_dropout",
        "hidden_dropout": Computed(
            lambda native: dict.fromkeys(("hidden_dropout", "embedding_dropout"), native.hidden_dropout),
            lambda ours: ours.hidden_dropout,
        ),
        "classifier_dropout": Computed(
            lambda native: {"classifier_dropout": native.classifier_dropout},
            lambda ours: 0.1 if ours.classifier_dropout is None else ours.classifier_dropout,
        ),
        "layer_norm_eps": "norm_eps",
        "use_parallel_residual": "parallel_residual",
        "rope_parameters": rope_row(partial=True),
        "attention_bias": ATTENTION_BIAS,
        "is_decoder": Irrelevant("no longer read: the model is causal either way"),
    },
    constants={**LAYER_NORM, **PLAIN_MLP},
    weights={
        "embed_in": "embed_tokens",
        "layers.*.input_layernorm": "layers.*.input_layernorm",
        "layers.*.attention.query_key_value": Weights(QKV, GroupedHeads()),
        "layers.*.attention.dense": "layers.*.self_attn.o_proj",
        "layers.*.post_attention_layernorm": "layers.*.post_attention_layernorm",
        "layers.*.mlp.dense_h_to_4h": "layers.*.mlp.up_proj",
        "layers.*.mlp.dense_4h_to_h": "layers.*.mlp.down_proj",
        "final_layer_norm": "norm",
    },
    legacy_names={r"^embed_out\.": "lm_head."},
    file_names={r"^lm_head\.": "embed_out."},
    tiny={
        "vocab_size": 83,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    examples={
        "parallel, a quarter rotated": {},
        "in sequence": {"use_parallel_residual": False},
        "no attention biases, tied, one layer": {
            "attention_bias": False,
            "tie_word_embeddings": True,
            "num_hidden_layers": 1,
        },
        "whole heads rotated, linear rope": {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "partial_rotary_factor": 1.0,
            }
        },
    },
    refused={"head_dim": {"head_dim": 10}},
)
