"""Loading that trusts nothing: a damaged checkpoint is refused by file and tensor, before it can pass for a model.

Transformers fills what a file lacks with fresh random weights and a warning, and loads NaN as it is. That serves those
who build on a model; a command that evaluates, generates or trains must rather stop.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .checkpoint import open_checkpoint
from .decilm.configs import read_decilm_config
from .decilm.configuration_decilm import DeciLMConfig
from .sources import base_of_adapter, first_line, is_adapter, locate, require


# Options of `generate`, in the words of `GenerationConfig`.
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
OF_BEAMS = ("early_stopping", "length_penalty")


def load_checked(auto_class: Any, source: str | Path, *, fresh_head: bool = False, **options: Any) -> Any:
    """`auto_class.from_pretrained(source)`, with every weight accounted for.

    Args:
        auto_class: An Auto class of transformers, or a model class.
        source: Folder, GGUF file (dequantized) or Hub id; `DeciLMForCausalLM` comes as a GroupFormer. Of an adapter
            folder, the model that it adapts, with the adapter merged into it where its kind can be.
        fresh_head: Whether the checkpoint may lack what lies outside the base model: a new head.
        options: Of `from_pretrained`.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: a source that cannot be loaded; a missing, truncated or otherwise broken file; a tensor that is
            missing, has another shape than the config says, or holds NaN or infinity. The message names file and
            tensor.
    """
    if is_adapter(source):
        return load_adapted(auto_class, source, fresh_head=fresh_head, **options)
    location, gguf = locate(source)
    check_files(source)
    with errors_only(), refused_by_library(source):
        decilm = None if gguf or "config" in options else find_decilm_config(location)
        if decilm is not None:  # Llama with counts by layer, whose tensors have the names of ours
            options["config"] = read_decilm_config(decilm)
        model, report = auto_class.from_pretrained(
            location,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **gguf,
            **options,
        )
    if gguf:
        forget_quantization(model)
    base = f"{model.base_model_prefix}."
    missing = sorted(name for name in report["missing_keys"] if not fresh_head or name.startswith(base))
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{source} lacks the tensor {missing[0]}{rest}; it is incomplete, or of another architecture")
    for name, found, wanted in sorted(report["mismatched_keys"]):
        shapes = f"shape {tuple(found)}, but the config makes it {tuple(wanted)}"
        raise ValueError(f"{file_of(source, name)}: {name} has {shapes}")
    check_weights_are_finite(model, source)
    unset_unread_options(model)
    return model


def unset_unread_options(model: Any) -> None:
    """Unsets what a generation config says of sampling or of beams though it uses none; generation stays the same.

    Transformers loads such a file and refuses to save it: a training would be lost at its first checkpoint.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    unread = [*(() if config.do_sample else OF_SAMPLING), *(() if (config.num_beams or 1) > 1 else OF_BEAMS)]
    for name in unread:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)


def forget_quantization(model: Any) -> None:
    """Makes a dequantized model a plain one, which can be saved and moved: its weights are floats already."""
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config


def load_adapted(auto_class: Any, source: str | Path, **options: Any) -> Any:
    """The model that an adapter folder adapts, with the adapter; merged where its kind can be merged."""
    require("peft", what=f"the adapter in {source}")
    from peft import PeftModel

    model = load_checked(auto_class, base_of_adapter(source), **options)
    with refused_by_library(source):
        adapted: Any = PeftModel.from_pretrained(model, str(source))
    if hasattr(adapted.base_model, "merge_and_unload"):
        adapted = adapted.merge_and_unload().requires_grad_(True)  # PEFT has frozen the base, which is trained further
    check_weights_are_finite(adapted, source)
    return adapted.eval()


def load_config(source: str | Path, **options: Any) -> PreTrainedConfig:
    """The config of a folder, GGUF file or Hub id, or of the model that an adapter folder adapts.

    Args:
        source: As in `load_checked`; no weights are read.
        options: Of `from_pretrained`.

    Raises:
        ValueError: no config, or one that transformers does not know.
    """
    if is_adapter(source):
        return load_config(base_of_adapter(source), **options)
    location, gguf = locate(source)
    with errors_only(), refused_by_library(source):
        return config_of_known_class(location, **gguf, **options)


def config_of_known_class(location: str | Path, **options: Any) -> PreTrainedConfig:
    """A config of transformers' own classes, or of DeciLM's, which is code beside the weights: that is never run."""
    decilm = None if "gguf_file" in options else find_decilm_config(location)
    return AutoConfig.from_pretrained(location, trust_remote_code=False, **options) if decilm is None else decilm


def find_decilm_config(location: str | Path) -> DeciLMConfig | None:
    """The config of a folder or Hub id that holds a `DeciLMForCausalLM`; None of any other."""
    content, _ = PreTrainedConfig.get_config_dict(location)
    return DeciLMConfig.from_dict(content) if content.get("model_type") == DeciLMConfig.model_type else None


@contextmanager
def refused_by_library(source: str | Path) -> Iterator[None]:
    """Names the source in errors of transformers and the Hub, and leaves advice for other users out."""
    try:
        yield
    except (OSError, KeyError, ImportError) as error:
        raise ValueError(f"{source} cannot be loaded: {first_line(error)}") from error
    except ValueError as error:
        message = " ".join(str(error).split()).split(" Model type should be one of")[0]  # then come hundreds of names
        if "trust_remote_code" in message:
            message = (
                "its class is code of its own, which is not run; vLLM, SGLang and llama.cpp know some of these "
                "classes, GroupFormer those of transformers"
            )
        raise ValueError(f"{source} cannot be loaded: {message}") from error


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence transformers' warnings, whose causes are raised as errors, and progress bars in log files."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def check_files(source: str | Path) -> None:
    """Checks headers, sizes and the index of a folder's safetensors files; other sources are left to transformers."""
    folder = Path(source)
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        open_checkpoint(folder)


def check_weights_are_finite(model: PreTrainedModel, source: str | Path) -> None:
    """Refuses a model with NaN or infinity among its weights, by tensor and file."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(f"{file_of(source, name)}: {name} holds NaN or infinity in {bad:,} places")


def file_of(source: str | Path, name: str) -> str:
    """The file that holds a tensor by the checkpoint's index; without one, the checkpoint itself."""
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
    if is_adapter(chosen) and not has_tokenizer(chosen):
        return load_tokenizer(base_of_adapter(chosen))
    if Path(chosen).is_dir():
        if not has_tokenizer(chosen):
            raise ValueError(f"{chosen} has no tokenizer (no tokenizer.json or tokenizer.model); {remedy}")
        location, gguf = str(chosen), dict[str, Any]()
    else:
        location, gguf = locate(chosen)
    try:
        with errors_only():
            loaded = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **gguf)
    except Exception as error:  # the library `tokenizers` raises no narrower class for a file that it cannot read
        raise ValueError(f"the tokenizer of {chosen} cannot be loaded ({first_line(error)}); {remedy}") from error
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


def has_fast_bf16(device: str) -> bool:
    """Whether a kind of device multiplies faster in bfloat16: GPUs that have it, and CPUs with matrix units for it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


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
