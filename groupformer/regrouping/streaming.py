"""Regrouping from folder to folder: one layer in memory at a time, whatever the checkpoint's size.

First, where there is calibration, its tokens pass through the model once, each layer read when they reach it and
forgotten when they left; the measured moments wait in files. Then, with "auto", each layer's losses are computed. At
last all tensors pass from the old folder to the new one, attention layers regrouped on their way. The result appears
whole or not at all.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from ..conversion.checkpoint import Entry, open_checkpoint
from ..conversion.folders import (
    class_name_of,
    copy_companions,
    local_folder,
    read_json,
    refuse_target,
    write_tokenizer_code,
    written_aside,
)
from ..conversion.shards import (
    MAX_SHARD_BYTES,
    Progress,
    bytes_of,
    header_of,
    ignore_progress,
    shard_names,
    write_index,
)
from ..conversion.weights import KINDS, kind_of, refuse_other_tensors, shapes_of
from ..model.configuration_groupformer import GroupFormerConfig
from . import check_finite
from .moments import Moment, adder, check_calibration, moment_from_norm
from .request import Request, regrouped_config


# Gives token ids (batch, seq) for a model folder and its config, e.g. by reading a text with the folder's tokenizer.
Calibration = Callable[[Path, GroupFormerConfig], torch.Tensor]


def regroup_folder(
    source: str | Path,
    target: str | Path,
    num_key_value_heads: int | str | Mapping[int, int],
    *,
    method: str = "svd",
    grouping: str = "adjacent",
    calibration: torch.Tensor | Calibration | None = None,
    budget: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> GroupFormerConfig:
    """A GroupFormer folder (or Hub id) to one with fewer key-value heads; see `groupformer.regroup`.

    Args:
        source: Folder or Hub id; safetensors, sharded or not, or legacy `.bin`.
        target: Folder to write. Must not exist, unless `overwrite`. Tokenizer and generation config travel along.
        calibration: Token ids, or a function that gives them once the source has been found and checked.
        overwrite: Whether to replace an existing target, once the new one is whole.
        max_shard_bytes: Largest shard to write, in bytes; a larger tensor gets a shard of its own.
        progress: Called with (shard, shards, bytes just written, bytes in all).

    Returns:
        The new config.

    Raises:
        ValueError: as `groupformer.regroup`, or a broken folder, by name. Nothing is written then.
    """
    folder, target_folder = local_folder(str(source)), Path(target).expanduser()
    refuse_target(folder, target_folder, overwrite)
    checkpoint = FolderModel(folder)
    request = Request.checked(checkpoint.config, num_key_value_heads, method, grouping, budget, seed)
    token_ids = calibration(folder, checkpoint.config) if callable(calibration) else calibration
    if token_ids is not None:
        check_calibration(token_ids, checkpoint.config)
    with written_aside(target_folder) as aside, tempfile.TemporaryDirectory(dir=aside) as scratch:
        if token_ids is not None:
            checkpoint.measure_moments(token_ids, Path(scratch))
        counts = request.counts
        if counts is None:
            layers = range(checkpoint.config.num_hidden_layers)
            counts = request.counts_for([layer_losses(checkpoint, request, layer_idx) for layer_idx in layers])
        config = regrouped_config(checkpoint.config, counts)
        config.architectures = [checkpoint.model_class.__name__]
        write_weights(checkpoint, request, counts, config, aside, max_shard_bytes, progress)
        config.save_pretrained(aside)
        with torch.device("meta"):
            custom_object_save(checkpoint.model_class(config), str(aside))
        copy_companions(folder, aside)
        write_tokenizer_code(aside)
    return config


def layer_losses(checkpoint: "FolderModel", request: Request, layer_idx: int) -> dict[int, float]:
    """The loss of each count of one layer."""
    tensors = checkpoint.attention(layer_idx)
    return request.losses(request.problem(layer_idx, tensors, checkpoint.moment(layer_idx)))


class FolderModel:
    """A GroupFormer folder whose tensors are read when they are needed, and checked to be finite."""

    def __init__(self, folder: Path):
        content = read_json(folder / "config.json")
        if content.get("model_type") != GroupFormerConfig.model_type:
            raise ValueError(f"{folder} is a {content.get('model_type')!r}, not a GroupFormer; import it first")
        self.folder = folder
        self.config = GroupFormerConfig.from_pretrained(folder)
        self.kind = kind_of(class_name_of(self.config))
        self.model_class: type[PreTrainedModel] = KINDS[self.kind][0]
        self.prefix = "" if self.kind == "Model" else "model."
        self.source = open_checkpoint(folder)
        expected = shapes_of(self.model_class, self.config)
        found = {name: entry.shape for name, entry in self.source.entries.items() if not self._is_tied_copy(name)}
        refuse_other_tensors(found, expected, str(folder))
        self.names = list(expected)  # in the model's order: a layer's tensors follow each other
        self.moments: list[Path] = []

    def _is_tied_copy(self, name: str) -> bool:
        return self.config.tie_word_embeddings and name == "lm_head.weight"

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the folder.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        tensor = self.source.read(name)
        check_finite(name, tensor, self.source.where)
        return tensor

    def module(self, stem: str) -> dict[str, torch.Tensor]:
        """All tensors of a module, by their names inside it."""
        return {name[len(stem) :]: self.read(name) for name in self.names if name.startswith(stem)}

    def attention_stem(self, layer_idx: int) -> str:
        return f"{self.prefix}layers.{layer_idx}.self_attn."

    def attention(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """The attention tensors of a layer."""
        return self.module(self.attention_stem(layer_idx))

    def moment(self, layer_idx: int) -> Moment:
        """The moment of a layer's attention inputs: measured, or else from the norm before it."""
        if self.moments:
            return Moment(**torch.load(self.moments[layer_idx], weights_only=True))
        norm = self.module(f"{self.prefix}layers.{layer_idx}.input_layernorm.")
        return moment_from_norm(self.config, norm)

    @torch.no_grad()
    def measure_moments(self, token_ids: torch.Tensor, scratch: Path) -> None:
        """Measures all layers on token ids (batch, seq) in float32, and keeps their moments in files of `scratch`."""
        with torch.device("meta"):
            skeleton: Any = KINDS["Model"][0](self.config)
        for name, child in list(skeleton.named_children()):
            if name.startswith("embed_") or name == "norm":
                setattr(skeleton, name, Streamed(self, child, f"{self.prefix}{name}."))
        if skeleton.rotary_emb is not None:
            skeleton.rotary_emb = type(skeleton.rotary_emb)(self.config)  # its tables are computed, not read
        paths = [scratch / f"moment-{layer_idx}.pt" for layer_idx in range(self.config.num_hidden_layers)]
        for layer_idx, path in enumerate(paths):
            stem = f"{self.prefix}layers.{layer_idx}."
            skeleton.layers[layer_idx] = StreamedLayer(self, skeleton.layers[layer_idx], stem, path)
        skeleton.eval()(token_ids, use_cache=False)
        self.moments = paths


class Streamed(nn.Module):
    """A module on the meta device whose weights are read for each call, and forgotten after it."""

    def __init__(self, checkpoint: FolderModel, module: nn.Module, stem: str):
        super().__init__()
        self.checkpoint, self.module, self.stem = checkpoint, module, stem

    def forward(self, *args, **kwargs):
        weights = {name: tensor.float() for name, tensor in self.checkpoint.module(self.stem).items()}
        return torch.func.functional_call(self.module, weights, args, kwargs)


class StreamedLayer(Streamed):
    """A decoder layer that takes rows one by one and writes the moment of its attention inputs to a file."""

    def __init__(self, checkpoint: FolderModel, module: nn.Module, stem: str, path: Path):
        super().__init__(checkpoint, module, stem)
        self.path = path

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        weights = {name: tensor.float() for name, tensor in self.checkpoint.module(self.stem).items()}
        moment = Moment.zeros(hidden_states.shape[-1])
        layer: Any = self.module
        hook = layer.self_attn.q_proj.register_forward_pre_hook(adder(moment))
        # In place of the old states: with one row at a time, memory does not grow with the number of rows.
        for index, row in enumerate(hidden_states.split(1)):
            several = attention_mask is not None and attention_mask.shape[0] > 1
            kwargs["attention_mask"] = attention_mask[index : index + 1] if several else attention_mask
            row.copy_(torch.func.functional_call(layer, weights, (row,), kwargs))
        hook.remove()
        torch.save(vars(moment), self.path)
        return hidden_states


# Writing -------------------------------------------------------------------------------------------------------------


def new_entries(checkpoint: FolderModel, config: GroupFormerConfig) -> dict[str, Entry]:
    """Names, dtypes and shapes of the new folder, in the old one's order."""
    shapes = shapes_of(checkpoint.model_class, config)
    return {name: Entry(checkpoint.source.entries[name].dtype, shapes[name]) for name in checkpoint.names}


def shards_of(entries: Mapping[str, Entry], max_bytes: int) -> list[dict[str, Entry]]:
    """Entries in their order, cut into shards; wider dtypes come first in each, so that all stay aligned."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if shards[-1] and sum(other.size for other in shards[-1].values()) + entry.size > max_bytes:
            shards.append({})
        shards[-1][name] = entry
    return [dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)) for shard in shards]


def write_weights(
    checkpoint: FolderModel,
    request: Request,
    counts: list[int],
    config: GroupFormerConfig,
    folder: Path,
    max_bytes: int,
    progress: Progress,
) -> None:
    shards = shards_of(new_entries(checkpoint, config), max_bytes)
    files = shard_names(len(shards))
    total = sum(entry.size for shard in shards for entry in shard.values())
    regrouped = RegroupedLayers(checkpoint, request, counts)
    for number, (name, shard) in enumerate(zip(files, shards), start=1):
        with open(folder / name, "wb") as file:
            file.write(header_of(shard))
            for tensor_name, entry in shard.items():
                file.write(bytes_of(regrouped.tensor(tensor_name)))
                progress(number, len(shards), entry.size, total)
    if len(shards) > 1:
        write_index(folder, dict(zip(files, shards)))


class RegroupedLayers:
    """The new folder's tensors by name; a layer is regrouped when its first tensor is asked for."""

    def __init__(self, checkpoint: FolderModel, request: Request, counts: list[int]):
        self.checkpoint, self.request = checkpoint, request
        layers = enumerate(zip(checkpoint.config.per_layer_config, counts))
        self.changed = {
            checkpoint.attention_stem(layer_idx): (layer_idx, count)
            for layer_idx, (layer, count) in layers
            if count != layer.num_key_value_heads
        }
        self.ready: dict[str, torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        stem, marker, _ = name.partition(".self_attn.")
        stem += marker
        if stem not in self.changed:
            return self.checkpoint.read(name)
        if name not in self.ready:
            layer_idx, count = self.changed[stem]
            tensors, moment = self.checkpoint.attention(layer_idx), self.checkpoint.moment(layer_idx)
            new = self.request.regroup_layer(layer_idx, count, tensors, moment)
            self.ready |= {stem + inner: tensor for inner, tensor in new.items()}
        return self.ready.pop(name)
