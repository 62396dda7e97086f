"""What vLLM runs for GroupFormer: its own transformers backend, with what that backend does not look for.

The backend builds our model, puts its paged attention into our attention interface and its parallel layers in place of
ours. It reads the logits' scale under another name, though, pools at the first token, and has no head over tokens.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.pooler.tokwise import pooler_for_token_classify
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersForSequenceClassification
from vllm.model_executor.models.transformers.pooling import EmbeddingMixin
from vllm.model_executor.models.utils import WeightsMapper


class GroupFormerForCausalLM(TransformersForCausalLM):
    """Generation."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if hasattr(self, "logits_processor"):  # the last stage of a pipeline has it
            self.logits_processor.scale = 1.0 / self.text_config.logits_scaling


@default_pooling_type(seq_pooling_type="LAST")
class GroupFormerForSequenceClassification(TransformersForSequenceClassification):
    """Classification of sequences."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_prefix={"score.": "classifier."})
        # The backend adds a dimension for heads that pick the first token themselves; ours is a plain matrix.
        self.classifier.__class__ = nn.Linear


@default_pooling_type(tok_pooling_type="ALL")
class GroupFormerForTokenClassification(EmbeddingMixin):
    """Classification of each token."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, model_config = self.text_config, vllm_config.model_config
        self.head_dtype = model_config.head_dtype
        self.score = nn.Linear(config.hidden_size, config.num_labels, dtype=self.head_dtype)
        self.pooler = pooler_for_token_classify(model_config.pooler_config)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.score(super().forward(*args, **kwargs).to(self.head_dtype))
