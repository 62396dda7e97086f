"""Llama 1, 2 and 3, SmolLM, TinyLlama and all others that use the class: the architecture closest to ours."""

from .family import ATTENTION_BIAS, LLAMA_FIELDS, LLAMA_WEIGHTS, ROPE_EXAMPLES, TINY_LLAMA, Family, Irrelevant


FAMILY = Family(
    model_type="llama",
    fields={
        **LLAMA_FIELDS,
        "head_dim": "head_dim",
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": "mlp_bias",
        "pretraining_tp": Irrelevant("transformers no longer computes in slices"),
    },
    constants={},
    weights=LLAMA_WEIGHTS,
    tiny=TINY_LLAMA,
    examples={
        "grouped queries": {},
        "every head its own keys": {"num_key_value_heads": 6},
        "one key head": {"num_key_value_heads": 1},
        "odd heads, wide": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10},
        "head_dim apart from hidden_size": {"head_dim": 6},
        "all biases": {"attention_bias": True, "mlp_bias": True},
        "tied, one layer": {"tie_word_embeddings": True, "num_hidden_layers": 1},
        "another activation": {"hidden_act": "gelu", "rms_norm_eps": 1e-3},
        "pad token outside the vocabulary": {"pad_token_id": -1, "eos_token_id": 999},
        **ROPE_EXAMPLES,
    },
    refused={
        "partial_rotary_factor": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        },
        "sliding_window": {"sliding_window": 4},
        "quantization_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    },
)
