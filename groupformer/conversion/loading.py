"""Loading that trusts nothing: a damaged checkpoint is refused by file and tensor, before it can pass for a model.

Transformers fills what a file lacks with fresh random weights and a warning, and loads NaN as it is. That serves those
who build on a model; a command that evaluates, generates or trains must rather stop.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .checkpoint import open_checkpoint


def load_checked(auto_class: Any, source: str | Path, *, fresh_head: bool = False, **options: Any) -> Any:
    """`auto_class.from_pretrained(source)`, with every weight accounted for.

    Args:
        auto_class: An Auto class of transformers, or a model class.
        source: Folder or Hub id.
        fresh_head: Whether the checkpoint may lack what lies outside the base model: a new head.
        options: Of `from_pretrained`.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: a missing, truncated or otherwise broken file; a tensor that is missing, has another shape than the
            config says, or holds NaN or infinity. The message names file and tensor.
    """
    refuse_broken_files(source)
    with errors_only():
        model, report = auto_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    base = f"{model.base_model_prefix}."
    missing = sorted(name for name in report["missing_keys"] if not fresh_head or name.startswith(base))
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{source} lacks the tensor {missing[0]}{rest}; it is incomplete, or of another architecture")
    for name, found, wanted in sorted(report["mismatched_keys"]):
        shapes = f"shape {tuple(found)}, but the config makes it {tuple(wanted)}"
        raise ValueError(f"{file_of(source, name)}: {name} has {shapes}")
    refuse_non_finite(model, source)
    return model


@contextmanager
def errors_only() -> Iterator[None]:
    """Keeps transformers' table of missing and odd weights quiet: what matters in it is raised as an error."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def refuse_broken_files(source: str | Path) -> None:
    """Checks headers, sizes and the index of a folder's safetensors files; other sources are left to transformers."""
    folder = Path(source)
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        open_checkpoint(folder)


def refuse_non_finite(model: PreTrainedModel, source: str | Path) -> None:
    """Refuses a model with NaN or infinity among its weights, by tensor and file."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(f"{file_of(source, name)}: {name} holds NaN or infinity in {bad:,} places")


def file_of(source: str | Path, name: str) -> str:
    """The file that holds a tensor, as far as the checkpoint tells; else the checkpoint itself."""
    folder = Path(source)
    if not any((folder / index).exists() for index in ("model.safetensors", "model.safetensors.index.json")):
        return str(source)
    places = getattr(open_checkpoint(folder), "places", {})
    endings = [stored for stored in places if stored == name or name.endswith(f".{stored}") or stored.endswith(name)]
    return str(places[endings[0]][0]) if endings else str(source)


# Tokenizers ----------------------------------------------------------------------------------------------------------

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a file of a tokenizer."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(source: str | Path, tokenizer: str | Path | None = None) -> Any:
    """The tokenizer of a checkpoint, or the one that is named instead, checked to have tokens.

    Transformers makes an empty tokenizer for a folder without one; every text then has no tokens.

    Args:
        source: Folder or Hub id of the checkpoint.
        tokenizer: Folder or Hub id of another tokenizer, as `--tokenizer` gives it.

    Raises:
        ValueError: no tokenizer, one that cannot be loaded, or one with fewer than two tokens besides special ones.
    """
    chosen = source if tokenizer is None else tokenizer
    remedy = "pass --tokenizer FOLDER with the model's own tokenizer" if tokenizer is None else "choose another one"
    if Path(chosen).is_dir() and not has_tokenizer(chosen):
        raise ValueError(f"{chosen} has no tokenizer (no tokenizer.json or tokenizer.model); {remedy}")
    try:
        loaded = AutoTokenizer.from_pretrained(chosen)
    except Exception as error:  # the library `tokenizers` raises no narrower class for a file that it cannot read
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"the tokenizer of {chosen} cannot be loaded ({reason.strip()}); {remedy}") from error
    ordinary = set(loaded.get_vocab().values()) - set(loaded.all_special_ids)
    if len(ordinary) < 2:
        count = f"{len(ordinary)} token{'' if len(ordinary) == 1 else 's'}"
        raise ValueError(f"the tokenizer of {chosen} has {count} besides special ones; {remedy}")
    return loaded


def check_token_ids(token_ids: Iterable[int], tokenizer: Any, what: str, vocab_size: int | None = None) -> None:
    """Refuses token ids from which nothing can be computed or learnt.

    Args:
        token_ids: All ids of the text.
        tokenizer: What gave them.
        what: What they are the tokens of, to begin the message with, e.g. "the calibration text".
        vocab_size: Of the model, to refuse larger ids.

    Raises:
        ValueError: no tokens, unknown tokens only, or ids that the model has no embedding for.
    """
    found = set(token_ids)
    if not found:
        raise ValueError(f"{what} has no tokens; give text that is not empty, in the tokenizer's language")
    markers = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = tokenizer.unk_token_id
    # A marker that doubles as the unknown token (GPT-2) may be all that was asked for.
    if unknown is not None and unknown not in markers and unknown in found and found <= markers | {unknown}:
        raise ValueError(
            f"{what} has only unknown tokens ({tokenizer.unk_token}); pass --tokenizer FOLDER with the model's own "
            "tokenizer, or give text in its language"
        )
    if vocab_size is not None and max(found) >= vocab_size:
        raise ValueError(
            f"{what} has the token id {max(found)}, but the model's vocab_size is {vocab_size}; "
            "pass --tokenizer FOLDER with the model's own tokenizer"
        )


# Devices -------------------------------------------------------------------------------------------------------------


def best_device(wanted: str | None = None) -> str:
    """The device that was asked for, once it is known to be there; by default the accelerator, else the CPU.

    Raises:
        ValueError: torch knows no such device, or it is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted is None:
        return accelerator.type if accelerator else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    count = torch.accelerator.device_count()
    is_there = device is not None and (
        device.type == "cpu"
        or (accelerator is not None and device.type == accelerator.type and (device.index or 0) < count)
    )
    if not is_there:
        kinds = "cpu" if accelerator is None else f"cpu or {accelerator.type} ({count} there)"
        raise ValueError(f"device ({wanted}) is not there; choose {kinds}")
    return wanted
