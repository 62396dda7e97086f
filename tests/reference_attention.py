"""Attention in plain float64, from heads and a native config: nothing of the module that it is compared with."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from groupformer.regrouping.heads import AttentionHeads
from groupformer.regrouping.layouts import AttentionLayout


def is_sliding(config: PreTrainedConfig, layer_idx: int) -> bool:
    if config.model_type == "gpt_neo":
        return config.attention_layers[layer_idx] == "local"
    types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (
        types is None or types[layer_idx] == "sliding_attention"
    )


def visible(config: PreTrainedConfig, layer_idx: int, length: int) -> torch.Tensor:
    """(T, T), True where a query (row) sees a key."""
    back = torch.arange(length)[:, None] - torch.arange(length)
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    return (back >= 0) & (back < window) if is_sliding(config, layer_idx) else back >= 0


def scale_of(config: PreTrainedConfig, layer_idx: int, head_dim: int) -> float:
    """The factor of the scores."""
    if config.model_type == "gpt_neo":
        return 1.0
    if config.model_type == "mpt":
        return config.attn_config.softmax_scale or head_dim**-0.5
    if hasattr(config, "query_pre_attn_scalar"):
        return config.query_pre_attn_scalar**-0.5
    scale = getattr(config, "attention_multiplier", head_dim**-0.5)
    if getattr(config, "scale_attn_weights", True) is False:
        scale = 1.0
    return scale / (layer_idx + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else scale


def frequencies(config: PreTrainedConfig, layer_idx: int, head_dim: int) -> tuple[torch.Tensor, float]:
    """The angle by which each rotary pair turns from token to token, and the factor of what is turned."""
    slides = is_sliding(config, layer_idx)
    if config.model_type in ("cohere2", "exaone4") and config.sliding_window and not slides:
        return torch.zeros(0), 1.0
    if getattr(config, "no_rope_layers", None) and not config.no_rope_layers[layer_idx]:
        return torch.zeros(0), 1.0
    if config.model_type == "gptj":
        parameters, size, by_kind = {"rope_theta": 10000.0}, config.rotary_dim, {}
    else:
        parameters = getattr(config, "rope_parameters", None)
        if not parameters:
            return torch.zeros(0), 1.0
        kind = "sliding_attention" if slides else "full_attention"
        by_kind = {"layer_type": kind} if kind in parameters else {}
        parameters = parameters.get(kind, parameters)
        size = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if parameters.get("rope_type", "default") != "default":
        frequency, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, **by_kind)
        return frequency.double(), factor
    return parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size), 1.0


def rotate(states: torch.Tensor, frequency: torch.Tensor, factor: float) -> torch.Tensor:
    """States (B, N, T, D) with their pairs (j, j + d/2) turned by their positions, as complex numbers."""
    half = len(frequency)
    if not half:
        return states
    angles = torch.arange(states.shape[2], dtype=torch.float64)[:, None] * frequency
    pairs = torch.complex(states[..., :half], states[..., half : 2 * half]) * torch.polar(
        torch.full_like(angles, factor), angles
    )
    return torch.cat((pairs.real, pairs.imag, states[..., 2 * half :]), dim=-1)


def alibi(config: PreTrainedConfig, heads: int, length: int) -> torch.Tensor | float:
    """What is added to the scores (H, 1, T) for positions (Press et al. 2022): up to a number a row, a slope times
    the key's position."""
    if config.model_type not in ("bloom", "mpt"):
        return 0.0
    power = 2 ** int(math.log2(heads))  # heads beyond it take every second slope of the next power's
    steps = torch.cat((torch.arange(2, 2 * power + 1, 2), torch.arange(1, max(1, 2 * (heads - power)), 2)))
    slopes = 2.0 ** (-8 * steps.double() / (2 * power))
    return (slopes[:, None] * torch.arange(length))[:, None]


def normed(
    states: torch.Tensor, module: nn.Module, weights: dict[str, torch.Tensor], eps: float, over_all_heads: bool
) -> torch.Tensor:
    """States (B, N, T, D) normed, each head by itself or all together; weights (N or 1, D)."""
    dims = (1, 3) if over_all_heads else (3,)
    if "LayerNorm" in type(module).__name__:
        states = states - states.mean(dims, keepdim=True)
    states = states / (states.pow(2).mean(dims, keepdim=True) + eps).sqrt()
    scale = weights["weight"] + ("Gemma" in type(module).__name__)  # Gemma's are stored minus one
    states = states * scale[:, None]
    return states + weights["bias"][:, None] if "bias" in weights else states


def norm_weights(
    layout: AttentionLayout, role: str, given: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of a norm: other weights for each head, as extracted, or one set for all, from the module's tensors."""
    if given:
        return given
    stem = f"{layout.names[role]}."
    return {name.removeprefix(stem): value.double()[None] for name, value in tensors.items() if name.startswith(stem)}


def attend(
    config: PreTrainedConfig,
    layer_idx: int,
    layout: AttentionLayout,
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    inputs: torch.Tensor,
) -> torch.Tensor:
    """The attention's output (B, T, hidden_size) on inputs of that shape, from extracted heads.

    Args:
        module: Only the classes of its norms are asked for.
        tensors: All tensors of the module, by their names inside it.
    """
    heads: AttentionHeads = layout.read_heads(tensors)
    inputs, head_dim = inputs.double(), heads.query.shape[1]
    if heads.has_bias:
        inputs = torch.cat((inputs, torch.ones_like(inputs[..., :1])), dim=-1)
    query, key, value = (torch.einsum("nde,bte->bntd", rows, inputs) for rows in (heads.query, heads.key, heads.value))
    frequency, factor = frequencies(config, layer_idx, head_dim)
    turn: Callable = lambda states: rotate(states, frequency, factor)  # noqa: E731
    steps = [norms_of(config, layout, module, tensors, heads), lambda query, key: (turn(query), turn(key))]
    for step in reversed(steps) if config.model_type.startswith("hunyuan") else steps:
        query, key = step(query, key)
    size = heads.queries_per_key
    key, value = key.repeat_interleave(size, dim=1), value.repeat_interleave(size, dim=1)
    length = query.shape[2]
    scores = query @ key.mT * scale_of(config, layer_idx, head_dim) + alibi(config, query.shape[1], length)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible(config, layer_idx, length), -math.inf)
    sinks = torch.stack(list(heads.per_head.values())).sum(0) if heads.per_head else None
    if sinks is not None:  # one more key, whose value is zero
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    probabilities = scores.softmax(dim=-1)[..., :length]
    output = torch.einsum("bhtd,hed->bte", probabilities @ value, heads.output)
    return output + tensors.get(f"{layout.names['output']}.bias", torch.zeros(())).double()


def norms_of(
    config: PreTrainedConfig,
    layout: AttentionLayout,
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    heads: AttentionHeads,
) -> Callable:
    """The step that norms queries and keys, where the attention has such norms."""
    if "query_norm" not in layout.names:
        return lambda query, key: (query, key)
    names = ("rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "norm_eps")
    eps = next(getattr(config, name) for name in names if hasattr(config, name))
    together = config.model_type in ("olmo2", "olmo3", "olmoe")

    def step(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for role, states, given in (
            ("query_norm", query, heads.query_norms),
            ("key_norm", key, heads.key_norms),
        ):
            weights = norm_weights(layout, role, given, tensors)
            found.append(normed(states, module.get_submodule(layout.names[role]), weights, eps, together))
        return found[0], found[1]

    return step
