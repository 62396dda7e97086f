"""The config of `DeciLMForCausalLM` (model type nemotron-nas): written from a GroupFormer's, and read as one."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from ...families.registry import FAMILIES
from ...model.configuration_groupformer import GroupFormerConfig
from ..configs import declared_fields, read_config, write_config
from ..counts import without_counts
from .configuration_decilm import DeciLMConfig


WIDTH_STEP = 256  # engines round an MLP's width up to a multiple of it


def decilm_config(config: GroupFormerConfig) -> dict[str, Any]:
    """The config.json of `DeciLMForCausalLM`: Llama's, with a block for each layer.

    Raises:
        ValueError: a field, named with its value, that the format cannot express.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act ({config.hidden_act!r}) cannot be expressed by DeciLM, whose MLPs use 'silu'")
    llama = write_config(without_counts(config), FAMILIES["llama"])
    fields = {name: value for name, value in llama.to_dict().items() if name not in REPLACED and value is not None}
    rope = dict(llama.rope_parameters)
    return {
        **fields,
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "block_configs": [block_of(config, layer) for layer in config.per_layer_config],
        "rope_theta": rope["rope_theta"],  # engines that do not know `rope_parameters` read these two
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


# Fields of Llama that are one for all layers.
REPLACED = ("num_key_value_heads", "intermediate_size", "architectures", "model_type", "transformers_version")


def block_of(config: GroupFormerConfig, layer: PreTrainedConfig) -> dict[str, Any]:
    """One layer's entry of `block_configs`."""
    if layer.intermediate_size % WIDTH_STEP:
        raise ValueError(
            f"intermediate_size ({layer.intermediate_size}) cannot be expressed by DeciLM, whose engines round it up "
            f"to a multiple of {WIDTH_STEP}; keep the GroupFormer format, which vLLM runs through the plugin"
        )
    return {
        "attention": {
            "n_heads_in_group": config.num_attention_heads // layer.num_key_value_heads,
            "no_op": False,
            "replace_with_linear": False,
        },
        "ffn": {
            "ffn_mult": 3 * layer.intermediate_size / (2 * config.hidden_size),
            "no_op": False,
            "replace_with_linear": False,
        },
    }


def read_decilm_config(config: DeciLMConfig) -> GroupFormerConfig:
    """The GroupFormer config that computes what the engines compute, `decilm_config`'s inverse.

    Raises:
        ValueError: a layer without attention or without an MLP, by its place in block_configs.
    """
    heads, hidden_size = config.num_attention_heads, config.hidden_size
    layers = {}
    for layer_idx, block in enumerate(config.block_configs):
        for part in ("attention", "ffn"):
            for word in ("no_op", "replace_with_linear"):
                if block[part].get(word):
                    raise ValueError(
                        f"block_configs[{layer_idx}].{part}.{word} (True): the layer has no {part}, which only "
                        "DeciLM's own engines run; choose a model in which all layers have it"
                    )
        width = int(2 * block["ffn"]["ffn_mult"] * hidden_size / 3)
        layers[layer_idx] = {
            "num_key_value_heads": heads // block["attention"]["n_heads_in_group"],
            "intermediate_size": -(-width // WIDTH_STEP) * WIDTH_STEP,
        }
    known = declared_fields(LlamaConfig)
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    llama = LlamaConfig(**{**fields, **layers[0], "architectures": None})
    ours = GroupFormerConfig(**{**read_config(llama, FAMILIES["llama"]).to_dict(), "per_layer_config": layers})
    if regrouping := getattr(config, "regrouping", None):  # what was done to the heads stays readable, and goes on
        ours.regrouping = regrouping
    return ours
