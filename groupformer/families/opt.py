"""OPT and Galactica-like models: GPT-2 with relu, and a position table whose first two rows are reserved."""

from typing import Any

from .family import (
    LAYER_NORM,
    SIZES,
    TRAINING_ONLY,
    Computed,
    Family,
    Required,
)


def read_projection(native: Any) -> dict[str, Any]:
    if native.word_embed_proj_dim != native.hidden_size:
        raise ValueError(
            f"word_embed_proj_dim ({native.word_embed_proj_dim}) of opt cannot be imported exactly: there is no "
            f"projection between embeddings and layers; it must be hidden_size ({native.hidden_size})"
        )
    return {}


FAMILY = Family(
    model_type="opt",
    fields={
        **SIZES,
        "ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "layerdrop": TRAINING_ONLY,
        "init_std": "initializer_range",
        "enable_bias": Computed(
            lambda native: dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), native.enable_bias),
            lambda ours: ours.attention_bias,
        ),
        "do_layer_norm_before": Required((True,), "norms after the residual addition are not built"),
        "_remove_final_layer_norm": Required((False,), "there is always a final norm"),
        "layer_norm_elementwise_affine": Required((True,), "norms always have weights"),
        "word_embed_proj_dim": Computed(read_projection, lambda ours: ours.hidden_size),
    },
    constants={
        **LAYER_NORM,
        "norm_eps": 1e-5,
        "mlp_type": "plain",
        "position_embedding_type": "learned",
        "position_offset": 2,
    },
    weights={
        "decoder.embed_tokens": "embed_tokens",
        "decoder.embed_positions": "embed_positions",
        "decoder.layers.*.self_attn_layer_norm": "layers.*.input_layernorm",
        "decoder.layers.*.self_attn.q_proj": "layers.*.self_attn.q_proj",
        "decoder.layers.*.self_attn.k_proj": "layers.*.self_attn.k_proj",
        "decoder.layers.*.self_attn.v_proj": "layers.*.self_attn.v_proj",
        "decoder.layers.*.self_attn.out_proj": "layers.*.self_attn.o_proj",
        "decoder.layers.*.final_layer_norm": "layers.*.post_attention_layernorm",
        "decoder.layers.*.fc1": "layers.*.mlp.up_proj",
        "decoder.layers.*.fc2": "layers.*.mlp.down_proj",
        "decoder.final_layer_norm": "norm",
    },
    tiny={
        "vocab_size": 83,
        "hidden_size": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
        "word_embed_proj_dim": 24,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    examples={
        "biases": {},
        "no biases, untied": {"enable_bias": False, "tie_word_embeddings": False},
        "gelu, one layer": {"activation_function": "gelu", "num_hidden_layers": 1},
    },
    refused={
        "do_layer_norm_before": {"do_layer_norm_before": False},
        "word_embed_proj_dim": {"word_embed_proj_dim": 12},
        "_remove_final_layer_norm": {"_remove_final_layer_norm": True},
        "layer_norm_elementwise_affine": {"layer_norm_elementwise_affine": False},
    },
)
