"""BLOOM and BLOOMZ: ALiBi for any number of heads, and a LayerNorm on the embeddings."""

from .family import ALL_BIASES, LAYER_NORM, QKV, Computed, Family, Irrelevant, Required, Weights
from .operations import GroupedHeads


FAMILY = Family(
    model_type="bloom",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": Computed(
            lambda native: {"hidden_size": native.hidden_size, "intermediate_size": 4 * native.hidden_size},
            lambda ours: ours.hidden_size,
        ),
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "layer_norm_epsilon": "norm_eps",
        "hidden_dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "apply_residual_connection_post_layernorm": Required(
            (False,), "the residual stream is never the normed one in GroupFormer"
        ),
        "slow_but_exact": Required((False,), "it adds up slices of a layer in another order, and drops its bias"),
        "pretraining_tp": Irrelevant("only used by slow_but_exact"),
    },
    constants={
        **LAYER_NORM,
        **ALL_BIASES,
        "mlp_type": "plain",
        "hidden_act": "gelu_fast",
        "position_embedding_type": "alibi",
        "embedding_norm": True,
    },
    weights={
        "word_embeddings": "embed_tokens",
        "word_embeddings_layernorm": "embed_norm",
        "h.*.input_layernorm": "layers.*.input_layernorm",
        "h.*.self_attention.query_key_value": Weights(QKV, GroupedHeads()),
        "h.*.self_attention.dense": "layers.*.self_attn.o_proj",
        "h.*.post_attention_layernorm": "layers.*.post_attention_layernorm",
        "h.*.mlp.dense_h_to_4h": "layers.*.mlp.up_proj",
        "h.*.mlp.dense_4h_to_h": "layers.*.mlp.down_proj",
        "ln_f": "norm",
    },
    tiny={
        "vocab_size": 83,
        "hidden_size": 24,
        "n_layer": 2,
        "n_head": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    examples={
        "four heads": {},
        "six heads": {"n_head": 6},
        "one head, one layer": {"n_head": 1, "n_layer": 1},
        "twelve heads, untied": {"n_head": 12, "tie_word_embeddings": False},
    },
    refused={
        "apply_residual_connection_post_layernorm": {"apply_residual_connection_post_layernorm": True},
        "slow_but_exact": {"slow_but_exact": True, "pretraining_tp": 2},
    },
)
