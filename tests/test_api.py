"""The commands as functions: `groupformer.evaluate`, `plan` and `uptrain`."""

import inspect
import json

import pytest
from typer.testing import CliRunner

import groupformer
from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands import plan as plan_module
from groupformer.commands.main import app
from groupformer.training.uptraining import UptrainRecipe

from .helpers import randomize, tiny_config


TEXTS = ["A river flows to the sea.", "It is deep there, and wide."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    randomize(GroupFormerForCausalLM(tiny_config(vocab_size=16384, num_key_value_heads=4))).save_pretrained(folder)
    GroupFormerTokenizer().save_pretrained(folder)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder


def command(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def test_evaluate_measures_what_the_command_measures(folder):
    expected = command("eval", folder, "--file", folder / "text.jsonl")
    assert groupformer.evaluate(folder, TEXTS) == pytest.approx(expected)
    model = GroupFormerForCausalLM.from_pretrained(folder)
    assert groupformer.evaluate(model, TEXTS, tokenizer=GroupFormerTokenizer()) == pytest.approx(expected)


def test_evaluate_needs_the_tokenizer_of_a_model_in_memory():
    with pytest.raises(ValueError, match=r"tokenizer \(None\) of a model in memory"):
        groupformer.evaluate(GroupFormerForCausalLM(tiny_config()), TEXTS)


def test_plan_counts_what_the_command_counts(folder):
    expected = command("plan", folder)
    model = GroupFormerForCausalLM.from_pretrained(folder)
    for source in (folder, model.config, model):
        rows = [vars(row) for row in groupformer.plan(source)]
        assert rows == [{name: value for name, value in row.items() if name != "class"} for row in expected]
    with pytest.raises(ValueError, match=r"cache_dtype \(int3\) is unknown; choose float32, bfloat16"):
        groupformer.plan(model, cache_dtype="int3")


@pytest.mark.parametrize("function, command", [(groupformer.plan, plan_module.plan_command)])
def test_the_defaults_are_the_commands(function, command):
    options = inspect.signature(command).parameters
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert defaults == {name: options[name].default for name in defaults}


def test_uptrain_trains_by_the_recipe_of_its_arguments(folder, tmp_path):
    fields = {"train_files": [str(folder / "text.jsonl")], "kl_weight": 0.0, "ce_weight": 1.0, "tokens": 16}
    fields |= {"row_length": 4, "batch_size": 1, "evaluations": 1, "device": "cpu"}
    assert set(fields) <= set(inspect.signature(UptrainRecipe).parameters)
    results = groupformer.uptrain(folder, tmp_path / "run", **fields)
    assert results["tokens"] >= 16
    assert (tmp_path / "run" / "model.safetensors").is_file()
