# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Faster ways to compute what GroupFormer's modeling file says: products, norms, attention of few tokens.

Each gives the numbers of its plain counterpart (up to rounding) and takes that one wherever something unusual is at
work: adapters, quantized weights, hooks, parallelism, compiled graphs.

This file travels to the Hub with the modeling file, so it imports only torch, transformers and what travels.

Shapes: B batch, T new tokens, S tokens seen (cached and new), H query heads, G key-value heads, D head_dim.
"""

import functools
import math
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward as transformers_sdpa

from .cache_groupformer import is_by_feature


# Products ------------------------------------------------------------------------------------------------------------


def mkl_is_slow() -> bool:
    """Whether MKL, which torch multiplies float32 matrices with on x86, runs on another maker's CPU than Intel's.

    It does not take its fast paths there, and reads a matrix for a single row on one thread only. oneDNN, which torch
    brings as well, does: on an AMD EPYC it multiplies 512 rows 1.15 times as fast (docs/benchmarks.md).
    """
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        makers = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")]
    except OSError:  # no Linux
        return False
    return bool(makers) and "GenuineIntel" not in makers[0]


PREFERS_ONEDNN = mkl_is_slow()
HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _LinearWithoutValues(nn.Linear):
    """`nn.Linear` that does not draw values where there is nothing to hold them."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def build_linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """torch's `nn.Linear`, made faster on the meta device, where a model is built before its weights are loaded.

    `nn.Linear` draws values there too, and that takes longer than all else that building a model does.
    """
    linear = _LinearWithoutValues(in_features, out_features, bias)
    linear.__class__ = nn.Linear  # many tools ask for this very type
    return linear


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is `nn.Linear` and nothing more: no adapter, quantized weight, hook or changed `forward`."""
    fields = linear.__dict__
    return (
        type(linear) is nn.Linear
        and type(fields["_parameters"].get("weight")) is nn.Parameter  # a replica of DataParallel has none
        and not (fields["_forward_hooks"] or fields["_forward_pre_hooks"] or "forward" in fields)
    )


def runs_bare(module: nn.Module) -> bool:
    """Whether calling a module is no more than calling its class's `forward`: no hooks, no `forward` of its own."""
    fields = module.__dict__
    return not (fields["_forward_hooks"] or fields["_forward_pre_hooks"] or "forward" in fields)


def project(linear: nn.Module, hidden_states: torch.Tensor, any_layout: bool = False) -> torch.Tensor:
    """`linear(hidden_states)`, at inference on a CPU by what is faster where that is known.

    Where MKL is slow, float32 goes by `project_by_onednn`; where it is not, few rows go by `project_few_rows`.
    `any_layout` says that the output need not be contiguous.

    `torch.backends.mkldnn.flags(enabled=False)` turns it off, for those who compare with other models bit by bit.
    """
    if PREFERS_ONEDNN:
        if hidden_states.dtype is torch.float32 and is_plain_inference(linear, hidden_states):
            return project_by_onednn(linear, hidden_states)
    elif hidden_states.dtype in FEW_ROWS and hidden_states.is_cpu and not torch.compiler.is_compiling():
        inputs = hidden_states.shape[-1]
        least_inputs, least_rows, most_rows, least_weight = FEW_ROWS[hidden_states.dtype]
        if (
            inputs >= least_inputs
            and least_rows * inputs <= hidden_states.numel() <= most_rows * inputs
            and inputs * getattr(linear, "out_features", 0) >= least_weight
            and is_plain_inference(linear, hidden_states)
        ):
            return project_few_rows(linear, hidden_states, any_layout)
    return linear(hidden_states)


def is_plain_inference(linear: nn.Module, hidden_states: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Whether a product is one of a CPU's plain matrices, without gradients, and nothing looks on."""
    return (
        hidden_states.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and is_plain(linear)
        and linear.weight.dtype is hidden_states.dtype
        and linear.weight.is_cpu
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0  # flop counters and fake tensors want to see the plain product
    )


# By dtype the fewest inputs, the fewest and most rows, and the smallest weight for which `project_few_rows` was
# measured to be faster. Where the CPU has no instructions for bfloat16, only its matrix-vector product is.
FEW_ROWS = {torch.bfloat16: (512, 1, 256 if HAS_BFLOAT16 else 1, 2**18)}
if torch.backends.mkl.is_available():
    FEW_ROWS[torch.float32] = (256, 4, 48, 5 * 2**16)
BAND, ROWS_IN_BANDS = 32, 15  # in float32 as bands of so many rows of the weight, up to so many rows,
WIDE = (1024, 8, 2**20)  # and else as `weight @ rows.T`, from so many inputs, rows and numbers in the weight on


def project_few_rows(linear: nn.Linear, hidden_states: torch.Tensor, any_layout: bool) -> torch.Tensor:
    """`linear(hidden_states)` of plain matrices for few rows, in the form that reads the weight fastest.

    One row of bfloat16 is a matrix-vector product. A few rows of float32 are a batch of products so small that MKL
    copies no weights before it multiplies: 1.1 to 2.3 times as fast. More rows are `weight @ rows.T`, whose output
    lies by feature: MKL and oneDNN have kernels for it that are 1.2 to 1.8 times as fast as for `rows @ weight.T`,
    unless it has to be laid out by row again and is large.
    """
    weight, bias = linear.weight, linear.bias
    outputs, inputs = weight.shape
    rows, size = hidden_states.numel() // inputs, hidden_states.shape[:-1]
    if rows == 1 and bias is None:
        return torch.mv(weight, hidden_states.reshape(inputs)).view(*size, outputs)
    if weight.dtype is torch.float32:
        if rows <= ROWS_IN_BANDS and outputs % BAND == 0 and weight.is_contiguous():
            return product_in_bands(hidden_states, weight, bias, rows, outputs // BAND)
        is_faster = inputs >= WIDE[0] and rows >= WIDE[1] and weight.numel() >= WIDE[2]
    else:
        costs_a_copy = not any_layout and hidden_states.stride(-1) == 1
        is_faster = rows > 1 and (not costs_a_copy or rows <= (64 if inputs >= 1024 else 16))
    if not is_faster:
        return linear(hidden_states)
    columns = hidden_states.reshape(rows, inputs).t()
    output = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    output = output.t().view(*size, outputs)
    return output if any_layout else output.contiguous()


def project_by_onednn(linear: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    """`linear(hidden_states)` of plain float32 matrices: few rows in bands, more by oneDNN."""
    rows, bands = hidden_states.numel() // hidden_states.shape[-1], 2 * torch.get_num_threads()
    if 0 < rows <= BANDED_ROWS and linear.weight.shape[0] % bands == 0 and linear.weight.is_contiguous():
        return product_in_bands(hidden_states, linear.weight, linear.bias, rows, bands)
    return torch.ops.mkldnn._linear_pointwise(hidden_states, linear.weight, linear.bias, "none", [], "")


BANDED_ROWS = 8  # where oneDNN is preferred; below, reading the weight takes longer than multiplying by it


def product_in_bands(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int, bands: int
) -> torch.Tensor:
    """A product of few rows as a batch of products, one with each band of the weight's rows.

    Threads take bands, so that all of them read the weight: that of a small model then comes from memory 1.2 to 1.8
    times as fast as by oneDNN, which splits small matrices badly.
    """
    outputs, inputs = weight.shape
    banded = weight.view(bands, outputs // bands, inputs).transpose(1, 2)
    product = torch.bmm(hidden_states.reshape(1, rows, inputs).expand(bands, rows, inputs), banded)
    product = product.transpose(0, 1).reshape(*hidden_states.shape[:-1], outputs)
    return product if bias is None else product.add_(bias)


LARGE_GATE = 2**20  # numbers: smaller ones take memory that was used before
SILU = (nn.SiLU, type(ACT2FN["silu"]))


def multiply_by_gate(mlp: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`mlp.act_fn(gate) * up`, for long prompts in the memory of the gate, where nobody else can hold it.

    New memory of many MiB comes from the system page by page, which takes longer than to compute what it is for.
    """
    act_fn = mlp.act_fn
    if (
        torch.compiler.is_compiling()  # first: graphs must not depend on sizes
        or torch.jit.is_tracing()
        or gate.numel() < LARGE_GATE
        or type(act_fn) not in SILU
        or not runs_bare(act_fn)
        or not is_plain_inference(mlp.gate_proj, gate)
        or not is_plain_inference(mlp.up_proj, up)
        or nn.modules.module._has_any_global_hook()
    ):
        return act_fn(gate) * up
    return nn.functional.silu(gate, inplace=True).mul_(up)


# Norms ---------------------------------------------------------------------------------------------------------------


NOTHING = torch.zeros(())  # to add to, where only a product with a number is wanted
ROW_DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Torch's RMSNorm; of a single row on the CPU, where that is six operations, by a dot product in two."""
    if (
        hidden_states.numel() == weight.numel()
        and hidden_states.dtype in ROW_DTYPES
        and hidden_states.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    ):
        is_wide = hidden_states.dtype is torch.float32
        wide = hidden_states if is_wide else hidden_states.float()
        row = wide.reshape(-1)
        mean_square = torch.dot(row, row).item() / row.shape[0]
        if mean_square + eps > 0:  # neither zeros without an eps, nor NaN
            normed = torch.addcmul(NOTHING, wide, weight, value=(mean_square + eps) ** -0.5)
            return normed if is_wide else normed.to(hidden_states.dtype)
    return torch.rms_norm(hidden_states, weight.shape, weight, eps)


# Attention -----------------------------------------------------------------------------------------------------------


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
    mask = torch.zeros(1, parts, 1, length, dtype=dtype)
    mask[:, :-1, :, step:] = -torch.inf
    return mask


# Transformers' attention functions that have a faster counterpart here.
OWN_ATTENTION: dict[Any, Any] = {transformers_sdpa: sdpa_attention_forward}
