"""From folder to folder, streaming: one group of tensors in memory at a time, whatever the checkpoint's size.

The result is written aside and renamed when it is whole. Until then nothing that existed is touched, and when anything
fails nothing is left behind.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ..families.operations import RENAME
from ..families.registry import family_named
from ..model import tokenization_groupformer
from ..model.configuration_groupformer import GroupFormerConfig
from .checkpoint import BinSource, SafetensorsSource, Source, open_checkpoint
from .convert import Conversion, file_name, plan_export, plan_import, source_names, target_entries
from .decilm.configuration_decilm import DeciLMConfig
from .loading import errors_only, load_checked, load_tokenizer
from .shards import MAX_SHARD_BYTES, Piece, Progress, ignore_progress, unchanged, write_shards
from .sources import check_on_hub, check_source, first_line, is_adapter, is_gguf
from .token_limit import with_token_limit
from .weights import Group


Function = TypeVar("Function", bound=Callable[..., Any])

# What travels along as it is: tokenizers, chat templates, generation configs, licences.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def local_folder(source: str) -> Path:
    """A folder as it is, or the local copy of a Hub repository's weights, configs and tokenizer.

    Raises:
        ValueError: neither a folder nor a repository that can be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    check_source(source)
    check_on_hub(source)
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *COMPANIONS]
    try:
        files: list[str] = []
        with suppress(OfflineModeIsEnabled):  # then what the cache holds has to do
            files = list_repo_files(source)
        if files and not any(file.endswith(".safetensors") for file in files):
            wanted += ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{source} cannot be downloaded from the Hub: {first_line(error)}") from error


@contextmanager
def opened_folder(source: str | Path) -> Iterator[Path]:
    """A checkpoint as a folder of plain weights, for what streams from folder to folder.

    A folder is taken as it is, and a Hub repository's local copy. A GGUF file (dequantized, in float32) and an adapter
    folder (merged into the model that it adapts) are loaded whole, and written to a folder that is removed at the end.

    Raises:
        ValueError: see `load_checked`; or an adapter of a kind that cannot be merged.
    """
    if not is_gguf(source) and not is_adapter(source):
        yield local_folder(str(source))
        return
    model = load_checked(AutoModelForCausalLM, source, dtype=torch.float32 if is_gguf(source) else "auto")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{source} is an adapter that cannot be merged ({type(model).__name__}); use its base model")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with errors_only():
            model.save_pretrained(folder)
        del model
        with suppress(ValueError):  # a file without a tokenizer is none that has a broken one
            load_tokenizer(source).save_pretrained(folder)
        yield folder


def from_opened_folder(function: Function) -> Function:
    """Decorates what goes from folder to folder, `function(source, target, ...)`, to take any source as a folder."""

    @wraps(function)
    def opening(source: str | Path, target: str | Path, *args: Any, overwrite: bool = False, **options: Any) -> Any:
        check_target(Path(source).expanduser(), Path(target).expanduser(), overwrite)
        with opened_folder(source) as folder:
            return function(folder, target, *args, overwrite=overwrite, **options)

    return opening  # type: ignore[return-value]


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_native_config(folder: Path) -> PreTrainedConfig:
    """The native config of a folder, by transformers' own class: code in the folder is never run.

    Raises:
        ValueError: no readable config.json, or of no known family.
    """
    content = read_json(folder / "config.json")
    if content.get("model_type") == GroupFormerConfig.model_type:
        raise ValueError(f"{folder} is a GroupFormer already; load it with from_pretrained")
    if content.get("model_type") == DeciLMConfig.model_type:
        return DeciLMConfig.from_dict(content)
    family = family_named(content.get("model_type"))
    config = CONFIG_MAPPING[family.model_type].from_pretrained(folder)
    config._attn_implementation = None  # whatever the file names, a kernel on the Hub too, is not needed to convert
    return config


def class_name_of(config: PreTrainedConfig) -> str | None:
    """The model class that a config was saved with, if it says so."""
    return config.architectures[0] if config.architectures else None


# The two directions --------------------------------------------------------------------------------------------------


@from_opened_folder
def import_folder(
    source: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> Conversion:
    """A native checkpoint folder (or Hub id) to a GroupFormer folder that loads with `from_pretrained`.

    Args:
        source: Folder (safetensors, sharded or not, or legacy `.bin`), GGUF file, adapter folder or Hub id; see
            `opened_folder`.
        target: Folder to write. Must not exist, unless `overwrite`.
        overwrite: Whether to replace an existing target, once the new one is whole.
        max_shard_bytes: Largest shard to write, in bytes; a larger tensor gets a shard of its own.
        progress: Called with (shard, shards, bytes just written, bytes in all).

    Returns:
        What was converted.

    Raises:
        ValueError: anything that cannot be converted exactly, or a broken file, by name. Nothing is written then.
    """
    source_folder, target_folder = Path(source), Path(target).expanduser()
    native_config = read_native_config(source_folder)
    conversion = plan_import(native_config, class_name_of(native_config))
    conversion.our_config.architectures = [conversion.model_class.__name__]
    name_tokenizer(conversion, source_folder)
    with written_aside(target_folder) as folder:
        pieces = pieces_of(conversion, open_checkpoint(source_folder))
        write_shards(pieces, folder, max_shard_bytes=max_shard_bytes, progress=progress)
        write_our_code(conversion, folder)
        conversion.our_config.save_pretrained(folder)
        copy_companions(source_folder, folder)
        if (limited := with_token_limit(folder, conversion.our_config)) is not None:
            (folder / "tokenizer_config.json").write_text(limited, encoding="utf-8")
        write_tokenizer_code(folder)
    return conversion


@from_opened_folder
def export_folder(
    source: str | Path,
    target: str | Path,
    *,
    family: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> Conversion:
    """A GroupFormer folder (or Hub id) to a native checkpoint folder; see `import_folder` for the arguments.

    Args:
        family: Transformers' model type to export to. Default: the one that the model was imported from.
    """
    source_folder, target_folder = Path(source), Path(target).expanduser()
    content = read_json(source_folder / "config.json")
    if content.get("model_type") != GroupFormerConfig.model_type:
        raise ValueError(
            f"{source} is a {content.get('model_type')!r}, not a GroupFormer: it can be used as it is; to convert it, "
            "import it first"
        )
    our_config = GroupFormerConfig.from_pretrained(source_folder)
    conversion = plan_export(our_config, class_name_of(our_config), family)
    conversion.native_config.architectures = [conversion.model_class.__name__]
    with written_aside(target_folder) as folder:
        pieces = pieces_of(conversion, open_checkpoint(source_folder))
        write_shards(pieces, folder, max_shard_bytes=max_shard_bytes, progress=progress)
        conversion.native_config.save_pretrained(folder)
        copy_companions(source_folder, folder)
        free_tokenizer_of_our_code(folder)
    return conversion


# Output that appears whole or not at all -----------------------------------------------------------------------------


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuses a target that would lose something, before any work is done."""
    if target.is_symlink():  # also one that leads nowhere; replaced, it would part from what it names
        raise ValueError(f"the target ({target}) is a link; name the folder itself, or choose another")
    if target.resolve() == source.resolve() or source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"the target ({target}) is, or holds, the source ({source}); choose another folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"the target ({target}) is a file; choose another name")
    if target.exists() and not overwrite:
        raise ValueError(f"the target ({target}) exists; choose another folder, or pass --overwrite to replace it")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, renamed to it on success and removed on failure.

    So do the folders above it that were made for it.
    """
    made = [parent for parent in target.parents if not parent.exists()]  # the innermost first
    unique = uuid.uuid4().hex[:8]
    aside, old = (target.with_name(f".{target.name}.{unique}.{word}") for word in ("partial", "old"))
    try:
        aside.mkdir(parents=True)
        yield aside
        if target.exists():
            target.rename(old)
        aside.rename(target)
    except BaseException:  # an interrupt, too, leaves nothing behind
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists():
            old.rename(target)
        for parent in made:
            with suppress(OSError):  # something else came to lie in it, or it was never made
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


# Weights -------------------------------------------------------------------------------------------------------------


def pieces_of(conversion: Conversion, source: SafetensorsSource | BinSource) -> Iterator[Piece]:
    """What the new checkpoint holds: a piece for each group of the plan."""
    names = source_names(conversion, source)
    for group, entries in target_entries(conversion, source, names):
        read = [names[name] for name in conversion.sides(group)[0]]
        stored = {file_name(conversion, name): entry for name, entry in entries.items()}
        if group.operation is RENAME:
            yield unchanged(source, read[0], next(iter(stored)))
        else:
            yield Piece(stored, partial(convert_group, conversion, source, group, read))


def convert_group(conversion: Conversion, source: Source, group: Group, names: list[str]) -> list[torch.Tensor]:
    return conversion.convert(group, [source.read(name) for name in names])


# What lies beside the weights ----------------------------------------------------------------------------------------


def write_our_code(conversion: Conversion, folder: Path) -> None:
    """The code files that `save_pretrained` of ours puts beside the weights, for `trust_remote_code`."""
    with torch.device("meta"):
        model = conversion.model_class(conversion.our_config)
    custom_object_save(model, str(folder))


def write_tokenizer_code(folder: Path) -> None:
    """The code of our tokenizer, where the folder's tokenizer_config.json names it for `trust_remote_code`."""
    path = folder / "tokenizer_config.json"
    named = (read_json(path).get("auto_map") or {}).get("AutoTokenizer") if path.exists() else None
    code = Path(tokenization_groupformer.__file__)
    # One class, or a slow and a fast one; where a repository's name comes first, the code lies there.
    classes = named if isinstance(named, list) else [named]
    if any(str(each).startswith(f"{code.stem}.") for each in classes):
        shutil.copyfile(code, folder / code.name)


def name_tokenizer(conversion: Conversion, source: Path) -> None:
    """Name the tokenizer's class in its config, where only the native model type implied it."""
    path = source / "tokenizer_config.json"
    named = read_json(path).get("tokenizer_class") if path.exists() else None
    if named or getattr(conversion.native_config, "tokenizer_class", None):
        return
    tokenizer_class = TOKENIZER_MAPPING_NAMES.get(conversion.family.model_type)
    if tokenizer_class is not None:
        conversion.our_config.tokenizer_class = tokenizer_class


def free_tokenizer_of_our_code(folder: Path) -> None:
    """Write our tokenizer as its plain base class, so that the native checkpoint loads without GroupFormer."""
    path = folder / "tokenizer_config.json"
    content = read_json(path) if path.exists() else {}
    if content.get("tokenizer_class") == "GroupFormerTokenizer":
        content.pop("auto_map", None)
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
