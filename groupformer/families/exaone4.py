"""EXAONE 4: norms after the sublayers and on each head, windows, and no RoPE in the layers that see all."""

from typing import Any

from .family import LLAMA_FIELDS, ROPE_EXAMPLES, TINY_LLAMA, WINDOW, Computed, Family, Irrelevant, head_dim_row
from .olmo2 import FAMILY as OLMO2


def read_layer_types(native: Any) -> dict[str, Any]:
    """Where some layers have a window, the others have no RoPE; without a window, all have it."""
    rotated = [native.sliding_window is None or kind == "sliding_attention" for kind in native.layer_types]
    return {"layer_types": native.layer_types, "no_rope_layers": [int(each) for each in rotated]}


FAMILY = Family(
    model_type="exaone4",
    fields={
        **LLAMA_FIELDS,
        **WINDOW,
        "head_dim": head_dim_row(),
        "layer_types": Computed(read_layer_types, lambda ours: ours.layer_types),
        "sliding_window_pattern": Irrelevant("only a default for layer_types"),
    },
    constants={"qk_norm": "head", "norm_position": "after"},
    weights=OLMO2.weights,
    tiny={**TINY_LLAMA, "sliding_window": 4},
    examples={
        "every fourth layer sees all": {"num_hidden_layers": 5},
        "no RoPE in the lower layer": {"layer_types": ["full_attention", "sliding_attention"]},
        "no window, tied": {
            "sliding_window": None,
            "layer_types": ["full_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        "wide heads, one layer": {"head_dim": 6, "num_hidden_layers": 1},
        "llama3 rope": ROPE_EXAMPLES["llama3 rope"],
    },
)
