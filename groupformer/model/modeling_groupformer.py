# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""GroupFormer: a transformer whose attention sharing is configured, from multi-head (MHA) to multi-query (MQA).

One architecture, its variants chosen once when the model is built (`configuration_groupformer.py` describes the
fields): KV heads, positions, norms, MLPs, biases, windows, causal or not. MHA, GQA and MQA run the same code.

The file reads top to bottom: norms, positions, attention, MLP, layers, model, heads. Module names are Llama's. As
remote code on the Hub it has torch, transformers and the files beside it.

Shapes: B batch, T new tokens, S tokens seen (cached and new), H query heads, G key-value heads, D head_dim.
"""

import copy
import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
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
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_groupformer import CACHE_NAME, OWN_ATTENTION, accept_cache_alias, grow_in_place
from .configuration_groupformer import GroupFormerConfig
from .loss_groupformer import CausalLMOutputWithoutLogits, chunked_causal_lm_loss, sequence_classification_loss
from .masking_groupformer import (
    build_position_ids,
    check_backend,
    check_inputs,
    check_positions,
    create_attention_masks,
    embed_token_ids,
    find_real_tokens,
    layer_mask_names,
    pool_real_tokens,
    running_mask_names,
)


# Norms ---------------------------------------------------------------------------------------------------------------


@use_kernel_forward_from_hub("RMSNorm")
class GroupFormerRMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019, eq. 4), computed in float32 inside."""

    def __init__(self, size: int, eps: float = 1e-6, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(input_dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        # PEFT keeps the weights of norms in float32: the residual stream keeps its dtype all the same.
        return (self.weight * hidden_states.to(input_dtype)).to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class GroupFormerRMSNorm1P(nn.Module):
    """RMS norm whose factor is one plus its weight, multiplied in float32, before the result is rounded (Gemma)."""

    def __init__(self, size: int, eps: float = 1e-6, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.to(wide.dtype))).to(hidden_states.dtype)


# Layer norm (Ba et al. 2016, eq. 4) is torch's own.
NORMS = {"rms_norm": GroupFormerRMSNorm, "rms_norm_1p": GroupFormerRMSNorm1P, "layer_norm": nn.LayerNorm}


def build_norm(config: GroupFormerConfig, size: int | None = None) -> nn.Module:
    """The configured norm over `size` features, by default over the hidden size."""
    return NORMS[config.norm_type](size or config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


# Positions -----------------------------------------------------------------------------------------------------------


class GroupFormerSinusoidalEmbedding(nn.Module):
    """Sines and cosines that are added to the token embeddings (Vaswani et al. 2017, section 3.5).

    `PE(p, 2i) = sin(p / 10000^(2i / hidden_size))` and `PE(p, 2i + 1)` its cosine, in float32.
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
    "learned": lambda c: nn.Embedding(c.max_position_embeddings + c.position_offset, c.hidden_size),
    "sinusoidal": GroupFormerSinusoidalEmbedding,
}


class GroupFormerRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021, eq. 34), for every RoPE type of transformers."""

    inv_freq: torch.Tensor

    def __init__(self, config: GroupFormerConfig, layer_type: str = "full_attention"):
        super().__init__()
        if layer_type in config.rope_parameters:  # each type of layer has its own
            config, parameters = copy.deepcopy(config), config.rope_parameters[layer_type]
            config.rope_parameters = parameters
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
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
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)  # (B, T, rotary_dim)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """The pairs `(x[j], x[j + d/2])` rotated by a right angle: `(-x[j + d/2], x[j])`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate each pair of queries (B, H, T, D) and keys (B, G, T, D) by its position's angle (Su et al. 2021, eq. 34).

    `cos` and `sin` are (B, T, rotary_dim); with a rotary_dim below D a head's last features stay as they are.
    """
    rotary_dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if rotary_dim == query.shape[-1]:
        return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
    (query, query_rest), (key, key_rest) = (states.tensor_split((rotary_dim,), dim=-1) for states in (query, key))
    query, key = query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
    return torch.cat((query, query_rest), dim=-1), torch.cat((key, key_rest), dim=-1)


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
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1): outputs (B, T, H, D), probabilities (B, H, T, S).

    Query head h reads key-value head h // (H / G): the query heads of a group are laid side by side as more queries of
    their shared head, so that keys and values are never repeated in memory.
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
        self.tp_head_slice: slice | None = None  # of a mask with biases by head, this tensor parallel rank's part
        self.uses_rope = config.no_rope_layers is None or config.no_rope_layers[layer_idx] == 1

        bias, query_size, key_size = config.attention_bias, heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=config.attention_output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.norm_shape = (-1, self.head_dim) if per_head else (1, -1)
            self.q_norm = build_norm(config, self.head_dim if per_head else query_size)
            self.k_norm = build_norm(config, self.head_dim if per_head else key_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = past_key_values if cache is None else cache
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query.unflatten(-1, self.norm_shape))
            key = self.k_norm(key.unflatten(-1, self.norm_shape))
        query = query.view(hidden_shape).transpose(1, 2)  # (B, H, T, D)
        key = key.view(hidden_shape).transpose(1, 2)  # (B, G, T, D)
        value = value.view(hidden_shape).transpose(1, 2)
        if position_embeddings is not None and self.uses_rope:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            # From 5.24 on continuous batching reads and changes these options through the cache.
            options = {"kwargs": kwargs} if CACHE_NAME == "cache" else {}
            key, value = cache.update(key, value, self.layer_idx, **options)
        if self.tp_head_slice is not None:
            attention_mask = attention_mask[:, self.tp_head_slice]

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
        return self.o_proj(attn_output), attn_weights


# MLP -----------------------------------------------------------------------------------------------------------------


class GroupFormerPlainMLP(nn.Module):
    """`down(act(up(x)))` (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, config: GroupFormerConfig, layer_idx: int):
        super().__init__()
        intermediate_size = config.per_layer_config[layer_idx].intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GroupFormerGatedMLP(GroupFormerPlainMLP):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, eq. 6)."""

    def __init__(self, config: GroupFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, self.up_proj.out_features, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


MLPS = {"gated": GroupFormerGatedMLP, "plain": GroupFormerPlainMLP}


# Layers --------------------------------------------------------------------------------------------------------------


class GroupFormerDecoderLayer(GradientCheckpointingLayer):
    """Attention, then MLP, each on the normed residual stream and added to it (GPT-2, Llama)."""

    def __init__(self, config: GroupFormerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = GroupFormerAttention(config, layer_idx)
        self.mlp = MLPS[config.mlp_type](config, layer_idx)
        self.residual_multiplier = config.residual_multiplier
        self.dropout = config.hidden_dropout
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
        attn_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.scale(attn_output)
        return hidden_states + self.scale(self.mlp(self.post_attention_layernorm(hidden_states)))


class GroupFormerPostNormDecoderLayer(GroupFormerDecoderLayer):
    """Norms on the sublayers' outputs, before these are added (OLMo 2); with "both", on their inputs too (GLM 4)."""

    def build_norms(self, config: GroupFormerConfig) -> None:
        build_input_norm = build_norm if config.norm_position == "both" else nn.Identity
        self.input_layernorm, self.pre_feedforward_layernorm = build_input_norm(config), build_input_norm(config)
        self.post_attention_layernorm, self.post_feedforward_layernorm = build_norm(config), build_norm(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.scale(self.post_attention_layernorm(attn_output))
        mlp_output = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.scale(self.post_feedforward_layernorm(mlp_output))


class GroupFormerParallelDecoderLayer(GroupFormerDecoderLayer):
    """Attention and MLP side by side on the same residual stream, each with its own norm (GPT-NeoX) or one (Phi)."""

    def build_norms(self, config: GroupFormerConfig) -> None:
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = None if config.shared_parallel_norm else build_norm(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attn(hidden_states=normed, **kwargs)
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(hidden_states)
        # Summed in the order of GPT-NeoX, Phi and Falcon: half precision rounds in between.
        return self.scale(attn_output) + self.scale(self.mlp(normed)) + hidden_states


LAYERS = {
    "before": GroupFormerDecoderLayer,
    "after": GroupFormerPostNormDecoderLayer,
    "both": GroupFormerPostNormDecoderLayer,
    "parallel": GroupFormerParallelDecoderLayer,
}


def layer_class_of(config: GroupFormerConfig) -> type[GroupFormerDecoderLayer]:
    """The kind of layer that a config asks for."""
    return LAYERS["parallel" if config.parallel_residual else config.norm_position]


# Model ---------------------------------------------------------------------------------------------------------------


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
        super().__init__(config, *args, **kwargs)
        # Only the kind of layer that this model has: accelerate's FSDP looks for each one named.
        self._no_split_modules = [layer_class_of(config).__name__]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GroupFormerRMSNorm1P):
            init.zeros_(module.weight)

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
        # Asked when the model is built and when the backend is set. Transformers' own check may load a kernel.
        if attn_implementation is not None:
            check_backend(self.config, attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def init_parallel_plans(self) -> None:
        """The config's plans; a norm over whole projections needs these whole on every rank, as in OLMo 2."""
        super().init_parallel_plans()
        if self.config.mlp_type == "plain" and self.base_model is self:
            self._tp_plan.pop("layers.*.mlp.gate_proj", None)
        if self.config.qk_norm == "projection" and self.base_model is self:
            whole = {"q_proj": "colwise_gather_output", "k_proj": "colwise_gather_output"}
            whole |= {"v_proj": "colwise_gather_output", "o_proj": "rowwise_split_input"}
            self._tp_plan.update({f"layers.*.self_attn.{name}": style for name, style in whole.items()})

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config, mesh_manager):
        """Transformers' sharding, refused where heads cannot be split; each rank learns which heads are its own."""
        if mesh_manager is None:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if distributed_config.pp_size > 1:
            model.config.check_pipeline_parallel()
        ranks = 1 if model.config.qk_norm == "projection" else distributed_config.tp_size  # that share the heads
        model.config.check_tensor_parallel(ranks)
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if model.config.position_embedding_type == "alibi" and ranks > 1:
            per_rank, rank = model.config.num_attention_heads // ranks, mesh_manager.get_mesh("tp").get_local_rank()
            for module in model.modules():
                if isinstance(module, GroupFormerAttention):
                    module.tp_head_slice = slice(rank * per_rank, (rank + 1) * per_rank)
        return model


class GroupFormerModel(GroupFormerPreTrainedModel):
    """The bare transformer: token ids (B, T) or embeddings in, normed hidden states (B, T, hidden_size) out."""

    def __init__(self, config: GroupFormerConfig):
        config.validate_architecture()  # again, because a config may have been changed since it was built
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        absolute = ABSOLUTE_POSITIONS.get(config.position_embedding_type)
        self.embed_positions = absolute(config) if absolute is not None else None
        self.embed_norm = build_norm(config) if config.embedding_norm else None
        self.embed_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([layer_class_of(config)(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = build_norm(config)
        self.rotary_emb = GroupFormerRotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        is_local = self.rotary_emb is not None and "sliding_attention" in config.rope_parameters
        self.rotary_emb_local = GroupFormerRotaryEmbedding(config, "sliding_attention") if is_local else None
        self.mask_names = layer_mask_names(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor`, *optional*): Token ids `(B, T)`. Give these or `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*): `(B, S)` with 1 for real tokens and 0 for padding (what stands
                behind the last new token is not read), a prepared mask `(B, 1, T, S)`, or a dictionary of them.
            position_ids (`torch.LongTensor`, *optional*): Positions `(B, T)`. Where neither mask nor cache is given,
                positions that start again mark packed documents, which do not see each other.
            past_key_values, cache (`Cache`, *optional*): Keys and values of earlier tokens, extended in place.
            inputs_embeds (`torch.FloatTensor`, *optional*): Embeddings `(B, T, hidden_size)`.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`): Whether to return the cache.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or more positions than there are.
        """
        cache = accept_cache_alias(past_key_values, cache)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        cached = cache.get_seq_length() if isinstance(cache, Cache) else 0  # continuous batching tells positions
        check_inputs(input_ids if inputs_embeds is None else inputs_embeds, attention_mask, cached)
        if inputs_embeds is None:
            inputs_embeds = embed_token_ids(self.embed_tokens, input_ids)
        masks = create_attention_masks(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if position_ids is None:
            position_ids = build_position_ids(self.config, inputs_embeds, attention_mask, cached)
        check_positions(self.config, position_ids)
        if use_cache and cache is None:  # after the masks: with a cache they would not keep packed documents apart
            cache = grow_in_place(DynamicCache(config=self.config))
        hidden_states = inputs_embeds
        if (multiplier := self.config.embedding_multiplier) != 1.0:
            is_rounded = self.config.round_embedding_multiplier
            hidden_states = hidden_states * (hidden_states.new_full((), multiplier) if is_rounded else multiplier)
        if self.embed_positions is not None:
            positions = self.embed_positions(position_ids + self.config.position_offset)
            hidden_states = hidden_states + positions.to(hidden_states.dtype)
        if self.embed_norm is not None:
            hidden_states = self.embed_norm(hidden_states)
        hidden_states = self.embed_dropout(hidden_states)
        full = local = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        if self.rotary_emb_local is not None:
            local = self.rotary_emb_local(hidden_states, position_ids)

        for mask_name, decoder_layer in zip(running_mask_names(self), self.layers):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[mask_name],
                position_embeddings=local if mask_name.startswith("sliding") else full,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})


# Heads ---------------------------------------------------------------------------------------------------------------


class GroupFormerForCausalLM(GroupFormerPreTrainedModel, GenerationMixin):
    """GroupFormer with a language modeling head: logits (B, T, vocab_size), next-token loss, `generate`.

    Set `model.skip_logits = True` to train without holding all logits, where nothing reads them (with `Trainer`, say).
    """

    skip_logits = False

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GroupFormerConfig):
        super().__init__(config)
        self.model = GroupFormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
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
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As `GroupFormerModel.forward`, and:

        Args:
            labels (`torch.LongTensor`, *optional*): Ids to predict `(B, T)`, not shifted; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Compute logits for the last so many
                tokens only, or for the given indices; 0 means all.
            skip_logits (`bool`, *optional*, defaults to the model's attribute of that name, `False`): With labels,
                compute their loss a part at a time and return no logits, whose memory is then saved.
        """
        cache = accept_cache_alias(past_key_values, cache)
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache=use_cache, **kwargs
        )
        hidden_states, logits, loss, output_class = outputs.last_hidden_state, None, None, CausalLMOutputWithPast
        skip_logits = self.skip_logits if skip_logits is None else skip_logits
        if skip_logits and labels is not None and self.loss_function is ForCausalLMLoss:
            output_class, scaling = CausalLMOutputWithoutLogits, self.config.logits_scaling
            loss = chunked_causal_lm_loss(self.lm_head, hidden_states, labels, self.vocab_size, scaling, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
            if self.config.logits_scaling != 1.0:
                logits = logits / self.config.logits_scaling
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return output_class(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and type(cache := model_kwargs.get(CACHE_NAME)) is DynamicCache:
            grow_in_place(cache)

    def generate(self, *args, **kwargs):
        """Transformers' `generate`; refused for bidirectional models, whose tokens would see their own future."""
        if not self.config.is_causal:
            raise ValueError("is_causal (False) makes this model bidirectional: it cannot generate; set it to True")
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Transformers' continuous batching; refused for ALiBi, because its paged masks hold no biases."""
        if self.config.position_embedding_type == "alibi":
            raise ValueError("position_embedding_type ('alibi') has no continuous batching; use `generate` instead")
        return super().init_continuous_batching(*args, **kwargs)


# Trainer shifts the labels for smoothing of the classes that this table names; as remote code nothing else adds ours.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GroupFormerConfig.model_type] = GroupFormerForCausalLM.__name__


class GroupFormerForSequenceClassification(GroupFormerPreTrainedModel):
    """GroupFormer with a head over sequences: logits (B, num_labels) of regression, single or multi label tasks."""

    def __init__(self, config: GroupFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GroupFormerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.loss_function = sequence_classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """As `GroupFormerModel.forward`, and:

        Args:
            labels (`torch.Tensor`, *optional*): `(B,)` class ids, `(B, num_labels)` floats of a multi-label task, or
                floats of a regression, as `config.problem_type` says or the labels' dtype tells.
        """
        cache = accept_cache_alias(past_key_values, cache)
        cached = 0 if cache is None else cache.get_seq_length()  # before the model extends it
        real = find_real_tokens(self.config, input_ids, inputs_embeds, attention_mask, cached)
        outputs = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)
        logits = self.score(pool_real_tokens(outputs.last_hidden_state, real, self.config.is_causal))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
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
        self.dropout = nn.Dropout(config.hidden_dropout if (p := config.classifier_dropout) is None else p)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @wraps(GenericForTokenClassification.forward)
    def forward(self, *args, labels: torch.LongTensor | None = None, **kwargs) -> TokenClassifierOutput:
        outputs, loss = super().forward(*args, return_dict=True, **kwargs), None
        if labels is not None:  # the generic loss leaves out `num_items_in_batch`, by which Trainer averages
            loss = self.loss_function(outputs.logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(loss=loss, **outputs)


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
