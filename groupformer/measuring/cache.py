"""The KV cache's arithmetic, for any decoder of transformers, from its config alone: the one place where it stands.

A token leaves in each layer a key and a value of `head_dim` numbers for every KV head:

    cache bytes per token = Σ_layers 2 · num_key_value_heads · head_dim · bytes per number

A layer with a sliding window keeps at most `window` tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..conversion.formats import as_groupformer
from ..families.registry import is_groupformer


# Layers of these types keep keys and values of single tokens; others (linear attention, state spaces, convolutions)
# keep something else.
WITH_CACHE = {"full_attention", "sliding_attention", "chunked_attention"}

# Fields that say that a model caches something else than the keys and values of its heads, and what that is.
NO_HEADS_CACHED = {
    "kv_lora_rank": "multi-head latent attention caches a compressed vector instead of heads",
    "state_size": "a state-space model keeps a state of fixed size",
    "ssm_state_size": "a state-space model keeps a state of fixed size",
    "mamba_d_state": "a state-space model keeps a state of fixed size",
}


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a token."""

    kv_heads: int
    head_dim: int
    window: int | None = None

    def numbers(self, tokens: int, block_size: int = 1, prefill_chunk: int = 1) -> int:
        """Numbers that the layer holds after so many tokens of one sequence, as engines allot them.

        Args:
            block_size: Tokens that are allotted at once.
            prefill_chunk: Tokens that are read at once, which a window holds beside those before them.
        """
        kept = tokens if self.window is None else min(tokens, self.window - 1 + prefill_chunk)
        blocks = -(-kept // block_size)
        if self.window is not None and block_size > 1:
            blocks += 1  # a window begins within a block
        return 2 * self.kv_heads * self.head_dim * blocks * block_size


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens of a sequence that a decoder was made for; None where its positions have no limit (ALiBi, none)."""
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "position_embedding_type", None) in ("alibi", "none"):
        return None
    return getattr(text_config, "max_position_embeddings", None)


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> int:
    """Bytes that one more token takes in the KV cache of a decoder, while no window is full.

    Args:
        config: Any decoder's; `decoder_of` is applied.
        dtype: Of the cache. Default: the config's, or else float32.

    Raises:
        ValueError: the model has no cache of heads; see `decoder_of` and `layer_caches`.
    """
    dtype = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    return sum(layer.numbers(1) for layer in layer_caches(decoder_of(config))) * dtype.itemsize


def decoder_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text decoder's config, as a GroupFormer's where the bridge knows the family.

    Raises:
        ValueError: the model keeps no keys and values of heads, or not only of a decoder; the field is named.
    """
    if config.is_encoder_decoder:
        raise ValueError(f"model_type ({config.model_type}) is an encoder-decoder; plan knows decoders")
    config = config.get_text_config(decoder=True)
    for field, reason in NO_HEADS_CACHED.items():
        if getattr(config, field, None):
            raise ValueError(f"{field} ({getattr(config, field)}): {reason}, so there are no KV heads to plan")
    return as_groupformer(config) or config  # what the bridge refuses need not matter to the cache


def layer_caches(config: PreTrainedConfig) -> list[LayerCache]:
    """What each layer keeps; `config` is a decoder's.

    Raises:
        ValueError: a layer keeps something else than keys and values, or the config names no number of heads.
    """
    layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or default_types(config)
    for layer, layer_type in enumerate(types):
        if layer_type not in WITH_CACHE:
            raise ValueError(
                f"layer_types[{layer}] ({layer_type}) keeps no keys and values; plan knows attention layers"
            )
    per_layer = getattr(config, "per_layer_config", None) if is_groupformer(config) else None
    caches = []
    for layer in range(layers):
        fields = per_layer[layer] if per_layer is not None else config
        window = getattr(fields, "sliding_window", None) or getattr(fields, "attention_chunk_size", None)
        caches.append(
            LayerCache(kv_heads_of(fields), head_dim_of(config), window if types[layer] != "full_attention" else None)
        )
    return caches


def default_types(config: PreTrainedConfig) -> list[str]:
    """A window without layer_types is one of every layer (Mistral)."""
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


def kv_heads_of(config: Any) -> int:
    """Key-value heads: those of the config, or as many as query heads where it has no such field."""
    heads = getattr(config, "num_key_value_heads", None)
    if heads is None and getattr(config, "multi_query", False):
        return 1
    if heads is None:
        heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(
            f"num_attention_heads ({heads}) of model_type {getattr(config, 'model_type', None)} is not a number of "
            "heads; plan needs the config of a decoder with attention"
        )
    return heads


def head_dim_of(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
