"""AFM 4.5B: Llama with a plain MLP of squared ReLUs."""

from .family import ATTENTION_BIAS, LLAMA_FIELDS, LLAMA_WEIGHTS, ROPE_EXAMPLES, TINY_LLAMA, Family


FAMILY = Family(
    model_type="arcee",
    fields={**LLAMA_FIELDS, "head_dim": "head_dim", "attention_bias": ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
    constants={"mlp_type": "plain"},
    weights={name: ours for name, ours in LLAMA_WEIGHTS.items() if "gate_proj" not in name},
    tiny=TINY_LLAMA,
    examples={
        "squared ReLUs": {},
        "all biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
        "another activation, tied, one layer": {
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
            "num_hidden_layers": 1,
        },
        "yarn rope": ROPE_EXAMPLES["yarn rope"],
    },
)
