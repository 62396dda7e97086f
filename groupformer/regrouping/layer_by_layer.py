"""Run a decoder layer by layer: load one layer, run all rows through it, record its attention's outputs, unload it."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .calibration import embed, load, unload
from .layouts import AttentionLayout
from .probing import build_on_meta
from .sources import Source


Streams = list[torch.Tensor]
State = dict[str, torch.Tensor]  # the attention's parameters, by their names inside it


@dataclass
class Call:
    """Arguments of one call of a module."""

    args: tuple
    kwargs: dict[str, Any]


@dataclass
class Attended:
    """An attention's output (B, T, E), and what the layer adds of it to the residual stream, both in float32."""

    raw: torch.Tensor
    added: torch.Tensor


class AttentionCalledError(Exception):
    """Ends a layer's forward pass once its attention has been called."""


class Layer:
    """A decoder layer in float32, its attention, and the arguments that it takes beside the hidden states."""

    def __init__(self, module: nn.Module, attention: nn.Module, layer_idx: int, others: Call, multiplier: float):
        self.module, self.attention, self.layer_idx, self.others = module, attention, layer_idx, others
        self.multiplier = multiplier
        self.after: list[nn.Module] = []

    @property
    def has_norm_after(self) -> bool:
        return bool(self.after)

    def state(self) -> State:
        return {name: parameter.detach().clone() for name, parameter in self.attention.named_parameters()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        for name, parameter in self.attention.named_parameters():
            parameter.copy_(state[name])

    def _call(self, states: torch.Tensor) -> torch.Tensor:
        device = next(self.module.parameters()).device
        outputs = self.module(states.to(device), *self.others.args, **self.others.kwargs)
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]

    @torch.no_grad()
    def run(self, streams: Streams) -> tuple[Streams, list[Attended]]:
        """The residual stream after the layer, and what its attention gave, for each batch."""
        following, attended = [], []
        for states in streams:
            with self._watched() as watched:
                following.append(self._call(states).float().to(states.device))
            self.after = watched["after"]
            raw, added = watched["raw"].float(), self.scale(watched["added"].float())
            attended.append(Attended(raw.to(states.device), added.to(states.device)))
        return following, attended

    def scale(self, added: torch.Tensor) -> torch.Tensor:
        """What the layer adds to the residual stream: without a multiplier the tensor itself, to save memory."""
        return added if self.multiplier == 1.0 else added * self.multiplier

    @contextmanager
    def _watched(self) -> Iterator[dict[str, Any]]:
        """Sees the attention's output, and the layer's norms that read nothing but it (OLMo 2, Gemma 2)."""
        seen: dict[str, Any] = {"after": []}

        def see_attention(module: nn.Module, args: Any, output: Any) -> None:
            seen["raw"] = seen["added"] = output if isinstance(output, torch.Tensor) else output[0]

        def see_child(module: nn.Module, args: Any, output: Any) -> None:
            if "added" not in seen or not (args and is_same(args[0], seen["added"])):
                return
            if isinstance(output, torch.Tensor) and not is_same(output, args[0]):
                seen["added"] = output
                seen["after"].append(module)

        hooks = [self.attention.register_forward_hook(see_attention)]
        others = (child for child in self.module.children() if child is not self.attention)
        hooks += [child.register_forward_hook(see_child) for child in others]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def calls(self, streams: Streams) -> list[Call]:
        """The arguments with which the layer calls its attention, for each batch."""
        calls: list[Call] = []

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.append(Call(args, kwargs))
            raise AttentionCalledError

        hook = self.attention.register_forward_pre_hook(see, with_kwargs=True)
        try:
            for states in streams:
                with contextlib.suppress(AttentionCalledError):
                    self._call(states)
        finally:
            hook.remove()
        return calls

    def attend(self, call: Call) -> Attended:
        """What the attention gives for a call."""
        output = self.attention(*call.args, **call.kwargs)
        raw = output if isinstance(output, torch.Tensor) else output[0]
        added = raw
        for module in self.after:
            added = module(added)
        return Attended(raw.float(), self.scale(added.float()))

    @torch.no_grad()
    def output_projection(self, call: Call) -> nn.Module | None:
        """The linear layer whose output is the attention's, unless it is wrapped or quantized."""
        outputs: list[tuple[nn.Module, int]] = []
        linears = [module for module in self.attention.modules() if type(module) in (nn.Linear, Conv1D)]
        hooks = [
            linear.register_forward_hook(lambda module, args, output: outputs.append((module, output.data_ptr())))
            for linear in linears
        ]
        try:
            output = self.attention(*call.args, **call.kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        raw = output if isinstance(output, torch.Tensor) else output[0]
        return next((module for module, place in reversed(outputs) if place == raw.data_ptr()), None)


class DecoderLayers:
    """A model's decoder layers, of which one at a time has its weights in memory."""

    def __init__(self, source: Source, layouts: Sequence[AttentionLayout], device: str):
        self.source, self.layouts, self.device = source, layouts, device
        self.model = build_on_meta(source.model_class, source.config, attention=None)
        self.multiplier = float(getattr(source.config.get_text_config(), "residual_multiplier", None) or 1.0)
        self.calls: list[Call] = []

    def embed(self, batches: list[torch.Tensor]) -> Streams:
        """What enters the first layer, for each batch of token ids; what else enters each layer is kept in `calls`."""
        paths = [layout.layer_path for layout in self.layouts]
        rows, calls = embed(self.source, self.model, paths, torch.cat(batches), self.device, torch.float32)
        self.calls = [Call(args, kwargs) for args, kwargs in calls]
        return [batch.cpu() for batch in torch.cat(rows).split(len(batches[0]))]

    @contextmanager
    def layer(self, layer_idx: int) -> Iterator[Layer]:
        """A layer with its weights, in float32 and apart from the source's."""
        layout = self.layouts[layer_idx]
        module, attention = (self.model.get_submodule(path) for path in (layout.layer_path, layout.path))
        load(self.source, self.model, layout.layer_path, self.device, torch.float32)
        for child in attention.modules():
            for name, parameter in child._parameters.items():
                child._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().clone())
        try:
            yield Layer(module, attention, layer_idx, self.calls[layer_idx], self.multiplier)
        finally:
            unload(module)


def is_same(value: Any, tensor: torch.Tensor) -> bool:
    """Whether a value is a tensor in the same place."""
    return isinstance(value, torch.Tensor) and value.data_ptr() == tensor.data_ptr()
