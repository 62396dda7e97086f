"""GroupFormer: transformers whose attention sharing is yours to choose.

Importing this package registers the architecture with transformers' Auto classes and PEFT. It stays light: nothing but
transformers and torch is imported.
"""

from .configuration_groupformer import GroupFormerConfig
from .modeling_groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForQuestionAnswering,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerModel,
    GroupFormerPreTrainedModel,
)
from .registration import register
from .tokenization_groupformer import GroupFormerTokenizer
from .version import __version__


register()

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
]
