"""What a family of native checkpoints is: data. The machinery around it is in `configs` and `weights`.

A family's module holds one `Family`: a table of the native config's fields, a table of its weights, and example
options that the tests are generated from. Every field of the native config class must be in the table; a field that
a new version of transformers adds is refused until the table has a row for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .operations import RENAME, Operation


@dataclass(frozen=True)
class Irrelevant:
    """A field that no logit depends on; it is kept for the way back."""

    because: str


@dataclass(frozen=True)
class Required:
    """A field that must have one of `values`, since GroupFormer has no field for the others."""

    values: tuple[Any, ...]
    because: str


@dataclass(frozen=True)
class Computed:
    """A field that meets ours in a formula.

    `read(native)` gives our fields, as a dict, from the native config (or object of its fields); `write(ours)` gives
    this field's value from our config. What `write` cannot know is remembered by the importer.
    """

    read: Callable[[Any], dict[str, Any]]
    write: Callable[[Any], Any]


@dataclass(frozen=True)
class Weights:
    """Our tensors behind one native tensor. `ours` are stems: `.weight` and `.bias` both follow, where they exist."""

    ours: str | tuple[str, ...]
    operation: Operation = RENAME

    @property
    def stems(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


# A field's row; a plain string is our name for the same value.
Row = str | Irrelevant | Required | Computed


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of native checkpoints.

    Args:
        model_type: Transformers' model type; the config and model classes follow from it.
        fields: A row for each field of the native config class, and for undeclared ones that the native code reads.
        constants: Our fields that have one value in the whole family.
        weights: Native stems, relative to the native base model, to ours, relative to `GroupFormerModel`; `*` is the
            layer. Heads have the same names everywhere, see `weights.HEADS`.
        legacy_names: Names in older files, as regular expressions, to the names that transformers' modules have today.
        file_names: Names of today's modules, as regular expressions, to those that files keep for compatibility.
        tiny: Native config of a model for tests, small and unusual.
        examples: Options that real checkpoints use, each as changes to `tiny`; every one is tested for exactness.
        refused: Options that are refused, each as changes to `tiny` that hold one field to blame, for the tests.
    """

    model_type: str
    fields: Mapping[str, Row]
    constants: Mapping[str, Any]
    weights: Mapping[str, str | Weights]
    legacy_names: Mapping[str, str] = field(default_factory=dict)
    file_names: Mapping[str, str] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def head_dim_row() -> Computed:
    """`head_dim` where the native class has no such field, but its code reads one from config.json when given."""
    return Computed(
        read=lambda native: {"head_dim": getattr(native, "head_dim", None)},
        write=lambda ours: ours.head_dim if ours.head_dim * ours.num_attention_heads != ours.hidden_size else ABSENT,
    )


# What `Computed.write` returns for a field that should not be written at all.
ABSENT = object()


def rope_row(partial: bool = False) -> Computed:
    """`rope_parameters`; `partial` says whether the family's default RoPE knows `partial_rotary_factor`."""

    def read(native: Any) -> dict[str, Any]:
        parameters = dict(native.rope_parameters)
        factor = parameters.get("partial_rotary_factor", 1.0)
        if not partial and factor != 1.0:
            raise ValueError(
                f"rope_parameters['partial_rotary_factor'] ({factor}) is not known to {native.model_type}; remove it"
            )
        return {"rope_parameters": parameters}

    def write(ours: Any) -> Any:
        if ours.rope_parameters is None:
            return ABSENT
        parameters = dict(ours.rope_parameters)
        if "full_attention" in parameters:
            raise ValueError(f"rope_parameters ({parameters}) differs by layer type, which the family cannot express")
        if partial:  # these families read it without a default of 1
            parameters.setdefault("partial_rotary_factor", 1.0)
        return parameters

    return Computed(read, write)


# Rows that most families share ---------------------------------------------------------------------------------------

TRAINING_ONLY = Irrelevant("training only")
MEMORY_ONLY = Irrelevant("how it is computed, not what")

SIZES: dict[str, Row] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
}

# The base class's fields and those that every causal model has.
COMMON: dict[str, Row] = {
    "transformers_version": Irrelevant("who wrote the file"),
    "architectures": Irrelevant("the class name, which the model itself knows"),
    "output_hidden_states": Irrelevant("what is returned beside the logits"),
    "output_attentions": Irrelevant("what is returned beside the logits"),
    "return_dict": Irrelevant("how outputs are packed"),
    "chunk_size_feed_forward": MEMORY_ONLY,
    "is_encoder_decoder": Required((False,), "GroupFormer is a decoder or an encoder, not both"),
    "dtype": "dtype",
    "id2label": "id2label",
    "label2id": "label2id",
    "problem_type": "problem_type",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "tie_word_embeddings": "tie_word_embeddings",
}


def token_id_row(name: str) -> Computed:
    """A special token. One outside the vocabulary, as tests' tiny models have, names no token: ours is None."""

    def read(native: Any) -> dict[str, Any]:
        value = getattr(native, name, None)
        ids = value if isinstance(value, (list, tuple)) else [value]
        return {name: value if all(i is not None and 0 <= i < native.vocab_size for i in ids) else None}

    return Computed(read, lambda ours: getattr(ours, name))


def classifier_dropout_row() -> Computed:
    """Some heads read `classifier_dropout` from a config whose class does not declare it."""

    def read(native: Any) -> dict[str, Any]:
        return {"classifier_dropout": getattr(native, "classifier_dropout", None)}

    def write(ours: Any) -> Any:
        return ABSENT if ours.classifier_dropout is None else ours.classifier_dropout

    return Computed(read, write)


COMMON["classifier_dropout"] = classifier_dropout_row()
COMMON.update({name: token_id_row(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")})


def window(ours: Any) -> int | None:
    """Our window, where any layer slides."""
    return ours.sliding_window if "sliding_attention" in (ours.layer_types or []) else None


# One window for all layers, or none (Mistral).
WINDOW: dict[str, Row] = {
    "sliding_window": Computed(lambda native: {"sliding_window": native.sliding_window}, window),
}


def check_window_is_used(native: Any) -> dict[str, Any]:
    """A layer type without its window: the native masks and kernels would disagree."""
    if not native.use_sliding_window and "sliding_attention" in (native.layer_types or []):
        raise ValueError(
            f"use_sliding_window (False) contradicts layer_types ({native.layer_types}); change one of the two"
        )
    return {}


# Windows layer by layer (Qwen, SmolLM 3).
WINDOWS: dict[str, Row] = {
    **WINDOW,
    "layer_types": "layer_types",
    "use_sliding_window": Computed(check_window_is_used, lambda ours: window(ours) is not None),
}

# Llama's fields that most of its descendants keep.
LLAMA_FIELDS: dict[str, Row] = {
    **SIZES,
    "intermediate_size": "intermediate_size",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "norm_eps",
    "attention_dropout": "attention_dropout",
    "rope_parameters": rope_row(),
}

# `attention_bias` of Llama and others means all four projections.
ATTENTION_BIAS = Computed(
    lambda native: {"attention_bias": native.attention_bias, "attention_output_bias": native.attention_bias},
    lambda ours: ours.attention_bias,
)

LAYER_NORM = {"norm_type": "layer_norm", "norm_bias": True}
PLAIN_MLP = {"mlp_type": "plain", "mlp_bias": True}
ALL_BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}

QKV = ("layers.*.self_attn.q_proj", "layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj")

# Families whose decoders have Llama's module names.
LLAMA_WEIGHTS: dict[str, str | Weights] = {
    "embed_tokens": "embed_tokens",
    **{
        f"layers.*.{name}": f"layers.*.{name}"
        for name in (
            "input_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    },
    "norm": "norm",
}

# Tests' models: the sizes are unusual on purpose, so that no two dimensions can be confused.
TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 83,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ROPE_TYPES: dict[str, dict[str, Any]] = {
    "linear rope": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    "dynamic rope": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn rope": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
    },
    "llama3 rope": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
ROPE_EXAMPLES: dict[str, dict[str, Any]] = {
    name: {"rope_parameters": parameters} for name, parameters in ROPE_TYPES.items()
}
ROPE_EXAMPLES["dynamic rope"]["max_position_embeddings"] = 16  # it acts on longer prompts only
