"""StarCoder 2: Llama with LayerNorm, a plain MLP, and biases everywhere or nowhere."""

from .family import (
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    ROPE_EXAMPLES,
    TINY_LLAMA,
    WINDOW,
    Computed,
    Family,
    head_dim_row,
)


FAMILY = Family(
    model_type="starcoder2",
    fields={
        **{name: row for name, row in LLAMA_FIELDS.items() if name != "rms_norm_eps"},
        **WINDOW,
        "head_dim": head_dim_row(),
        "norm_epsilon": "norm_eps",
        "residual_dropout": "hidden_dropout",
        "embedding_dropout": "embedding_dropout",
        "use_bias": Computed(
            lambda native: dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), native.use_bias),
            lambda ours: ours.attention_bias,
        ),
    },
    constants={"norm_type": "layer_norm", "norm_bias": True, "mlp_type": "plain"},
    weights={
        **{name: ours for name, ours in LLAMA_WEIGHTS.items() if ".mlp." not in name},
        "layers.*.mlp.c_fc": "layers.*.mlp.up_proj",
        "layers.*.mlp.c_proj": "layers.*.mlp.down_proj",
    },
    tiny=TINY_LLAMA,
    examples={
        "biases": {},
        "no biases, untied": {"use_bias": False, "tie_word_embeddings": False},
        "window shorter than the prompt": {"sliding_window": 4, "num_key_value_heads": 1},
        "wide heads, yarn rope": {"head_dim": 8, **ROPE_EXAMPLES["yarn rope"]},
    },
)
