"""GroupFormer: transformers whose attention sharing is yours to choose.

Importing this package registers the architecture with transformers' Auto classes and PEFT. It stays light: nothing but
transformers and torch is imported.
"""

import importlib

from .integrations.registration import register
from .model.configuration_groupformer import GroupFormerConfig
from .model.modeling_groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForQuestionAnswering,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerModel,
    GroupFormerPreTrainedModel,
)
from .model.tokenization_groupformer import GroupFormerTokenizer
from .version import __version__


register()

# Public functions whose modules are imported when they are first used.
LAZY = {
    "expand": "regrouping",
    "export_model": "conversion",
    "import_model": "conversion",
    "regroup": "regrouping",
}


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)


__all__ = [
    "GroupFormerConfig",
    "GroupFormerForCausalLM",
    "GroupFormerForQuestionAnswering",
    "GroupFormerForSequenceClassification",
    "GroupFormerForTokenClassification",
    "GroupFormerModel",
    "GroupFormerPreTrainedModel",
    "GroupFormerTokenizer",
    "__version__",
    "expand",
    "export_model",
    "import_model",
    "regroup",
]
