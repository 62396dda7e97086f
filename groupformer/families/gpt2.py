"""GPT-2, and the many models of its class (DistilGPT-2, DialoGPT, Stanford's CRFM models)."""

from typing import Any

from .family import (
    ALL_BIASES,
    LAYER_NORM,
    MEMORY_ONLY,
    QKV,
    Computed,
    Family,
    Irrelevant,
    Required,
    Row,
    Weights,
)
from .operations import Conv1D, Stacked


def read_inner(native: Any) -> dict[str, Any]:
    return {"intermediate_size": native.n_inner if native.n_inner is not None else 4 * native.n_embd}


def read_scale(native: Any) -> dict[str, Any]:
    """Scores are divided by the root of head_dim, and by the layer's number, each if the config says so."""
    factor = (native.n_embd // native.n_head) ** -0.5 if native.scale_attn_weights else 1.0
    if not getattr(native, "scale_attn_by_inverse_layer_idx", False):
        return {} if native.scale_attn_weights else {"attention_multiplier": factor}
    return {
        "per_layer_config": {
            layer: {"attention_multiplier": factor / float(layer + 1)} for layer in range(native.n_layer)
        }
    }


def write_scale(ours: Any) -> bool:
    return ours.attention_multiplier is None or ours.attention_multiplier == ours.head_dim**-0.5


SUMMARY = Irrelevant("only GPT2DoubleHeadsModel's multiple-choice head, which is not imported")

GPT2_FIELDS: dict[str, Row] = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": Computed(read_inner, lambda ours: ours.intermediate_size),
    "activation_function": "hidden_act",
    "resid_pdrop": "hidden_dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attention_dropout",
    "layer_norm_epsilon": "norm_eps",
    "scale_attn_weights": Computed(read_scale, write_scale),
    "add_cross_attention": Required((False,), "there is no encoder to attend to"),
}

TINY_GPT2 = {
    "vocab_size": 83,
    "n_positions": 40,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GPT2_CONSTANTS = {**LAYER_NORM, **ALL_BIASES, "mlp_type": "plain", "position_embedding_type": "learned"}

FAMILY = Family(
    model_type="gpt2",
    fields={
        **GPT2_FIELDS,
        "scale_attn_by_inverse_layer_idx": Computed(
            lambda native: {}, lambda ours: len({layer.attention_multiplier for layer in ours.layers}) > 1
        ),
        "reorder_and_upcast_attn": MEMORY_ONLY,
        **dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation"), SUMMARY),
        **dict.fromkeys(("summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout"), SUMMARY),
    },
    constants=GPT2_CONSTANTS,
    weights={
        "wte": "embed_tokens",
        "wpe": "embed_positions",
        "h.*.ln_1": "layers.*.input_layernorm",
        "h.*.attn.c_attn": Weights(QKV, Conv1D(Stacked())),
        "h.*.attn.c_proj": Weights("layers.*.self_attn.o_proj", Conv1D()),
        "h.*.ln_2": "layers.*.post_attention_layernorm",
        "h.*.mlp.c_fc": Weights("layers.*.mlp.up_proj", Conv1D()),
        "h.*.mlp.c_proj": Weights("layers.*.mlp.down_proj", Conv1D()),
        "ln_f": "norm",
    },
    tiny=TINY_GPT2,
    examples={
        "odd heads": {},
        "narrow MLP, relu, untied": {"n_inner": 10, "activation_function": "relu", "tie_word_embeddings": False},
        "scores by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        "scores not scaled, one layer": {"scale_attn_weights": False, "n_layer": 1},
        "neither, both": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    },
    refused={"add_cross_attention": {"add_cross_attention": True}},
)
