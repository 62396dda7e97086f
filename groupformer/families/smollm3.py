"""SmolLM 3: Llama with some layers that have no positions."""

from .family import (
    ATTENTION_BIAS,
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    ROPE_EXAMPLES,
    TINY_LLAMA,
    WINDOWS,
    Computed,
    Family,
    Irrelevant,
    head_dim_row,
)


FAMILY = Family(
    model_type="smollm3",
    fields={
        **LLAMA_FIELDS,
        **WINDOWS,
        "head_dim": head_dim_row(),
        "attention_bias": ATTENTION_BIAS,
        "mlp_bias": "mlp_bias",
        "no_rope_layers": Computed(
            lambda native: {"no_rope_layers": list(native.no_rope_layers)},
            lambda ours: list(ours.no_rope_layers or [1] * ours.num_hidden_layers),
        ),
        "no_rope_layer_interval": Irrelevant("only a default for no_rope_layers"),
    },
    constants={},
    weights=LLAMA_WEIGHTS,
    tiny=TINY_LLAMA,
    examples={
        "RoPE in every second layer": {"no_rope_layers": [1, 0]},
        "by interval": {"no_rope_layer_interval": 2, "num_hidden_layers": 3},
        "windows where no RoPE is": {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 4},
        "biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        "llama3 rope": {"no_rope_layers": [1, 0], **ROPE_EXAMPLES["llama3 rope"]},
    },
    refused={"use_sliding_window": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}},
)
