"""StarCoder 1 and SantaCoder: GPT-2 with plain linear layers and, mostly, one key-value head."""

from typing import Any

from .family import MEMORY_ONLY, QKV, Computed, Family, Irrelevant, Weights
from .gpt2 import GPT2_CONSTANTS, GPT2_FIELDS, TINY_GPT2
from .operations import GroupedHeads


def read_heads(native: Any) -> dict[str, Any]:
    return {"num_key_value_heads": 1 if native.multi_query else native.n_head}


FAMILY = Family(
    model_type="gpt_bigcode",
    fields={
        **GPT2_FIELDS,
        "multi_query": Computed(read_heads, lambda ours: ours.num_key_value_heads == 1),
        "num_key_value_heads": Irrelevant("follows from multi_query"),
        "attention_softmax_in_fp32": MEMORY_ONLY,
        "scale_attention_softmax_in_fp32": MEMORY_ONLY,
    },
    constants=GPT2_CONSTANTS,
    weights={
        "wte": "embed_tokens",
        "wpe": "embed_positions",
        "h.*.ln_1": "layers.*.input_layernorm",
        "h.*.attn.c_attn": Weights(QKV, GroupedHeads()),
        "h.*.attn.c_proj": "layers.*.self_attn.o_proj",
        "h.*.ln_2": "layers.*.post_attention_layernorm",
        "h.*.mlp.c_fc": "layers.*.mlp.up_proj",
        "h.*.mlp.c_proj": "layers.*.mlp.down_proj",
        "ln_f": "norm",
    },
    tiny=TINY_GPT2,
    examples={
        "one key head": {},
        "every head its own keys": {"multi_query": False},
        "one head, one layer": {"n_head": 1, "multi_query": False, "n_layer": 1},
        "untied, narrow MLP, not scaled": {"tie_word_embeddings": False, "n_inner": 10, "scale_attn_weights": False},
    },
    refused={"add_cross_attention": {"add_cross_attention": True, "multi_query": False}},
)
