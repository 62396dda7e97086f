"""Healing from folder to folder: one layer of each model in memory; a run that was cut off goes on where it stopped.

Each healed layer waits in a file beside the target until all are there. Then all learn together, if the recipe says so
(both models are loaded for that), and the student's folder is written anew with the healed attention; everything else
is copied byte for byte. The result appears whole or not at all.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..conversion.folders import (
    check_target,
    copy_companions,
    from_opened_folder,
    import_folder,
    local_folder,
    read_json,
    write_tokenizer_code,
    written_aside,
)
from ..conversion.loading import load_checked
from ..conversion.shards import MAX_SHARD_BYTES, Piece, unchanged, write_shards
from ..conversion.shards import Progress as ShardProgress
from ..conversion.shards import ignore_progress as ignore_shard_progress
from ..families.registry import is_groupformer
from ..integrations.model_card import regrouped_card
from .costs import FLOAT32, HEALED_STATES
from .heal import (
    HealReport,
    LayerReport,
    Progress,
    check_pair,
    heal_layers,
    ignore_progress,
    is_joint,
    split_batches,
)
from .heal_jointly import heal_jointly
from .heal_recipe import HealRecipe
from .layer_by_layer import State
from .processes import ALONE, Processes
from .sources import FolderSource
from .streaming import Calibration, regroup_folder


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
    progress: Progress = ignore_progress,
    processes: Processes = ALONE,
) -> HealReport:
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
        progress: Called after each layer and each step of all layers together.
        processes: Those that heal it together, each of which calls this function; the first one writes.

    Returns:
        What it did.

    Raises:
        ValueError: as `groupformer.heal`, a broken folder, models that do not fit into memory together though the
            recipe has a joint phase, or an interrupted run that is neither to be resumed nor to be replaced, or one of
            other settings.
    """
    recipe = recipe or HealRecipe()
    folder, target_folder = local_folder(str(student)), Path(target).expanduser()
    original_folder = local_folder(str(original))
    for source in (folder, original_folder):
        check_target(source, target_folder, overwrite)
    own, teacher = FolderSource(folder), FolderSource(original_folder)
    ids = token_ids(folder, own.config) if callable(token_ids) else token_ids
    batches = processes.rows_of_batches(split_batches(ids, own.config, recipe))
    check_states_fit(own, ids.numel(), recipe)
    if recipe.joint_epochs and device == "cpu":
        check_models_fit(own, teacher)
    work = work_folder(target_folder)
    is_imported = is_groupformer(own.config) and not is_groupformer(teacher.config)
    if not is_imported:
        check_pair(own, teacher)
    if processes.is_first:
        prepare_work(work, settings_of(recipe, ids, folder, original_folder), resume, overwrite)
        if is_imported and not (work / "original").exists():
            import_folder(original_folder, work / "original")
    processes.wait()
    if is_imported:
        teacher = FolderSource(work / "original")
        check_pair(own, teacher)
    layers = HealedLayers(work)
    reports = HealReport([])
    paths: list[str] = []
    for layer_idx, (report, path, state) in enumerate(
        heal_layers(own, teacher, ids, recipe, device=device, ready=layers.read, processes=processes)
    ):
        if processes.is_first:
            layers.write(layer_idx, report, state)
        paths.append(path)
        reports.layers.append(report)
        progress("layers", len(paths), own.config.get_text_config().num_hidden_layers)
    processes.wait()
    states: dict[str, Callable[[], State]] = {
        own.stem(path): partial(layers.state, layer_idx) for layer_idx, path in enumerate(paths)
    }
    if recipe.joint_epochs and reports.lost_something:
        model, whole = (
            load_checked(source.model_class, source.folder, dtype="auto").to(device) for source in (own, teacher)
        )
        load_healed(model, layers, paths)
        if is_joint(recipe, model):
            steps = partial(progress, "steps")
            reports.joint = heal_jointly(model, whole, batches, recipe, progress=steps, processes=processes)
            states = {own.stem(path): partial(parameters_of, model, path) for path in paths}
    if processes.is_first:
        with written_aside(target_folder) as aside:
            write_shards(healed_pieces(own, states), aside, max_shard_bytes=max_shard_bytes)
            write_beside_weights(own, aside, ids.numel(), recipe)
        shutil.rmtree(work)
    processes.wait()
    return reports


@from_opened_folder
def regroup_and_heal_folder(
    source: str | Path,
    target: str | Path,
    num_key_value_heads: int | str | Mapping[int, int],
    token_ids: torch.Tensor | Calibration,
    recipe: HealRecipe | None = None,
    *,
    calibration: torch.Tensor | Calibration,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    merge_progress: ShardProgress = ignore_shard_progress,
    progress: Progress = ignore_progress,
    **options: Any,
) -> HealReport:
    """`regroup_folder`, then `heal_folder`; the merged folder waits beside the target, and goes when all is done.

    Args:
        token_ids, recipe, resume, progress: As in `heal_folder`; an interrupted run need not merge again.
        calibration, merge_progress, options: As in `regroup_folder`.
    """
    folder, target_folder = Path(source), Path(target).expanduser()
    merged = merged_folder(target_folder)
    check_not_interrupted(work_folder(target_folder), resume, overwrite)
    recipe, checkpoint = recipe or HealRecipe(), FolderSource(folder)
    ids = token_ids(folder, checkpoint.config) if callable(token_ids) else token_ids
    split_batches(ids, checkpoint.config, recipe)
    check_states_fit(checkpoint, ids.numel(), recipe)
    if recipe.joint_epochs and device == "cpu":
        check_models_fit(checkpoint, checkpoint)
    shared: dict[str, Any] = dict(device=device, max_shard_bytes=max_shard_bytes)
    request = {"num_key_value_heads": str(num_key_value_heads), **{name: str(each) for name, each in options.items()}}
    if resume and merged.exists():
        check_same_settings(merged, request)
    else:
        regroup_folder(
            folder,
            merged,
            num_key_value_heads,
            calibration=calibration,
            overwrite=True,
            progress=merge_progress,
            **shared,
            **options,
        )
        (merged / SETTINGS).write_text(json.dumps(request, indent=2), encoding="utf-8")
    report = heal_folder(
        merged, folder, target, ids, recipe, resume=resume, overwrite=overwrite, progress=progress, **shared
    )
    shutil.rmtree(merged)
    return report


def work_folder(target: Path) -> Path:
    """Where the healed layers wait."""
    return target.with_name(f".{target.name}.healing")


def merged_folder(target: Path) -> Path:
    """Where the merged model waits for its healing."""
    return target.with_name(f".{target.name}.merged")


def check_states_fit(student: FolderSource, tokens: int, recipe: HealRecipe) -> None:
    """Refuses more tokens than the machine can hold the hidden states of, while a layer is healed.

    Raises:
        ValueError: with the sizes and the remedy.
    """
    per_token = HEALED_STATES * student.config.get_text_config().hidden_size * FLOAT32
    tokens, present = min(tokens, recipe.layer_tokens), memory_of_machine()
    if present is not None and tokens * per_token > present:
        raise ValueError(
            f"healing a layer on {tokens} tokens needs about {tokens * per_token / 1e9:.1f} GB for hidden states, and "
            f"this machine has {present / 1e9:.1f}; pass --tokens {present // (2 * per_token)} or fewer to "
            "`groupformer heal`, or as --heal-tokens to `groupformer regroup`"
        )


def check_models_fit(student: FolderSource, teacher: FolderSource) -> None:
    """Refuses a joint phase for which the machine has not the memory.

    The student is in float32 and the teacher as it is stored, where what trains the attention takes as much again.

    Raises:
        ValueError: with the sizes and the remedy.
    """
    needed = 2 * 4 * count_parameters(student) + 4 * count_parameters(teacher)
    present = memory_of_machine()
    if present is not None and needed > present:
        raise ValueError(
            f"joint_epochs needs about {needed / 1e9:.1f} GB for both models at once, and this machine has "
            f"{present / 1e9:.1f}; pass --joint-epochs 0 to `groupformer heal`, which then heals layer by layer alone"
        )


def count_parameters(source: FolderSource) -> int:
    return sum(math.prod(entry.shape) for entry in source.checkpoint.entries.values())


def memory_of_machine() -> int | None:
    """Bytes of memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def load_healed(model: Any, layers: "HealedLayers", paths: list[str]) -> None:
    """Gives the attention of each layer of a model its healed weights."""
    with torch.no_grad():
        for layer_idx, path in enumerate(paths):
            for name, tensor in layers.state(layer_idx).items():
                model.get_parameter(f"{path}.{name}").copy_(tensor)


def parameters_of(model: Any, path: str) -> State:
    """A module's parameters, by their names inside it."""
    return dict(model.get_submodule(path).named_parameters())


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
        return report, self.state(layer_idx)

    def state(self, layer_idx: int) -> State:
        """The attention of a layer that is there."""
        return load_file(self.path(layer_idx))

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
    fields = dataclasses.asdict(recipe)
    return {name: value for name, value in fields.items() if not name.startswith("joint_")} | models | {"text": text}


def check_not_interrupted(work: Path, resume: bool, overwrite: bool) -> None:
    """Refuses to pass over the layers of an interrupted run, unless it is said what becomes of them."""
    if work.exists() and not (resume or overwrite):
        raise ValueError(
            f"{work} holds the layers of an interrupted run; pass --resume to go on from them, or --overwrite to "
            "begin again"
        )


def check_same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses to go on with a run that had other settings, by name."""
    kept = read_json(folder / SETTINGS)
    for name, value in settings.items():
        if kept.get(name) != value:
            raise ValueError(
                f"{name} ({value}) was {kept.get(name)} in the run that {folder} holds; resume it as it was, or pass "
                "--overwrite without --resume to begin again"
            )


def prepare_work(work: Path, settings: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """The folder of healed layers: made, taken up again, or emptied.

    Raises:
        ValueError: an interrupted run lies there, and it is not said what becomes of it; or it had other settings.
    """
    check_not_interrupted(work, resume, overwrite)
    if work.exists() and not resume:
        shutil.rmtree(work)
    if not (work / SETTINGS).exists():
        work.mkdir(parents=True, exist_ok=True)
        (work / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    check_same_settings(work, settings)


# Writing -------------------------------------------------------------------------------------------------------------


def healed_pieces(student: FolderSource, states: Mapping[str, Callable[[], State]]) -> Iterator[Piece]:
    """The student's tensors in their order; those of the attention are the healed ones, in the student's dtype.

    Args:
        states: Gives the healed attention of a layer, by the stem of its names in the file.
    """
    for name, entry in student.checkpoint.entries.items():
        stem = next((stem for stem in states if name.startswith(stem)), None)
        if stem is None:
            yield unchanged(student.checkpoint, name)
            continue

        def tensors(name: str = name, stem: str = stem, dtype: torch.dtype = entry.dtype) -> list[torch.Tensor]:
            own = student.read(name)
            healed = states[stem]().get(name[len(stem) :], own)
            return [healed.detach().cpu().to(dtype).view(own.shape)]

        yield Piece({name: entry}, tensors)


def write_beside_weights(student: FolderSource, folder: Path, tokens: int, recipe: HealRecipe) -> None:
    """Config, card, tokenizer and code; config and card tell of the healing."""
    copy_companions(student.folder, folder)
    for path in student.folder.glob("*.py"):  # the code that `trust_remote_code` runs
        shutil.copyfile(path, folder / path.name)
    write_tokenizer_code(folder)
    content = read_json(student.folder / "config.json")
    entries = content.get("regrouping") or [{}]
    entries[-1]["healing"] = {"tokens": tokens, "epochs": recipe.epochs, "joint_epochs": recipe.joint_epochs}
    content["regrouping"] = student.config.regrouping = entries
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    readme = student.folder / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else None
    if "from" in entries[-1]:
        card = regrouped_card(card, student.config)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


__all__ = ["heal_folder", "regroup_and_heal_folder"]
