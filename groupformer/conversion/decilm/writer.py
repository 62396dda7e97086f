"""Writes a GroupFormer as `DeciLMForCausalLM` (model type nemotron-nas), Llama with its own counts in every layer.

The format is that of NVIDIA's Nemotron NAS checkpoints. Its tensors have Llama's names, which are ours, so they pass
from file to file as they are; only the config is written anew.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ...model.configuration_groupformer import GroupFormerConfig
from ...model.modeling_groupformer import GroupFormerForCausalLM
from ..checkpoint import open_checkpoint
from ..folders import (
    class_name_of,
    copy_companions,
    free_tokenizer_of_our_code,
    from_opened_folder,
    read_json,
    written_aside,
)
from ..shards import MAX_SHARD_BYTES, Progress, ignore_progress, unchanged, write_shards
from ..weights import check_tensors, shapes_of
from .configs import decilm_config


CODE = Path(__file__).with_name("configuration_decilm.py")


@from_opened_folder
def export_decilm(
    source: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """A GroupFormer folder (or Hub id) of Llama's shape, its counts by layer included, as `DeciLMForCausalLM`.

    Args:
        source: Folder or Hub id of a causal GroupFormer.
        target: Folder to write. Must not exist, unless `overwrite`. Tokenizer and generation config travel along.
        overwrite: Whether to replace an existing target, once the new one is whole.
        max_shard_bytes: Largest shard to write, in bytes; a larger tensor gets a shard of its own.
        progress: Called with (shard, shards, bytes just written, bytes in all).

    Returns:
        The new config.json.

    Raises:
        ValueError: a field that Llama, or the format, cannot express, or a broken folder, by name. Nothing is written
            then.
    """
    folder, target_folder = Path(source), Path(target).expanduser()
    content = read_json(folder / "config.json")
    if content.get("model_type") != GroupFormerConfig.model_type:
        raise ValueError(f"{source} is a {content.get('model_type')!r}, not a GroupFormer; import it first")
    config = GroupFormerConfig.from_pretrained(folder)
    if class_name_of(config) not in (None, "GroupFormerForCausalLM"):
        raise ValueError(f"architectures ({config.architectures}) is no causal language model; DeciLM is one")
    new = decilm_config(config)
    checkpoint = open_checkpoint(folder)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = [name for name in checkpoint.entries if name not in tied]
    found = {name: checkpoint.entries[name].shape for name in names}
    check_tensors(found, shapes_of(GroupFormerForCausalLM, config), checkpoint.where)
    with written_aside(target_folder) as aside:
        pieces = (unchanged(checkpoint, name) for name in names)
        write_shards(pieces, aside, max_shard_bytes=max_shard_bytes, progress=progress)
        (aside / "config.json").write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(CODE, aside / CODE.name)
        copy_companions(folder, aside)
        free_tokenizer_of_our_code(aside)
    return new
