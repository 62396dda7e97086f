"""PEFT: the module names are Llama's, so what PEFT knows of Llama's modules is true of ours.

Nothing here imports PEFT: it waits until somebody else does.
"""

import functools
import sys
from typing import Any

from transformers import DynamicCache

from ..model.configuration_groupformer import GroupFormerConfig
from .imports import after_import


CONSTANTS = "peft.utils.constants"
ADAPTION_PROMPT = "peft.tuners.adaption_prompt.config"
MODELS = "peft.peft_model"


def register() -> None:
    """Give GroupFormer entries in PEFT's tables, and its generation the cache's name, once PEFT is imported."""
    after_import(CONSTANTS, add_to_tables)
    after_import(ADAPTION_PROMPT, add_adaption_prompt)
    after_import(MODELS, name_cache_in_generation)


def add_to_tables() -> None:
    """Each method's default target modules, for configs that name none, and what makes a cache of a prefix."""
    model_type, constants = GroupFormerConfig.model_type, sys.modules[CONSTANTS]
    for name, mapping in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(mapping, dict) and "llama" in mapping:
            mapping.setdefault(model_type, mapping["llama"])
    constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING[model_type] = PrefixCache


def add_adaption_prompt() -> None:
    """How adaption prompts (Zhang et al. 2023) find the attention's projections and compute its queries."""
    mapping = sys.modules[ADAPTION_PROMPT].TRANSFORMERS_MODEL_CONFIG
    mapping.setdefault(GroupFormerConfig.model_type, mapping["llama"])


class PrefixCache(DynamicCache):
    """The cache of prefix tuning (Li and Liang 2021), whose layers may have fewer KV heads than the prefix.

    PEFT trains keys and values (B, G, T, D) of the config's own `num_key_value_heads` G for every layer; a layer with
    fewer reads the first ones.

    Raises:
        ValueError: a layer has more; the message names it and the remedy.
    """

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        heads, layer = key_states.shape[1], self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is not None and layer.is_initialized and layer.keys.shape[1] != heads:
            if layer.keys.shape[1] < heads:
                raise ValueError(
                    f"num_key_value_heads ({heads}) of layer {layer_idx} is above the {layer.keys.shape[1]} that "
                    "prefix tuning trains; set the config's num_key_value_heads to the largest count and name layers "
                    "with fewer in per_layer_config, or use LoRA"
                )
            layer.keys, layer.values = layer.keys[:, :heads], layer.values[:, :heads]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def name_cache_in_generation() -> None:
    """Let PEFT's prompt learning see the cache in `generate`: it reads `past_key_values`, now called `cache`.

    From transformers 5.24 on PEFT would take the cache for missing, and put the prompt in front of every token. With
    `use_cache=False` every step begins with the prompt alone: the cache that the step before filled is left out.
    """
    model_class: Any = sys.modules[MODELS].PeftModelForCausalLM
    prepare = model_class.prepare_inputs_for_generation
    if getattr(prepare, "names_cache", False):
        return

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        if self.get_base_model().config.model_type != GroupFormerConfig.model_type:
            return prepare(self, *args, **kwargs)
        if kwargs.get("use_cache") is False:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
        of_base = self.base_model_prepare_inputs_for_generation

        def with_old_name(*args, **kwargs):
            inputs = of_base(*args, **kwargs)
            return {"past_key_values" if name == "cache" else name: value for name, value in inputs.items()}

        self.base_model_prepare_inputs_for_generation = with_old_name
        try:
            return prepare(self, *args, **kwargs)
        finally:
            self.base_model_prepare_inputs_for_generation = of_base

    prepare_inputs_for_generation.names_cache = True  # type: ignore[attr-defined]
    model_class.prepare_inputs_for_generation = prepare_inputs_for_generation
