# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""GroupFormer: a transformer whose attention sharing is configured, from multi-head (MHA) to multi-query (MQA).

One architecture, its variants chosen once when the model is built (see `configuration_groupformer.py` for the fields):

- `num_key_value_heads`, for the whole model or by layer; MHA, GQA and MQA run the same code;
- positions: learned, sinusoidal, RoPE with every scaling type of transformers, ALiBi, or none;
- RMSNorm or LayerNorm, before or after the sublayers, side by side (parallel residual), and on queries and keys;
- gated or plain MLP; biases where configured; sliding windows by layer; causal or bidirectional.

The file reads top to bottom: norms, positions, attention, MLP, layers, model, heads. Attention goes through
transformers' attention interface. Module names are Llama's. This file also travels to the Hub as remote code, so it
imports nothing but torch, transformers and the files beside it: configuration, masks, cache, loss, faster operations.

Shapes: B batch, T new tokens, S tokens seen (cached and new), H query heads, G key-value heads, D head_dim.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_groupformer import OWN_ATTENTION
from .cache_groupformer import CACHE_NAME, either_cache_name, grow_in_place, new_cache, update_options
from .configuration_groupformer import GroupFormerConfig
from .decoding_groupformer import (
    attention_of_one_token,
    decode_layer,
    decode_layer_with_norms_after,
    decode_parallel_layer,
    is_row,
    takes_one_token,
)
from .loss_groupformer import head_cross_entropy
from .masking_groupformer import (
    check_backend,
    check_inputs,
    check_positions,
    create_attention_masks,
    layer_mask_names,
    look_up,
    running_mask_names,
)
from .ops_groupformer import build_linear, is_turned_in_place, is_unwatched, multiply_by_gate, project, rms_norm


# Norms ---------------------------------------------------------------------------------------------------------------


@use_kernel_forward_from_hub("RMSNorm")
class GroupFormerRMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019, eq. 4), computed in float32 inside."""

    def __init__(self, size: int, eps: float = 1e-6, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight.dtype != hidden_states.dtype:  # PEFT keeps norms in float32, the residual stream its own dtype
            weight = weight.to(hidden_states.dtype)
        return rms_norm(hidden_states, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


# Layer norm (Ba et al. 2016, eq. 4) is torch's own.
NORMS = {"rms_norm": GroupFormerRMSNorm, "layer_norm": nn.LayerNorm}


def build_norm(config: GroupFormerConfig, size: int | None = None) -> nn.Module:
    """The configured norm over `size` features, by default over the hidden size."""
    return NORMS[config.norm_type](size or config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


# Positions -----------------------------------------------------------------------------------------------------------


class GroupFormerSinusoidalEmbedding(nn.Module):
    """Fixed sines and cosines, added to the token embeddings (Vaswani et al. 2017, section 3.5).

    `PE(p, 2i) = sin(p / 10000^(2i / hidden_size))` and `PE(p, 2i + 1)` its cosine, computed in float32 when asked for:
    there is no table to store, move or initialise.
    """

    def __init__(self, config: GroupFormerConfig):
        super().__init__()
        self.hidden_size = config.hidden_size

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        exponents = torch.arange(0, self.hidden_size, 2, device=position_ids.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * torch.exp(exponents * (-math.log(10000.0) / self.hidden_size))
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # (B, T, hidden_size)


# Positions added to the embeddings (learned: a trained vector each, as in GPT-2); the other kinds act in attention.
ABSOLUTE_POSITIONS = {
    "learned": lambda it: nn.Embedding(it.max_position_embeddings + it.position_offset, it.hidden_size),
    "sinusoidal": GroupFormerSinusoidalEmbedding,
}


class GroupFormerRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021, eq. 34), for every RoPE type of transformers."""

    inv_freq: torch.Tensor

    def __init__(self, config: GroupFormerConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = {"default": self.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: GroupFormerConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `theta^(-2i / d)` of the rotated part of a head, and the factor 1 of cos and sin."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)  # (B, T, rotary_dim)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair `(x[j], x[j + d/2])` of heads (B, H or G, T, D) by its position's angle.

    `cos` and `sin` are (B, 1, T, d), the first half of the sines negative: they meet the halves of x in exchange.
    Partial rotary (d below `D`) leaves the head's last features as they are.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
        return torch.cat((turn(turned, cos, sin), kept), dim=-1)
    rolled = torch.roll(x, rotary_dim // 2, dims=-1)
    return rolled.mul_(sin).addcmul_(x, cos) if is_turned_in_place(x) else torch.addcmul(x * cos, rolled, sin)


# Attention -----------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) for any number of key-value heads.

    Query head h reads key-value head h // (H / G). The query heads of a group are laid side by side as more queries of
    their shared head, so keys and values are never repeated in memory.

    Returns the heads' outputs (B, T, H, D) and the attention probabilities (B, H, T, S).
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, seen = key.shape[1], key.shape[2]
    group_rows = heads // kv_heads * length
    # Scaled before the product and masked in float32 (float64 stays itself): float16 ends at 65,504.
    scores = torch.matmul((query * scaling).reshape(batch, kv_heads, group_rows, head_dim), key.transpose(2, 3))
    scores = scores.view(batch, heads, length, seen).to(torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    output = torch.matmul(probabilities.view(batch, kv_heads, group_rows, seen), value)
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous(), probabilities


class GroupFormerAttention(nn.Module):
    """Attention of `num_attention_heads` query heads over `num_key_value_heads` shared keys and values."""

    def __init__(self, config: GroupFormerConfig, layer_idx: int):
        super().__init__()
        layer_config = config.per_layer_config[layer_idx]
        hidden_size, heads, kv_heads = config.hidden_size, config.num_attention_heads, layer_config.num_key_value_heads
        # The model's own config, not the layer's: backends look up their choice here, and it may change later.
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = heads // kv_heads
        multiplier = layer_config.attention_multiplier
        self.scaling = self.head_dim**-0.5 if multiplier is None else multiplier
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        slides = config.layer_types[layer_idx] == "sliding_attention"
        # Flash attention counts a window with its own token, transformers' bidirectional masks without it.
        self.sliding_window = layer_config.sliding_window + (not self.is_causal) if slides else None
        self.own_heads: slice | None = None  # of a mask with biases by head, this tensor parallel rank's part
        self.uses_rope = config.no_rope_layers is None or config.no_rope_layers[layer_idx] == 1

        bias, query_size, key_size = config.attention_bias, heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = build_linear(hidden_size, query_size, bias=bias)
        self.k_proj = build_linear(hidden_size, key_size, bias=bias)
        self.v_proj = build_linear(hidden_size, key_size, bias=bias)
        self.o_proj = build_linear(query_size, hidden_size, bias=config.attention_output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.q_norm = build_norm(config, self.head_dim if per_head else query_size)
            self.k_norm = build_norm(config, self.head_dim if per_head else key_size)

    def normalize(self, norm: nn.Module | None, projected: torch.Tensor) -> torch.Tensor:
        """Norm of projected queries or keys, over as many features as the norm has: one head, or all of them."""
        if norm is None:
            return projected
        return norm(projected.unflatten(-1, (-1, norm.weight.shape[0]))).flatten(-2)

    @either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.normalize(self.q_norm, project(self.q_proj, hidden_states))
        key = self.normalize(self.k_norm, project(self.k_proj, hidden_states))
        query, key = (states.view(hidden_shape).transpose(1, 2) for states in (query, key))  # (B, H or G, T, D)
        value = project(self.v_proj, hidden_states).view(hidden_shape).transpose(1, 2)  # (B, G, T, D)

        if position_embeddings is not None and self.uses_rope:
            query, key = turn(query, *position_embeddings), turn(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, **update_options(kwargs))
        if self.own_heads is not None:
            attention_mask = attention_mask[:, self.own_heads]

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_interface = OWN_ATTENTION.get(attention_interface, attention_interface)
        attn_output, attn_weights = attention_interface(  # vLLM finds this call by its name
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()  # (B, T, H * D)
        return project(self.o_proj, attn_output), attn_weights


# MLP -----------------------------------------------------------------------------------------------------------------


class GroupFormerPlainMLP(nn.Module):
    """`down(act(up(x)))` (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, config: GroupFormerConfig, layer_idx: int):
        super().__init__()
        intermediate_size = config.per_layer_config[layer_idx].intermediate_size
        self.up_proj = build_linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = build_linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.down_proj, self.act_fn(project(self.up_proj, hidden_states, any_layout=True)))


class GroupFormerGatedMLP(GroupFormerPlainMLP):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, eq. 6)."""

    def __init__(self, config: GroupFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate_proj = build_linear(config.hidden_size, self.up_proj.out_features, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = project(self.gate_proj, hidden_states, any_layout=True)
        up = project(self.up_proj, hidden_states, any_layout=True)
        return project(self.down_proj, multiply_by_gate(self, gate, up))


MLPS = {"gated": GroupFormerGatedMLP, "plain": GroupFormerPlainMLP}


# Layers --------------------------------------------------------------------------------------------------------------


class GroupFormerDecoderLayer(GradientCheckpointingLayer):
    """Attention, then MLP, each on the normed residual stream and added to it (GPT-2, Llama)."""

    decode = decode_layer

    def __init__(self, config: GroupFormerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = GroupFormerAttention(config, layer_idx)
        self.mlp = MLPS[config.mlp_type](config, layer_idx)
        self.residual_multiplier = config.residual_multiplier
        self.dropout = config.hidden_dropout
        self.is_usual = type(self) in LAYERS.values()  # `decode` knows no subclass of anyone else's
        self.build_norms(config)

    def build_norms(self, config: GroupFormerConfig) -> None:
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)

    def scale(self, sublayer_output: torch.Tensor) -> torch.Tensor:
        """A sublayer's output as it is added to the residual stream."""
        if self.dropout > 0:
            sublayer_output = nn.functional.dropout(sublayer_output, p=self.dropout, training=self.training)
        return sublayer_output if self.residual_multiplier == 1.0 else sublayer_output * self.residual_multiplier

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.scale(attn_output)
        return hidden_states + self.scale(self.mlp(self.post_attention_layernorm(hidden_states)))


class GroupFormerPostNormDecoderLayer(GroupFormerDecoderLayer):
    """Norms on the sublayers' outputs, before these are added to the residual stream (OLMo 2)."""

    decode = decode_layer_with_norms_after

    def build_norms(self, config: GroupFormerConfig) -> None:
        self.post_attention_layernorm = build_norm(config)
        self.post_feedforward_layernorm = build_norm(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = hidden_states + self.scale(self.post_attention_layernorm(attn_output))
        return hidden_states + self.scale(self.post_feedforward_layernorm(self.mlp(hidden_states)))


class GroupFormerParallelDecoderLayer(GroupFormerDecoderLayer):
    """Attention and MLP side by side on the same residual stream, each with its own norm (GPT-NeoX) or one (Phi)."""

    decode = decode_parallel_layer

    def build_norms(self, config: GroupFormerConfig) -> None:
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = None if config.shared_parallel_norm else build_norm(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attn(normed, **kwargs)
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.scale(attn_output) + self.scale(self.mlp(normed))


LAYERS = {
    "before": GroupFormerDecoderLayer,
    "after": GroupFormerPostNormDecoderLayer,
    "parallel": GroupFormerParallelDecoderLayer,
}


def layer_class_of(config: GroupFormerConfig) -> type[GroupFormerDecoderLayer]:
    """The kind of layer that a config asks for."""
    return LAYERS["parallel" if config.parallel_residual else config.norm_position]


# Model ---------------------------------------------------------------------------------------------------------------


# Tensor parallel styles of the attention where its projections must be whole: each rank computes all heads.
WHOLE_PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output"),
    "o_proj": "rowwise_split_input",
}


class GroupFormerPreTrainedModel(PreTrainedModel):
    """What all GroupFormer models share: what they support, and which backends they refuse."""

    config: GroupFormerConfig
    config_class = GroupFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [f"GroupFormer{kind}DecoderLayer" for kind in ("", "PostNorm", "Parallel")]
    _skip_keys_device_placement = [CACHE_NAME, "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GroupFormerDecoderLayer, "attentions": GroupFormerAttention}

    def __init__(self, config: GroupFormerConfig, *args, **kwargs):
        config.validate_architecture()  # again, because a config may have been changed since it was built
        super().__init__(config, *args, **kwargs)
        # Only the kind of layer that this model has: accelerate's FSDP looks for each one named.
        self._no_split_modules = [layer_class_of(config).__name__]

    def save_pretrained(self, *args, **kwargs):
        # FSDP2 makes a class of torch's of a sharded model's; while it is saved, it goes by our name and file.
        cls = type(self)
        names, own = (cls.__name__, cls.__module__), cls.__bases__[-1] if cls.__name__.startswith("FSDP") else cls
        cls.__name__, cls.__module__ = own.__name__, own.__module__
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            cls.__name__, cls.__module__ = names

    # `generate` prepares masks in advance for compiled decoding; these are ours, for the same names.
    create_masks_for_generate = staticmethod(create_attention_masks)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        # Transformers asks here when the model is built and when the backend is set. Ours comes first, because its own
        # check may load a kernel from the Hub.
        if attn_implementation is not None:
            check_backend(self.config, attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def init_parallel_plans(self) -> None:
        """The config's plans; a norm over whole projections needs these whole on every rank, as in OLMo 2."""
        super().init_parallel_plans()
        if self.config.qk_norm == "projection" and self.base_model is self:
            self._tp_plan.update({f"layers.*.self_attn.{name}": style for name, style in WHOLE_PROJECTIONS.items()})

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config, mesh_manager):
        """Transformers' sharding, refused where heads cannot be split; each rank learns which heads are its own."""
        if mesh_manager is None:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if distributed_config.pp_size > 1:
            model.config.check_pipeline_parallel()
        ranks = distributed_config.tp_size
        splits_heads = model.config.qk_norm != "projection"
        if splits_heads and ranks > 1:
            model.config.check_tensor_parallel(ranks)
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if model.config.position_embedding_type == "alibi" and splits_heads and ranks > 1:
            per_rank, rank = model.config.num_attention_heads // ranks, mesh_manager.get_mesh("tp").get_local_rank()
            for module in model.modules():
                if isinstance(module, GroupFormerAttention):
                    module.own_heads = slice(rank * per_rank, (rank + 1) * per_rank)
        return model


class GroupFormerModel(GroupFormerPreTrainedModel):
    """The bare transformer: token ids (B, T) or embeddings in, normed hidden states (B, T, hidden_size) out."""

    def __init__(self, config: GroupFormerConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        absolute = ABSOLUTE_POSITIONS.get(config.position_embedding_type)
        self.embed_positions = absolute(config) if absolute is not None else None
        self.embed_norm = build_norm(config) if config.embedding_norm else None
        self.embed_dropout = nn.Dropout(config.embedding_dropout)
        layer_class = layer_class_of(config)
        self.layers = nn.ModuleList([layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = build_norm(config)
        self.rotary_emb = GroupFormerRotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.mask_names = layer_mask_names(config)
        self.gradient_checkpointing = False
        self.post_init()

    def build_position_ids(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Positions (B or 1, T) of the new tokens, when the caller gave none.

        Positions that are added to the embeddings count real tokens, so that a left-padded row means what it means
        alone. Those inside the attention are relative: padding shifts them all alike.
        """
        length = inputs_embeds.shape[1]
        if self.embed_positions is not None and attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)

    def embed(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer: embeddings, scaled, with positions added, normed, as configured."""
        multiplier = self.config.embedding_multiplier
        hidden_states = inputs_embeds if multiplier == 1.0 else inputs_embeds * multiplier
        if self.embed_positions is not None:
            positions = self.embed_positions(position_ids + self.config.position_offset)
            hidden_states = hidden_states + positions.to(hidden_states.dtype)
        if self.embed_norm is not None:
            hidden_states = self.embed_norm(hidden_states)
        return self.embed_dropout(hidden_states)

    @merge_with_config_defaults
    @capture_outputs
    @either_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): Token ids. Give these or `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*): `(B, S)` with 1 for real tokens and 0 for padding; or a
                prepared mask `(B, 1, T, S)`; or, from `generate`, a dictionary of prepared masks.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions. Without an attention mask and
                cache, positions that start again mark packed documents, which do not see each other.
            past_key_values (`Cache`, *optional*): Keys and values of earlier tokens; extended in place.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, hidden_size)`, *optional*): Instead of `input_ids`.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`): Whether to return the cache.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or more positions than there are.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        check_inputs(input_ids if inputs_embeds is None else inputs_embeds, attention_mask, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embed_tokens, input_ids)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        masks = attention_mask
        if not isinstance(masks, dict):  # `generate` may have prepared them
            masks = create_attention_masks(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            position_ids = self.build_position_ids(inputs_embeds, attention_mask, past_key_values)
        check_positions(self.config, position_ids)
        hidden_states = self.embed(inputs_embeds, position_ids)
        position_embeddings = None
        if self.rotary_emb is not None:  # one for all heads
            position_embeddings = tuple(part.unsqueeze(1) for part in self.rotary_emb(hidden_states, position_ids))

        attend = attention_of_one_token(self, hidden_states, past_key_values)
        for mask_name, decoder_layer in zip(running_mask_names(self), self.layers):
            if attend is not None and takes_one_token(decoder_layer):
                token = hidden_states.view(-1) if is_row(hidden_states) else hidden_states.squeeze(1)
                mask = masks[mask_name]
                token = decoder_layer.decode(token, mask, position_embeddings, past_key_values, attend)
                hidden_states = token.view(hidden_states.shape)
                continue
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[mask_name],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: past_key_values},
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_key_values if use_cache else None}
        )


# Heads ---------------------------------------------------------------------------------------------------------------


class GroupFormerForCausalLM(GroupFormerPreTrainedModel, GenerationMixin):
    """GroupFormer with a language modeling head: logits (B, T, vocab_size), next-token loss, `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GroupFormerConfig):
        super().__init__(config)
        self.model = GroupFormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = build_linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    @either_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As `GroupFormerModel.forward`, and:

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Ids to predict, not shifted; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Compute logits for the last so many
                tokens only, or for the given indices; 0 means all.
            skip_logits (`bool`, *optional*): Return the loss without logits, whose memory is then saved. Default: in
                training, where there are labels. Heads that are adapted, quantized or sharded give them all the same.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        skip_logits = self.training if skip_logits is None else skip_logits
        if skip_logits and labels is not None and self.can_skip_logits(logits_to_keep):
            logits, scaling = None, self.config.logits_scaling
            loss = head_cross_entropy(self.lm_head, outputs.last_hidden_state, labels, scaling, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = project(self.lm_head, outputs.last_hidden_state[:, kept, :])
            if self.config.logits_scaling != 1.0:
                logits = logits / self.config.logits_scaling
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def can_skip_logits(self, logits_to_keep: int | torch.Tensor) -> bool:
        """Whether the loss is the usual one of all logits, its head a plain matrix, and nobody looks on."""
        usual = self.loss_function is ForCausalLMLoss and isinstance(logits_to_keep, int) and logits_to_keep == 0
        return usual and is_unwatched(self.lm_head)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get(CACHE_NAME)
        try:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        except AmbiguousGlobalPerLayerAttributeError:  # transformers below 5.19, see `new_cache`
            if generation_config.cache_implementation is not None:
                raise
            model_kwargs[CACHE_NAME] = new_cache(self.config)
        cache = model_kwargs.get(CACHE_NAME)
        if given is None and type(cache) is DynamicCache:
            grow_in_place(cache)

    def generate(self, *args, **kwargs):
        """Transformers' `generate`; refused for bidirectional models, whose tokens would see their own future."""
        if not self.config.is_causal:
            raise ValueError(
                "is_causal (False) makes this model bidirectional: it cannot generate; set is_causal=True"
            )
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Transformers' continuous batching; refused for ALiBi, because its paged masks hold no biases."""
        if self.config.position_embedding_type == "alibi":
            raise ValueError("position_embedding_type ('alibi') has no continuous batching; use `generate` instead")
        return super().init_continuous_batching(*args, **kwargs)


# `generate` asks the forward of remote code for its signature with every token; here it is found at once.
vars(GroupFormerForCausalLM)["forward"].__signature__ = inspect.signature(GroupFormerForCausalLM.forward)


class GroupFormerForSequenceClassification(GroupFormerPreTrainedModel):
    """GroupFormer with a head over whole sequences: logits (B, num_labels) of regression, single or multi label tasks.

    A causal model is read at the last real token of each row, the only one that saw the whole text; a bidirectional
    one as the mean of its real tokens.
    """

    def __init__(self, config: GroupFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GroupFormerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def real_tokens(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Which of the new tokens are real: a boolean (B, T), from the attention mask where there is one."""
        batch, length = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            return attention_mask[:, -length:].to(hidden_states.device) != 0
        if self.config.pad_token_id is not None and input_ids is not None:
            return input_ids.to(hidden_states.device) != self.config.pad_token_id
        if batch > 1 and input_ids is not None:
            raise ValueError(
                f"pad_token_id (None) leaves padding unknown in a batch of {batch}; "
                "pass attention_mask, set config.pad_token_id, or use batches of 1"
            )
        return torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)

    def pool(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """One vector a row (B, hidden_size) of hidden states (B, T, hidden_size), finite for a row of padding too."""
        if not self.config.is_causal:
            weights = real.to(hidden_states.dtype).unsqueeze(-1)  # (B, T, 1)
            return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        indices = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        last = (indices * real).argmax(dim=-1)  # the greatest real index, wherever the padding is
        return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]

    @can_return_tuple
    @either_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """As `GroupFormerModel.forward`, and:

        Args:
            labels (`torch.Tensor`, *optional*): `(B,)` class ids, `(B, num_labels)` floats of a multi-label task, or
                floats of a regression, as `config.problem_type` says or the labels' dtype tells.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        pooled = self.pool(hidden_states, self.real_tokens(input_ids, attention_mask, hidden_states))
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


# The generic heads build their base through `AutoModel`, which knows no remote code; ours name it.
class GroupFormerForTokenClassification(GenericForTokenClassification, GroupFormerPreTrainedModel):
    """GroupFormer with a head over each token: logits (B, T, num_labels)."""

    def __init__(self, config: GroupFormerConfig):
        GroupFormerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GroupFormerModel(config)
        dropout = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class GroupFormerForQuestionAnswering(GenericForQuestionAnswering, GroupFormerPreTrainedModel):
    """GroupFormer with a head for spans: start and end logits (B, T)."""

    def __init__(self, config: GroupFormerConfig):
        GroupFormerPreTrainedModel.__init__(self, config)
        self.model = GroupFormerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "GroupFormerForCausalLM",
    "GroupFormerForQuestionAnswering",
    "GroupFormerForSequenceClassification",
    "GroupFormerForTokenClassification",
    "GroupFormerModel",
    "GroupFormerPreTrainedModel",
]
