"""A regrouped model leaves for its native family: the same logits there, and the smaller cache."""

import json

import pytest
import torch
from typer.testing import CliRunner

import groupformer
from groupformer.commands.main import app
from groupformer.regrouping.heal_recipe import HealRecipe

from .helpers import random_ids
from .helpers_families import native_model
from .test_bridge_gguf import llama_cpp, needs_llama_cpp


# Families whose own class can express fewer key-value heads than query heads, and an example with several of them.
GROUPED = [
    ("llama", "every head its own keys"),
    ("llama", "llama3 rope"),
    ("mistral", "no window"),
    ("qwen2", "no window"),
    ("qwen3", "wide heads"),
    ("olmo2", "grouped queries"),
    ("starcoder2", "biases"),
    ("phi", "half of each head rotated"),
]


def cache_bytes(model, ids) -> int:
    cache = model(ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def many_heads(name: str, option: str):
    """A native model with as many key-value heads as query heads."""
    return native_model(name, option, num_attention_heads=6, num_key_value_heads=6)


@torch.no_grad()
@pytest.mark.parametrize(("name", "option"), GROUPED)
@pytest.mark.parametrize("heads", [3, 1])
def test_the_native_class_gives_the_same_logits_with_a_smaller_cache(name, option, heads):
    native = many_heads(name, option)
    ids = random_ids(2, 9, native.config.vocab_size)
    small = groupformer.regroup(
        groupformer.import_model(native), heads, calibration=random_ids(8, 32, native.config.vocab_size)
    )
    back = groupformer.export_model(small)
    assert type(back) is type(native)
    assert back.config.num_key_value_heads == heads
    expected = small.eval()(ids).logits
    assert torch.allclose(back.eval()(ids).logits, expected, atol=2e-5 * expected.abs().max())
    assert cache_bytes(back, ids) * 6 == cache_bytes(native, ids) * heads


@pytest.mark.parametrize(
    ("name", "option", "field"),
    [("gpt2", "odd heads", "num_key_value_heads"), ("bloom", "four heads", "num_key_value_heads")],
)
def test_families_without_groups_refuse_by_the_field(name, option, field):
    small = groupformer.regroup(groupformer.import_model(native_model(name, option)), 1)
    with pytest.raises(ValueError, match=field):
        groupformer.export_model(small)


def regrouped_folder(tmp_path):
    """The commands, one after the other: native folder, imported, regrouped."""
    native = many_heads("llama", "every head its own keys")
    native.save_pretrained(tmp_path / "native")
    for arguments in (["import", "native", "ours"], ["regroup", "ours", "small", "--kv-heads", "2"]):
        arguments = [str(tmp_path / each) if each in ("native", "ours", "small") else each for each in arguments]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    return tmp_path / "small"


def test_the_commands_lead_from_llama_to_a_smaller_llama(tmp_path):
    folder = regrouped_folder(tmp_path)
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "back")])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", 2)


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_runs_a_regrouped_model(tmp_path):
    folder = regrouped_folder(tmp_path)
    model = groupformer.GroupFormerForCausalLM.from_pretrained(folder)
    arguments = ["export", str(folder), str(tmp_path / "model.gguf"), "--format", "gguf", "--no-tokenizer"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    ids = random_ids(1, 21, model.config.vocab_size)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert llama_cpp(tmp_path / "model.gguf", ids[0].tolist())[1] == expected[0, 21:].tolist()


def test_a_groupformer_heals_by_its_native_original():
    original = native_model("gpt2", "odd heads")
    merged, by_import = (groupformer.regroup(original, 1, method="mean") for _ in range(2))
    recipe, token_ids = HealRecipe(epochs=1, joint_epochs=0), random_ids(8, 16, original.config.vocab_size)
    report = groupformer.heal(merged, original, token_ids, recipe)
    groupformer.heal(by_import, groupformer.import_model(original), token_ids, recipe)
    assert any(layer.healed < layer.merged for layer in report.layers)
    assert all(torch.equal(tensor, by_import.state_dict()[name]) for name, tensor in merged.state_dict().items())
