"""GPT-J 6B and descendants: attention and MLP side by side on one LayerNorm, RoPE on neighbours of part of a head."""

from typing import Any

from .family import LAYER_NORM, Computed, Family, Weights
from .gpt2 import GPT2_FIELDS, TINY_GPT2
from .operations import InterleavedRope


def read_rotary_dim(native: Any) -> dict[str, Any]:
    """Our share of a head is a factor; theirs a number of features."""
    head_dim = native.n_embd // native.n_head
    factor = (native.rotary_dim or 0) / head_dim
    if not native.rotary_dim or int(head_dim * factor) != native.rotary_dim or factor > 1:
        raise ValueError(f"rotary_dim ({native.rotary_dim}) must be a number of features of a head ({head_dim})")
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    return {"rope_parameters": parameters}


def write_rotary_dim(ours: Any) -> int:
    if not ours.rope_parameters:
        raise ValueError(f"position_embedding_type ({ours.position_embedding_type!r}) is not 'rope', which gptj needs")
    return int(ours.head_dim * ours.rope_parameters.get("partial_rotary_factor", 1.0))


FAMILY = Family(
    model_type="gptj",
    fields={
        **{
            name: row for name, row in GPT2_FIELDS.items() if name not in ("scale_attn_weights", "add_cross_attention")
        },
        "rotary_dim": Computed(read_rotary_dim, write_rotary_dim),
    },
    constants={
        **LAYER_NORM,
        "attention_bias": False,
        "attention_output_bias": False,
        "mlp_bias": True,
        "lm_head_bias": True,
        "mlp_type": "plain",
        "parallel_residual": True,
        "shared_parallel_norm": True,
    },
    weights={
        "wte": "embed_tokens",
        "h.*.ln_1": "layers.*.input_layernorm",
        "h.*.attn.q_proj": Weights("layers.*.self_attn.q_proj", InterleavedRope()),
        "h.*.attn.k_proj": Weights("layers.*.self_attn.k_proj", InterleavedRope()),
        "h.*.attn.v_proj": "layers.*.self_attn.v_proj",
        "h.*.attn.out_proj": "layers.*.self_attn.o_proj",
        "h.*.mlp.fc_in": "layers.*.mlp.up_proj",
        "h.*.mlp.fc_out": "layers.*.mlp.down_proj",
        "ln_f": "norm",
    },
    tiny={**TINY_GPT2, "rotary_dim": 4},
    examples={
        "half of each head rotated": {},
        "whole heads rotated, narrow MLP": {"rotary_dim": 8, "n_inner": 20},
        "another activation, tied, one layer": {
            "activation_function": "relu",
            "tie_word_embeddings": True,
            "n_layer": 1,
        },
    },
    refused={"rotary_dim": {"rotary_dim": 0}},
)
