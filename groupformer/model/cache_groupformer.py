# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Layers of a KV cache that grow without copying, for transformers' own `DynamicCache`.

`DynamicLayer` joins old and new keys into a new tensor for every token, so each decoded token moves the whole cache.
Here keys and values begin a larger memory, their room, and new ones are written behind them. A full room is
replaced by one a quarter larger than what is needed: that copies about four tokens for every new one, however many
there are, and the memory held stays within 1.25 of what the tokens need.

Both are laid out by token, as everywhere, until a single sequence on a CPU is long and is decoded token by token: then
by feature, which products with them read faster. What is seen of them has the same shape, with other strides.

The cache itself stays a `DynamicCache`: beam search, assisted decoding, offloading and whatever else knows its layers
goes on working. Where writing in place could be wrong, transformers' own way is taken, which copies: where gradients
could flow, in graphs being compiled or exported, and for sliding windows that record their past for assisted decoding.

This file travels to the Hub with the modeling file, so it imports nothing but torch and transformers.

Shapes: B batch, G key-value heads, T new tokens, S tokens seen (cached and new), D head_dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.modeling_outputs import BaseModelOutputWithPast


# What transformers calls a cache in its calls, outputs and keyword arguments: `cache` from 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def either_cache_name(function: Callable) -> Callable:
    """Lets a function with an argument `past_key_values` take it as `cache` too, where transformers calls it so.

    Raises:
        ValueError: when called with both names.
    """
    if CACHE_NAME == "past_key_values":
        return function

    @functools.wraps(function)
    def renamed(*args, **kwargs):
        if CACHE_NAME in kwargs:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("cache and past_key_values are one argument under two names; give only cache")
            kwargs["past_key_values"] = kwargs.pop(CACHE_NAME)
        return function(*args, **kwargs)

    return renamed


def update_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of a cache's update: the pages of continuous batching, since they came through it, read and change what
    the attention function is called with."""
    return {"kwargs": kwargs} if CACHE_NAME == "cache" else {}


# Keys that are read faster by feature: so many numbers (with the values 2 MiB, a core's cache), tokens and features.
LARGE_LAYER, LONG, NARROW_HEAD = 2**18, 512, 64


def is_by_feature(states: torch.Tensor) -> bool:
    """Whether keys or values (B, G, S, D) lie in memory as (B, G, D, S)."""
    return states.stride(2) == 1 and states.stride(3) > 1


def read_faster_by_feature(keys: torch.Tensor) -> bool:
    """Whether single tokens read these keys (B, G, S, D), laid out by token, and their values faster by feature.

    Dot products and sums of one head's features are too short for the full bandwidth; those of rows as long as the
    cache are not. In float32, which MKL multiplies batches of on a CPU. Wider heads and several sequences are read as
    fast by torch's own kernel.
    """
    return (
        keys.numel() >= LARGE_LAYER
        and keys.shape[0] == 1
        and keys.shape[2] >= LONG
        and keys.shape[3] <= NARROW_HEAD
        and keys.stride(3) == 1
        and keys.is_cpu
        and keys.dtype is torch.float32
        and type(keys) is torch.Tensor
        and torch.backends.mkl.is_available()
    )


def new_memory(like: torch.Tensor, capacity: int, by_feature: bool) -> torch.Tensor:
    """Memory (B, G, capacity, D) for keys or values such as these."""
    batch, heads, _, head_dim = like.shape
    if by_feature:
        return like.new_empty(batch, heads, head_dim, capacity).transpose(2, 3)
    return like.new_empty(batch, heads, capacity, head_dim)


class Room:
    """Memory (B, G, capacity, D) for keys and for values, of which a stretch of `length` tokens is in use.

    `keys` and `values` are views of that stretch, (B, G, length, D).
    """

    def __init__(self, key_memory: torch.Tensor, value_memory: torch.Tensor, length: int, start: int = 0):
        self.key_memory, self.value_memory = key_memory, value_memory
        self.show(start, length)

    def show(self, start: int, length: int) -> None:
        """Takes another stretch of the memory as the one in use."""
        self.start, self.length = start, length
        self.keys = self.key_memory.narrow(2, start, length)
        self.values = self.value_memory.narrow(2, start, length)

    def takes(self, count: int) -> bool:
        """Whether so many tokens fit behind those in use, and may be written there."""
        fits = self.start + self.length + count <= self.key_memory.shape[2]
        # Memory that was made in inference mode cannot be written outside of it.
        return fits and (torch.is_inference_mode_enabled() or not self.key_memory.is_inference())

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Writes new tokens (B, G, T, D) behind those in use."""
        place, count = self.start + self.length, key_states.shape[2]
        self.key_memory.narrow(2, place, count).copy_(key_states)
        self.value_memory.narrow(2, place, count).copy_(value_states)
        self.show(self.start, self.length + count)

    def lay_by_feature(self) -> None:
        """Moves keys and values into memory of the same size that is laid out by feature."""
        self.key_memory, self.value_memory = map(self.by_feature, (self.key_memory, self.value_memory))
        self.show(self.start, self.length)

    def by_feature(self, held: torch.Tensor) -> torch.Tensor:
        """Memory by feature that holds what is in use of memory by token."""
        memory = new_memory(held, held.shape[2], by_feature=True)
        # Transposed, what is written is contiguous: twice as fast.
        old, new = (it.narrow(2, self.start, self.length).transpose(2, 3) for it in (held, memory))
        new.copy_(old)
        return memory

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Room":
        """The room after a change of its memory that leaves the dimension of tokens as it is."""
        return Room(change(self.key_memory), change(self.value_memory), self.length, self.start)


def roomy(held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """Memory that begins with what is held (B, G, S - T, D) and new (B, G, T, D), and is a quarter larger than both.

    It is laid out as what is held, or, where that is nothing, as what is new.
    """
    place = 0 if held is None else held.shape[2]
    length = place + new.shape[2]
    memory = new_memory(new, length + length // 4, is_by_feature(new if held is None else held))
    if held is not None:
        memory.narrow(2, 0, place).copy_(held)
    memory.narrow(2, place, new.shape[2]).copy_(new)
    return memory


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes new keys and values behind the old ones.

    Its room belongs to it for as long as nobody else sets `keys` or `values`.
    """

    keys: Any
    values: Any
    room: Room | None = None

    def owned_room(self) -> Room | None:
        if self.room is not None and (self.keys is not self.room.keys or self.values is not self.room.values):
            self.room = None
        return self.room

    def enter(self, room: Room) -> None:
        self.room, self.keys, self.values = room, room.keys, room.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values (B, G, T, D) of new tokens and returns those of all, (B, G, S, D).

        What is returned are views. They keep what they hold while tokens are added; after a `crop`, the places of what
        was cropped are written again.
        """
        if self.must_copy(key_states, value_states):
            self.room = None
            return super().update(key_states, value_states, *args, **kwargs)
        room = self.owned_room()
        if room is not None and room.takes(key_states.shape[2]):
            if key_states.shape[2] == 1 and read_faster_by_feature(room.keys):
                room.lay_by_feature()
            room.append(key_states, value_states)
        else:
            count = self.get_seq_length()
            keys, values = (self.keys, self.values) if count else (None, None)
            room = Room(roomy(keys, key_states), roomy(values, value_states), count + key_states.shape[2])
            # As `lazy_initialization`, less the empty keys and values.
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.enter(room)
        return room.keys, room.values

    def must_copy(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether to leave an update to transformers: for gradients, for graphs, or for its error on a wrong shape."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return True
        if torch.is_grad_enabled():  # even where only queries have gradients, what they met must stay as it was
            return True
        held = self.keys
        if held is None or held.numel() == 0:
            return False
        return held.requires_grad or held.shape[:2] != key_states.shape[:2] or held.dtype != key_states.dtype

    def change(self, change: Callable[[torch.Tensor], torch.Tensor], otherwise: Callable[[], None]) -> None:
        """Changes the room, or, where there is none, the keys and values by themselves."""
        room = self.owned_room()
        if room is None:
            otherwise()
        else:
            self.enter(room.changed(change))

    def crop(self, tokens_to_remove: int) -> None:
        room = self.owned_room()
        super().crop(tokens_to_remove)
        if room is not None and self.keys is not room.keys:
            room.show(room.start, self.keys.shape[2])
            self.enter(room)

    def reset(self) -> None:
        self.room = None
        super().reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.change(
            lambda it: it.index_select(0, beam_idx.to(it.device)),
            lambda: super(GrowingLayer, self).reorder_cache(beam_idx),
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(
            lambda it: it.repeat_interleave(repeats, dim=0),
            lambda: super(GrowingLayer, self).batch_repeat_interleave(repeats),
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.change(lambda it: it[indices, ...], lambda: super(GrowingLayer, self).batch_select_indices(indices))

    def offload(self) -> None:
        self.change(lambda it: it.to("cpu", non_blocking=True), super().offload)

    def prefetch(self) -> None:
        self.change(lambda it: it.to(self.device, non_blocking=True), super().prefetch)


class GrowingSlidingWindowLayer(GrowingLayer, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` whose window moves through its room, and from its end into a new one.

    Like the original it keeps the last `sliding_window - 1` tokens, and returns these and the new ones.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `GrowingLayer.update`, with the keys and values that the window's tokens can see."""
        if self.record_past or self.must_copy(key_states, value_states):
            self.room = None
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        room = self.owned_room()
        if room is not None and room.takes(key_states.shape[2]):
            room.append(key_states, value_states)
            seen = room.keys, room.values
            surplus = max(0, room.length - self.sliding_window + 1)
            room.show(room.start + surplus, room.length - surplus)
        else:
            if self.keys.numel():
                key_states = torch.cat([self.keys, key_states], dim=2)
                value_states = torch.cat([self.values, value_states], dim=2)
            seen = key_states, value_states
            kept = min(key_states.shape[2], self.sliding_window - 1)
            first = key_states.shape[2] - kept
            kept_keys, kept_values = (states.narrow(2, first, kept) for states in (key_states, value_states))
            room = Room(roomy(None, kept_keys), roomy(None, kept_values), kept)
        self.enter(room)
        return seen


GROWING_LAYERS: dict[Any, Any] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingWindowLayer}


def new_cache(config: Any) -> DynamicCache:
    """An empty growing cache for a model.

    Before transformers 5.19 no cache knows windows that differ by layer: there sliding layers keep all tokens, which
    costs memory and changes nothing else, since the masks hide what a window has left behind.
    """
    try:
        return grow_in_place(DynamicCache(config=config))
    except AmbiguousGlobalPerLayerAttributeError:
        return grow_in_place(DynamicCache())


def grow_in_place(cache: DynamicCache) -> DynamicCache:
    """Gives an empty cache growing layers for those of transformers' that have a growing kind; others stay."""
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        kind = GROWING_LAYERS.get(type(layer))
        if kind is not None and not layer.is_initialized:
            growing = kind.__new__(kind)
            vars(growing).update(vars(layer))  # its window, and whether that was told to record its past
            layers[index] = growing
    return cache
