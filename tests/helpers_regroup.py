"""Models whose heads are redundant on purpose, made with plain linear algebra, independent of the package."""

import torch

from groupformer import GroupFormerForCausalLM

from .helpers import randomize, tiny_config


# Every position kind and bias setting in which heads have something of their own to turn.
KINDS = {
    "rope": {},
    "rope_bias": {"attention_bias": True},
    "partial_rope": {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "partial_rope_bias": {
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "attention_bias": True,
        "attention_output_bias": True,
        "norm_type": "layer_norm",
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "layers_without_rope": {"no_rope_layers": [1, 0], "attention_bias": True},
    "learned_bias": {"position_embedding_type": "learned", "norm_type": "layer_norm", "attention_bias": True},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "none": {"position_embedding_type": "none"},
    "none_bias": {"position_embedding_type": "none", "attention_bias": True},
    "alibi": {"position_embedding_type": "alibi"},
    "alibi_bias": {"position_embedding_type": "alibi", "attention_bias": True},
    "norm_after": {"norm_position": "after"},
    "parallel": {"parallel_residual": True, "norm_type": "layer_norm"},
    "qk_norm_head": {"qk_norm": "head"},
    "qk_norm_projection": {"qk_norm": "projection", "norm_position": "after"},
    "qk_layer_norm_head": {"qk_norm": "head", "norm_type": "layer_norm"},
    "qk_norm_around_one": {"qk_norm": "projection", "norm_type": "rms_norm_1p"},
    "qk_layer_norm_projection": {"qk_norm": "projection", "norm_type": "layer_norm"},
}


def float64_model(**overrides) -> GroupFormerForCausalLM:
    """A tiny random causal language model in float64."""
    return randomize(GroupFormerForCausalLM(tiny_config(num_attention_heads=8, **overrides))).double()


def key_map(config, uses_rope: bool, generator: torch.Generator) -> torch.Tensor:
    """A random (D, D) map of a key that its queries can undo exactly, whatever the position."""
    size = config.head_dim
    sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
    if config.qk_norm is not None:
        has_bias_or_mean = config.norm_type == "layer_norm"
        scale = 1 + float(torch.rand((), generator=generator)) if config.qk_norm == "head" else 1.0
        return torch.eye(size, dtype=torch.float64) * (1.0 if has_bias_or_mean else sign) * scale
    turn = torch.randn(size, size, generator=generator, dtype=torch.float64) + 2 * torch.eye(size, dtype=torch.float64)
    if not uses_rope:
        return turn
    rotary = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
    half = rotary // 2
    turn[:rotary] = 0
    turn[:, :rotary] = 0
    for j in range(half):
        a, b = torch.randn(2, generator=generator, dtype=torch.float64) + 1
        turn[j, j] = turn[j + half, j + half] = a
        turn[j, j + half], turn[j + half, j] = -b, b
    return turn


@torch.no_grad()
def with_copies(
    model: GroupFormerForCausalLM, order: list[int] | None = None, seed: int = 0
) -> GroupFormerForCausalLM:
    """A multi-head model that computes what a grouped one does: each query head has a key-value head of its own, a
    copy of its group's under a random map that its query and output projections undo.

    `order` places query head `order[i]` of the grouped model at place i.
    """
    config = model.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    order = list(range(heads)) if order is None else order
    fields = {**config.to_dict(), "num_key_value_heads": heads}
    copied = GroupFormerForCausalLM(type(config)(**fields)).double().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for layer_idx in range(config.num_hidden_layers):
        uses_rope = bool(config.rope_parameters) and (config.no_rope_layers or [1] * 99)[layer_idx] == 1
        prefix = f"model.layers.{layer_idx}.self_attn."
        new = {name: [] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        biases = {name: [] for name in ("q_proj", "k_proj", "v_proj")}
        norms = {name: [] for name in state if name.startswith((prefix + "q_norm", prefix + "k_norm"))}
        for head in order:
            group = head // (heads // groups)
            turn = key_map(config, uses_rope, generator)
            # A norm forgets a scale, so there the query undoes the sign alone.
            undo = turn.sign() if config.qk_norm else torch.linalg.inv(turn).T
            mix = torch.randn(size, size, generator=generator, dtype=torch.float64) + 2 * torch.eye(size).double()
            maps = {"q_proj": (head, undo), "k_proj": (group, turn), "v_proj": (group, mix)}
            for name, (place, linear) in maps.items():
                rows = slice(place * size, (place + 1) * size)
                new[name].append(linear @ state[prefix + name + ".weight"][rows])
                if config.attention_bias:
                    biases[name].append(linear @ state[prefix + name + ".bias"][rows])
            columns = slice(head * size, (head + 1) * size)
            new["o_proj"].append(state[prefix + "o_proj.weight"][:, columns] @ torch.linalg.inv(mix))
            for name in norms:
                place = head if "q_norm" in name else group
                norms[name].append(state[name][place * size : (place + 1) * size])
        for name, parts in new.items():
            state[f"{prefix}{name}.weight"] = torch.cat(parts, dim=1 if name == "o_proj" else 0)
        for name, parts in biases.items():
            if parts:
                state[f"{prefix}{name}.bias"] = torch.cat(parts)
        if config.qk_norm == "projection":
            state |= {name: torch.cat(parts) for name, parts in norms.items()}
    copied.load_state_dict(state)
    return copied
