"""Writes GGUF, the format of llama.cpp and Ollama, tensor by tensor, through the same operations as the other exports.

What is written must first be expressible by a native family (so the shape is one that llama.cpp was made for), and
then be what llama.cpp computes for it (`gguf_shapes`). Weights keep their dtype; norms and biases become float32, as
llama.cpp asks for; that changes no value.
"""

import importlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...families.operations import RENAME
from ...families.registry import family_named
from ...model.configuration_groupformer import GroupFormerConfig
from ...model.modeling_groupformer import GroupFormerForCausalLM, GroupFormerRotaryEmbedding
from ..checkpoint import Entry, open_checkpoint
from ..configs import write_config
from ..counts import without_counts
from ..folders import class_name_of, local_folder, read_json
from ..shards import Progress, ignore_progress
from ..weights import Group, check_all_covered, check_tensors, expand, make_group, shapes_of
from .shapes import Architecture, exact_architecture, rope_metadata
from .tokenizer import tokenizer_metadata


TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def export_gguf(
    source: str | Path,
    target: str | Path,
    *,
    family: str | None = None,
    overwrite: bool = False,
    tokenizer: bool = True,
    progress: Progress = ignore_progress,
) -> str:
    """A GroupFormer folder (or Hub id) as one GGUF file for llama.cpp.

    Args:
        source: Folder or Hub id of a causal GroupFormer.
        target: File to write; it appears when it is whole.
        family: Native family to write it as. Default: the one that the model was imported from.
        overwrite: Whether to replace an existing file.
        tokenizer: Whether to write the tokenizer too. It must be one whose splitting llama.cpp knows.
        progress: Called with (1, 1, bytes just read, bytes in all).

    Returns:
        The name of llama.cpp's architecture.

    Raises:
        ValueError: what llama.cpp would not compute exactly, by field and value; broken files, by name.
    """
    gguf = import_gguf()
    folder, target = local_folder(str(source)), Path(target).expanduser()
    if target.is_dir() or (target.exists() and not overwrite):
        raise ValueError(f"the target ({target}) exists; choose another file, or pass --overwrite to replace a file")
    if read_json(folder / "config.json").get("model_type") != GroupFormerConfig.model_type:
        raise ValueError(f"{folder} is not a GroupFormer; import it first")
    config = GroupFormerConfig.from_pretrained(folder)
    architecture = plan_gguf(config, class_name_of(config), family)
    metadata = metadata_of(config, architecture)
    metadata |= tokenizer_metadata(folder, config) if tokenizer else {"tokenizer.ggml.model": "none"}
    checkpoint = open_checkpoint(folder)
    shapes = shapes_of(GroupFormerForCausalLM, config)
    check_tensors({name: entry.shape for name, entry in checkpoint.entries.items()}, shapes, checkpoint.where)
    groups = build_groups(config, architecture, shapes)
    with file_written_aside(target) as path:
        writer = gguf.GGUFWriter(path, architecture.name)
        for key, value in metadata.items():
            add_metadata(gguf, writer, key, value)
        write_tensors(gguf, writer, config, groups, checkpoint, progress)
        writer.close()
    return architecture.name


def import_gguf() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError("writing GGUF needs the gguf package: pip install 'groupformer[serving]'") from error


@contextmanager
def file_written_aside(target: Path) -> Iterator[Path]:
    """A path beside the target that takes its name when all went well, and disappears when not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield aside
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def plan_gguf(config: GroupFormerConfig, class_name: str | None, family_name: str | None) -> Architecture:
    """The architecture for a model, through the native family that expresses it."""
    if class_name not in (None, "GroupFormerForCausalLM"):
        raise ValueError(f"architectures ({class_name!r}) is no causal language model; llama.cpp runs only those")
    if family_name is None and config.family is None:
        raise ValueError("this model was not imported, so family (None) is needed, e.g. --family llama")
    family = family_named(family_name or config.family)
    # Refuses what the family cannot express; llama.cpp has an architecture for a Llama with counts by layer.
    write_config(without_counts(config) if family.model_type == "llama" else config, family)
    return exact_architecture(config, family.model_type)


# Metadata ------------------------------------------------------------------------------------------------------------


def metadata_of(config: GroupFormerConfig, architecture: Architecture) -> dict[str, Any]:
    """All keys but the tokenizer's."""
    layer = list(config.per_layer_config)[0]
    epsilon = "layer_norm_rms_epsilon" if config.norm_type == "rms_norm" else "layer_norm_epsilon"
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": layer.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": layer.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{epsilon}": float(config.norm_eps),
        **rope_metadata(config),
        **architecture.metadata(config),
    }
    return {f"{architecture.name}.{key}": value for key, value in numbers.items()}


def add_metadata(gguf: ModuleType, writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    writer.add_key_value(key, value, getattr(gguf.GGUFValueType, kinds[type(value)]))


def rope_factors(config: GroupFormerConfig) -> torch.Tensor | None:
    """What each RoPE frequency is divided by, where that is not one number for all (Llama 3)."""
    if (config.rope_parameters or {}).get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain, _ = GroupFormerRotaryEmbedding.compute_default_rope_parameters(config)
    return plain / scaled


# Tensors -------------------------------------------------------------------------------------------------------------


def build_groups(config: GroupFormerConfig, architecture: Architecture, shapes: dict) -> list[Group]:
    """Which of our tensors become which of the file's; all of ours are used."""
    groups = []
    rows = [
        (stem, [f"model.{name}" for name in row.stems], row.operation)
        for stem, row in expand(architecture.weights, config.num_hidden_layers)
    ]
    for stem, ours, operation in [*rows, ("output", ["lm_head"], RENAME)]:
        for suffix in (".weight", ".bias"):
            names = tuple(name + suffix for name in ours)
            if all(name in shapes for name in names):
                groups.append(make_group((stem + suffix,), names, operation, config, shapes))
    check_all_covered(shapes, (name for group in groups for name in group.ours), "llama.cpp's " + architecture.name)
    return groups


def stored_dtype(entry: Entry, shape: tuple[int, ...]) -> torch.dtype:
    """Norms and biases are float32 in the file; weights stay as they are."""
    return torch.float32 if len(shape) == 1 else entry.dtype


def write_tensors(gguf: ModuleType, writer: Any, config: GroupFormerConfig, groups, checkpoint, progress) -> None:
    """Announces all tensors, then writes them one after the other."""
    factors = rope_factors(config)
    if factors is not None:
        announce(gguf, writer, "rope_freqs.weight", tuple(factors.shape), torch.float32)
    for group in groups:
        entries = [checkpoint.entries[name] for name in group.ours]
        shape = (sum(entry.shape[0] for entry in entries), *entries[0].shape[1:])
        announce(gguf, writer, group.native[0], shape, stored_dtype(entries[0], shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(entry.size for entry in checkpoint.entries.values())
    if factors is not None:
        writer.write_tensor_data(as_array(factors))
    for group in groups:
        (tensor,) = group.to_native([checkpoint.read(name) for name in group.ours])
        dtype = stored_dtype(checkpoint.entries[group.ours[0]], tuple(tensor.shape))
        writer.write_tensor_data(as_array(tensor.to(dtype)))
        progress(1, 1, sum(checkpoint.entries[name].size for name in group.ours), total)


def announce(gguf: ModuleType, writer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype not in TYPES:
        raise ValueError(f"{name} has dtype {dtype}; GGUF holds {', '.join(TYPES.values())}")
    array = as_array(torch.empty(0, dtype=dtype))
    kind = getattr(gguf.GGMLQuantizationType, TYPES[dtype])
    size = torch.Size(shape).numel() * dtype.itemsize
    if dtype == torch.bfloat16:  # numpy has none: the writer takes its bytes, and their shape
        shape = (*shape[:-1], shape[-1] * dtype.itemsize)
    writer.add_tensor_info(name, shape, array.dtype, size, raw_dtype=kind if dtype == torch.bfloat16 else None)


def as_array(tensor: torch.Tensor):
    """A tensor as numpy knows it; bfloat16 as bytes."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()
