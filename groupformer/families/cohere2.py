"""Command R7B and Command A: Command R with windows, and RoPE in the layers that have one."""

from typing import Any

from . import cohere
from .family import TINY_LLAMA, WINDOW, Computed, Family


def read_layer_types(native: Any) -> dict[str, Any]:
    """Only layers with a window rotate their queries and keys."""
    slides = [kind == "sliding_attention" for kind in native.layer_types]
    return {"layer_types": native.layer_types, "no_rope_layers": [int(each) for each in slides]}


FAMILY = Family(
    model_type="cohere2",
    fields={
        **{name: row for name, row in cohere.FAMILY.fields.items() if name != "use_qk_norm"},
        **WINDOW,
        "layer_types": Computed(read_layer_types, lambda ours: ours.layer_types),
    },
    constants=cohere.FAMILY.constants,
    weights=cohere.FAMILY.weights,
    tiny={**TINY_LLAMA, "sliding_window": 4},
    examples={
        "every fourth layer sees all": {"num_hidden_layers": 5},
        "RoPE in the upper layer": {"layer_types": ["full_attention", "sliding_attention"]},
        "untied, biases, an odd scale": {"tie_word_embeddings": False, "attention_bias": True, "logit_scale": 0.3},
        "no window, no RoPE, one layer": {"layer_types": ["full_attention"], "num_hidden_layers": 1},
    },
    refused={"logit_scale": {"logit_scale": 0.0}},
)
