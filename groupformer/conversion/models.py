"""The bridge in memory: `import_model` and `export_model`."""

import copy
from pathlib import Path

from transformers import PreTrainedModel

from ..families.registry import is_groupformer, own_config
from .checkpoint import StateDictSource, open_checkpoint
from .convert import build_model, plan_export, plan_import
from .folders import class_name_of, opened_folder, read_native_config


def import_model(source: PreTrainedModel | str | Path) -> PreTrainedModel:
    """A native model as a GroupFormer with the same logits.

    Args:
        source: A native model in memory (the result shares no storage with it), a folder, a GGUF file, an adapter
            folder of PEFT or a Hub id. Causal language models and sequence classification, token classification and
            question answering heads.

    Returns:
        The GroupFormer model, in eval mode, in the source's dtype; its config remembers the family.

    Raises:
        ValueError: the model, or its file, is not one that GroupFormer expresses exactly; the message names the field
            and its value.
    """
    if isinstance(source, PreTrainedModel):
        conversion = plan_import(source.config, type(source).__name__)
        model = build_model(conversion, StateDictSource(source.state_dict(), type(source).__name__))
        return with_generation_config(model, source)
    with opened_folder(source) as folder:
        native_config = read_native_config(folder)
        conversion = plan_import(native_config, class_name_of(native_config))
        return with_file_generation_config(build_model(conversion, open_checkpoint(folder)), folder)


def export_model(model: PreTrainedModel, family: str | None = None) -> PreTrainedModel:
    """A GroupFormer as a model of a native family: bit for bit what was imported, or what training made of it.

    Args:
        model: A GroupFormer model in memory; the result shares no storage with it.
        family: Transformers' model type, e.g. "llama". Default: the family that the model was imported from.

    Raises:
        ValueError: the family cannot express the model exactly; the message names the field and its value.
    """
    if not is_groupformer(model):
        raise ValueError(f"model ({type(model).__name__}) is not a GroupFormer; use import_model for native models")
    conversion = plan_export(own_config(model.config), type(model).__name__, family)
    return with_generation_config(build_model(conversion, StateDictSource(model.state_dict(), "the model")), model)


def with_generation_config(model: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    if model.can_generate() and getattr(source, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    return model


def with_file_generation_config(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
