"""What `import groupformer` does to transformers and PEFT, and what it leaves alone."""

import importlib
import logging
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping

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
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


# Where names are looked up: modules of these packages, once what looks things up there has been imported.
LOOKING = ("transformers.trainer", "transformers.pipelines", "transformers.modelcard", "peft", "accelerate", "trl")

# Tables with an entry for Llama that need none for us, and why.
NOT_NEEDED = {
    "_import_structure": "where transformers' own modules are; ours are set on the package",
    "_class_to_module": "the same",
    "_modules": "the same",
    "CONFIG_MAPPING_NAMES": "where transformers' own configs are; CONFIG_MAPPING holds ours",
    "CONFIG_TO_TYPE": "the same, turned around",
    "SLOW_TO_FAST_CONVERTERS": "there is no slow tokenizer of ours",
    "TOKENIZER_CLASSES": "the same",
    "GGUF_CONFIG_MAPPING": "architectures of GGUF files; a file of ours has that of its native class",
    "GGUF_SUPPORTED_ARCHITECTURES": "the same",
    "GGUF_TOKENIZER_TYPES": "the same",
    "TENSOR_PROCESSORS": "the same",
    "DEFAULT_EXAMPLES": "prompts of a chat, of which one is about a llama",
    "MODEL_CONFIGS_TO_MEGATRON_PARSERS": "Megatron-LM builds a Llama of its own; it has none of our variants",
}


def names_llama(entry) -> bool:
    """Whether an entry of a table is Llama's: its model type, or one of its classes."""
    name = entry.__name__ if isinstance(entry, type) else entry
    return isinstance(name, str) and re.fullmatch(r"llama|Llama(Config|Model|ForCausalLM|For\w+)", name) is not None


def ours(entry):
    """What stands in our entry where `entry` stands in Llama's."""
    name = entry.__name__ if isinstance(entry, type) else entry
    name = "groupformer" if name == "llama" else name.replace("Llama", "GroupFormer")
    return getattr(groupformer, name) if isinstance(entry, type) else name


def tables_of_llama(prefixes):
    """Every table of a loaded module that names Llama: its name, and the table."""
    found = {}
    for module_name, module in sorted(sys.modules.items()):
        inside = module_name.startswith("transformers.models.") and ".auto" not in module_name
        if module_name.split(".")[0] not in prefixes or inside:
            continue
        for name, table in list(vars(module).items()):
            if not name.startswith("__") and isinstance(
                table, (Mapping, _LazyAutoMapping, list, tuple, set, frozenset)
            ):
                extra = list(getattr(table, "_model_mapping", ()))  # the keys of a lazy mapping import every model
                if any(names_llama(entry) for entry in extra or list(table)):
                    found.setdefault(id(table), (name, table))
    return sorted(found.values(), key=lambda pair: pair[0])


def missing_entries(prefixes):
    """The tables in which Llama has an entry and we have none, and the entries."""
    missing = {}
    for name, table in tables_of_llama(prefixes):
        if name in NOT_NEEDED:
            continue
        if isinstance(table, _LazyAutoMapping):
            lacking = [] if GroupFormerConfig in table else ["GroupFormerConfig"]
        else:
            lacking = [str(entry) for entry in table if names_llama(entry) and ours(entry) not in table]
        if type(table) in (dict, OrderedDict) and names_llama(table.get("llama")):
            lacking += [] if table.get("groupformer") == ours(table["llama"]) else [table["llama"]]
        if lacking:
            missing[name] = lacking
    return missing


def test_we_have_an_entry_in_every_table_in_which_llama_has_one():
    for name in (*LOOKING, "transformers.models.llama.modeling_llama", "peft.tuners.adaption_prompt.config"):
        importlib.import_module(name)
    names = {name for name, _ in tables_of_llama(("transformers", "peft", "accelerate", "trl"))}
    assert {"MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CONFIG_MAPPING"} <= names
    assert {"TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "TRANSFORMERS_MODEL_CONFIG"} <= names
    assert missing_entries(("transformers", "peft", "accelerate", "trl")) == {}


@pytest.mark.slow
def test_no_other_module_has_a_table_with_llama_either():
    """In a process of its own, since everything is imported there that can be."""
    code = """
import importlib, logging, pkgutil, warnings
import tests.test_registration as here
warnings.simplefilter("ignore")
for package in ("transformers", "peft", "accelerate", "trl"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        own = module.name.startswith("transformers.models.") and ".auto" not in module.name
        if not own and not any(part in module.name for part in ("test_utils", "commands", "kernels", "cli.add")):
            try:
                importlib.import_module(module.name)
            except (ImportError, NameError):
                pass  # needs what is not installed, or names its types
print(here.missing_entries(("transformers", "peft", "accelerate", "trl")))
"""
    assert python(code).splitlines()[-1] == "{}"


def test_label_smoothing_predicts_the_next_token(tmp_path):
    """Trainer shifts the labels of classes that it finds in a table of names."""
    set_seed(0)
    model, row = GroupFormerForCausalLM(tiny_config()), list(range(5, 29))
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_steps=150,
        learning_rate=5e-3, label_smoothing_factor=0.1,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 8).train()
    predicted = model.eval()(torch.tensor([row])).logits.argmax(-1)[0].tolist()
    assert predicted[:-1] == row[1:]


def test_trainer_smooths_the_labels_of_remote_code_as_well(tmp_path, monkeypatch):
    randomize(GroupFormerForCausalLM(tiny_config())).save_pretrained(tmp_path)
    monkeypatch.delitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "groupformer")  # as where the package is not imported
    remote = get_class_from_dynamic_module("modeling_groupformer.GroupFormerForCausalLM", tmp_path)
    model, ids = remote.from_pretrained(tmp_path), random_ids(2, 6)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.1)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "task,head",
    [
        ("text-generation", "CausalLM"),
        ("text-classification", "SequenceClassification"),
        ("token-classification", "TokenClassification"),
    ],
)
def test_pipelines_take_our_models_without_complaint(task, head, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = getattr(groupformer, f"GroupFormerFor{head}")(tiny_config(vocab_size=16384))
    pipeline(task, model=model, tokenizer=GroupFormerTokenizer())("a river")
    assert "not supported" not in caplog.text


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
