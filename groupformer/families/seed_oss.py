"""Seed-OSS 36B: Llama whose output projection has, or lacks, a bias by itself."""

from .family import LLAMA_FIELDS, LLAMA_WEIGHTS, ROPE_EXAMPLES, TINY_LLAMA, Family, Irrelevant


FAMILY = Family(
    model_type="seed_oss",
    fields={
        **LLAMA_FIELDS,
        "head_dim": "head_dim",
        "attention_bias": "attention_bias",
        "attention_out_bias": "attention_output_bias",
        "mlp_bias": "mlp_bias",
        "residual_dropout": "hidden_dropout",
        "pretraining_tp": Irrelevant("transformers no longer computes in slices"),
    },
    constants={},
    weights=LLAMA_WEIGHTS,
    tiny={**TINY_LLAMA, "head_dim": 6},
    examples={
        "biases on queries, keys and values": {},
        "no biases, tied": {"attention_bias": False, "tie_word_embeddings": True},
        "all biases, one layer": {"attention_out_bias": True, "mlp_bias": True, "num_hidden_layers": 1},
        "bias on the output alone": {"attention_bias": False, "attention_out_bias": True},
        "yarn rope": ROPE_EXAMPLES["yarn rope"],
    },
)
