"""Checks before uptraining begins: models, tokenizers and outputs with which a run would go wrong without an error."""

import inspect
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch

from ..conversion.folders import read_json
from ..conversion.loading import has_tokenizer, load_tokenizer
from ..families.registry import is_groupformer


ATTENTION_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]  # what regrouping changed, and what adapters train
# Largest change of a document's logits, as a share of the largest, that is still rounding.
ROUNDING = 1e-4
SETTINGS = "recipe.json"  # in the output folder: what its checkpoints fit


# Models --------------------------------------------------------------------------------------------------------------


def check_keeps_documents_apart(name: str, source: str, model: Any) -> None:
    """Refuse a model that ignores position_ids, which alone keep packed documents apart.

    Raises:
        ValueError: such a model, by name.
    """
    # Ours are tested; flash attention reads the documents' limits from the positions, and does not run on a CPU.
    if is_groupformer(model) or "flash" in (model.config._attn_implementation or ""):
        return
    if not sees_one_document(model):
        raise ValueError(
            f"{name} ({source}) is a {model.config.model_type!r}, in which packed documents see each other; "
            "import it first (groupformer import), its logits stay the same"
        )


@torch.no_grad()
def sees_one_document(model: Any, length: int = 4) -> bool:
    """Whether the second document of a packed row has the same logits whatever the first one is."""
    if "position_ids" not in inspect.signature(model.forward).parameters:  # then Trainer leaves them out
        return False
    size = model.config.get_text_config().vocab_size
    first, other, second = (torch.arange(3 * length) % size).view(3, length)
    input_ids = torch.stack((torch.cat((first, second)), torch.cat((other, second))))
    position_ids = torch.arange(length).repeat(2)[None]
    was_training = model.training
    model.eval()
    try:
        outputs = [model(input_ids=row[None], position_ids=position_ids, use_cache=False) for row in input_ids]
    finally:
        model.train(was_training)
    known, found = (each.logits[0, length:].float() for each in outputs)
    # Numbers that overflow say nothing of documents; training will show them.
    return torch.allclose(found, known, rtol=0, atol=ROUNDING * float(known.abs().max()), equal_nan=True)


def check_has_projections(source: str, model: Any) -> None:
    """Refuse adapters on attention projections for a model whose projections have other names.

    Raises:
        ValueError: such a model, by name.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in ATTENTION_MODULES if name not in names]
    if missing:
        raise ValueError(
            f"lora (True) trains {', '.join(ATTENTION_MODULES)}, but model ({source}) is a "
            f"{model.config.model_type!r} without {', '.join(missing)}; import it first (groupformer import)"
        )


# Tokenizers ----------------------------------------------------------------------------------------------------------


def check_ids_fit(rows: Any, name: str, tokenizer: Any, vocab_size: int) -> None:
    """Refuses packed rows with token ids that the model has no embedding for.

    Raises:
        ValueError: such rows; the message names the largest id and the model's vocab_size.
    """
    if len(tokenizer) <= vocab_size:
        return
    largest = max(int(part["input_ids"].max()) for part in rows.with_format("numpy").iter(1000))
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer gives the {name} text token ids up to {largest}, but model has vocab_size {vocab_size}; "
            "use the model's own tokenizer"
        )


def check_same_vocabulary(teacher: str, tokenizer: Any) -> None:
    """Refuses a teacher whose folder holds a tokenizer that gives a token another id than ours.

    Raises:
        ValueError: such a tokenizer; the message names a token and both ids.
    """
    if not has_tokenizer(teacher):
        return
    try:
        taught = load_tokenizer(teacher).get_vocab()
    except ValueError:  # not needed to train, so no reason to stop
        return
    own = tokenizer.get_vocab()
    other = [token for token in own if taught.get(token, own[token]) != own[token]]
    if other:
        token = min(other, key=own.__getitem__)
        raise ValueError(
            f"teacher ({teacher}) gives the token {token!r} the id {taught[token]}, but model's tokenizer gives it "
            f"{own[token]}; distillation needs one vocabulary: choose the model that this one was made from"
        )


# Outputs -------------------------------------------------------------------------------------------------------------


def settings_of(recipe: Any, model: Any) -> dict[str, Any]:
    """What a run's checkpoints depend on; a longer or another training may go on from them."""
    return {
        "lora": recipe.lora,
        "lora_rank": recipe.lora_rank if recipe.lora else None,
        "attention_only": recipe.attention_only,
        "parameters": model.num_parameters(),
    }


def check_same_settings(output: Path, settings: dict[str, Any]) -> None:
    """Refuses to go on from checkpoints of other settings. Folders without a record of them are taken as they are.

    Raises:
        ValueError: another setting; the message names it and both values.
    """
    path = output / SETTINGS
    kept = read_json(path) if path.exists() else {}
    for name, value in settings.items():
        if kept.get(name, value) != value:
            raise ValueError(
                f"{name} ({value}) was {kept[name]} in the run that output ({output}) holds; "
                "resume it as it was, or choose another folder"
            )


def keep_settings(output: Path, settings: dict[str, Any]) -> None:
    """Writes the settings beside the checkpoints, whole or not at all."""
    aside = output / f".{SETTINGS}.{uuid.uuid4().hex[:8]}.partial"
    try:
        aside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, output / SETTINGS)
    finally:
        aside.unlink(missing_ok=True)
