"""MPT: ALiBi, LayerNorm without biases, no biases anywhere.

Transformers' class ignores many of its config's fields (`expansion_ratio`, `alibi_bias_max`, `learned_pos_emb`, ...).
A checkpoint that sets one of them otherwise is computed wrongly there, so it is refused here.
"""

from typing import Any

from .family import QKV, Computed, Family, Irrelevant, Required, Weights
from .operations import Stacked


# What transformers computes, whatever these fields of attn_config say; anything else was another model.
ATTENTION_REQUIRED = {
    "attn_type": "multihead_attention",
    "prefix_lm": False,
    "qk_ln": False,
    "alibi": True,
    "alibi_bias_max": 8,
    "clip_qkv": None,
}


def read_attention(native: Any) -> dict[str, Any]:
    attention = native.attn_config
    for name, value in ATTENTION_REQUIRED.items():
        if (getattr(attention, name) or None) != (value or None):
            raise ValueError(
                f"attn_config.{name} ({getattr(attention, name)!r}) of mpt cannot be imported exactly; "
                f"it must be {value!r}"
            )
    return {
        "attention_multiplier": attention.softmax_scale,
        "attention_dropout": attention.attn_pdrop,
        "hidden_dropout": attention.attn_pdrop,
    }


def write_attention(ours: Any) -> dict[str, Any]:
    return {"softmax_scale": ours.attention_multiplier, "attn_pdrop": int(ours.attention_dropout)}


FAMILY = Family(
    model_type="mpt",
    fields={
        "d_model": Computed(
            lambda native: {"hidden_size": native.d_model, "intermediate_size": 4 * native.d_model},
            lambda ours: ours.hidden_size,
        ),
        "vocab_size": "vocab_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
        "layer_norm_epsilon": "norm_eps",
        "attn_config": Computed(read_attention, write_attention),
        "expansion_ratio": Required((4,), "transformers always builds 4"),
        "no_bias": Required((True,), "transformers builds no biases"),
        "logit_scale": Required((None,), "transformers ignores it"),
        "norm_type": Required(("low_precision_layernorm", "layernorm"), "transformers always builds LayerNorm"),
        "learned_pos_emb": Irrelevant("ALiBi replaces it"),
        "resid_pdrop": Irrelevant("declared, but not used"),
        "emb_pdrop": Irrelevant("declared, but not used"),
        "embedding_fraction": Irrelevant("only gradients"),
        "init_device": Irrelevant("where weights are created"),
    },
    constants={
        "norm_type": "layer_norm",
        "norm_bias": False,
        "mlp_type": "plain",
        "hidden_act": "gelu",
        "position_embedding_type": "alibi",
    },
    weights={
        "wte": "embed_tokens",
        "blocks.*.norm_1": "layers.*.input_layernorm",
        "blocks.*.attn.Wqkv": Weights(QKV, Stacked()),
        "blocks.*.attn.out_proj": "layers.*.self_attn.o_proj",
        "blocks.*.norm_2": "layers.*.post_attention_layernorm",
        "blocks.*.ffn.up_proj": "layers.*.mlp.up_proj",
        "blocks.*.ffn.down_proj": "layers.*.mlp.down_proj",
        "norm_f": "norm",
    },
    tiny={
        "vocab_size": 83,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    examples={
        "four heads": {},
        "six heads, untied": {"n_heads": 6, "tie_word_embeddings": False},
        "scores scaled otherwise, one layer": {"attn_config": {"softmax_scale": 0.2}, "n_layers": 1},
    },
    refused={
        "clip_qkv": {"attn_config": {"clip_qkv": 6.0}},
        "alibi": {"attn_config": {"alibi": False}},
        "alibi_bias_max": {"attn_config": {"alibi_bias_max": 16}},
        "logit_scale": {"logit_scale": "inv_sqrt_d_model"},
        "expansion_ratio": {"expansion_ratio": 2},
    },
)
