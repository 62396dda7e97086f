"""Random configurations: legal ones of every kind, and illegal ones with the field that makes them so."""

from typing import Any

from hypothesis import strategies as st

from groupformer import GroupFormerConfig


ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


@st.composite
def rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(ROPE_TYPES)))
    fields = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000.0])), **ROPE_TYPES[kind]}
    if draw(st.booleans()):
        fields["partial_rotary_factor"] = 0.5
    return fields


@st.composite
def legal_fields(draw: st.DrawFn, causal: bool | None = None) -> dict[str, Any]:
    """The fields of a small model that can be built; `causal` fixes its direction."""
    heads = draw(st.integers(1, 6))
    head_dim = 4 * draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    positions = draw(st.sampled_from(["learned", "sinusoidal", "rope", "alibi", "none"]))
    norm = draw(st.sampled_from(["rms_norm", "rms_norm_1p", "layer_norm"]))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(5, 60)),
        "hidden_size": 2 * draw(st.integers(4, 16)),
        "intermediate_size": draw(st.integers(4, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from(divisors(heads))),
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "position_embedding_type": positions,
        "norm_type": norm,
        "norm_bias": norm == "layer_norm" and draw(st.booleans()),
        "norm_position": draw(st.sampled_from(["before", "after", "both"])),
        "qk_norm": draw(st.sampled_from([None, "head", "projection"])),
        "mlp_type": draw(st.sampled_from(["gated", "plain"])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "attention_bias": draw(st.booleans()),
        "attention_output_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "is_causal": draw(st.booleans()) if causal is None else causal,
        "pad_token_id": 0,
        "attn_implementation": draw(st.sampled_from(["eager", "sdpa"])),
    }
    if positions == "rope":
        fields["rope_parameters"] = draw(rope_parameters())
        if head_dim == 4 and fields["rope_parameters"]["rope_type"] == "dynamic":
            fields["rope_parameters"].pop("partial_rotary_factor", None)  # needs two pairs
    if draw(st.booleans()):
        fields["sliding_window"] = draw(st.integers(2, 6))
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        fields["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
        if "sliding_attention" not in fields["layer_types"]:
            fields.pop("sliding_window")
    if draw(st.booleans()):
        layer = draw(st.integers(0, layers - 1))
        fields["per_layer_config"] = {layer: {"num_key_value_heads": draw(st.sampled_from(divisors(heads)))}}
    return fields


def legal_configs(causal: bool | None = None) -> st.SearchStrategy[GroupFormerConfig]:
    return legal_fields(causal).map(lambda fields: GroupFormerConfig(**fields))


# A field, and what it must not be in a model of 4 query heads of 8 features and 2 layers.
ILLEGAL: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.integers(-5, 0),
    "hidden_size": st.integers(-5, 0),
    "intermediate_size": st.integers(-5, 0),
    "num_hidden_layers": st.integers(-5, -1),
    "num_attention_heads": st.integers(-5, 0),
    "num_key_value_heads": st.integers(-5, 20).filter(lambda heads: heads not in (1, 2, 4)),
    "head_dim": st.integers(-5, 0) | st.sampled_from([3, 7]),
    "max_position_embeddings": st.integers(-5, 0),
    "position_embedding_type": st.text(max_size=8),
    "norm_type": st.text(max_size=8),
    "norm_position": st.text(max_size=8),
    "mlp_type": st.text(max_size=8),
    "hidden_act": st.text(max_size=4).filter(
        lambda name: name not in ("relu", "silu", "gelu", "mish", "tanh", "selu")
    ),
    "qk_norm": st.text(max_size=6),
    "sliding_window": st.integers(-5, 0),
    "layer_types": st.lists(st.just("full_attention"), max_size=5).filter(lambda types: len(types) != 2),
    "norm_eps": st.floats(-9, -1e-9),
    "hidden_dropout": st.floats(1.01, 9) | st.floats(-9, -0.01),
    "initializer_range": st.floats(-9, -0.01),
    "pad_token_id": st.integers(99, 1000),
    "bos_token_id": st.integers(99, 1000),
}
