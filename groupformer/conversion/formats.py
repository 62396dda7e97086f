"""The classes and files that can hold a decoder, from its config alone: commands say so before any work."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..families.registry import FAMILIES, is_groupformer, own_config
from ..model.configuration_groupformer import GroupFormerConfig
from .configs import read_config
from .convert import families_for
from .counts import regrouped_config
from .decilm.configs import decilm_config, read_decilm_config
from .decilm.configuration_decilm import DeciLMConfig
from .gguf.writer import plan_gguf
from .weights import native_class


@dataclass(frozen=True)
class Formats:
    """What can hold a model besides GroupFormer's own class.

    Args:
        native: Causal language models of transformers, e.g. "LlamaForCausalLM": the checkpoint's own class, or all
            others that can hold it.
        files: What `export --format` writes for other engines, e.g. "GGUF llama".
    """

    native: tuple[str, ...]
    files: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """The class that a regrouped model gets."""
        return self.native[0] if self.native else "GroupFormerForCausalLM"

    def __str__(self) -> str:
        return ", ".join([self.result, *self.files]) if self.native or self.files else f"{self.result} only"


def classes_for(config: PreTrainedConfig, counts: int | Sequence[int] | None = None) -> Formats:
    """The classes and files that can hold a decoder with these numbers of key-value heads, from its config alone.

    Args:
        config: Of a native decoder or of a GroupFormer.
        counts: Of all layers, or of each. Default: those that it has.
    """
    ours = as_groupformer(config)
    if ours is None:
        return Formats(own_class(config, counts))
    if counts is not None:
        counts = [counts] * ours.num_hidden_layers if isinstance(counts, int) else list(counts)
        ours = regrouped_config(ours, counts)
    families = families_for(ours, [ours.family]) if ours.family else []
    if not families:  # slower, and only asked for where its own family cannot hold it; first Llama, which engines know
        families = sorted(families_for(ours), key=lambda name: name != "llama")
    native = [native_class(FAMILIES[name], "ForCausalLM").__name__ for name in families]
    return Formats(tuple(native), tuple(files_for(ours, families)))


def files_for(config: GroupFormerConfig, families: Sequence[str]) -> list[str]:
    """DeciLM, where no family can hold the layers' counts; and the first architecture of llama.cpp that can."""
    files = []
    if not families:
        with suppress(ValueError):
            decilm_config(config)
            files.append("DeciLMForCausalLM")
    for family in families or ["llama"]:
        with suppress(ValueError):
            return [*files, f"GGUF {plan_gguf(config, None, family).name}"]
    return files


def as_groupformer(config: PreTrainedConfig) -> GroupFormerConfig | None:
    """The config as a GroupFormer's, where the bridge can express it."""
    if is_groupformer(config):
        return own_config(config)
    if isinstance(config, DeciLMConfig):
        return read_decilm_config(config)
    if config.model_type not in FAMILIES:
        return None
    try:
        return read_config(config, FAMILIES[config.model_type])
    except ValueError:
        return None


def own_class(config: PreTrainedConfig, counts: int | Sequence[int] | None) -> tuple[str, ...]:
    """A native class by itself: it holds other counts where its config has a field for one count of all layers."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        return ()
    is_uniform = counts is None or isinstance(counts, int) or len(set(counts)) == 1
    if not is_uniform or (counts is not None and not hasattr(config, "num_key_value_heads")):
        return ()
    return (model_class.__name__,)
