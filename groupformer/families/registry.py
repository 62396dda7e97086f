"""All families, and the ones that are refused by name."""

import importlib

from ..model.configuration_groupformer import GroupFormerConfig
from .family import Family


# A new family is one module of this name and one line here.
NAMES = (
    "arcee",
    "bloom",
    "cohere",
    "cohere2",
    "cwm",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "llama",
    "ministral",
    "mistral",
    "mpt",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (importlib.import_module(f"{__package__}.{name}").FAMILY for name in NAMES)
}

EXPERTS = "its MLPs are mixtures of experts"

REFUSED: dict[str, str] = {
    "apertus": "its MLP's activation has weights of its own (xIELU)",
    "dots1": EXPERTS,
    "gemma2": "it caps its scores and logits (attn_logit_softcapping, final_logit_softcapping)",
    "glm4_moe": EXPERTS,
    "gpt_oss": EXPERTS,
    "granitemoe": EXPERTS,
    "hunyuan_v1_dense": "its norms on queries and keys follow RoPE",
    "ministral3": "its queries are scaled by their positions",
    "mixtral": EXPERTS,
    "nemotron": "its layer norms store their weights minus one",
    "olmo": "its norms have no weights",
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
}


def family_named(model_type: str | None) -> Family:
    """The family of a transformers model type.

    Raises:
        ValueError: a family that is refused, with the reason, or one without a module yet.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise ValueError(
            f"model_type ({model_type!r}) cannot be imported exactly: {REFUSED[model_type]}; regroup takes the native "
            "model as it is"
        )
    if model_type == GroupFormerConfig.model_type:
        raise ValueError("the model is a GroupFormer already; take it as it is")
    raise ValueError(f"model_type ({model_type!r}) is not a known family; choose one of {', '.join(sorted(FAMILIES))}")


def is_groupformer(model) -> bool:
    """Whether a model, or a config, is a GroupFormer; it may be of this package's class or of remote code's."""
    return getattr(getattr(model, "config", model), "model_type", None) == GroupFormerConfig.model_type


def own_config(config) -> GroupFormerConfig:
    """A GroupFormer's config as this package's class: itself, or what remote code's class would save."""
    return config if isinstance(config, GroupFormerConfig) else GroupFormerConfig.from_dict(config.to_dict())
