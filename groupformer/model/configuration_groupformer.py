# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""GroupFormer configuration: one architecture from multi-head to multi-query attention.

Every field has transformers' own name where one exists. What the fields describe together is checked here; the
modeling file trusts it. This file also travels to the Hub as remote code, so it imports nothing but transformers.
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


# Fields that `per_layer_config` may override in single layers; every other field is one for the whole model.
PER_LAYER_FIELDS = ("num_key_value_heads", "sliding_window", "attention_multiplier", "intermediate_size")

# Fields that follow from others unless they are given. A config remembers what was given: a derived value is derived
# again whenever a field changes, and a saved config leaves it out, so that loading with overrides equals building with
# them. `per_layer_config` is among them because transformers drops what equals the global value.
DERIVED_FIELDS = (
    "head_dim",
    "num_key_value_heads",
    "rope_parameters",
    "use_cache",
    "per_layer_config",
    "layer_types",
    "label2id",
)

# What a Hub repository of ours says about its code, so that all Auto classes find it with `trust_remote_code=True`.
HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
AUTO_MAP = {
    "AutoConfig": "configuration_groupformer.GroupFormerConfig",
    "AutoModel": "modeling_groupformer.GroupFormerModel",
    **{f"AutoModel{head}": f"modeling_groupformer.GroupFormer{head}" for head in HEADS},
}

LAYER_TYPES = ("full_attention", "sliding_attention")  # what a layer sees: all tokens, or those of a window

# The smallest legal values of numbers.
MINIMUMS = (
    (1, ("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")),
    (0, ("num_hidden_layers", "position_offset")),
    (0.0, ("norm_eps", "initializer_range")),
)

# Fields that can only be set where another field has a certain value.
REQUIREMENTS = (
    ("parallel_residual", "norm_position", "before"),
    ("shared_parallel_norm", "parallel_residual", True),
    ("rope_parameters", "position_embedding_type", "rope"),
    ("no_rope_layers", "position_embedding_type", "rope"),
    ("position_offset", "position_embedding_type", "learned"),
)


def divisors(number: int) -> list[int]:
    """All positive divisors of `number`, in ascending order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def choices(options) -> str:
    """`[1, 2, 3]` as "1, 2 or 3", for error messages."""
    words = [str(option) for option in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def derive_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the derived fields are where they are not given, from the other fields of the same config."""
    heads, layer_count = fields["num_attention_heads"], fields["num_hidden_layers"]
    rope = fields["position_embedding_type"] == "rope"
    layers = {int(layer_idx): layer for layer_idx, layer in (fields.get("per_layer_config") or {}).items()}
    windows = [layers.get(i, {}).get("sliding_window", fields["sliding_window"]) for i in range(layer_count)]
    return {
        "head_dim": fields["hidden_size"] // heads if heads > 0 else None,
        "num_key_value_heads": heads,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"} if rope else None,
        "use_cache": bool(fields["is_causal"]),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "label2id": {label: int(label_id) for label_id, label in (fields.get("id2label") or {}).items()},
    }


def restore_given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dictionary with the derived ones as they were given, but for those that were replaced since."""
    fields = dict(fields)
    given, values = fields.pop("derived_fields", {}), fields.pop("derived_values", {})
    return {**fields, **{name: given[name] for name in values if name in fields and fields[name] == values[name]}}


def first_layers(fields: Mapping[str, Any], num_hidden_layers: int) -> dict[str, Any]:
    """The fields that have an entry a layer, without the entries of further layers."""
    shorter: dict[str, Any] = {}
    if types := fields.get("layer_types"):
        shorter["layer_types"] = types[:num_hidden_layers]
    if layers := fields.get("per_layer_config"):
        shorter["per_layer_config"] = {i: layer for i, layer in layers.items() if int(i) < num_hidden_layers}
    return shorter


def _check_per_layer_fields(fields) -> None:
    unknown = sorted(set(fields) - set(PER_LAYER_FIELDS))
    if unknown:
        raise ValueError(
            f"per_layer_config overrides {choices(unknown)}, which is one for the whole model; "
            f"only {choices(PER_LAYER_FIELDS)} may differ by layer"
        )


@strict
class GroupFormerConfig(PreTrainedConfig):
    r"""Configuration of every GroupFormer model. The defaults are the reference checkpoint (MHA, 10 M parameters).

    Args:
        vocab_size (`int`, defaults to 16384): Number of tokens of the vocabulary.
        hidden_size (`int`, defaults to 256): Width of the residual stream.
        intermediate_size (`int`, defaults to 704): Width inside the MLP.
        num_hidden_layers (`int`, defaults to 8): Number of layers.
        num_attention_heads (`int`, defaults to 8): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key-value heads, the group count of grouped-query attention
            (Ainslie et al. 2023). `None` means one for each query head: multi-head attention (Vaswani et al. 2017); 1
            is multi-query attention (Shazeer 2019). It must divide `num_attention_heads`.
        per_layer_config (`dict[int, dict]`, *optional*): Transformers' heterogeneity: overrides for single layers,
            e.g. `{3: {"num_key_value_heads": 1}}`. Only `num_key_value_heads`, `sliding_window`,
            `attention_multiplier` and `intermediate_size` may differ.
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads`): Width of one head.
        position_embedding_type (`str`, defaults to `"rope"`): `"learned"` (GPT-2), `"sinusoidal"` (Vaswani et al.
            2017, section 3.5), `"rope"` (Su et al. 2021), `"alibi"` (Press et al. 2022) or `"none"`.
        max_position_embeddings (`int`, defaults to 2048): Longest sequence that the positions are made for. Learned
            and sinusoidal positions refuse longer ones; RoPE warns once; ALiBi and no positions have no limit.
        position_offset (`int`, defaults to 0): Row of the learned positions that the first token reads (OPT: 2).
        rope_parameters (`dict`, *optional*, defaults to the type `"default"` with a `rope_theta` of 10000):
            Transformers' RoPE parameters: every `rope_type` that it knows, `partial_rotary_factor`; for all layers,
            or under `"full_attention"` and `"sliding_attention"` for each kind of layer (OLMo 3). RoPE only.
        no_rope_layers (`list[int]`, *optional*): SmolLM3's and Llama 4's convention: one entry a layer, 1 where the
            layer uses RoPE, 0 where it has no positions at all. RoPE only.
        norm_type (`str`, defaults to `"rms_norm"`): `"rms_norm"` (Zhang and Sennrich 2019),
            `"rms_norm_1p"`, whose factor is one plus its weight (Gemma), or `"layer_norm"` (Ba et al. 2016).
        norm_eps (`float`, defaults to 1e-6): Epsilon of every norm.
        norm_bias (`bool`, defaults to `True`): Whether LayerNorm has a bias. RMSNorm never has one.
        norm_position (`str`, defaults to `"before"`): `"before"` each sublayer (GPT-2, Llama), `"after"` it and
            before the residual addition (OLMo 2), or `"both"` (GLM 4, Gemma 3).
        embedding_norm (`bool`, defaults to `False`): A norm right after the embeddings (BLOOM).
        qk_norm (`str`, *optional*): Norm of queries and keys before RoPE: `"head"`, each head by itself with one
            shared weight (Qwen 3), or `"projection"`, over all heads together (OLMo 2).
        mlp_type (`str`, defaults to `"gated"`): `"gated"`, `down(act(gate(x)) * up(x))` (Shazeer 2020), or `"plain"`,
            `down(act(up(x)))` (GPT-2).
        hidden_act (`str`, defaults to `"silu"`): Activation of the MLP: any name in `transformers.activations.ACT2FN`.
        parallel_residual (`bool`, defaults to `False`): Attention and MLP side by side (GPT-NeoX, Phi), not in turn.
        shared_parallel_norm (`bool`, defaults to `False`): With `parallel_residual`, whether both sublayers read the
            same norm (Phi) or each its own (GPT-NeoX).
        attention_bias, attention_output_bias, mlp_bias, lm_head_bias (`bool`, default to `False`): Biases of the q/k/v
            projections, of the output projection, of the MLP, and of the LM head.
        sliding_window (`int`, *optional*): How many tokens, itself included, a token of a sliding layer looks back on;
            when bidirectional, how many it sees to each side, itself not included.
        layer_types (`list[str]`, *optional*): `"full_attention"` or `"sliding_attention"` for each layer. By default
            every layer slides whose `sliding_window` is set.
        is_causal (`bool`, defaults to `True`): `False` makes a bidirectional encoder of the same weights. It keeps no
            KV cache: `use_cache` is `False`.
        embedding_multiplier, residual_multiplier, logits_scaling (`float`, default to 1.0): Granite's scalars: factors
            of the embeddings and of each sublayer's output, and what logits are divided by.
        round_embedding_multiplier (`bool`, defaults to `False`): Round it to the embeddings' dtype first (Gemma).
        attention_multiplier (`float`, *optional*, defaults to `head_dim ** -0.5`): Factor of the attention scores.
        attention_dropout, hidden_dropout, embedding_dropout (`float`, default to 0.0): Dropout of attention
            probabilities, of each sublayer's output, and of the embeddings.
        classifier_dropout (`float`, *optional*, defaults to `hidden_dropout`): Dropout before the head over tokens.
        initializer_range (`float`, defaults to 0.02): Standard deviation of fresh weights.
        use_cache (`bool`, defaults to `True`): Whether the model returns a KV cache.
        tie_word_embeddings (`bool`, defaults to `True`): Whether the LM head is the embedding matrix.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special tokens, inside the vocabulary.
        family (`str`, *optional*): Model type that the model was imported from, and to which an export returns.
        native_config (`dict`, *optional*): What the native config says beyond these fields, which an export returns.

    Raises:
        ValueError: fields that cannot be built. The message names the field, its value and what to choose instead.

    ```python
    >>> from groupformer import GroupFormerConfig, GroupFormerForCausalLM
    >>> config = GroupFormerConfig(num_attention_heads=8, num_key_value_heads=2)  # GQA: 4 query heads share a KV head
    >>> model = GroupFormerForCausalLM(config)
    ```"""

    model_type = "groupformer"
    _rope_type_labels = LAYER_TYPES  # under which transformers looks for RoPE parameters by layer type
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # from transformers 5.24 on the latter
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # Size
    vocab_size: int = 16384
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    # Heads
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    # Positions
    position_embedding_type: Literal["learned", "sinusoidal", "rope", "alibi", "none"] = "rope"
    max_position_embeddings: int = 2048
    position_offset: int = 0
    rope_parameters: dict[str, Any] | None = None
    no_rope_layers: list[int] | None = None
    # Norms
    norm_type: Literal["rms_norm", "rms_norm_1p", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    norm_position: Literal["before", "after", "both"] = "before"
    embedding_norm: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    # MLP and residuals
    mlp_type: Literal["gated", "plain"] = "gated"
    hidden_act: str = "silu"
    parallel_residual: bool = False
    shared_parallel_norm: bool = False
    # Biases
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    # Who sees whom
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    is_causal: bool = True
    # Scalars, neutral by default
    embedding_multiplier: float | int = 1.0
    round_embedding_multiplier: bool = False
    residual_multiplier: float | int = 1.0
    attention_multiplier: float | int | None = None
    logits_scaling: float | int = 1.0
    # Dropout
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    # The rest, as everywhere in transformers
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    # Where it came from
    family: str | None = None
    native_config: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build a config from a dictionary and overrides, as if it had been built with both.

        The dictionary may come from a file, so it may name no code to fetch from the Hub. Fewer layers than it has
        (`from_pretrained(path, num_hidden_layers=2)`) are its first ones.
        """
        for name in ("attn_implementation", "_attn_implementation"):
            if "/" in str(config_dict.get(name)):  # a name, or a dictionary of them
                raise ValueError(
                    f"{name} ({config_dict[name]!r}) in a config would fetch code from the Hub; take it out there, "
                    "and pass it to from_pretrained if you trust it"
                )
        if "derived_fields" in config_dict:
            config_dict = restore_given(config_dict)
        else:  # from before they were named: a value that equals the derived one counts as derived
            defaults = {name: field.default for name, field in cls.__dataclass_fields__.items()}
            derived = derive_fields({**defaults, **config_dict})
            config_dict = {name: v for name, v in config_dict.items() if name not in derived or v != derived[name]}
        names = {*cls.__dataclass_fields__, "per_layer_config", "rope_scaling", "rope_theta", "partial_rotary_factor"}
        overrides = {name: kwargs.pop(name) for name in (names - {"dtype"}) & set(kwargs)}
        if "num_hidden_layers" in overrides:
            config_dict |= first_layers(config_dict, overrides["num_hidden_layers"])
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def __post_init__(self, **kwargs):
        if named := {name: kwargs.pop(name) for name in ("derived_fields", "derived_values") if name in kwargs}:
            for name, value in restore_given({**vars(self), **named}).items():
                setattr(self, name, value)
        # Transformers completes this dictionary in place, so it gets a copy: the caller's stays as it was.
        legacy = ("rope_theta", "partial_rotary_factor")
        rope_parameters = {name: value for name in legacy if (value := kwargs.pop(name, None)) is not None}
        rope_parameters |= copy.deepcopy(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        self.rope_parameters = None
        layers = kwargs.pop("per_layer_config", None) or {}
        per_layer_config = {int(layer_idx): dict(overrides) for layer_idx, overrides in layers.items()}
        _check_per_layer_fields(field for overrides in per_layer_config.values() for field in overrides)
        self._check_sizes()
        # A config loaded from the Hub names its code as "repo--module.Class"; the code travels with every save of
        # ours, so a saved config always names the files beside it.
        auto_map = kwargs.pop("auto_map", None) or AUTO_MAP
        super().__post_init__(**kwargs)
        self.auto_map = {
            name: reference.split("--")[-1] if isinstance(reference, str) else reference
            for name, reference in auto_map.items()
        }
        given = {name: vars(self).get(name) for name in DERIVED_FIELDS}
        given |= {"rope_parameters": rope_parameters or None, "per_layer_config": per_layer_config or None}
        self._derive(given)

    def __setattr__(self, name, value):
        values = vars(self)
        known = values.get("_derived")
        has_changed = known and (name not in values or values[name] != value)
        super().__setattr__(name, value)
        # Transformers sets `is_causal` in every forward: what has not changed derives nothing.
        is_relevant = name in DERIVED_FIELDS or (has_changed and name in self.__dataclass_fields__)
        # Transformers makes a layer's config: a copy without `per_layer_config`, in which nothing is derived either.
        had_layers = known and known["per_layer_config"][1] and name != "per_layer_config"
        if known and is_relevant and (self.is_heterogeneous or not had_layers):
            given = {**self._given_fields(), name: value}
            if name == "num_hidden_layers":
                given |= first_layers(given, value)
            self._derive(given)

    def _derive(self, given: dict[str, Any]) -> None:
        """Set every derived field: to what is given for it, completed, or to what follows from the other fields.

        `_derived` remembers what was given and what it became. While it is missing, setting a field derives nothing.
        """
        self.__dict__.pop("_derived", None)
        try:
            self.per_layer_config = None  # while it is set, transformers forbids reading what differs by layer
            derived = derive_fields({**vars(self), "per_layer_config": given["per_layer_config"]})
            if given["label2id"] == derived["label2id"]:  # transformers sets both where it is given `num_labels`
                given = {**given, "label2id": None}
            given_values = {name: copy.deepcopy(given[name]) for name in derived if given[name] is not None}
            vars(self).update(derived | given_values, use_cache=given["use_cache"] and self.is_causal)
            if self.position_embedding_type == "rope":
                self.convert_rope_params_to_dict()
            self.per_layer_config = given["per_layer_config"]
        finally:
            values = self._whole_values()
            self._derived = {name: (given[name], copy.deepcopy(values[name])) for name in DERIVED_FIELDS}

    def _whole_values(self) -> dict[str, Any]:
        """The values for the whole model; `per_layer_config` is `True` where there is one, else `None`."""
        return {**vars(self), "per_layer_config": self.is_heterogeneous or None}

    def _given_fields(self) -> dict[str, Any]:
        """What each derived field was given as. A value that was changed in place since then is a given one too."""
        values = self._whole_values()
        known = values.get("_derived", {})
        return {name: given if values[name] == was else values[name] for name, (given, was) in known.items()}

    def _derived_entries(self) -> dict[str, Any]:
        """What files and dictionaries say of derived fields: what they were given as, where it is not their value."""
        given, entries = self._given_fields(), {}
        layers = given.pop("per_layer_config", None)
        if layers and not self.serialize_explicit_per_layer_config:
            digits = len(str(max(layers)))  # transformers' own way, so that the keys sort in JSON
            entries["per_layer_config"] = {str(idx).zfill(digits): dict(layers[idx]) for idx in sorted(layers)}
        return {**entries, "derived_fields": {name: v for name, v in given.items() if v != vars(self)[name]}}

    def to_dict(self) -> dict[str, Any]:
        """Every value, as transformers' `to_dict`, for whoever reads it; and which ones are derived.

        What is put into the dictionary before a config is built from it counts as given, and the rest follows.
        """
        entries = self._derived_entries()
        entries["derived_values"] = {name: vars(self)[name] for name in entries["derived_fields"]}
        return {name: v for name, v in super().to_dict().items() if name != "_derived"} | copy.deepcopy(entries)

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: derived values are left out, and named, so that the file can be edited."""
        entries, fields = self._derived_entries(), self.__dataclass_fields__
        given = entries["derived_fields"]
        output = {**super().to_diff_dict(), **given, **entries, "derived_fields": sorted(given)}
        left_out = {"derived_values", *(name for name, value in given.items() if value == fields[name].default)}
        return {name: value for name, value in output.items() if name not in left_out}

    def __eq__(self, other):
        """Whether all values are equal, given or derived."""
        same_kind = isinstance(other, PreTrainedConfig)
        return same_kind and {**vars(self), "_derived": None} == {**vars(other), "_derived": None}

    def validate_architecture(self):
        """Refuses what cannot be built. Runs by itself when a config is built or loaded."""
        _check_per_layer_fields(self.per_layer_attributes or ())
        self._check_sizes()
        self._check_layers()
        for name, other, needed in REQUIREMENTS:
            value, found = getattr(self, name), getattr(self, other)
            if value and found != needed:
                raise ValueError(
                    f"{name} ({value!r}) needs {other}={needed!r}, but it is {found!r}; change one of the two"
                )
        from transformers.activations import ACT2FN  # imports torch, which a config alone does not need

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act ({self.hidden_act!r}) is unknown; choose {choices(sorted(ACT2FN))}")

    def check_tensor_parallel(self, ranks: int) -> None:
        """Raises a `ValueError`, with the layer and the counts that would do, where ranks would share a head."""
        for layer_idx, layer in enumerate(self.per_layer_config):
            for name in ("num_key_value_heads", "num_attention_heads"):
                heads = getattr(layer, name)
                if heads % ranks != 0:
                    raise ValueError(
                        f"{name} ({heads}) of layer {layer_idx} cannot be split among {ranks} tensor parallel ranks; "
                        f"choose {choices(divisors(heads))}, or shard by FSDP"
                    )

    def check_pipeline_parallel(self) -> None:
        """Raises a `ValueError` that names the field, if stages of a pipeline would compute something else.

        Transformers and vLLM hand a stage the hidden states of the one before as its input embeddings: what is done to
        embeddings would be done again by each stage.
        """
        neutral = {
            "position_embedding_type": ("rope", "alibi", "none"),
            "embedding_norm": (False,),
            "embedding_multiplier": (1.0,),
        }
        for name, values in neutral.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} ({getattr(self, name)!r}) acts on the embeddings, and each stage of a pipeline would do "
                    "it again; use one stage, and tensor or data parallelism instead"
                )

    def validate_token_ids(self):
        """Refuses special tokens that the embedding matrix does not hold."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, (list, tuple)) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name} ({token_id}) is outside the vocabulary; choose None or a number from 0 to "
                        f"vocab_size - 1 ({self.vocab_size - 1})"
                    )

    def validate_rope(self):
        """Refuses RoPE parameters that transformers does not know or that cannot be computed."""
        parameters = self.rope_parameters
        if not parameters:
            return
        by_type = [value for value in parameters.values() if isinstance(value, dict)]
        if by_type and (len(by_type) != len(LAYER_TYPES) or set(parameters) != set(LAYER_TYPES)):
            raise ValueError(
                f"rope_parameters ({parameters}) differs by layer type; give one for each of {LAYER_TYPES}, or for all"
            )
        try:
            for each in by_type or [parameters]:
                self._check_rope_parameters(each)
            super().validate_rope()
        except KeyError as error:  # transformers' word for a missing key; ours are all ValueErrors
            raise ValueError(f"rope_parameters ({parameters}) is incomplete: {error.args[0]}") from error

    def _check_rope_parameters(self, parameters: dict[str, Any]) -> None:
        known_types = ["default", *ROPE_INIT_FUNCTIONS]
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in known_types:
            raise ValueError(f"rope_parameters['rope_type'] ({rope_type!r}) is unknown; choose {choices(known_types)}")
        for name in ("rope_theta", "factor", "original_max_position_embeddings"):
            value = parameters.get(name)
            if value is not None and not value > 0:
                raise ValueError(f"rope_parameters[{name!r}] ({value}) must be greater than 0")
        partial = parameters.get("partial_rotary_factor", 1.0)
        if not 0 < partial <= 1:
            raise ValueError(f"rope_parameters['partial_rotary_factor'] ({partial}) must be above 0 and at most 1")
        rotary_dim = self.head_dim if rope_type == "proportional" else int(self.head_dim * partial)
        if rotary_dim % 2 != 0 or rotary_dim == 0:
            raise ValueError(
                f"head_dim ({self.head_dim}) and rope_parameters['partial_rotary_factor'] ({partial}) give "
                f"{rotary_dim} rotary dimensions, but RoPE rotates pairs; choose an even number above 0"
            )
        if rope_type == "dynamic" and rotary_dim == 2:
            raise ValueError(
                "rope_parameters['rope_type'] ('dynamic') divides by the rotary dimensions less 2, and there are 2; "
                "choose a larger head_dim or partial_rotary_factor, or another rope_type"
            )
        for name in ("short_factor", "long_factor"):
            if rope_type == "longrope" and len(parameters[name]) != rotary_dim // 2:
                raise ValueError(
                    f"rope_parameters[{name!r}] has {len(parameters[name])} entries, but needs one for each of the "
                    f"{rotary_dim // 2} rotary pairs"
                )

    def _check_sizes(self) -> None:
        for minimum, names in MINIMUMS:
            for name in names:
                value = getattr(self, name)
                if value is not None and value < minimum:
                    raise ValueError(f"{name} ({value}) must be at least {minimum}")
        for name in ("attention_dropout", "hidden_dropout", "embedding_dropout", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} ({value}) must be at least 0 and below 1")
        given_head_dim = self._given_fields().get("head_dim", self.head_dim)
        if given_head_dim is None and self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}); choose another, or set head_dim"
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2 != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be even with position_embedding_type='sinusoidal': "
                "sines and cosines come in pairs"
            )
        if self.logits_scaling == 0:
            raise ValueError("logits_scaling (0) must not be 0: logits are divided by it")

    def _check_layers(self) -> None:
        count, types, is_mixed = self.num_hidden_layers, self.layer_types, self.is_heterogeneous
        if len(types) != count:
            raise ValueError(
                f"layer_types has {len(types)} entries, but num_hidden_layers is {count}; give one entry a layer"
            )
        # Without overrides the layers of a type are alike, and the first one stands for them.
        for idx in range(count) if is_mixed else map(types.index, dict.fromkeys(types)):
            layer, where = self.per_layer_config[idx], f" in layer {idx}" if is_mixed else ""
            heads, kv_heads, window = self.num_attention_heads, layer.num_key_value_heads, layer.sliding_window
            if kv_heads < 1 or heads % kv_heads != 0:
                raise ValueError(
                    f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}){where}; "
                    f"choose {choices(divisors(heads))}"
                )
            if window is not None and window < 1:
                raise ValueError(f"sliding_window ({window}){where} must be at least 1, or None for full attention")
            if layer.intermediate_size < 1:
                raise ValueError(f"intermediate_size ({layer.intermediate_size}){where} must be at least 1")
            if types[idx] not in LAYER_TYPES:
                raise ValueError(f"layer_types[{idx}] ({types[idx]!r}) is unknown; choose {choices(LAYER_TYPES)}")
            if types[idx] == "sliding_attention" and window is None:
                raise ValueError(
                    f"layer_types[{idx}] is 'sliding_attention', but sliding_window (None) gives no window; "
                    "set sliding_window or choose 'full_attention'"
                )
        rotated = self.no_rope_layers
        if rotated is not None and (len(rotated) < count or not set(rotated) <= {0, 1}):
            raise ValueError(
                f"no_rope_layers ({rotated}) needs one entry for each of the {count} layers: 1 with RoPE, 0 without"
            )


__all__ = ["GroupFormerConfig"]
