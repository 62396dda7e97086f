# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Faster ways to compute what GroupFormer's modeling file says: linear layers, norms, rotary positions.

Each gives the numbers of its plain counterpart (up to rounding) and takes that one wherever something unusual is at
work: adapters, quantized weights, hooks, parallelism, compiled graphs.

This file travels to the Hub with the modeling file, so it imports only torch, transformers and what travels.
"""

from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.activations import ACT2FN


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


TORCHS_LINEAR = nn.Linear


class _LinearWithoutValues(TORCHS_LINEAR):
    """`nn.Linear` that does not draw values where there is nothing to hold them."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def build_linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """torch's `nn.Linear`, made faster on the meta device, where a model is built before its weights are loaded.

    `nn.Linear` draws values there too, and that takes longer than all else that building a model does.
    """
    if nn.Linear is not TORCHS_LINEAR:  # somebody put another in its place
        return nn.Linear(in_features, out_features, bias)
    linear: nn.Linear = _LinearWithoutValues(in_features, out_features, bias)
    linear.__class__ = TORCHS_LINEAR  # many tools ask for this very type
    return linear


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is `nn.Linear` and nothing more: no adapter, quantized weight, hook or changed `forward`."""
    fields = linear.__dict__
    return (
        type(linear) is nn.Linear
        and type(fields["_parameters"].get("weight")) is nn.Parameter  # a replica of DataParallel has none
        and not (fields["_forward_hooks"] or fields["_forward_pre_hooks"] or "forward" in fields)
    )


def is_unwatched(linear: nn.Module) -> bool:
    """Whether a layer's product and its gradients can be computed elsewhere, with nobody noticing."""
    fields = linear.__dict__
    return (
        is_plain(linear)
        and not (fields["_backward_hooks"] or fields["_backward_pre_hooks"])
        and not nn.modules.module._has_any_global_hook()
        and not linear.weight.is_meta
        and not torch.compiler.is_compiling()
        and not in_transform()
    )


def in_transform() -> bool:
    """Whether one of `torch.func`'s transforms or forward-mode differentiation is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


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


NOTHING = torch.zeros((), device="cpu")  # to add to, where only a product with a number is wanted
ROW_DTYPES = (torch.float32, torch.bfloat16)
MANY_NUMBERS = 3 * 2**16  # fewer are in a core's cache anyway


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Torch's RMSNorm; on the CPU, where that is six operations, of a single row in two and of many rows in four."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first: graphs must not depend on sizes
        return torch.rms_norm(hidden_states, weight.shape, weight, eps)
    numbers = hidden_states.numel()
    if (
        (numbers == weight.numel() or numbers >= MANY_NUMBERS)
        and hidden_states.dtype in ROW_DTYPES
        and hidden_states.is_cpu
        and not torch.is_grad_enabled()
        and not in_transform()
        and torch._C._len_torch_dispatch_stack() == 0
    ):
        if numbers >= MANY_NUMBERS:
            return rms_norm_of_many_rows(hidden_states, weight, eps)
        if (normed := rms_norm_of_a_row(hidden_states, weight, eps)) is not None:
            return normed
    return torch.rms_norm(hidden_states, weight.shape, weight, eps)


def rms_norm_of_a_row(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """By a dot product; `None` where that is nothing to divide by: zeros without an eps, or NaN."""
    is_wide = hidden_states.dtype is torch.float32
    wide = hidden_states if is_wide else hidden_states.float()
    row = wide.reshape(-1)
    mean_square = torch.dot(row, row).item() / row.shape[0]
    if not mean_square + eps > 0:
        return None
    normed = torch.addcmul(NOTHING, wide, weight, value=(mean_square + eps) ** -0.5)
    return normed if is_wide else normed.to(hidden_states.dtype)


def rms_norm_of_many_rows(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As a batch norm whose channels are the rows: a mean of 0, for variance the mean square, in float32.

    That is one pass over the rows instead of a few that write float32 in between. Like transformers' own norms, it
    rounds before and after the weight.
    """
    rows = hidden_states.reshape(1, -1, weight.shape[0])
    mean_square = torch.linalg.vector_norm(rows[0], dim=-1, dtype=torch.float32).square_().div_(weight.shape[0])
    zeros = torch.zeros_like(mean_square)
    normed = torch.batch_norm(rows, None, None, zeros, mean_square, False, 0.0, eps, False)
    return normed.mul_(weight).view(hidden_states.shape)


# Rotary positions ----------------------------------------------------------------------------------------------------


def is_turned_in_place(x: torch.Tensor) -> bool:
    """Whether rotary positions take less time where they write their products in place.

    Always in float32, where it saves a quarter to a half; in bfloat16 only what fits a core's cache. Graphs must not
    depend on sizes.
    """
    if x.dtype is torch.float32 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x.dtype is torch.float32
    return x.numel() < 2**20
