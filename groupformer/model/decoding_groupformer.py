# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""One new token through a decoder layer, in as few operations as their order allows.

A decoded token of a small model takes as long to call its hundreds of operations as to compute them. Here they are
called with as little Python between them as can be, and dimension T is left out. What is computed is what the modeling
file's layers compute; wherever something unusual is at work (hooks, adapters, gradients), those are called.

This file travels to the Hub with the modeling file, so it imports only torch, transformers and what travels.

Shapes: B batch, S tokens seen (cached and new), H query heads, G key-value heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward as transformers_sdpa
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_groupformer import attend, attend_eagerly
from .ops_groupformer import PREFERS_ONEDNN, ROW_DTYPES, is_plain, project, runs_bare


def attention_of_one_token(model: Any, hidden_states: torch.Tensor, past_key_values: Any | None) -> Callable | None:
    """What attends in the layers' `decode`, if a model may compute these hidden states (B, T, hidden_size) by it."""
    if (
        hidden_states.shape[1] == 1
        and isinstance(past_key_values, Cache)  # nor the pages of continuous batching
        and not model.training
        and not torch.is_grad_enabled()
        and not hidden_states.is_meta  # of which autocast knows nothing
        and not torch.is_autocast_enabled(hidden_states.device.type)  # knows no products with vectors
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not nn.modules.module._has_any_global_hook()
    ):
        name = model.config._attn_implementation
        backend = ALL_ATTENTION_FUNCTIONS.get(name)
        if backend is transformers_sdpa:
            return attend
        if backend is None and name == "eager":
            return attend_eagerly
    return None


def takes_one_token(layer: Any) -> bool:
    """Whether a layer's `decode` computes what calling the layer would."""
    attention = layer.self_attn
    if not (layer.is_usual and runs_bare(layer) and runs_bare(attention) and attention.own_heads is None):
        return False
    return attention.q_norm is None or (runs_bare(attention.q_norm) and runs_bare(attention.k_norm))


def is_row(hidden_states: torch.Tensor) -> bool:
    """Whether hidden states (B, 1, hidden_size) are computed as a vector: a product with a matrix is then one call.

    In float32 and bfloat16 on a CPU; elsewhere products of matrices have the better kernels.
    """
    return hidden_states.shape[0] == 1 and hidden_states.is_cpu and hidden_states.dtype in ROW_DTYPES


# Layers --------------------------------------------------------------------------------------------------------------
#
# Each is `layer(hidden_states, …)` of one kind of layer, for one new token. Arguments:
#   hidden_states: (B, hidden_size); or (hidden_size,) of a single sequence, where `is_row` says so.
#   attention_mask: (B, 1 or H, 1, S), additive or boolean, or `None`.
#   position_embeddings: Cosines and signed sines (B or 1, 1, 1, rotary_dim), or `None`.
#   past_key_values: The cache, which is extended.
#   attend: What attends, of the arguments of the function of that name.


def decode_layer(layer: Any, hidden_states: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """A layer with norms before its sublayers."""
    modules, scale = layer.__dict__["_modules"], layer.residual_multiplier
    attention = modules["self_attn"]
    read = decode_attention(attention, call(modules["input_layernorm"], hidden_states), *arguments)
    hidden_states = add_product(hidden_states, attention.__dict__["_modules"]["o_proj"], read, scale)
    return add_mlp(hidden_states, modules["mlp"], call(modules["post_attention_layernorm"], hidden_states), scale)


def decode_layer_with_norms_after(layer: Any, hidden_states: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """A layer with norms on its sublayers' outputs."""
    modules, scale = layer.__dict__["_modules"], layer.residual_multiplier
    attention, mlp = modules["self_attn"], modules["mlp"]
    read = decode_attention(attention, hidden_states, *arguments)
    output = call(modules["post_attention_layernorm"], product(attention.__dict__["_modules"]["o_proj"], read))
    hidden_states = hidden_states.add(output, alpha=scale)
    if runs_bare(mlp):
        output = product(mlp.__dict__["_modules"]["down_proj"], decode_mlp(mlp, hidden_states))
    else:
        output = call(mlp, hidden_states)
    return hidden_states.add(call(modules["post_feedforward_layernorm"], output), alpha=scale)


def decode_parallel_layer(layer: Any, hidden_states: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """A layer whose attention and MLP read the same residual stream, each by its own norm or both by one."""
    modules, scale = layer.__dict__["_modules"], layer.residual_multiplier
    attention, own_norm = modules["self_attn"], modules.get("post_attention_layernorm")
    normed = call(modules["input_layernorm"], hidden_states)
    read = decode_attention(attention, normed, *arguments)
    for_mlp = normed if own_norm is None else call(own_norm, hidden_states)
    hidden_states = add_product(hidden_states, attention.__dict__["_modules"]["o_proj"], read, scale)
    return add_mlp(hidden_states, modules["mlp"], for_mlp, scale)


# Sublayers -----------------------------------------------------------------------------------------------------------


def decode_attention(
    attention: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    past_key_values: Any,
    attend: Callable,
) -> torch.Tensor:
    """What the heads read for one new token, before the output projection.

    Queries and keys are turned together, and since the token is alone, no dimension needs to change its place.
    """
    modules, head_dim, size = attention.__dict__["_modules"], attention.head_dim, hidden_states.shape[:-1]
    batch = size[0] if size else 1
    query = product(modules["q_proj"], hidden_states)
    key = product(modules["k_proj"], hidden_states)
    value = product(modules["v_proj"], hidden_states).view(batch, -1, 1, head_dim)
    kv_heads = value.shape[1]
    if "q_norm" in modules:
        query, key = attention.normalize(modules["q_norm"], query), attention.normalize(modules["k_norm"], key)
    states = torch.cat((query, key), dim=-1).view(batch, -1, 1, head_dim)  # (B, H + G, 1, D)
    if position_embeddings is not None and attention.uses_rope:
        states = turn_one(states, *position_embeddings)
    heads = states.shape[1] - kv_heads
    key, value = past_key_values.update(states.narrow(1, heads, kv_heads), value, attention.layer_idx)
    if attention_mask is not None and attention_mask.shape[1] > 1:  # biases of each head
        attention_mask = attention_mask.reshape(attention_mask.shape[0], kv_heads, -1, attention_mask.shape[-1])
    query = states.narrow(1, 0, heads).view(batch, kv_heads, -1, head_dim)
    return attend(query, key, value, attention_mask, attention.scaling).reshape(*size, -1)


def turn_one(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of heads (B, H + G, 1, D); partial ones in place."""
    rotary_dim = cos.shape[-1]
    if rotary_dim == states.shape[-1]:
        return torch.roll(states, rotary_dim // 2, dims=-1).mul_(sin).addcmul_(states, cos)
    part = states.narrow(-1, 0, rotary_dim)
    part.copy_(torch.roll(part, rotary_dim // 2, dims=-1).mul_(sin).addcmul_(part, cos))
    return states


def add_mlp(residual: torch.Tensor, mlp: nn.Module, hidden_states: torch.Tensor, scale: float) -> torch.Tensor:
    """`residual + scale * mlp(hidden_states)`."""
    if not runs_bare(mlp):
        return residual.add(call(mlp, hidden_states), alpha=scale)
    return add_product(residual, mlp.__dict__["_modules"]["down_proj"], decode_mlp(mlp, hidden_states), scale)


def decode_mlp(mlp: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """A plain or gated MLP for one new token, before its last projection."""
    modules = mlp.__dict__["_modules"]
    up, gate = product(modules["up_proj"], hidden_states), modules.get("gate_proj")
    return call(modules["act_fn"], up) if gate is None else call(modules["act_fn"], product(gate, hidden_states)) * up


# Modules -------------------------------------------------------------------------------------------------------------


def call(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`module(hidden_states)` past `nn.Module.__call__`, where that has nothing to do.

    A module that has hooks, an adapter or the like gets (B, 1, features), as it would elsewhere.
    """
    if runs_bare(module):
        return module.forward(hidden_states)
    output = module(hidden_states.view(-1, 1, hidden_states.shape[-1]))
    return output.view(*hidden_states.shape[:-1], output.shape[-1])


def product(linear: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`linear(hidden_states)`, likewise."""
    if not is_plain(linear):
        return call(linear, hidden_states)
    if PREFERS_ONEDNN or hidden_states.dim() > 1:
        return project(linear, hidden_states, any_layout=True)
    parameters = linear.__dict__["_parameters"]
    weight, bias = parameters["weight"], parameters["bias"]
    return torch.mv(weight, hidden_states) if bias is None else torch.addmv(bias, weight, hidden_states)


def add_product(residual: torch.Tensor, linear: nn.Module, hidden_states: torch.Tensor, scale: float) -> torch.Tensor:
    """`residual + scale * linear(hidden_states)`."""
    if hidden_states.dim() == 1 and not PREFERS_ONEDNN and is_plain(linear) and linear.bias is None:
        return torch.addmv(residual, linear.weight, hidden_states, alpha=scale)
    return residual.add(product(linear, hidden_states), alpha=scale)
