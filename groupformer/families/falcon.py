"""Falcon 7B (one key head), 40B and 180B (grouped), Falcon 2 11B: LayerNorm, RoPE, attention and MLP side by side."""

from typing import Any

from .family import (
    LAYER_NORM,
    QKV,
    ROPE_EXAMPLES,
    SIZES,
    Computed,
    Family,
    Required,
    Weights,
    rope_row,
)
from .operations import GroupedHeads


def read_architecture(native: Any) -> dict[str, Any]:
    """Which heads share keys, and which norms the two sublayers read, from five fields that depend on each other."""
    new, parallel, norms = native.new_decoder_architecture, native.parallel_attn, native.num_ln_in_parallel_attn
    heads = native.num_kv_heads if new else 1 if native.multi_query else native.num_attention_heads
    if norms is None:
        norms = 2 if new else 1
    if (new and not parallel) or (norms == 2 and parallel and not new) or norms not in (1, 2):
        raise ValueError(
            f"num_ln_in_parallel_attn ({native.num_ln_in_parallel_attn}) with new_decoder_architecture ({new}) and "
            f"parallel_attn ({parallel}) is not a model that transformers can run"
        )
    return {
        "num_key_value_heads": heads,
        "parallel_residual": parallel,
        "shared_parallel_norm": parallel and norms == 1,
    }


def is_new(ours: Any) -> bool:
    grouped = ours.num_key_value_heads not in (1, ours.num_attention_heads)
    return bool(ours.parallel_residual and (grouped or not ours.shared_parallel_norm))


FAMILY = Family(
    model_type="falcon",
    fields={
        **SIZES,
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
        "layer_norm_epsilon": "norm_eps",
        "hidden_dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "bias": Computed(
            lambda native: dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), native.bias),
            lambda ours: ours.attention_bias,
        ),
        "rope_parameters": rope_row(),
        "new_decoder_architecture": Computed(read_architecture, is_new),
        "parallel_attn": Computed(lambda native: {}, lambda ours: ours.parallel_residual),
        "multi_query": Computed(lambda native: {}, lambda ours: ours.num_key_value_heads == 1),
        "num_kv_heads": Computed(lambda native: {}, lambda ours: ours.num_key_value_heads if is_new(ours) else None),
        "num_ln_in_parallel_attn": Computed(
            lambda native: {}, lambda ours: (1 if ours.shared_parallel_norm else 2) if is_new(ours) else None
        ),
        "alibi": Required((False,), "its biases are rounded to bfloat16 and scaled with the scores"),
    },
    constants={**LAYER_NORM, "mlp_type": "plain"},
    weights={
        "word_embeddings": "embed_tokens",
        "h.*.input_layernorm": "layers.*.input_layernorm",
        "h.*.ln_attn": "layers.*.input_layernorm",
        "h.*.self_attention.query_key_value": Weights(QKV, GroupedHeads()),
        "h.*.self_attention.dense": "layers.*.self_attn.o_proj",
        "h.*.post_attention_layernorm": "layers.*.post_attention_layernorm",
        "h.*.ln_mlp": "layers.*.post_attention_layernorm",
        "h.*.mlp.dense_h_to_4h": "layers.*.mlp.up_proj",
        "h.*.mlp.dense_4h_to_h": "layers.*.mlp.down_proj",
        "ln_f": "norm",
    },
    tiny={
        "vocab_size": 83,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    examples={
        "one key head": {},
        "grouped, two norms": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "grouped, one norm": {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
        "in sequence, biases": {"multi_query": False, "parallel_attn": False, "bias": True},
        "every head its own keys, narrow, untied, one layer": {
            "multi_query": False,
            "ffn_hidden_size": 20,
            "tie_word_embeddings": False,
            "num_hidden_layers": 1,
        },
        "linear rope": ROPE_EXAMPLES["linear rope"],
    },
    refused={
        "alibi": {"alibi": True},
        "num_ln_in_parallel_attn": {"num_ln_in_parallel_attn": 2},
    },
)
