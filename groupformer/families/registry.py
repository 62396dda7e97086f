"""All families, and the ones that are refused by name."""

import importlib

from .family import Family


# A new family is one module of this name and one line here.
NAMES = (
    "bloom",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "llama",
    "mistral",
    "olmo2",
    "phi",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (importlib.import_module(f"{__package__}.{name}").FAMILY for name in NAMES)
}

REFUSED: dict[str, str] = {}


def family_named(model_type: str | None) -> Family:
    """The family of a transformers model type.

    Raises:
        ValueError: a family that is refused, with the reason, or one that nobody has written yet.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise ValueError(f"model_type ({model_type!r}) cannot be imported exactly: {REFUSED[model_type]}")
    raise ValueError(f"model_type ({model_type!r}) is not a known family; choose one of {', '.join(sorted(FAMILIES))}")
