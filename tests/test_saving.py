"""Saving and loading: quiet, whole, and the same in every way that transformers offers."""

import json
import logging
import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForSequenceClassification,
    GroupFormerModel,
    GroupFormerTokenizer,
)

from .helpers import random_ids, randomize, tiny_config


def build(**overrides):
    return randomize(GroupFormerForCausalLM(tiny_config(**overrides)))


def saved_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_tied_weights_are_saved_once_and_come_back(tmp_path):
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in saved_names(tmp_path)
    loaded = GroupFormerForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(random_ids(1, 4)).logits, model(random_ids(1, 4)).logits)


def test_untied_weights_are_both_saved(tmp_path):
    model = build(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= saved_names(tmp_path)
    assert torch.equal(GroupFormerForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_shards_hold_the_same_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = GroupFormerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(random_ids(1, 4)).logits, model(random_ids(1, 4)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype, tmp_path):
    build().to(dtype).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "alibi", "none"])
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_loads_the_same_model(device_map, position, tmp_path):
    model = build(position_embedding_type=position)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded(random_ids(1, 4)).logits, model(random_ids(1, 4)).logits)


def test_generation_settings_agree_with_the_config_and_survive(tmp_path):
    model = build(bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    fresh = model.generation_config
    assert (fresh.bos_token_id, fresh.eos_token_id, fresh.pad_token_id) == (3, [4, 5], 6)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=4)
    model.save_pretrained(tmp_path)
    loaded = GroupFormerForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.max_new_tokens, loaded.eos_token_id) == (7, 4)


@pytest.mark.parametrize("head", [GroupFormerModel, GroupFormerForCausalLM, GroupFormerForSequenceClassification])
def test_saving_and_loading_say_nothing(head, tmp_path, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            randomize(head(tiny_config())).save_pretrained(tmp_path)
            head.from_pretrained(tmp_path)
            GroupFormerTokenizer().save_pretrained(tmp_path)
            AutoTokenizer.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in caught] == []


def test_a_language_model_becomes_a_classifier_with_only_a_new_head(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded, report = GroupFormerForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"score.weight"}
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_norms_around_one_begin_at_one_where_a_file_lacks_them(tmp_path):
    model = build(norm_type="rms_norm_1p")
    lacking = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=lacking)
    assert model.model.norm.weight.abs().max() > 0
    assert GroupFormerForCausalLM.from_pretrained(tmp_path).model.norm.weight.abs().max() == 0


def test_a_base_model_loads_from_a_language_model_and_back(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "lm")
    base = GroupFormerModel.from_pretrained(tmp_path / "lm")
    base.save_pretrained(tmp_path / "base")
    again = GroupFormerForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again(random_ids(1, 4)).logits, model(random_ids(1, 4)).logits)


def test_the_saved_config_names_the_class_and_the_code(tmp_path):
    build().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["GroupFormerForCausalLM"]
    assert content["auto_map"]["AutoModelForCausalLM"] == "modeling_groupformer.GroupFormerForCausalLM"
    assert content["model_type"] == "groupformer"


def test_a_model_built_on_the_meta_device_needs_no_memory_and_loads():
    with torch.device("meta"):
        model = GroupFormerForCausalLM(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_linear_layer_that_somebody_put_in_torchs_place_is_used(monkeypatch):
    class Other(nn.Linear):
        pass

    monkeypatch.setattr(nn, "Linear", Other)
    assert type(GroupFormerForCausalLM(tiny_config()).lm_head) is Other


def test_fewer_layers_than_were_saved_are_the_first_ones(tmp_path):
    model = build(num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    first = GroupFormerForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(first.model.layers) == len(first.config.layer_types) == 2
    model.model.layers = model.model.layers[:2]
    assert torch.equal(first(random_ids(1, 4)).logits, model(random_ids(1, 4)).logits)
