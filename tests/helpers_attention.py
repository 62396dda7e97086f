"""Tiny native decoders of many architectures, with unusual sizes, for what must work on any of them."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .helpers_families import cases, native_model


SIZES = dict(
    vocab_size=83,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=12,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
EXPERTS = dict(
    num_experts=3, num_local_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, decoder_sparse_step=1
)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)

# Options that real checkpoints use: model type -> name of the option -> fields beside `SIZES`.
ARCHITECTURES: dict[str, dict[str, dict]] = {
    "mixtral": {"experts": EXPERTS, "window": {**EXPERTS, "sliding_window": 4}},
    "qwen2_moe": {
        "experts": {**EXPERTS, "shared_expert_intermediate_size": 24},
        "no biases": {**EXPERTS, "qkv_bias": False},
    },
    "qwen3_moe": {"experts": EXPERTS, "a dense layer": {**EXPERTS, "mlp_only_layers": [0]}},
    "olmoe": {"norms over projections": EXPERTS},
    "granitemoe": {"factors": {**EXPERTS, "attention_multiplier": 0.3, "residual_multiplier": 0.5}},
    "glm4_moe": {
        "partial": {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "attention_bias": True},
        "norms": {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "use_qk_norm": True},
    },
    "gemma": {"plain": {}, "wide heads": {"head_dim": 20}},
    "gemma2": {"caps and windows": {"query_pre_attn_scalar": 30, "attn_logit_softcapping": 5.0, "sliding_window": 4}},
    "gemma3_text": {"norms, two rotations": {**WINDOWS, "query_pre_attn_scalar": 30}},
    "olmo": {"norms without weights": {}},
    "olmo3": {"norms over projections, windows": WINDOWS},
    "cohere2": {"rotation in windows only": WINDOWS},
    "glm": {"half of the neighbours turned": {}},
    "glm4": {"half of the neighbours turned": {"attention_bias": True}},
    "exaone4": {"rotation in windows only": {**WINDOWS, "rms_norm_eps": 1e-9}},
    "ernie4_5": {"plain": {}, "biases": {"use_bias": True}},
    "seed_oss": {"biases": {"attention_bias": True, "attention_out_bias": True}},
    "ministral": {"windows": WINDOWS},
    "ministral3": {
        "queries scaled by position": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.1,
            }
        }
    },
    "helium": {"plain": {}, "biases": {"attention_bias": True}},
    "hunyuan_v1_dense": {"norms after the rotation": {}},
    "nemotron": {"partial": {"partial_rotary_factor": 0.5}, "biases": {"attention_bias": True}},
    "arcee": {"plain": {}, "biases": {"attention_bias": True}},
    "apertus": {"norms": {}},
    "persimmon": {"norms": {}, "no norms": {"qk_layernorm": False}},
    "gpt_oss": {"sinks and windows": {**EXPERTS, **WINDOWS}},
    "cohere": {"norms": {"use_qk_norm": True}},
    "stablelm": {
        "norms": {"qk_layernorm": True, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
    },
    "cwm": {"windows": WINDOWS},
    # Nobody wrote a line for these.
    "gpt_neo": {"windows": {"attention_types": [[["global", "local"], 1]], "window_size": 4}},
    "phimoe": {"biases": {**EXPERTS, "attention_bias": True}},
    "hunyuan_v1_moe": {"norms": {**EXPERTS, "moe_topk": 2}},
    "dots1": {
        "experts": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **WINDOWS}
    },
    "vaultgemma": {"caps and windows": {**WINDOWS, "query_pre_attn_scalar": 30}},
}
CASES = [(name, option) for name, options in ARCHITECTURES.items() for option in options]
FAMILY_CASES = cases()


def tiny_native_config(name: str, option: str, **changes) -> PreTrainedConfig:
    return CONFIG_MAPPING[name](**{**SIZES, **ARCHITECTURES[name][option], **changes})


def tiny_native(name: str, option: str, **changes) -> PreTrainedModel:
    """A native causal language model with random weights, norms and biases, in eval mode."""
    if (name, option) in FAMILY_CASES:
        return native_model(name, option, **changes)
    torch.manual_seed(0)
    config = tiny_native_config(name, option, **changes)
    return randomize_all(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config))


@torch.no_grad()
def randomize_all(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights of unit gain, norms around what they are, biases that matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.2 * noise)
    return model.eval()
