"""Native configs to ours and back, by the families' tables.

Nothing is approximated. Reading refuses every field that the tables do not know or allow; writing reads its own result
back and refuses it unless it computes what the original computes, whichever fields may differ in name.
"""

import dataclasses
import inspect
import json
import re
import sys
from types import MappingProxyType, NoneType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..families.family import ABSENT, COMMON, Computed, Family, Irrelevant, Required, Row
from ..model.configuration_groupformer import PER_LAYER_FIELDS, GroupFormerConfig


# Fields that transformers' shared code (masks, caches, RoPE) reads from any config that has them.
SHARED_FIELDS = ("layer_types", "sliding_window", "attention_chunk_size", "is_causal", "kv_sharing_modes", "head_dim")

# Fields about which a native config need not agree with ours to compute the same logits.
NO_LOGIT_DEPENDS_ON = frozenset(
    [
        "family",
        "native_config",
        "initializer_range",
        "use_cache",
        "attention_dropout",
        "hidden_dropout",
        "embedding_dropout",
        "classifier_dropout",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "transformers_version",
        "architectures",
        "output_hidden_states",
        "return_dict",
        "dtype",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "is_encoder_decoder",
    ]
)

# Names of one and the same function.
SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


# Reading -------------------------------------------------------------------------------------------------------------


def table_of(family: Family) -> dict[str, Row]:
    """All rows of a family: those that every family shares, and its own, which may replace them."""
    return {**COMMON, **family.fields}


def declared_fields(config_class: type) -> set[str]:
    """The names of a config class's own fields, defined by it or inherited."""
    return {field.name for field in dataclasses.fields(config_class)}


def native_code(config_class: type[PreTrainedConfig]) -> str:
    """The source of the family's modeling file, where undeclared fields may be read."""
    return inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__module__])


def check_known_fields(native: PreTrainedConfig, family: Family) -> None:
    """Refuse fields that the family's table does not mention and the native model may read.

    Files carry many fields that no code reads (`n_ctx`, `gradient_checkpointing`); they are harmless. A field is
    refused when the native class declares it with another default, or the native code names it.
    """
    table, values = table_of(family), plain(native)
    defaults = {field.name: field.default for field in dataclasses.fields(native)}
    code = None
    for name in sorted(set(values) - set(table)):
        value = values[name]
        if name == "quantization_config" and value:
            raise ValueError(
                f"quantization_config ({value}) is set: quantized weights are not converted; use the original ones"
            )
        if value is None or name in IGNORED_EVERYWHERE or (name in defaults and value == defaults[name]):
            continue
        if name == "partial_rotary_factor" and name in (native.rope_parameters or {}):
            continue  # older versions of transformers keep a second one, which no model reads
        code = native_code(type(native)) if code is None else code
        read = re.search(rf"config\.{re.escape(name)}\b|[\"']{re.escape(name)}[\"']", code)
        if name in defaults or name in SHARED_FIELDS or read:
            raise ValueError(
                f"{name} ({value!r}) of {family.model_type} is not known to GroupFormer and may change the logits; "
                "only a config without it can be imported"
            )


IGNORED_EVERYWHERE = ("auto_map", "_name_or_path", "model_type", "torch_dtype", "_attn_implementation")


# What a config says about where it was read from, not about the model.
NOT_REMEMBERED = ("model_type", "transformers_version", "_name_or_path")


def check_required_fields(native: PreTrainedConfig, family: Family) -> None:
    for name, row in table_of(family).items():
        value = getattr(native, name, None)
        if isinstance(row, Required) and value not in row.values and not (value is None and not hasattr(native, name)):
            allowed = " or ".join(repr(option) for option in row.values)
            raise ValueError(
                f"{name} ({value!r}) of {family.model_type} cannot be imported exactly: {row.because}; "
                f"it must be {allowed}"
            )


def read_fields(native: PreTrainedConfig, family: Family) -> dict[str, Any]:
    """Our fields, by the table, from a native config."""
    ours = dict(family.constants)
    for name, row in table_of(family).items():
        if isinstance(row, str) and hasattr(native, name):
            ours[row] = getattr(native, name)
        elif isinstance(row, Computed):
            ours.update(row.read(native))
    return ours


def read_config(native: PreTrainedConfig, family: Family) -> GroupFormerConfig:
    """The GroupFormer config that computes what a native config computes.

    Raises:
        ValueError: a field, named with its value, that GroupFormer cannot express or does not know.
    """
    check_known_fields(native, family)
    check_required_fields(native, family)
    ours = GroupFormerConfig(**read_fields(native, family), family=family.model_type)
    rebuilt = plain(config_class_of(family)(**write_fields(ours, family)))
    ours.native_config = {
        name: value
        for name, value in plain(native).items()
        if name not in NOT_REMEMBERED and (name not in rebuilt or rebuilt[name] != value)
    }
    if "regrouping" in ours.native_config:  # what was done to the heads stays readable, and goes on
        ours.regrouping = ours.native_config.pop("regrouping")
    return ours


def plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's fields as JSON holds them."""
    fields = json.loads(json.dumps(config.to_dict(), default=str))
    for value in fields.values():
        if isinstance(value, dict) and "architectures" in value:  # a config inside this one
            value["dtype"] = None  # loading writes the model's dtype there; the file does not hold it
    return fields


# Writing -------------------------------------------------------------------------------------------------------------


class LayerView:
    """Our config as the tables' formulas read it: where layers differ, a field shows its value in the first layer.

    That may be wrong for the others; `write_config` finds out by reading its result back.
    """

    def __init__(self, config: GroupFormerConfig):
        self.config = config
        self.layers = list(config.per_layer_config)

    def __getattr__(self, name: str) -> Any:
        source = self.layers[0] if name in PER_LAYER_FIELDS and self.layers else self.config
        return getattr(source, name)


def config_class_of(family: Family) -> type[PreTrainedConfig]:
    return CONFIG_MAPPING[family.model_type]


def write_fields(ours: GroupFormerConfig, family: Family) -> dict[str, Any]:
    """Native fields, by the table, from ours."""
    view, declared = LayerView(ours), declared_fields(config_class_of(family))
    fields: dict[str, Any] = {}
    for name, row in table_of(family).items():
        if isinstance(row, str) and name in declared:
            fields[name] = getattr(view, row, None)
        elif isinstance(row, Required):
            fields[name] = row.values[0]
        elif isinstance(row, Computed) and (value := row.write(view)) is not ABSENT:
            fields[name] = value
    if fields.get("dtype") is None:
        fields.pop("dtype", None)
    return fields


def write_config(ours: GroupFormerConfig, family: Family) -> PreTrainedConfig:
    """The native config that computes what ours computes; for the family it came from, with all that it said.

    Raises:
        ValueError: the family cannot express a field, named with its value.
    """
    fields = write_fields(ours, family)
    if getattr(ours, "regrouping", None):
        fields["regrouping"] = ours.regrouping
    remembered = dict(ours.native_config or {}) if ours.family == family.model_type else {}
    # A remembered value may contradict a field that was changed since; then only what no logit depends on stays.
    table = table_of(family)
    harmless = {
        name: value for name, value in remembered.items() if isinstance(table.get(name), (Irrelevant, NoneType))
    }
    try:
        return checked_config(ours, {**fields, **restore(remembered)}, family)
    except ValueError:
        return checked_config(ours, {**fields, **restore(harmless)}, family)


def checked_config(ours: GroupFormerConfig, fields: dict[str, Any], family: Family) -> PreTrainedConfig:
    try:
        native = config_class_of(family)(**fields)
    except StrictDataclassError as error:  # a class whose fields may not be None, say
        raise ValueError(f"{family.model_type} cannot express the config: {' '.join(str(error).split())}") from error
    check_same_fields(ours, native, family)
    return native


def restore(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as a config class takes them: JSON turned the keys of label names into strings."""
    if "id2label" in fields:
        fields = {**fields, "id2label": {int(key): label for key, label in fields["id2label"].items()}}
    return fields


def check_same_fields(ours: GroupFormerConfig, native: PreTrainedConfig, family: Family) -> None:
    wanted, got = computation(ours), computation(read_config(native, family))
    for name, value in wanted.items():
        if got[name] != value:
            remedy = "choose another family, or keep the GroupFormer format"
            if family.model_type == "llama" and name == "num_key_value_heads" and isinstance(value, list):
                remedy = "choose --format decilm (vLLM) or gguf (llama.cpp), or keep the GroupFormer format"
            raise ValueError(
                f"{name} ({value!r}) cannot be expressed by {family.model_type}, which would compute with "
                f"{got[name]!r}; {remedy}"
            )


def computation(config: GroupFormerConfig) -> dict[str, Any]:
    """What a config computes, in a form where two configs are equal exactly when they compute the same."""
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in NO_LOGIT_DEPENDS_ON | set(PER_LAYER_FIELDS) | {"layer_types"}
    }
    fields["hidden_act"] = SAME_ACTIVATION.get(config.hidden_act, config.hidden_act)
    fields["norm_bias"] = config.norm_bias and config.norm_type == "layer_norm"
    if config.position_embedding_type in ("alibi", "none"):
        fields["max_position_embeddings"] = None  # nothing depends on it
    fields["rope_parameters"] = {
        name: value
        for name, value in (config.rope_parameters or {}).items()
        if value is not None and (name, value) != ("partial_rotary_factor", 1.0)
    }
    no_rope = list(config.no_rope_layers or [1] * config.num_hidden_layers)[: config.num_hidden_layers]
    fields["no_rope_layers"] = no_rope
    layers = list(config.per_layer_config)
    scale = float(config.head_dim or 1) ** -0.5
    for name in ("num_key_value_heads", "intermediate_size"):
        fields[name] = same_in_all(getattr(layer, name) for layer in layers)
    fields["attention_multiplier"] = same_in_all(
        scale if layer.attention_multiplier is None else layer.attention_multiplier for layer in layers
    )
    fields["sliding_window"] = same_in_all(
        layer.sliding_window if kind == "sliding_attention" else None
        for layer, kind in zip(layers, config.layer_types or [])
    )
    return fields


def same_in_all(values) -> Any:
    """One value where all layers agree, else the list of them."""
    values = list(values)
    return values[0] if values and all(value == values[0] for value in values) else values


def coverage(family: Family) -> set[str]:
    """Fields of the native config class that a family's table lacks; the tests require that there are none."""
    return declared_fields(config_class_of(family)) - set(table_of(family))


def irrelevant_fields(family: Family) -> MappingProxyType:
    """Fields that are kept but change no logit, with the reason."""
    rows = {name: row.because for name, row in table_of(family).items() if isinstance(row, Irrelevant)}
    return MappingProxyType(rows)
