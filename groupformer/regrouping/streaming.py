"""Regrouping from folder to folder: one layer in memory at a time, whatever the checkpoint's size.

The steps are those in memory; measured moments wait in files. Tensors outside attention pass from file to file as they
are, and are only checked for NaN. The result appears whole or not at all.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..conversion.checkpoint import Entry
from ..conversion.convert import plan_import
from ..conversion.folders import (
    class_name_of,
    copy_companions,
    from_opened_folder,
    import_folder,
    read_json,
    read_native_config,
    write_tokenizer_code,
    written_aside,
)
from ..conversion.shards import MAX_SHARD_BYTES, Piece, Progress, ignore_progress, unchanged, write_shards
from ..families.registry import is_groupformer
from ..integrations.model_card import regrouped_card
from .expansion import expanded_tensors, plan_expansion
from .layouts import AttentionLayout
from .moments import check_calibration
from .probing import build_on_meta
from .processes import ALONE, Processes
from .result import Result
from .sources import FolderSource, check_finite
from .steps import (
    Plan,
    choose_counts,
    describe_result,
    find_moments,
    merge_layer,
    plan_regrouping,
    warn_that_class_changes,
)


# Gives token ids (batch, seq) for a model folder and its config, e.g. by reading a text with the folder's tokenizer.
Calibration = Callable[[Path, PreTrainedConfig], torch.Tensor]

# Gives all tensors of a layer's new attention module, by their names inside it.
NewTensors = Callable[[int], dict[str, torch.Tensor]]


@from_opened_folder
def regroup_folder(
    source: str | Path,
    target: str | Path,
    num_key_value_heads: int | str | Mapping[int, int],
    *,
    method: str = "svd",
    grouping: str | None = None,
    calibration: torch.Tensor | Calibration | None = None,
    budget: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = ignore_progress,
    processes: Processes = ALONE,
) -> PreTrainedConfig:
    """A decoder's folder (or Hub id) to one with fewer key-value heads; see `groupformer.regroup`.

    Args:
        source: Folder, GGUF file, adapter folder or Hub id of a native decoder or of a GroupFormer; see
            `opened_folder`.
        target: Folder to write. Must not exist, unless `overwrite`. Tokenizer and generation config travel along.
        calibration: Token ids, or a function that gives them once the source has been found and checked.
        overwrite: Whether to replace an existing target, once the new one is whole.
        max_shard_bytes: Largest shard to write, in bytes; a larger layer gets a shard of its own.
        progress: Called with (shard, shards, bytes just written, bytes in all).
        processes: Those that work at it together, each of which calls this function; the first one writes.

    Returns:
        The new config.

    Raises:
        ValueError: as `groupformer.regroup`, or a broken folder, by name. Nothing is written then.
    """
    folder, target_folder = Path(source), Path(target).expanduser()
    checkpoint = FolderSource(folder)
    options = (num_key_value_heads, method, grouping, budget, seed)
    plan = plan_regrouping(checkpoint, *options)
    token_ids = calibration(folder, checkpoint.config) if callable(calibration) else calibration
    if token_ids is not None:
        check_calibration(token_ids, checkpoint.config)
    result = describe_result(checkpoint, plan, plan.example_counts, token_ids)
    if result is None:
        check_importable(checkpoint)
        warn_that_class_changes(checkpoint, plan.layouts, plan.example_counts)
    with processes.workspace(target_folder) as (aside, scratch):
        if result is None:
            if processes.is_first:
                import_folder(folder, scratch / "groupformer")
            processes.wait()
            checkpoint = FolderSource(scratch / "groupformer")
            plan = plan_regrouping(checkpoint, *options)
        moments = find_moments(checkpoint, plan, token_ids, scratch, device, dtype, processes)
        counts = choose_counts(checkpoint, plan, moments, token_ids, device, processes)
        if result is None or counts != plan.example_counts:
            result = describe_result(checkpoint, plan, counts, token_ids)
            assert result is not None
        new_layouts = result.layouts

        def merged(layer_idx: int) -> dict[str, torch.Tensor]:
            heads = merge_layer(checkpoint, plan, moments, layer_idx, counts[layer_idx])
            originals = checkpoint.read_module(plan.layouts[layer_idx].path)
            return new_layouts[layer_idx].write_heads(heads, originals)

        changed = changed_layers(plan, counts)
        pieces = regrouped_pieces(
            checkpoint, plan.layouts, result, changed, processes.share_out(changed, merged, scratch)
        )
        if processes.is_first:
            write_shards(pieces, aside, max_shard_bytes=max_shard_bytes, progress=progress)
            write_beside_weights(checkpoint, result, aside)
    return result.config


@from_opened_folder
def expand_folder(
    source: str | Path,
    target: str | Path,
    num_key_value_heads: int,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> PreTrainedConfig:
    """A decoder's folder (or Hub id) to one with more key-value heads; see `groupformer.expand`, `regroup_folder`."""
    folder, target_folder = Path(source), Path(target).expanduser()
    checkpoint = FolderSource(folder)
    layouts, result = plan_expansion(checkpoint, num_key_value_heads)

    def repeated(layer_idx: int) -> dict[str, torch.Tensor]:
        return expanded_tensors(checkpoint, layouts[layer_idx], result.layouts[layer_idx])

    with written_aside(target_folder) as aside:
        pieces = regrouped_pieces(checkpoint, layouts, result, list(range(len(layouts))), repeated)
        write_shards(pieces, aside, max_shard_bytes=max_shard_bytes, progress=progress)
        write_beside_weights(checkpoint, result, aside)
    return result.config


def check_importable(checkpoint: FolderSource) -> None:
    """Refuses a native folder whose class cannot hold the counts, and which the bridge does not know either."""
    try:
        plan_import(read_native_config(checkpoint.folder), class_name_of(checkpoint.config))
    except ValueError as error:
        raise ValueError(
            f"{checkpoint.model_class.__name__} has no config field for these key-value heads, and it cannot become a "
            f"GroupFormer: {error}"
        ) from error


def changed_layers(plan: Plan, counts: list[int]) -> list[int]:
    """Layers whose count changes; the others stay bit for bit."""
    present = [layout.geometry.num_key_value_heads for layout in plan.layouts]
    return [layer_idx for layer_idx, (now, count) in enumerate(zip(present, counts)) if now != count]


def regrouped_pieces(
    checkpoint: FolderSource,
    layouts: list[AttentionLayout],
    result: Result,
    changed: list[int],
    new_tensors: NewTensors,
) -> Iterator[Piece]:
    """The new folder's tensors in the old one's order, the attention of a changed layer together."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in build_on_meta(checkpoint.model_class, result.config).state_dict().items()
    }
    layers = {checkpoint.stem(layouts[layer_idx].path): layer_idx for layer_idx in changed}
    is_tied = is_groupformer(checkpoint.config) and checkpoint.config.tie_word_embeddings
    done: set[int] = set()
    for name in checkpoint.checkpoint.entries:
        if is_tied and name == "lm_head.weight":
            continue
        layer_idx = next((layers[stem] for stem in layers if name.startswith(stem)), None)
        if layer_idx is None:
            yield checked(checkpoint, name)
        elif layer_idx not in done:
            done.add(layer_idx)
            entries = new_entries(checkpoint, layouts[layer_idx], shapes)

            def tensors(layer_idx: int = layer_idx, entries: Mapping[str, Entry] = entries) -> list[torch.Tensor]:
                new = new_tensors(layer_idx)
                stem = checkpoint.stem(layouts[layer_idx].path)
                return [new[name[len(stem) :]] for name in entries]

            yield Piece(entries, tensors)


def checked(checkpoint: FolderSource, name: str) -> Piece:
    """A tensor as it is, refused where it holds NaN or infinity."""
    return unchanged(checkpoint.checkpoint, name, check=lambda part: check_finite(name, part, checkpoint.where))


def new_entries(
    checkpoint: FolderSource, layout: AttentionLayout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Entry]:
    """Names in the file, dtypes and new shapes of a layer's attention tensors."""
    stem, path = checkpoint.stem(layout.path), f"{layout.path}."
    originals = {inner: checkpoint.checkpoint.entries[name] for inner, name in checkpoint.names(layout.path).items()}
    dtype = originals[f"{layout.names['output']}.weight"].dtype
    names = [inner for inner in originals if not layout.is_head_norm(inner)]
    names += [name[len(path) :] for name in shapes if name.startswith(path) and layout.is_head_norm(name[len(path) :])]
    return {
        stem + inner: Entry(
            originals[inner].dtype if inner in originals else dtype,
            shapes[path + inner] if path + inner in shapes else originals[inner].shape,
        )
        for inner in names
    }


def write_beside_weights(checkpoint: FolderSource, result: Result, folder: Path) -> None:
    """Config, tokenizer and, for a GroupFormer, the code that `trust_remote_code` runs."""
    copy_companions(checkpoint.folder, folder)
    readme = checkpoint.folder / "README.md"
    original = readme.read_text(encoding="utf-8") if readme.is_file() else None
    (folder / "README.md").write_text(regrouped_card(original, result.config), encoding="utf-8")
    if is_groupformer(checkpoint.config):
        result.config.architectures = [checkpoint.model_class.__name__]
        result.config.save_pretrained(folder)
        with torch.device("meta"):
            custom_object_save(checkpoint.model_class(result.config), str(folder))
        write_tokenizer_code(folder)
        return
    # The native config.json as it is, but for what changed: engines of other versions read it, too.
    content: dict[str, Any] = read_json(checkpoint.folder / "config.json")
    content |= result.fields
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
