"""PEFT: the module names are Llama's, so what PEFT knows of Llama's modules is true of ours.

Nothing here imports PEFT: it waits until somebody else does.
"""

import sys

from ..model.configuration_groupformer import GroupFormerConfig
from .imports import after_import


CONSTANTS = "peft.utils.constants"
ADAPTION_PROMPT = "peft.tuners.adaption_prompt.config"


def register() -> None:
    """Give GroupFormer Llama's entries in PEFT's tables, once PEFT is imported."""
    after_import(CONSTANTS, add_target_modules)
    after_import(ADAPTION_PROMPT, add_adaption_prompt)


def add_target_modules() -> None:
    """Each method's default target modules, for configs that name none."""
    for name, mapping in vars(sys.modules[CONSTANTS]).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(mapping, dict) and "llama" in mapping:
            mapping.setdefault(GroupFormerConfig.model_type, mapping["llama"])


def add_adaption_prompt() -> None:
    """How adaption prompts (Zhang et al. 2023) find the attention's projections and compute its queries."""
    mapping = sys.modules[ADAPTION_PROMPT].TRANSFORMERS_MODEL_CONFIG
    mapping.setdefault(GroupFormerConfig.model_type, mapping["llama"])
