"""Which families llama.cpp knows, and how it names and lays out their tensors: data, as in the families' own modules.

Only what llama.cpp computes exactly is here: each architecture has one RoPE layout, one activation and one mask, fixed
in its code, so a family's other options are refused with the field and its value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...families.family import QKV, Weights
from ...families.operations import InterleavedRope, Stacked
from ...model.configuration_groupformer import GroupFormerConfig
from ..configs import SAME_ACTIVATION
from ..weights import rotary_dim_of


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture of llama.cpp.

    Args:
        name: Its name in the file.
        hidden_act: The activation that its code has.
        weights: Stems in the file to ours, relative to `GroupFormerModel`; `*` is the layer.
        allowed: Our fields, with the values that its code can load, where that is not all of the family's.
        wide_heads: Whether head_dim may be other than hidden_size / num_attention_heads.
        rope_factors: Whether each RoPE frequency may have a factor of its own (Llama 3).
        metadata: Keys after the architecture's name, beyond those that every file has, from our config.
        check: Refuses what its code does not compute; raises ValueError.
    """

    name: str
    hidden_act: str
    weights: Mapping[str, str | Weights]
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    wide_heads: bool = False
    rope_factors: bool = False
    metadata: Callable[[GroupFormerConfig], Mapping[str, Any]] = lambda config: {}
    check: Callable[[GroupFormerConfig], None] = field(default=lambda config: None)


Table = Mapping[str, str | Weights]

EMBEDDINGS = {"token_embd": "embed_tokens", "position_embd": "embed_positions", "token_embd_norm": "embed_norm"}
OUTPUT = {"output_norm": "norm"}
NORMS = {
    "blk.*.attn_norm": "layers.*.input_layernorm",
    "blk.*.ffn_norm": "layers.*.post_attention_layernorm",
}
SEPARATE: Table = {
    "blk.*.attn_q": "layers.*.self_attn.q_proj",
    "blk.*.attn_k": "layers.*.self_attn.k_proj",
    "blk.*.attn_v": "layers.*.self_attn.v_proj",
}
NEIGHBOURS: Table = {  # RoPE on neighbouring features
    **SEPARATE,
    "blk.*.attn_q": Weights("layers.*.self_attn.q_proj", InterleavedRope()),
    "blk.*.attn_k": Weights("layers.*.self_attn.k_proj", InterleavedRope()),
}
FUSED: Table = {"blk.*.attn_qkv": Weights(QKV, Stacked())}
QK_NORMS = {
    "blk.*.attn_q_norm": "layers.*.self_attn.q_norm",
    "blk.*.attn_k_norm": "layers.*.self_attn.k_norm",
}
REST = {
    "blk.*.attn_output": "layers.*.self_attn.o_proj",
    "blk.*.ffn_gate": "layers.*.mlp.gate_proj",
    "blk.*.ffn_up": "layers.*.mlp.up_proj",
    "blk.*.ffn_down": "layers.*.mlp.down_proj",
}


def table(attention: Table, norms: Table = NORMS) -> dict[str, str | Weights]:
    return {**EMBEDDINGS, **norms, **attention, **REST, **OUTPUT}


def every_fourth_layer_without_rope(config: GroupFormerConfig) -> None:
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers or [1] * config.num_hidden_layers)[: config.num_hidden_layers] != expected:
        raise ValueError(
            f"no_rope_layers ({config.no_rope_layers}) is not what llama.cpp computes for smollm3, which is {expected}"
        )


def scores_divided_by_root(config: GroupFormerConfig) -> None:
    for layer in config.per_layer_config:
        multiplier = layer.attention_multiplier
        if multiplier is not None and multiplier != float(config.head_dim or 1) ** -0.5:
            raise ValueError(
                f"attention_multiplier ({multiplier}) is not what llama.cpp computes, which is head_dim ** -0.5"
            )


def granite_factors(config: GroupFormerConfig) -> dict[str, Any]:
    multiplier = config.attention_multiplier
    return {
        "attention.scale": float(config.head_dim or 1) ** -0.5 if multiplier is None else float(multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


LLAMA = Architecture(name="llama", hidden_act="silu", weights=table(NEIGHBOURS), wide_heads=True, rope_factors=True)
NO_BIAS = {"attention_bias": (False,)}


def counts_by_layer(config: GroupFormerConfig) -> dict[str, Any]:
    layers = list(config.per_layer_config)
    return {
        "feed_forward_length": [layer.intermediate_size for layer in layers],
        "attention.head_count": [config.num_attention_heads] * len(layers),
        "attention.head_count_kv": [layer.num_key_value_heads for layer in layers],
    }


# Llama whose layers differ in their key-value heads and MLPs.
DECI = replace(LLAMA, name="deci", allowed={**NO_BIAS, "mlp_bias": (False,)}, metadata=counts_by_layer)

# By family.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": Architecture(
        name="smollm3",
        hidden_act="silu",
        weights=table(NEIGHBOURS),
        allowed={**NO_BIAS, "mlp_bias": (False,)},
        check=every_fourth_layer_without_rope,
    ),
    "granite": Architecture(
        name="granite",
        hidden_act="silu",
        weights=table(NEIGHBOURS),
        wide_heads=True,
        rope_factors=True,
        metadata=granite_factors,
    ),
    "qwen2": Architecture(name="qwen2", hidden_act="silu", weights=table(SEPARATE)),
    "qwen3": Architecture(
        name="qwen3",
        hidden_act="silu",
        weights=table({**SEPARATE, **QK_NORMS}),
        allowed=NO_BIAS,
        wide_heads=True,
    ),
    "olmo2": Architecture(
        name="olmo2",
        hidden_act="silu",
        allowed=NO_BIAS,
        weights=table(
            {**SEPARATE, **QK_NORMS},
            norms={
                "blk.*.post_attention_norm": "layers.*.post_attention_layernorm",
                "blk.*.post_ffw_norm": "layers.*.post_feedforward_layernorm",
            },
        ),
    ),
    "starcoder2": Architecture(
        name="starcoder2", hidden_act="gelu_tanh", weights=table(SEPARATE), allowed={"attention_bias": (True,)}
    ),
    "gpt2": Architecture(name="gpt2", hidden_act="gelu_tanh", weights=table(FUSED), check=scores_divided_by_root),
    "gpt_bigcode": Architecture(
        name="starcoder", hidden_act="gelu_tanh", weights=table(FUSED), check=scores_divided_by_root
    ),
    "gpt_neox": Architecture(
        name="gptneox",
        hidden_act="gelu_tanh",
        weights=table(FUSED),
        metadata=lambda config: {"use_parallel_residual": bool(config.parallel_residual)},
    ),
    "bloom": Architecture(name="bloom", hidden_act="gelu_tanh", weights=table(FUSED)),
    "phi": Architecture(
        name="phi2",
        hidden_act="gelu_tanh",
        weights=table(SEPARATE),
        allowed={"qk_norm": (None,), "tie_word_embeddings": (False,)},
    ),
}


def rope_metadata(config: GroupFormerConfig) -> dict[str, Any]:
    """Keys of RoPE; `llama3` is a tensor of factors instead, see `rope_factors`."""
    if config.rope_parameters is None:
        return {}
    parameters: dict[str, Any] = dict(config.rope_parameters)
    kind = parameters.get("rope_type")  # None where it differs by layer type
    unusual = [name for name in ("beta_fast", "beta_slow", "attention_factor", "mscale") if parameters.get(name)]
    if kind not in ("default", "linear", "yarn", "llama3") or (kind == "yarn" and unusual):
        raise ValueError(f"rope_parameters ({parameters}) cannot be written as GGUF exactly")
    metadata: dict[str, Any] = {
        "rope.dimension_count": rotary_dim_of(config),
        "rope.freq_base": float(parameters["rope_theta"]),
    }
    if kind in ("linear", "yarn"):
        metadata["rope.scaling.type"] = kind
        metadata["rope.scaling.factor"] = float(parameters["factor"])
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        metadata["rope.scaling.original_context_length"] = int(original)
    return metadata


def differs_by_layer(config: GroupFormerConfig) -> bool:
    """Whether layers differ in their key-value heads or in the width of their MLPs."""
    return len({(layer.num_key_value_heads, layer.intermediate_size) for layer in config.per_layer_config}) > 1


def exact_architecture(config: GroupFormerConfig, family: str) -> Architecture:
    """The architecture that computes a config exactly.

    Raises:
        ValueError: llama.cpp does not know the family, or not with this field's value.
    """
    if family not in ARCHITECTURES:
        raise ValueError(f"family ({family!r}) cannot be written as GGUF; choose one of {', '.join(ARCHITECTURES)}")
    architecture = DECI if family == "llama" and differs_by_layer(config) else ARCHITECTURES[family]
    activation = SAME_ACTIVATION.get(config.hidden_act, config.hidden_act)
    if activation != architecture.hidden_act:
        raise ValueError(
            f"hidden_act ({config.hidden_act!r}) is not what llama.cpp computes for {family}, "
            f"which is {architecture.hidden_act}"
        )
    if any(kind == "sliding_attention" for kind in config.layer_types or []):
        raise ValueError(
            f"sliding_window ({config.sliding_window}) is not computed by llama.cpp for {family}; "
            "export it as safetensors"
        )
    for name, values in architecture.allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{name} ({getattr(config, name)!r}) is not loaded by llama.cpp for {family}")
    if not architecture.wide_heads and (config.head_dim or 0) * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"head_dim ({config.head_dim}) must be hidden_size / num_attention_heads for llama.cpp's {family}"
        )
    if not architecture.rope_factors and (config.rope_parameters or {}).get("rope_type") == "llama3":
        raise ValueError(f"rope_parameters ({config.rope_parameters}) is not computed by llama.cpp for {family}")
    rope_metadata(config)  # refuses kinds of RoPE that have no keys
    architecture.check(config)
    return architecture
