"""Makes transformers and PEFT know GroupFormer, on `import groupformer`; doing it again changes nothing."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from ..model.configuration_groupformer import GroupFormerConfig
from ..model.modeling_groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForQuestionAnswering,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerModel,
)
from ..model.tokenization_groupformer import GroupFormerTokenizer


MODELS = {
    AutoModel: GroupFormerModel,
    AutoModelForCausalLM: GroupFormerForCausalLM,
    AutoModelForSequenceClassification: GroupFormerForSequenceClassification,
    AutoModelForTokenClassification: GroupFormerForTokenClassification,
    AutoModelForQuestionAnswering: GroupFormerForQuestionAnswering,
}

PEFT_MAPPINGS = "peft.utils.constants"


def register() -> None:
    """Registers our classes with the Auto classes, their code with `save_pretrained`, and PEFT's defaults."""
    model_type = GroupFormerConfig.model_type
    AutoConfig.register(model_type, GroupFormerConfig, exist_ok=True)
    GroupFormerConfig.register_for_auto_class()
    for auto_class, model_class in MODELS.items():
        auto_class.register(GroupFormerConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
        setattr(transformers, model_class.__name__, model_class)  # `transformers serve` looks up architectures there
    AutoTokenizer.register(GroupFormerConfig, tokenizer_class=GroupFormerTokenizer, exist_ok=True)
    GroupFormerTokenizer.register_for_auto_class()
    if PEFT_MAPPINGS in sys.modules:
        add_peft_defaults(sys.modules[PEFT_MAPPINGS])
    elif not any(isinstance(finder, PeftDefaultsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftDefaultsFinder())


def add_peft_defaults(constants: ModuleType) -> None:
    """Gives GroupFormer the target modules that PEFT has for Llama, in every mapping: the module names are Llama's."""
    for name, mapping in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(mapping, dict) and "llama" in mapping:
            mapping.setdefault(GroupFormerConfig.model_type, mapping["llama"])


class PeftDefaultsFinder(importlib.abc.MetaPathFinder):
    """Waits for PEFT to be imported, without importing it, and then adds our defaults; any other import passes by."""

    def find_spec(self, fullname, path, target=None):
        if fullname != PEFT_MAPPINGS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PeftDefaultsLoader(spec.loader)
            sys.meta_path.remove(self)
        return spec


class _PeftDefaultsLoader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        add_peft_defaults(module)
