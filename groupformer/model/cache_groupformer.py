# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Layers of a KV cache that grow in place, for transformers' `DynamicCache`, and attention that repeats no heads.

`DynamicLayer` concatenates old and new keys into a new tensor for every token, so each decoded token copies the whole
cache. Here keys and values begin a larger buffer, and new ones are written behind them. A full buffer is replaced by
one a quarter larger than what is needed: that copies about four tokens for every new one, however many there are, and
the memory held stays within 1.25 of what the tokens need.

The cache stays a `DynamicCache`, for beam search, assisted decoding and offloading: a layer writes in place only where
its keys and values are the ones that it wrote last. After a crop, a reordering or an assignment they are others, and
the next update copies them into a new buffer: a tensor that was taken out of the cache never changes.

Shapes: B batch, T new tokens, S tokens seen (cached and new), H query heads, G key-value heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward as transformers_sdpa
from transformers.modeling_outputs import BaseModelOutputWithPast


# What transformers calls a cache in its calls, outputs and keyword arguments: `cache` from 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def accept_cache_alias(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache of a call that may name it by its old name, its new one, or both.

    PEFT's prefix tuning gives the prefix by the old name beside the empty cache that `generate` has made; for the
    tokens after that, `generate` gives the prefix and what followed, and PEFT the bare prefix once more.
    """
    if cache is None or (past_key_values is not None and cache.get_seq_length() == 0):
        return past_key_values
    return cache


def allocate_with_headroom(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """A buffer (B, G, capacity, D) that begins with held (B, G, S - T, D) and new states (B, G, T, D)."""
    length = held.shape[2] + new.shape[2]
    buffer = new.new_empty(new.shape[0], new.shape[1], length + length // 4, new.shape[3])
    buffer[:, :, : held.shape[2]] = held
    buffer[:, :, held.shape[2] : length] = new
    return buffer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes new keys and values behind the old ones."""

    keys: Any
    values: Any
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None  # of keys and values, each (B, G, capacity, D)
    end: int = 0  # the index behind the last token in the buffers
    written: tuple[torch.Tensor, torch.Tensor] | None = None  # `keys` and `values` as the last update left them

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values (B, G, T, D) of new tokens and returns those of all, (B, G, S, D)."""
        if not self.can_grow(key_states):
            self.drop_buffers()
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = (self.keys.shape[2] if self.keys.numel() else 0), key_states.shape[2]
        if held == 0:  # a prompt stays as it is: whether tokens will follow is not known
            self.drop_buffers()
            self.keys, self.values = self.written = key_states, value_states
            return key_states, value_states
        # After a crop, say, the keys are others than were written last: what lies behind them may be in use elsewhere.
        is_unchanged = self.written is not None and self.keys is self.written[0] and self.values is self.written[1]
        # Memory that was made in inference mode cannot be written outside of it.
        if (
            self.buffers is not None
            and is_unchanged
            and self.end + new <= self.buffers[0].shape[2]
            and (torch.is_inference_mode_enabled() or not self.buffers[0].is_inference())
        ):
            self.buffers[0][:, :, self.end : self.end + new] = key_states
            self.buffers[1][:, :, self.end : self.end + new] = value_states
            self.end += new
        else:
            self.buffers = (
                allocate_with_headroom(self.keys, key_states),
                allocate_with_headroom(self.values, value_states),
            )
            self.end = held + new
        seen = slice(self.end - held - new, self.end)
        self.keys, self.values = self.written = self.buffers[0][:, :, seen], self.buffers[1][:, :, seen]
        return self.keys, self.values

    def can_grow(self, key_states: torch.Tensor) -> bool:
        """Whether tokens may be written in place; elsewhere transformers' own way is taken, which copies."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if not self.is_initialized or not self.keys.numel():
            return True
        return self.keys.shape[:2] == key_states.shape[:2] and self.keys.dtype == key_states.dtype

    def drop_buffers(self) -> None:
        self.buffers = self.written = None

    def reset(self) -> None:
        self.drop_buffers()
        super().reset()

    def offload(self) -> None:
        self.drop_buffers()
        super().offload()


class GrowingSlidingWindowLayer(GrowingLayer, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` whose window moves through the buffers, and from their end into new ones.

    Like the original it keeps the last `sliding_window - 1` tokens, and returns these and the new ones.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `GrowingLayer.update`, with the keys and values that the window's tokens can see."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.written is None:  # not in place: the original has kept the window
            return keys, values
        self.cumulative_length += key_states.shape[2]
        first = max(0, keys.shape[2] - self.sliding_window + 1)
        held = keys[:, :, first:], values[:, :, first:]
        if self.buffers is None and first > 0:  # a long prompt, of which only the window is to stay in memory
            held = held[0].clone(), held[1].clone()
        self.keys, self.values = self.written = held
        return keys, values

    def can_grow(self, key_states: torch.Tensor) -> bool:
        return not self.record_past and super().can_grow(key_states)


GROWING_LAYERS: dict[Any, Any] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingWindowLayer}


def grow_in_place(cache: DynamicCache) -> DynamicCache:
    """Replaces the layers of an empty cache that have a growing kind; others stay."""
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        kind = GROWING_LAYERS.get(type(layer))
        if kind is not None and not layer.is_initialized:
            growing = kind.__new__(kind)
            vars(growing).update(vars(layer))  # its window, and whether that was told to record its past
            layers[index] = growing
    return cache


def sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' sdpa; where few tokens follow cached ones, without repeating keys and values.

    The query heads of a group are laid side by side as more queries of their shared head, (B, G, H / G * T, D), and
    the mask (B, 1 or H, T, S) with them.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, seen = key.shape[1], key.shape[2]
    group = heads // kv_heads
    # Of several tokens each sees another part of the keys, as the mask says; graphs must not depend on their number.
    is_few = length == 1 or (attention_mask is not None and not torch.compiler.is_compiling() and length <= FEW_TOKENS)
    if group == 1 or not is_few or length == seen:
        return transformers_sdpa(module, query, key, value, attention_mask, **kwargs)
    query = query.reshape(batch, kv_heads, group * length, head_dim)
    if attention_mask is not None and (length > 1 or attention_mask.shape[1] > 1):
        mask_rows = attention_mask.shape[0]
        attention_mask = attention_mask.expand(-1, heads, -1, -1).reshape(mask_rows, kv_heads, group * length, seen)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, kwargs.get("dropout", 0.0), scale=kwargs.get("scaling")
    )
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


FEW_TOKENS = 16  # one, or those that assisted decoding checks at a time

# Transformers' attention functions of which there is a form of ours.
OWN_ATTENTION: dict[Callable, Callable] = {transformers_sdpa: sdpa_attention_forward}
