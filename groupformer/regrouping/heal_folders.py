"""Healing from folder to folder: one layer of each model in memory; a run that was cut off goes on where it stopped.

Each healed layer waits in a file beside the target until all are there. Then the student's folder is written anew with
the healed attention; everything else is copied byte for byte. The result appears whole or not at all.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..conversion.folders import (
    copy_companions,
    import_folder,
    local_folder,
    read_json,
    refuse_target,
    write_tokenizer_code,
    written_aside,
)
from ..conversion.shards import MAX_SHARD_BYTES, Piece, unchanged, write_shards
from .heal import HealRecipe, LayerReport, check_pair, heal_layers, split_batches
from .layer_by_layer import State
from .result import is_groupformer
from .sources import FolderSource
from .streaming import Calibration


SETTINGS = "settings.json"


def heal_folder(
    student: str | Path,
    original: str | Path,
    target: str | Path,
    token_ids: torch.Tensor | Calibration,
    recipe: HealRecipe | None = None,
    *,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[LayerReport, int], None] = lambda report, layers: None,
) -> list[LayerReport]:
    """Win back what a merge lost, from folder to folder; see `groupformer.heal`.

    Args:
        student: Folder or Hub id of the regrouped model; it stays as it is.
        original: Folder or Hub id of the model that it was made from. A native original of a GroupFormer is imported.
        target: Folder to write. Must not exist, unless `overwrite`.
        token_ids: LongTensor (rows, seq), or a function that gives it for the student's folder and config.
        recipe: How. Default: `HealRecipe()`.
        device: Where the layers are computed.
        resume: Go on from the layers that an interrupted run of the same text and recipe left beside the target.
        overwrite: Whether to replace an existing target, once the new one is whole.
        max_shard_bytes: Largest shard to write, in bytes.
        progress: Called with each layer's report and the number of layers.

    Returns:
        A report for each layer.

    Raises:
        ValueError: as `groupformer.heal`, a broken folder, or an interrupted run that is neither to be resumed nor to
            be replaced, or one of other settings.
    """
    recipe = recipe or HealRecipe()
    folder, target_folder = local_folder(str(student)), Path(target).expanduser()
    original_folder = local_folder(str(original))
    for source in (folder, original_folder):
        refuse_target(source, target_folder, overwrite)
    own, teacher = FolderSource(folder), FolderSource(original_folder)
    ids = token_ids(folder, own.config) if callable(token_ids) else token_ids
    split_batches(ids, own.config, recipe)
    work = target_folder.with_name(f".{target_folder.name}.healing")
    if is_groupformer(own.config) and not is_groupformer(teacher.config):
        layers = prepare_work(work, settings_of(recipe, ids, folder, original_folder), resume, overwrite)
        if not (work / "original").exists():
            import_folder(original_folder, work / "original")
        teacher = FolderSource(work / "original")
        check_pair(own, teacher)
    else:
        check_pair(own, teacher)
        layers = prepare_work(work, settings_of(recipe, ids, folder, original_folder), resume, overwrite)
    reports = []
    stems: dict[str, int] = {}
    healed = heal_layers(own, teacher, ids, recipe, device=device, ready=layers.read)
    for layer_idx, (report, path, state) in enumerate(healed):
        layers.write(layer_idx, report, state)
        stems[own.stem(path)] = layer_idx
        reports.append(report)
        progress(report, own.config.get_text_config().num_hidden_layers)
    with written_aside(target_folder) as aside:
        write_shards(healed_pieces(own, stems, layers), aside, max_shard_bytes=max_shard_bytes)
        write_beside_weights(own, aside, ids.numel(), recipe)
    shutil.rmtree(work)
    return reports


# Layers that wait ----------------------------------------------------------------------------------------------------


class HealedLayers:
    """Healed layers in files of a folder, each written whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, layer_idx: int) -> Path:
        return self.folder / f"layer-{layer_idx}.safetensors"

    def read(self, layer_idx: int) -> tuple[LayerReport, State] | None:
        """A layer's report and attention, if it is there."""
        if not self.path(layer_idx).exists():
            return None
        report = LayerReport(**read_json(self.path(layer_idx).with_suffix(".json")))
        return report, load_file(self.path(layer_idx))

    def write(self, layer_idx: int, report: LayerReport, state: State) -> None:
        path = self.path(layer_idx)
        if path.exists():
            return
        path.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)  # last: a layer that is there has its report


def settings_of(recipe: HealRecipe, token_ids: torch.Tensor, student: Path, original: Path) -> dict[str, Any]:
    """What the healed layers of a run depend on."""
    text = hashlib.sha256(token_ids.cpu().contiguous().numpy().tobytes()).hexdigest()
    models = {"student": str(student.resolve()), "original": str(original.resolve())}
    return {**dataclasses.asdict(recipe), **models, "text": text}


def prepare_work(work: Path, settings: Mapping[str, Any], resume: bool, overwrite: bool) -> HealedLayers:
    """The folder of healed layers: made, taken up again, or emptied.

    Raises:
        ValueError: an interrupted run lies there, and it is not said what becomes of it; or it had other settings.
    """
    if work.exists() and not resume:
        if not overwrite:
            raise ValueError(
                f"{work} holds the layers of an interrupted run; pass --resume to go on from them, or --overwrite to "
                "begin again"
            )
        shutil.rmtree(work)
    if not (work / SETTINGS).exists():
        work.mkdir(parents=True, exist_ok=True)
        (work / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    kept = read_json(work / SETTINGS)
    for name, value in settings.items():
        if kept.get(name) != value:
            raise ValueError(
                f"{name} ({value}) was {kept.get(name)} in the run that {work} holds; resume it as it was, or pass "
                "--overwrite without --resume to begin again"
            )
    return HealedLayers(work)


# Writing -------------------------------------------------------------------------------------------------------------


def healed_pieces(student: FolderSource, stems: Mapping[str, int], layers: HealedLayers) -> Iterator[Piece]:
    """The student's tensors in their order; those of the attention are the healed ones, in the student's dtype."""
    for name, entry in student.checkpoint.entries.items():
        stem = next((stem for stem in stems if name.startswith(stem)), None)
        if stem is None:
            yield unchanged(student.checkpoint, name)
            continue

        def tensors(name: str = name, stem: str = stem, dtype: torch.dtype = entry.dtype) -> list[torch.Tensor]:
            healed = layers.read(stems[stem])
            assert healed is not None
            own = student.read(name)
            return [healed[1].get(name[len(stem) :], own).to(dtype).view(own.shape)]

        yield Piece({name: entry}, tensors)


def write_beside_weights(student: FolderSource, folder: Path, tokens: int, recipe: HealRecipe) -> None:
    """Config, tokenizer and code; the config tells of the healing."""
    copy_companions(student.folder, folder)
    for path in student.folder.glob("*.py"):  # the code that `trust_remote_code` runs
        shutil.copyfile(path, folder / path.name)
    write_tokenizer_code(folder)
    content = read_json(student.folder / "config.json")
    entries = content.get("regrouping") or [{}]
    entries[-1]["healing"] = {"tokens": tokens, "epochs": recipe.epochs}
    content["regrouping"] = entries
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = ["heal_folder"]
