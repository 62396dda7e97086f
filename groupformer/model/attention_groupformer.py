# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Faster ways to attend: few queries, many keys, short rows in training, one token of a compiled graph.

Each gives the numbers of transformers' sdpa (up to rounding), which is taken wherever something unusual is at work.

This file travels to the Hub with the modeling file, so it imports only torch, transformers and what travels.

Shapes: B batch, T new tokens, S tokens seen (cached and new), H query heads, G key-value heads, D head_dim.
"""

import functools
import math
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward as transformers_sdpa

from .cache_groupformer import is_by_feature


def sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' sdpa, without repeating keys and values when new tokens (B, H, T, D) follow cached ones.

    The query heads of a group are laid side by side as more queries of their shared head, (B, G, H / G * T, D), and
    the mask (B, 1 or H, T, S) with them. Transformers' newest versions do this for a single token.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, seen = key.shape[1], key.shape[2]
    group = heads // kv_heads
    follows_cached = length < seen and (length == 1 or attention_mask is not None)
    by_feature = is_by_feature(key)
    many_of_own = length > 1 and group * length > FEW_QUERIES if by_feature else group == 1 and length > 1
    in_graph = torch.compiler.is_compiling()
    on_gpu = in_graph and query.is_cuda and group > 1 and length == 1 and not kwargs.get("dropout")
    if on_gpu and attention_mask is not None:
        output = attend_in_graph(query, key, value, attention_mask, kwargs["scaling"])
        return output.transpose(1, 2).contiguous(), None
    in_other_graph = in_graph and not (query.is_cpu and length == 1 and attention_mask is not None)
    trained_eagerly = trains_faster_eagerly(query, key, attention_mask, kwargs.get("dropout"))
    if trained_eagerly:
        attention_mask = additive_mask(module, query, attention_mask, kwargs.get("is_causal"))
    elif many_of_own or not follows_cached or "cache" in kwargs or in_other_graph:
        if by_feature:
            key, value = key.contiguous(), value.contiguous()  # torch's kernels read them by token
        return transformers_sdpa(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and group > 1:
        rows = attention_mask.shape[0]
        if attention_mask.shape[1] == 1:
            attention_mask = attention_mask.unsqueeze(2).expand(rows, 1, group, length, seen)
        attention_mask = attention_mask.reshape(rows, -1, group * length, seen)
    query = query.reshape(batch, kv_heads, group * length, head_dim)
    if trained_eagerly:
        output = attend_eagerly(query, key, value, attention_mask, kwargs["scaling"])
    else:
        output = attend(query, key, value, attention_mask, kwargs.get("scaling"), kwargs.get("dropout", 0.0))
    return output.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Torch's attention of queries (B, G, any, D) that see all keys (B, G, S, D) which the mask does not hide."""
    if is_by_feature(key) and dropout == 0.0 and query.shape[0] == 1:
        return attend_by_feature(query, key, value, attention_mask, scale)
    parts = parts_of_keys(query, key, value) if attention_mask is None and dropout == 0.0 else 1
    if parts > 1:
        return attend_in_parts(query, key, value, parts, scale)
    return nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scale)


def attend_eagerly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """As `attend`, in the steps of the modeling file's eager attention."""
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is not None:
        scores = scores + attention_mask
    return torch.matmul(torch.softmax(scores, dim=-1).to(query.dtype), value)


FEW_TRAINED_KEYS = 128  # at 256 both ways take as long


def trains_faster_eagerly(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float | None
) -> bool:
    """Whether to train attention of queries (B, H, T, D) and as many keys by plain products.

    In bfloat16 the backward pass of torch's CPU kernel takes 2 to 4 times as long for short rows. What it makes of
    rows that see nothing (padding) is its own, so such masks are left to it.
    """
    return (
        query.requires_grad
        and query.dtype is torch.bfloat16
        and query.is_cpu
        and query.shape[2] == key.shape[2] <= FEW_TRAINED_KEYS
        and not dropout
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and (attention_mask is None or every_row_sees(attention_mask))
    )


def every_row_sees(attention_mask: torch.Tensor) -> bool:
    """Whether each query of a boolean or additive mask (B, 1 or H, T, S) sees a key."""
    if attention_mask.dtype is not torch.bool:
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return bool(attention_mask.any(-1).all())


def additive_mask(
    module: nn.Module, query: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool | None
) -> torch.Tensor | None:
    """A mask to be added to scores (B, H, T, T), from one for sdpa, which may be boolean, or none for causal rows."""
    lowest, zero = torch.finfo(torch.float32).min, query.new_zeros((), dtype=torch.float32)
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        length = query.shape[2]
        return zero.new_full((1, 1, length, length), lowest).triu(1) if is_causal else None
    if attention_mask.dtype is torch.bool:
        return zero.expand_as(attention_mask).masked_fill(~attention_mask, lowest)
    return attention_mask


FEW_QUERIES = 128  # more of one KV head are worth a copy by token, which torch's kernel reads; scores take memory too


def attend_by_feature(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention of a few queries (1, G, any, D) as two products and a softmax between."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    queries, keys, values = query.squeeze(0), *(it.squeeze(0).transpose(1, 2) for it in (key, value))  # (G, D, S)
    halves = reads_halves_faster(keys)
    scores = scores_of_halves(queries, keys, scale) if halves else torch.bmm(queries * scale, keys)
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask.squeeze(0), torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask.squeeze(0)
    shares = torch.softmax(scores, dim=-1)
    return (outputs_of_halves(shares, values) if halves else torch.bmm(shares, values.transpose(1, 2))).unsqueeze(0)


def reads_halves_faster(keys: torch.Tensor) -> bool:
    """Whether to read keys (G, D, S) as twice as many heads of half the features.

    MKL gives a thread whole heads: of 3 KV heads one of two threads reads two, of 5 three.
    """
    heads, threads = keys.shape[0], torch.get_num_threads()
    idle_half = 1 < heads < 3 * threads and threads == 2 * math.gcd(heads, threads)
    return idle_half and keys.shape[2] >= MANY_KEYS and keys.shape[1] % 2 == 0


def scores_of_halves(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scores (G, N, S) of queries (G, N, D) and keys (G, D, S), as sums over halves of the features."""
    heads, rows, head_dim = queries.shape
    queries = (queries * scale).view(heads, rows, 2, -1).transpose(1, 2).reshape(2 * heads, rows, -1)
    scores = torch.bmm(queries, keys.reshape(2 * heads, head_dim // 2, -1)).view(heads, 2, rows, -1)
    return scores[:, 0] + scores[:, 1]


def outputs_of_halves(shares: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Outputs (G, N, D) of shares (G, N, S) and values (G, D, S), each half of the features by itself."""
    heads, head_dim, _ = values.shape
    twice = shares.repeat_interleave(2, dim=0)
    halves = torch.bmm(twice, values.reshape(2 * heads, head_dim // 2, -1).transpose(1, 2))
    return halves.view(heads, 2, -1, head_dim // 2).transpose(1, 2).flatten(2)


def attend_in_graph(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one token (B, H, 1, D) of which torch's compiler makes a few small kernels for a GPU.

    No key is repeated in memory. The scores are sums that the compiler keeps in float32 and joins with the softmax.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, seen = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, 1, head_dim).float() * scale
    scores = (grouped * key.unsqueeze(2)).sum(-1)  # (B, G, H / G, S)
    if attention_mask.shape[1] > 1:  # biases of each head
        attention_mask = attention_mask.reshape(-1, kv_heads, heads // kv_heads, seen)
    is_boolean = attention_mask.dtype is torch.bool
    scores = scores.masked_fill(~attention_mask, -torch.inf) if is_boolean else scores + attention_mask
    return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value).reshape(batch, heads, 1, -1)


MANY_KEYS = 2048  # below, joining the parts takes as long as is won
FLASH_ON_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def parts_of_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """In how many parts to read the keys of one sequence, so that each CPU thread reads as much as the others.

    Torch's kernel gives a thread whole heads: of 3 KV heads one of two threads reads two, and of 1 the other none.
    """
    if key.shape[2] < MANY_KEYS or key.shape[0] > 1 or not key.is_cpu or FLASH_ON_CPU is None:
        return 1
    heads, threads = key.shape[1], torch.get_num_threads()
    parts = threads // math.gcd(heads, threads)
    suits = (
        type(key) is type(value) is torch.Tensor  # no shards, nor quantized ones
        and query.dtype == key.dtype == value.dtype
        and key.shape[3] == value.shape[3]
        and key.stride(3) == value.stride(3) == 1
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )
    return min(parts, key.shape[2] * 4 // MANY_KEYS) if suits else 1


def attend_in_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: int, scale: float | None
) -> torch.Tensor:
    """Attention of queries (1, G, any, D) with every part of the keys as a head of its own, then joined.

    Each part's output counts by the share of its `exp(scores)` in their sum over all parts, which the kernel returns
    as a logarithm (Dao et al. 2023, Flash-Decoding).
    """
    heads, seen, head_dim = key.shape[1:]
    step = seen // parts
    length = seen - step * (parts - 1)

    def in_parts(states: torch.Tensor) -> torch.Tensor:
        _, by_head, by_token, _ = states.stride()
        return states.as_strided((heads, parts, length, head_dim), (by_head, step * by_token, by_token, 1))

    queries = query.squeeze(0).unsqueeze(1).expand(heads, parts, query.shape[2], head_dim)
    mask = mask_of_parts(parts, step, length, query.dtype)
    outputs, logarithms = FLASH_ON_CPU(  # type: ignore[misc]
        queries, in_parts(key), in_parts(value), attn_mask=mask, scale=scale
    )
    shares = torch.softmax(logarithms, dim=1).unsqueeze(-1)  # at least float32, and so is the sum
    return (outputs * shares).sum(dim=1).unsqueeze(0).to(query.dtype)


@functools.lru_cache(maxsize=4)  # one for all layers of a token; windows can differ by layer
def mask_of_parts(parts: int, step: int, length: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Hides (1, parts, 1, length) the keys that a part shares with the next, where S is no multiple of parts."""
    if length == step:
        return None
    mask = torch.zeros(1, parts, 1, length, dtype=dtype, device="cpu")
    mask[:, :-1, :, step:] = -torch.inf
    return mask


# Transformers' attention functions that have a faster counterpart here.
OWN_ATTENTION: dict[Any, Any] = {transformers_sdpa: sdpa_attention_forward}
