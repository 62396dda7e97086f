"""A model to regroup, in memory or in a folder: its class, its config, and its tensors, module by module."""

import copy
import math
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..conversion.checkpoint import open_checkpoint
from ..conversion.decilm.configs import read_decilm_config
from ..conversion.decilm.configuration_decilm import DeciLMConfig
from ..conversion.folders import class_name_of, read_json
from ..conversion.loading import config_of_known_class, refused_by_library
from ..conversion.weights import check_tensors, shapes_of
from ..families.registry import is_groupformer
from ..integrations.loading import load_checkpoint_tensors
from ..model import modeling_groupformer
from ..model.configuration_groupformer import GroupFormerConfig
from .probing import on_meta


class Source(Protocol):
    """What the steps of regrouping read."""

    where: str
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig

    def read_module(self, path: str) -> dict[str, torch.Tensor]:
        """All tensors of a module, on the CPU, by their names inside it."""
        ...

    def load_module(self, model: PreTrainedModel, path: str) -> None:
        """Gives a module of a model on the meta device its weights, in the dtype that they are stored in."""
        ...

    def check_all_finite(self) -> None:
        """Refuses NaN and infinity in any tensor."""
        ...


class ModelSource:
    """A model in memory."""

    def __init__(self, model: PreTrainedModel):
        self.where, self.model_class, self.config = type(model).__name__, type(model), model.config
        self.model = model
        check_layers(model)
        self.check_all_finite()

    def check_all_finite(self) -> None:
        for name, tensor in self.model.state_dict().items():
            check_finite(name, tensor, self.where)

    def read_module(self, path: str) -> dict[str, torch.Tensor]:
        state_dict = self.model.get_submodule(path).state_dict()
        return {name: tensor.detach().cpu() for name, tensor in state_dict.items()}

    def load_module(self, model: PreTrainedModel, path: str) -> None:
        model.get_submodule(path).load_state_dict(self.read_module(path), assign=True)


class FolderSource:
    """A checkpoint folder, whose tensors are read when they are needed, and checked to be finite."""

    def __init__(self, folder: Path):
        self.where, self.folder = str(folder), folder
        content = read_json(folder / "config.json")
        self.config, self.model_class = read_config_and_class(folder, content)
        self.checkpoint = open_checkpoint(folder)
        if is_groupformer(self.config):
            tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
            found = {name: entry.shape for name, entry in self.checkpoint.entries.items() if name not in tied}
            check_tensors(found, shapes_of(self.model_class, self.config), self.where)

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in the file.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        tensor = self.checkpoint.read(name)
        check_finite(name, tensor, self.where)
        return tensor

    def check_all_finite(self) -> None:
        for name in self.checkpoint.entries:
            self.read(name)

    def stem(self, path: str) -> str:
        """The beginning of the file's names of a module's tensors; files may lack or add the base model's prefix.

        Raises:
            ValueError: the file holds nothing of the module.
        """
        shorter = path.split(".", 1)[-1]
        for stem in (path, shorter, f"{self.model_class.base_model_prefix}.{path}"):
            if any(name.startswith(f"{stem}.") for name in self.checkpoint.entries):
                return f"{stem}."
        raise ValueError(f"{self.where} lacks the tensors of {path}: it does not fit its config.json")

    def names(self, path: str) -> dict[str, str]:
        """Names inside a module to those in the file."""
        stem = self.stem(path)
        return {name[len(stem) :]: name for name in self.checkpoint.entries if name.startswith(stem)}

    def read_module(self, path: str) -> dict[str, torch.Tensor]:
        return {inner: self.read(name) for inner, name in self.names(path).items()}

    def load_module(self, model: PreTrainedModel, path: str) -> None:
        module, names = model.get_submodule(path), self.names(path)
        tensors = {inner: self.checkpoint.read(name) for inner, name in names.items()}
        shapes = {inner: tensor.shape for inner, tensor in module.state_dict().items()}
        if shapes == {inner: tensor.shape for inner, tensor in tensors.items()}:  # nothing to convert
            module.load_state_dict(tensors, assign=True)
            return
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        for child in module.modules():  # so that the loader makes no copies in another dtype
            for name, parameter in child._parameters.items():
                child._parameters[name] = None if parameter is None else on_meta(parameter.to(dtype))
        load_checkpoint_tensors(model, {names[inner]: tensor for inner, tensor in tensors.items()})
        for name, tensor in module.named_parameters():
            if tensor.is_meta:
                raise ValueError(f"{self.where} lacks {path}.{name}: it does not fit its config.json")


def read_config_and_class(folder: Path, content: dict[str, Any]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config of a folder and the class that it was saved with, transformers' or ours; code in it is never run.

    Raises:
        ValueError: a model type or class that transformers does not have.
    """
    if content.get("model_type") == GroupFormerConfig.model_type:
        config: PreTrainedConfig = GroupFormerConfig.from_pretrained(folder)
        return config, getattr(modeling_groupformer, class_name_of(config) or "GroupFormerForCausalLM")
    with refused_by_library(folder):
        config = config_of_known_class(folder)
    if isinstance(config, DeciLMConfig):  # Llama with counts by layer, whose tensors have the names of ours
        return read_decilm_config(config), modeling_groupformer.GroupFormerForCausalLM
    config._attn_implementation = None
    name = class_name_of(config)
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if name is None else getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config)):
        raise ValueError(
            f"{folder}: architectures ({name!r}) is no class of transformers for {config.model_type}; take the "
            "checkpoint that it was made from"
        )
    return config, found


# Checks --------------------------------------------------------------------------------------------------------------


def check_layers(model: PreTrainedModel) -> None:
    """Refuses a model whose tensors are not those of its class by its config.

    Adapters and quantizers replace layers in place. A model built anew from the config has the plain ones, and nothing
    would fill those whose names or shapes differ.

    Raises:
        ValueError: a tensor that is unknown, missing, of another shape, or of whole numbers, by name.
    """
    # A copy: a model may settle its config's attention backend while it is built.
    expected = shapes_of(type(model), copy.deepcopy(model.config))
    kind, remedy = type(model).__name__, "merge or remove the adapter first, and regroup before quantizing"
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if name not in expected and not is_tied(model, name):
            raise ValueError(f"model holds {name}, no tensor of {kind} by its config; {remedy}")
        shape = expected.get(name, tensor.shape)
        if tuple(tensor.shape) != tuple(shape) or not tensor.is_floating_point():
            found = f"{tuple(tensor.shape)} in {tensor.dtype}"
            raise ValueError(f"model: {name} is {found}, but {tuple(shape)} in floating point by its config; {remedy}")
    missing = sorted(set(expected) - set(state_dict))
    if missing:
        raise ValueError(f"model lacks {missing[0]}, a tensor of {kind} by its config; {remedy}")


def is_tied(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor of this name is another one's, by the config."""
    return bool(model.config.tie_word_embeddings) and name in (getattr(model, "_tied_weights_keys", None) or {})


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Refuses NaN and infinity: they would spread over whole layers."""
    if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
        raise ValueError(f"{where}: {name} holds numbers that are not finite (NaN or infinity); repair the checkpoint")


# The bits of infinity as an integer of the same size; those of NaN are greater.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
INFINITY = {
    dtype: torch.tensor(math.inf, dtype=dtype).view(INTEGERS[dtype.itemsize]).item()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite.

    On the CPU the numbers are read as integers, signed for the positive ones and unsigned for the negative. NumPy
    finds the greatest in a quarter of the time that torch takes for the extremes of bfloat16.
    """
    if tensor.dtype not in INFINITY or not tensor.is_cpu:
        return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())
    size, infinity = tensor.dtype.itemsize, INFINITY[tensor.dtype]
    bits = tensor.detach().contiguous().view(INTEGERS[size]).numpy()
    return bits.max() < infinity and bits.view(f"u{size}").max() < infinity + (1 << 8 * size - 1)
