"""GLM 4 0414: GLM 4 9B with norms on the sublayers' outputs, too."""

from . import glm
from .family import Family


FAMILY = Family(
    model_type="glm4",
    fields=glm.FAMILY.fields,
    constants={"norm_position": "both"},
    weights={
        **{name: ours for name, ours in glm.FAMILY.weights.items() if name != "layers.*.post_attention_layernorm"},
        "layers.*.post_self_attn_layernorm": "layers.*.post_attention_layernorm",
        "layers.*.post_attention_layernorm": "layers.*.pre_feedforward_layernorm",
        "layers.*.post_mlp_layernorm": "layers.*.post_feedforward_layernorm",
    },
    tiny=glm.FAMILY.tiny,
    examples=glm.FAMILY.examples,
)
