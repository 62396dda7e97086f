"""Transformers' common test mixins on GroupFormer's classes in several shapes, and on Llama beside them.

Run through `make test-upstream`, which unpacks `transformers_tests` from the source distribution of the installed
transformers. Nothing of it is in this repository.
"""

import unittest
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.testing_utils import torch_device
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

import groupformer


# These lists name the models on which transformers' CI runs its distributed tests; here all run.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = (
    LlamaModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForQuestionAnswering,
    LlamaForTokenClassification,
)
OURS = (
    groupformer.GroupFormerModel,
    groupformer.GroupFormerForCausalLM,
    groupformer.GroupFormerForSequenceClassification,
    groupformer.GroupFormerForQuestionAnswering,
    groupformer.GroupFormerForTokenClassification,
)
LEARNED = {
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "norm_bias": True,
    "mlp_type": "plain",
    "hidden_act": "gelu",
    "attention_bias": True,
}


class Tester:
    """What the mixins ask about: a small config and inputs. Its names are transformers'."""

    is_training = True
    batch_size, seq_length = 13, 7
    num_labels = type_sequence_label_size = 3

    def __init__(self, parent: unittest.TestCase, config_class: type, classes: tuple, options: dict[str, Any]):
        self.parent, self.config_class, self.options = parent, config_class, {**SIZES, **options}
        self.base_model_class, self.causal_lm_class = classes[0], classes[1]
        self.__dict__ |= self.options

    def get_config(self):
        return self.config_class(**self.options)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """What one process tests; a shape gives its classes and its options."""

    config_class: type = groupformer.GroupFormerConfig
    all_model_classes = OURS
    options: dict[str, Any] = {}
    model_tester = None

    def setUp(self):
        self.model_tester = Tester(self, self.config_class, self.all_model_classes, self.options)
        self.config_tester = ConfigTester(self, config_class=self.config_class, hidden_size=64)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model(self):
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            output = model_class(config).to(torch_device).eval()(**inputs)
            assert output[0].isfinite().all() and output[0].shape[0] == self.model_tester.batch_size
            assert not torch.isnan(output[0]).any()


class BothCacheNames:
    """Transformers 5.24 warns of the old name of a cache; here both names are taken, from 5.19 on."""

    def test_bc_cache_name_forward(self):
        self.skipTest("The old name of a cache is taken without a warning")


class WithoutRope:
    """Transformers' tests of RoPE ask whether the config has a field `rope_parameters`, not whether it is used."""

    def skip(self, *_, **__):
        self.skipTest("This shape has no RoPE")

    test_model_rope_scaling_frequencies = test_model_rope_with_partial_rotation = skip
    test_model_rope_scaling_from_config_0_linear = test_model_rope_scaling_from_config_1_dynamic = skip
    test_model_rope_scaling_from_config_2_yarn = skip


class Bidirectional:
    """A model that sees what follows does not generate."""

    def test_training_overfit(self):
        self.skipTest("This shape does not generate")


class LlamaTest(Suite, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase):
    """The reference: what is skipped here may be skipped below."""

    config_class = LlamaConfig
    all_model_classes = LLAMA
    options = {"num_key_value_heads": 2}


class MhaLearnedTest(BothCacheNames, WithoutRope, Suite, TensorParallelTesterMixin, unittest.TestCase):
    options = {"num_key_value_heads": 4, **LEARNED}


class GqaRopeTest(BothCacheNames, Suite, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase):
    options = {"num_key_value_heads": 2}


class MqaAlibiTest(BothCacheNames, WithoutRope, Suite, unittest.TestCase):
    options = {"num_key_value_heads": 1, "position_embedding_type": "alibi"}


class MhaLearnedBidirectionalTest(BothCacheNames, WithoutRope, Bidirectional, Suite, unittest.TestCase):
    options = {"num_key_value_heads": 4, "is_causal": False, **LEARNED}


class GqaRopeBidirectionalTest(BothCacheNames, Bidirectional, Suite, unittest.TestCase):
    options = {"num_key_value_heads": 2, "is_causal": False}
