"""What `import groupformer` does to transformers and PEFT, and what it leaves alone."""

import subprocess
import sys

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import groupformer
from groupformer import GroupFormerConfig, GroupFormerForCausalLM, GroupFormerTokenizer

from .helpers import random_ids, randomize, tiny_config


HEADS = {
    AutoModel: ("GroupFormerModel", "FEATURE_EXTRACTION"),
    AutoModelForCausalLM: ("GroupFormerForCausalLM", "CAUSAL_LM"),
    AutoModelForSequenceClassification: ("GroupFormerForSequenceClassification", "SEQ_CLS"),
    AutoModelForTokenClassification: ("GroupFormerForTokenClassification", "TOKEN_CLS"),
    AutoModelForQuestionAnswering: ("GroupFormerForQuestionAnswering", "QUESTION_ANS"),
}


def python(code):
    """Runs code in a fresh process and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("auto_class", HEADS)
def test_every_auto_class_builds_our_model(auto_class):
    assert type(auto_class.from_config(tiny_config())).__name__ == HEADS[auto_class][0]


def test_auto_config_and_auto_tokenizer_know_us(tmp_path):
    assert type(AutoConfig.for_model("groupformer")) is GroupFormerConfig
    tiny_config().save_pretrained(tmp_path)
    GroupFormerTokenizer().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is GroupFormerTokenizer


def test_registering_twice_or_after_another_plugin_is_harmless():
    AutoConfig.register("groupformer", GroupFormerConfig, exist_ok=True)
    groupformer.integrations.registration.register()
    groupformer.integrations.registration.register()
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is GroupFormerForCausalLM


def test_the_import_is_light():
    heavy = ("peft", "datasets", "vllm", "sklearn", "scipy", "matplotlib", "gradio", "trl", "typer", "rich")
    loaded = f"print([name for name in {heavy} if name in sys.modules])"
    before = python(f"import sys; from transformers import LlamaForCausalLM, AutoTokenizer; {loaded}")
    assert python(f"import sys, groupformer; {loaded}") == before


@pytest.mark.parametrize("order", ["groupformer, peft", "peft, groupformer"])
def test_peft_has_our_defaults_whichever_is_imported_first(order):
    code = f"import {order}; from peft.utils import constants as c; " + (
        "print(c.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING['groupformer'])"
    )
    assert python(code) == "['q_proj', 'v_proj']"


@pytest.mark.parametrize("auto_class", HEADS)
def test_lora_needs_no_target_modules(auto_class):
    model = get_peft_model(auto_class.from_config(tiny_config()), LoraConfig(task_type=HEADS[auto_class][1]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("q_proj.lora_A" in name for name in trained)
    assert not any("embed_tokens" in name for name in trained)


@pytest.mark.parametrize(
    "config", [IA3Config, peft.AdaLoraConfig, peft.LoHaConfig, peft.LoKrConfig, peft.OFTConfig, peft.VeraConfig]
)
def test_other_adapters_need_no_target_modules_either(config):
    options = {"total_step": 10} if config is peft.AdaLoraConfig else {}
    options |= {"oft_block_size": 4} if config is peft.OFTConfig else {}
    model = get_peft_model(GroupFormerForCausalLM(tiny_config()), config(task_type="CAUSAL_LM", **options))
    assert torch.isfinite(model(random_ids(1, 4)).logits).all()


def test_a_trained_adapter_is_saved_loaded_and_merged(tmp_path):
    base = randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2)))
    base.save_pretrained(tmp_path / "base")
    base = GroupFormerForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    expected = model(random_ids(1, 5)).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(random_ids(1, 5)).logits, expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is GroupFormerForCausalLM
    torch.testing.assert_close(merged(random_ids(1, 5)).logits, expected, rtol=1e-4, atol=1e-4)
