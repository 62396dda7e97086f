"""Makes transformers know GroupFormer as it knows its own models; doing it again changes nothing."""

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
from transformers.models.auto import modeling_auto

from ..model.configuration_groupformer import GroupFormerConfig
from ..model.modeling_groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForQuestionAnswering,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerModel,
)
from ..model.tokenization_groupformer import GroupFormerTokenizer
from . import peft


# The Auto class that builds a model, the table of names by which Trainer, pipelines, `transformers serve` and model
# cards know what it computes, and the model.
MODELS = (
    (AutoModel, modeling_auto.MODEL_MAPPING_NAMES, GroupFormerModel),
    (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, GroupFormerForCausalLM),
    (
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        GroupFormerForSequenceClassification,
    ),
    (
        AutoModelForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        GroupFormerForTokenClassification,
    ),
    (
        AutoModelForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        GroupFormerForQuestionAnswering,
    ),
)


def register() -> None:
    """Register our classes with the Auto classes, the tables of names, `save_pretrained` and PEFT."""
    model_type = GroupFormerConfig.model_type
    AutoConfig.register(model_type, GroupFormerConfig, exist_ok=True)
    GroupFormerConfig.register_for_auto_class()
    for auto_class, names, model_class in MODELS:
        auto_class.register(GroupFormerConfig, model_class, exist_ok=True)
        names[model_type] = model_class.__name__
        model_class.register_for_auto_class(auto_class.__name__)
        setattr(transformers, model_class.__name__, model_class)  # `transformers serve` looks up architectures there
    AutoTokenizer.register(GroupFormerConfig, tokenizer_class=GroupFormerTokenizer, exist_ok=True)
    GroupFormerTokenizer.register_for_auto_class()
    peft.register()
