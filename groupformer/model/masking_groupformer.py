# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Attention masks by layer, with the biases of ALiBi in them, positions, which tokens are real, what is refused.

Shapes: B batch, T new tokens, S tokens seen (cached and new), H query heads.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .cache_groupformer import CACHE_NAME, accept_cache_alias
from .configuration_groupformer import GroupFormerConfig


logger = logging.get_logger(__name__)


def layer_mask_names(config: GroupFormerConfig) -> list[str]:
    """For each layer the name of the mask that it reads: its layer type, and its window where windows differ."""
    kinds = config.layer_types or []
    if "sliding_window" not in (config.per_layer_attributes or ()):
        return kinds
    windows = [layer.sliding_window for layer in config.per_layer_config]
    sliding = {window for kind, window in zip(kinds, windows) if kind == "sliding_attention"}
    if len(sliding) < 2:
        return kinds
    return [f"{kind}_{window}" if kind == "sliding_attention" else kind for kind, window in zip(kinds, windows)]


def running_mask_names(model: Any) -> list[str]:
    """The mask of each layer that runs; where layers came in after the model was built, by the config as it is now.

    Raises:
        ValueError: `layer_types` says nothing of a layer.
    """
    count = min(model.config.num_hidden_layers, len(model.layers))
    names = model.mask_names if len(model.mask_names) >= count else layer_mask_names(model.config)
    if len(names) < count:
        raise ValueError(
            f"layer_types has {len(names)} entries, but {count} layers are to run; add one for each new layer"
        )
    return names[:count]


def check_inputs(inputs: torch.Tensor, attention_mask: Any, cached: int | torch.Tensor) -> None:
    """Refuses what would be computed wrongly, or fail further down by a message about something else.

    Raises:
        ValueError: an empty or flat input, (B, T) or (B, T, hidden_size); a mask (B, S) of another batch, shorter than
            the tokens, cached ones included, or with values other than 0 and 1. Other masks are not looked at.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph holds no checks of sizes
        return
    shape = inputs.shape
    if len(shape) < 2 or 0 in shape[:2]:
        raise ValueError(f"the input has shape {tuple(shape)}; give (batch, sequence), both of at least 1")
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return
    cached = 0 if isinstance(cached, torch.Tensor) else cached
    if attention_mask.shape[0] != shape[0] or attention_mask.shape[1] < cached + shape[1]:
        after = f" after {cached} cached tokens" if cached else ""
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the input {tuple(shape[:2])}{after}; "
            "give one row for each row of the input, with an entry for each token, cached ones included"
        )
    if attention_mask.is_floating_point() and not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError(
            "attention_mask (batch, sequence) must hold 1 for real tokens and 0 for padding; "
            "give an additive mask as (batch, 1, queries, keys)"
        )


def check_positions(config: GroupFormerConfig, position_ids: torch.Tensor) -> None:
    """Refuses positions beyond the ones that exist; RoPE computes them, and warns once."""
    if torch.compiler.is_compiling():  # neither a warning nor a look at values belongs in a graph
        return
    limit, kind = config.max_position_embeddings, config.position_embedding_type
    if kind == "rope" and position_ids.shape[-1] > limit:
        logger.warning_once(
            f"The sequence has {position_ids.shape[-1]} positions, more than max_position_embeddings ({limit}). "
            "RoPE computes them, but the model was not made for them: quality may fall."
        )
    if kind not in ("learned", "sinusoidal") or position_ids.numel() == 0 or position_ids.is_meta:
        return
    if (length := int(position_ids.max()) + 1) > limit:
        raise ValueError(
            f"The sequence has {length} positions, but max_position_embeddings ({limit}) is all that "
            f"position_embedding_type={kind!r} has; shorten or truncate the input"
        )


def embed_token_ids(embed_tokens: nn.Embedding, input_ids: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, T, hidden_size) of token ids; on the CPU an id outside the vocabulary is named."""
    if torch.compiler.is_compiling():
        return embed_tokens(input_ids)
    try:
        return embed_tokens(input_ids)
    except IndexError as error:
        outside = input_ids[(input_ids < 0) | (input_ids >= embed_tokens.num_embeddings)]
        raise IndexError(
            f"input_ids holds {outside[0].item()}, but vocab_size ({embed_tokens.num_embeddings}) allows "
            "only ids from 0 to one less; use the tokenizer of this model, or resize_token_embeddings"
        ) from error


def check_backend(config: GroupFormerConfig, name: str) -> None:
    """Refuses attention backends that cannot compute what the config says.

    Raises:
        ValueError: names the backend, the field and its value.
    """
    if name not in ("eager", *ALL_ATTENTION_FUNCTIONS) and not set(name) & set("/|"):  # of the Hub; "paged|sdpa"
        return  # an unknown name: transformers' error lists the known ones
    if config.position_embedding_type == "alibi" and name not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation ({name!r}) cannot add the biases of position_embedding_type='alibi'; "
            "choose 'eager' or 'sdpa'"
        )
    if name == "flex_attention" and config.attention_dropout > 0:
        raise ValueError(
            f"attn_implementation ({name!r}) has no dropout, but attention_dropout is "
            f"{config.attention_dropout}; set it to 0 or choose 'eager' or 'sdpa'"
        )


def create_attention_masks(
    config: GroupFormerConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, Any] | None,
    past_key_values: Cache | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    **kwargs,
) -> dict[str, Any]:
    """One mask for each name of `layer_mask_names`, in the form that the configured backend reads.

    With ALiBi the biases are part of the masks: they depend on the head and on positions, not on the layer. `generate`
    passes arguments of other models (token types); they are ignored. Masks that it has prepared stay as they are.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    cache = accept_cache_alias(past_key_values, cache)
    cached = cache.get_seq_length() if isinstance(cache, Cache) else 0
    # A static cache counts its tokens in a tensor and its masks may be as long as the cache: these stay as they are.
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and not isinstance(cached, torch.Tensor):
        attention_mask = attention_mask[:, : cached + inputs_embeds.shape[1]]
    uses_alibi = config.position_embedding_type == "alibi"
    names = layer_mask_names(config)
    masks = {}
    for name in dict.fromkeys(names):
        layer_idx = names.index(name)
        create_mask = create_sliding_window_causal_mask if name.startswith("sliding") else create_causal_mask
        masks[name] = create_mask(
            config=config.per_layer_config[layer_idx] if config.is_heterogeneous else config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            layer_idx=layer_idx,
            allow_is_causal_skip=not uses_alibi,
            **{CACHE_NAME: cache},
        )
        if uses_alibi:
            masks[name] = add_alibi(config, masks[name], inputs_embeds, attention_mask, cache, layer_idx)
    return masks


def select_tokens(per_token: torch.Tensor, length: int, cached: int | torch.Tensor) -> torch.Tensor:
    """The entries (B, length) after the cached ones, in a tensor (B, S or longer) that begins with these.

    What a static cache has beyond the tensor repeats its last entry; it is masked.
    """
    index = torch.arange(length, device=per_token.device) + cached
    return per_token[:, index.clamp(max=per_token.shape[1] - 1)]


def build_position_ids(
    config: GroupFormerConfig, inputs_embeds: torch.Tensor, attention_mask: Any, cached: int | torch.Tensor
) -> torch.Tensor:
    """Positions (B or 1, T) of the new tokens, when the caller gave none.

    Positions that are added to the embeddings count real tokens, so that a left-padded row means what it means
    alone. Those inside the attention are relative: padding shifts them all alike.
    """
    length = inputs_embeds.shape[1]
    adds_positions = config.position_embedding_type in ("learned", "sinusoidal")
    if adds_positions and getattr(attention_mask, "ndim", None) == 2:  # it may be a dictionary of prepared masks
        return select_tokens((attention_mask.long().cumsum(-1) - 1).clamp(min=0), length, cached)
    return (torch.arange(length, device=inputs_embeds.device) + cached).unsqueeze(0)


def find_real_tokens(
    config: GroupFormerConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cached: int | torch.Tensor,
) -> torch.Tensor:
    """Which of the new tokens are real, a boolean (B, T), from the attention mask where there is one."""
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if attention_mask is not None and attention_mask.ndim == 2:
        return select_tokens(attention_mask, inputs.shape[1], cached) != 0
    if input_ids is not None and config.pad_token_id is not None:
        return input_ids != config.pad_token_id
    if input_ids is not None and len(input_ids) > 1:
        raise ValueError(
            f"pad_token_id (None) leaves padding unknown in a batch of {len(input_ids)}; "
            "pass attention_mask, set config.pad_token_id, or use batches of 1"
        )
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)


def pool_real_tokens(hidden_states: torch.Tensor, real: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """One vector a row (B, hidden_size) of hidden states (B, T, hidden_size), finite for a row of padding too.

    Causal: the last real token's, the only one that saw the whole text. Bidirectional: the mean of the real tokens'.
    """
    batch, length = hidden_states.shape[:2]
    real = real.to(hidden_states.device)
    if not is_causal:
        # Summed in float32: thousands of states are more than float16 can hold.
        weights = real.to(torch.promote_types(hidden_states.dtype, torch.float32)).unsqueeze(-1)  # (B, T, 1)
        return ((hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)).to(hidden_states.dtype)
    indices = torch.arange(length, device=hidden_states.device)
    last = (indices * real).argmax(dim=-1)  # the greatest real index, wherever the padding is
    return hidden_states[torch.arange(batch, device=hidden_states.device), last]


def add_alibi(
    config: GroupFormerConfig,
    mask: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    layer_idx: int,
) -> torch.Tensor:
    """Writes ALiBi's biases `-slope_h * |q - k|` (Press et al. 2022, section 3) into a mask (B, 1, T, S).

    Returns an additive float mask (B or 1, H, T, S). Positions count real tokens where a 2D `attention_mask` tells
    them from padding, and plain indices elsewhere.
    """
    length, device, dtype = inputs_embeds.shape[1], inputs_embeds.device, inputs_embeds.dtype
    seen = cache.get_query_offset(layer_idx) if cache is not None else 0
    first_key = cache.get_mask_sizes(length, layer_idx)[1] if cache is not None else 0
    parts = (length, seen), (mask.shape[-1], first_key)  # of queries and keys: how many, after how many
    if attention_mask is not None and attention_mask.ndim == 2:
        positions = attention_mask.to(device=device, dtype=torch.long).cumsum(-1) - 1
        query_position, key_position = (select_tokens(positions, *part) for part in parts)
    else:
        query_position, key_position = ((torch.arange(n, device=device) + start)[None] for n, start in parts)
    distance = (query_position[:, None, :, None] - key_position[:, None, None, :]).abs()  # (B or 1, 1, T, S)
    slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=device)[None, :, None, None]
    biases, lowest = (-slopes * distance).to(dtype), torch.finfo(dtype).min
    return torch.where(mask, biases, lowest) if mask.dtype == torch.bool else (mask + biases).clamp(min=lowest)


def alibi_slopes(num_heads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022, section 3): `2^(-8 i / n)`, i = 1 … n, for a power of two n of heads.

    Other counts take the slopes of the next lower power of two, then every second one of the next higher, as the
    authors' code does.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4.0 * i / power) for i in range(1, 2 * power + 1, 2)]
    return slopes + between[: num_heads - power]
