"""The attention of any decoder of transformers, native or ours: found, proved, taken apart into heads, put together.

Nothing is known about model types. Projections and norms are found among an attention module's children; how a fused
projection is ordered and which features RoPE rotates together is tried, and a proof decides before any work is done.
The module itself is the reference. With random weights, on random inputs,

1. its cache must hold as many keys and values of as many features as the layout says, and the values that the
   extracted heads give (so a clamp, a norm on values and another order of a fused projection are noticed);
2. its output must not change when the extracted heads are mapped and put back: values by any linear map that the
   output projection undoes, keys by any map that commutes with the layer's positions and that the queries undo, heads
   with their queries into another order. These are the freedoms that merging uses, so what passes can be merged,
   whatever else the scores go through: scalings, soft caps, windows, sinks, biases by position.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .heads import AttentionHeads, Geometry, join_rotary, split_rotary
from .layouts import ROLES, AttentionLayout
from .probing import AttentionCall, attention_calls, build_on_meta


TOLERANCE = 1e-5  # of the largest output, in float32
# Classes that mix tokens without keys and values.
OTHER_MIXERS = "Mamba|Mixer|Recurrent|DeltaNet|ShortConv|LinearAttention|LightningAttention|Rwkv"
LARGE = 1000.0  # factor of inputs at which a clamp shows


# Finding -------------------------------------------------------------------------------------------------------------


def find_attention(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> list[AttentionLayout]:
    """The layout of each layer's attention, proved on random weights.

    Raises:
        ValueError: attention that has no key-value heads, or that is not understood; the message names the layer and
            what differs.
    """
    name = model_class.__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder and a decoder; only decoders can be regrouped")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name} is quantized (quantization_config); regroup before quantizing")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{name}: layers share keys and values (num_kv_shared_layers is {config.num_kv_shared_layers})"
        )
    with refusing_failures(name):
        model = build_on_meta(model_class, config)
    paths = [(layer_path, attention_path(name, layer_path, layer)) for layer_path, layer in decoder_layers(model)]
    with refusing_failures(name):
        calls = attention_calls(model, paths)
    if len(calls) < len(paths):
        raise ValueError(
            f"{name} does not call the attention of each layer once; only plain decoders can be regrouped"
        )
    proved: dict[tuple, AttentionLayout] = {}
    layouts = []
    for call in calls:
        kind = kind_of_attention(call)
        if kind not in proved:
            with refusing_failures(name):
                proved[kind] = Proof(name, call, getattr(config, "initializer_range", 0.02) or 0.02).layout()
        layouts.append(replace(proved[kind], path=call.path, layer_path=call.layer_path, norm_path=call.norm_path))
    return layouts


@contextmanager
def refusing_failures(model_name: str) -> Iterator[None]:
    """Turns what a model's own code raises, on inputs that a plain decoder takes, into a refusal."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{model_name} cannot be regrouped: it fails on a probe ({type(error).__name__}: {reason}); "
            "only plain decoders, whose layers call one attention each, can be"
        ) from error


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Names and modules of the decoder's layers.

    Raises:
        ValueError: there is no list of `num_hidden_layers` modules.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{path}.{layer_idx}", layer) for layer_idx, layer in enumerate(module)]
    raise ValueError(f"{type(model).__name__} has no list of {count} layers; only plain decoders can be regrouped")


def attention_path(model_name: str, layer_path: str, layer: nn.Module) -> str:
    """Name of a layer's only attention module.

    Raises:
        ValueError: there is none, more than one, or one without a projection to each of queries, keys and values.
    """
    where = f"{model_name}: {layer_path} ({type(layer).__name__})"
    others = [type(module).__name__ for module in layer.modules() if re.search(OTHER_MIXERS, type(module).__name__)]
    if others:
        raise ValueError(
            f"{where} mixes tokens by {others[-1]}; state spaces, linear attention and their hybrids with attention "
            "cannot be regrouped"
        )
    candidates = {path: module for path, module in layer.named_modules() if path and is_attention(module)}
    found = [path for path, module in candidates.items() if not missing_roles(roles_of(module))]
    if len(found) == 1:
        return f"{layer_path}.{found[0]}"
    if found:
        raise ValueError(f"{where} has several attention modules ({', '.join(found)}); only decoders can be regrouped")
    if not candidates:
        raise ValueError(f"{where} has no softmax attention among {', '.join(dict(layer.named_children()))}")
    path, module = next(iter(candidates.items()))
    children = ", ".join(dict(module.named_children()))
    latent = any(re.search(r"kv_a|kv_b|q_a|latent", child) for child, _ in module.named_children())
    reason = "latent attention (MLA) has no key-value heads to merge" if latent else "its layout is unknown"
    lacking = " or ".join(missing_roles(roles_of(module)))
    raise ValueError(f"{where}: {path} ({type(module).__name__}) has no {lacking} among {children}; {reason}")


def is_attention(module: nn.Module) -> bool:
    """Whether a module calls itself attention; state-space mixers also have projections named so."""
    return re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None


def roles_of(module: nn.Module) -> dict[str, str]:
    """Role to the name of the child that plays it."""
    names = [name for name, _ in module.named_children()]
    found = {role: [name for name in names if re.fullmatch(pattern, name)] for role, pattern in ROLES.items()}
    return {role: matches[0] for role, matches in found.items() if matches}


def missing_roles(roles: Mapping[str, str]) -> list[str]:
    """Projections that attention needs and `roles` lacks."""
    needed = ["output"] if "fused" in roles else ["query", "key", "value", "output"]
    return [f"{role} projection" for role in needed if role not in roles]


def kind_of_attention(call: AttentionCall) -> tuple:
    """What distinguishes kinds of attention layers: the class, shapes, scalars, and what they are given."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in call.module.state_dict().items())
    simple = (bool, int, float, str, type(None))
    scalars = tuple((name, value) for name, value in vars(call.module).items() if isinstance(value, simple))
    given = tuple((name, value is None) for name, value in call.kwargs.items())
    return type(call.module), shapes, tuple(pair for pair in scalars if pair[0] != "layer_idx"), given


# Proving -------------------------------------------------------------------------------------------------------------


class Proof:
    """Finds the layout of one attention module by trying it, on random weights and inputs.

    Args:
        model_name: The model's class, for errors.
        call: What the module receives.
        initializer_range: Of the model's config.
    """

    def __init__(self, model_name: str, call: AttentionCall, initializer_range: float):
        self.model_name, self.call, self.initializer_range = model_name, call, initializer_range
        self.generator = torch.Generator().manual_seed(0)
        self.roles = roles_of(call.module)
        self.inputs = torch.randn(call.inputs.shape, generator=self.generator)
        self.tensors = {
            name: self.random_weights(name, parameter) for name, parameter in call.module.named_parameters()
        }

    def random_weights(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """Weights that give features of unit variance; norms around 1; biases and others that matter."""
        noise = torch.randn(parameter.shape, generator=self.generator)
        child, _, part = name.partition(".")
        if child in (self.roles.get("query_norm"), self.roles.get("key_norm")):
            return 0.3 * noise + part.endswith("weight")
        if parameter.ndim == 2 and part:
            return noise / self.inputs.shape[-1] ** 0.5
        return 0.3 * noise

    @torch.no_grad()
    def layout(self) -> AttentionLayout:
        """The layout that the module's own output proves.

        Raises:
            ValueError: no layout does; the message says what differs.
        """
        keys, values = self.cached(self.inputs)
        if keys.shape != values.shape:
            self.refuse(f"its cache holds keys of shape {tuple(keys.shape)}, but values of {tuple(values.shape)}")
        layout = self.layout_of_values(values)
        if self.change(layout, map_values, self.inputs) > TOLERANCE:
            self.refuse("something between its values and its output projection (a gate, a norm) keeps heads apart")
        layout = self.layout_of_positions(layout)
        if "key_norm" in self.roles:
            layout = self.layout_of_norms(layout)
        can_move = self.change(layout, reverse_heads, self.inputs) <= TOLERANCE
        return replace(layout, can_move=can_move)

    def cached(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values (1, groups, seq, head_dim) that the module keeps."""
        _, cache = self.call(inputs, self.tensors)
        layers: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        layers = [layer for layer in layers if layer.keys.numel()]
        if not layers:
            self.refuse("it keeps no keys and values in the cache")
        return layers[-1].keys, layers[-1].values

    def layout_of_values(self, values: torch.Tensor) -> AttentionLayout:
        """The order of the projections that gives the cached values, for small and for large inputs."""
        # Falcon repeats its key-value heads before it caches them.
        repeats = 1 + int((values[:, 1:] == values[:, :-1]).all(dim=(0, 2, 3)).sum())
        groups, head_dim = 1 + values.shape[1] - repeats, values.shape[3]
        first = slice(None, None, values.shape[1] // groups)
        values, large_values = values[:, first], self.cached(LARGE * self.inputs)[1][:, first]
        for order in ("stacked", "grouped") if "fused" in self.roles else ("separate",):
            layout = self.layout_of_shapes(order, groups, head_dim)
            if layout is None:
                continue
            small, large = (layout.read_heads(self.tensors).values_of(x) for x in (self.inputs, LARGE * self.inputs))
            if relative_change(small, values) <= TOLERANCE and relative_change(large, large_values) <= TOLERANCE:
                return layout
        self.refuse(
            f"the {groups} value heads of {head_dim} features in its cache are not those of its projections "
            "(a clamp such as clip_qkv, a norm on values, or an unknown order)"
        )

    def layout_of_shapes(self, order: str, groups: int, head_dim: int) -> AttentionLayout | None:
        """A layout whose shapes are the module's; None where they cannot be."""
        module, roles = self.call.module, self.roles
        is_transposed = type(module.get_submodule(roles["output"])).__name__ == "Conv1D"
        first = self.tensors[f"{roles['query' if order == 'separate' else 'fused']}.weight"]
        rows, remainder = divmod(first.shape[1 if is_transposed else 0], head_dim)
        heads = rows if order == "separate" else rows - 2 * groups
        if remainder or heads < 1 or heads % groups:
            return None
        projections = [roles[role] for role in ("query", "key", "value", "fused") if role in roles]
        norm_size = sum(
            tensor.numel()
            for name, tensor in self.tensors.items()
            if name.startswith(f"{roles.get('query_norm')}.") and name.endswith("weight")
        )
        geometry = Geometry(
            num_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            rotary_dim=0,
            qk_norm=None,
            has_norm_by_head=norm_size > head_dim,
            sign_is_free=True,
            initializer_range=self.initializer_range,
        )
        return AttentionLayout(
            path=self.call.path,
            layer_path=self.call.layer_path,
            norm_path=self.call.norm_path,
            names=roles,
            geometry=geometry,
            order=order,
            is_transposed=is_transposed,
            is_interleaved=False,
            has_bias=any(f"{name}.bias" in self.tensors for name in projections),
            per_head=tuple(name for name, tensor in self.tensors.items() if "." not in name and len(tensor) == heads),
            can_move=True,
        )

    def layout_of_positions(self, layout: AttentionLayout) -> AttentionLayout:
        """The layout with the rotary features under which keys may be mapped, norms on queries and keys left out."""
        smallest = float("inf")
        with self.without_norms():
            for rotary_dim, is_interleaved in self.rotations(layout.geometry.head_dim):
                geometry = replace(layout.geometry, rotary_dim=rotary_dim)
                candidate = replace(layout, geometry=geometry, is_interleaved=is_interleaved)
                change = self.change(candidate, map_keys, self.inputs)
                if change <= TOLERANCE:
                    return candidate
                smallest = min(smallest, change)
        self.refuse(
            f"its output changes by {smallest:.1g} of itself when keys are mapped and queries undo it; "
            "its keys are rotated, normed or used in a way that is not known"
        )

    def rotations(self, head_dim: int) -> Iterator[tuple[int, bool]]:
        """Candidates (rotary_dim, whether neighbours are pairs), those with the most freedom first."""
        yield 0, False
        embeddings = self.call.kwargs.get("position_embeddings")
        sizes = {2 * embeddings[0].shape[-1], embeddings[0].shape[-1]} if isinstance(embeddings, tuple) else set()
        sizes |= {value for name, value in vars(self.call.module).items() if re.match("rotary_(dim|ndims)", name)}
        for size in sorted(size for size in {*sizes, head_dim} if size and size <= head_dim and size % 2 == 0):
            yield size, False
            yield size, True

    def layout_of_norms(self, layout: AttentionLayout) -> AttentionLayout:
        """The layout with what norms on queries and keys leave free."""
        inputs = 10 * self.inputs  # beside which the norms' epsilon vanishes
        is_by_head = self.change(layout, scale_first_key, inputs) <= TOLERANCE
        geometry = replace(
            layout.geometry,
            qk_norm="head" if is_by_head else "projection",
            sign_is_free=self.change(layout, flip_first_key, inputs) <= TOLERANCE,
        )
        return replace(layout, geometry=geometry)

    def change(
        self, layout: AttentionLayout, mapped: Callable[[AttentionHeads], AttentionHeads], inputs: torch.Tensor
    ) -> float:
        """How much the module's output changes when its heads are mapped."""
        tensors = layout.write_heads(mapped(layout.read_heads(self.tensors)), self.tensors)
        return relative_change(self.call(inputs, tensors)[0], self.call(inputs, self.tensors)[0])

    @contextmanager
    def without_norms(self) -> Iterator[None]:
        norms = [self.call.module.get_submodule(self.roles[r]) for r in ("query_norm", "key_norm") if r in self.roles]
        for norm in norms:
            norm.forward = lambda states, *args, **kwargs: states
        yield
        for norm in norms:
            del norm.forward

    def refuse(self, reason: str) -> NoReturn:
        where = f"{self.model_name}: {self.call.path} ({type(self.call.module).__name__})"
        raise ValueError(f"{where} cannot be regrouped: {reason}")


def relative_change(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


# Maps that leave a layer's function as it is -------------------------------------------------------------------------


def orthogonal(count: int, size: int) -> torch.Tensor:
    """Random orthogonal matrices (count, size, size)."""
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64)).Q


def map_values(heads: AttentionHeads) -> AttentionHeads:
    """Values under an orthogonal map for each key-value head, which the output projection undoes."""
    maps = orthogonal(*heads.value.shape[:2])
    undo = maps.mT.repeat_interleave(heads.queries_per_key, dim=0)
    return replace(heads, value=maps @ heads.value, output=heads.output @ undo)


def map_keys(heads: AttentionHeads) -> AttentionHeads:
    """Keys under a map that commutes with RoPE, and queries that undo it."""
    rotary_dim, groups = heads.geometry.rotary_dim, len(heads.key)
    keys, queries = (split_rotary(rows, rotary_dim) for rows in (heads.key, heads.query))
    generator = torch.Generator().manual_seed(2)
    for index, block in enumerate(keys):
        sizes = 0.7 + torch.rand(len(block), groups, 1, 1, generator=generator, dtype=torch.float64)
        if block.is_complex():
            angles = 6 * torch.rand(sizes.shape, generator=generator, dtype=torch.float64)
            maps, undo = torch.polar(sizes, angles), torch.polar(1 / sizes, angles)
        else:
            maps = sizes * orthogonal(groups, block.shape[2])
            undo = maps / sizes**2
        undo = undo.repeat_interleave(heads.queries_per_key, dim=1)
        keys[index], queries[index] = (
            (maps * block, undo * queries[index]) if block.is_complex() else (maps @ block, undo @ queries[index])
        )
    return replace(heads, key=join_rotary(keys), query=join_rotary(queries))


def reverse_heads(heads: AttentionHeads) -> AttentionHeads:
    """Key-value heads in reverse order, with their queries."""
    return heads.permuted(range(len(heads.key))[::-1])


def flip_first_key(heads: AttentionHeads) -> AttentionHeads:
    """The first key and its queries with the other sign."""
    key, query = heads.key.clone(), heads.query.clone()
    key[0], query[: heads.queries_per_key] = -key[0], -query[: heads.queries_per_key]
    return replace(heads, key=key, query=query)


def scale_first_key(heads: AttentionHeads) -> AttentionHeads:
    """The first key twice as large, which only a norm over each head forgets."""
    key = heads.key.clone()
    key[0] *= 2
    return replace(heads, key=key)
