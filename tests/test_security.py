"""Security: nothing that is loaded or read runs code that it brings along, or leaves its folder."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from jinja2.exceptions import SecurityError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.conversion import import_folder
from groupformer.conversion.loading import load_checked
from groupformer.training.data import load_files
from groupformer.training.finetuning import FinetuneRecipe
from groupformer.training.pretraining import PretrainRecipe, pretrain

from .helpers import tiny_config
from .test_training import tiny_pretraining


@pytest.fixture
def marker(tmp_path):
    """A folder that every attack here tries to make, and that must not be there in the end."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists()


@pytest.fixture
def checkpoint(tmp_path):
    GroupFormerForCausalLM(tiny_config(vocab_size=16384)).save_pretrained(tmp_path / "model")
    GroupFormerTokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Attack:
    """Makes the marker when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_attack_of_these_tests_works(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()


def load_language_model(folder):
    return load_checked(AutoModelForCausalLM, folder)


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_language_model])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_bin_file_is_not_unpickled(load, zipped, checkpoint, marker):
    (checkpoint / "model.safetensors").unlink()
    weights = {"model.norm.weight": Attack(marker)}
    if zipped:
        torch.save(weights, checkpoint / "pytorch_model.bin")
    else:
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(weights, protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        load(checkpoint)


def test_a_pickle_that_is_called_safetensors_is_not_unpickled(checkpoint, marker):
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or broken"):
        load_checked(AutoModelForCausalLM, checkpoint)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret", "a/../../secret", ".."])
def test_an_index_cannot_name_files_outside_its_folder(shard, checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leaves the folder"):
        load_checked(AutoModelForCausalLM, checkpoint)


def test_a_gguf_file_that_is_a_pickle_is_not_run(tmp_path, marker):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + pickle.dumps(Attack(marker)))
    with pytest.raises(ValueError, match=r"model.gguf cannot be loaded"):
        import_folder(path, tmp_path / "ours")


# Configs, tokenizers and templates -----------------------------------------------------------------------------------

EVIL_CODE = "import os\nos.mkdir({marker!r})\nclass Evil: pass\n"


def test_code_beside_a_checkpoint_is_not_run_unasked(checkpoint, marker):
    (checkpoint / "evil.py").write_text(EVIL_CODE.format(marker=str(marker)))
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    change_json(checkpoint / "config.json", auto_map=dict.fromkeys(names, "evil.Evil"))
    change_json(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    assert type(AutoConfig.from_pretrained(checkpoint)).__name__ == "GroupFormerConfig"
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)) is GroupFormerForCausalLM
    assert type(AutoTokenizer.from_pretrained(checkpoint)) is GroupFormerTokenizer


def test_commands_never_trust_code_beside_an_unknown_checkpoint(tmp_path, marker):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "evil.py").write_text(EVIL_CODE.format(marker=str(marker)))
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("The river is wide.")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    for command in (
        ["info", model],
        ["plan", model],
        ["generate", model, "The river"],
        ["import", model, out],
        ["regroup", model, out, "--kv-heads", "1"],
        ["eval", model, "--file", str(tmp_path / "text.txt")],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1 and isinstance(done.exception, ValueError | OSError), (command, done.exception)


def test_commands_neither_run_nor_ask_for_the_code_of_a_tokenizer(checkpoint, tmp_path, marker):
    evil, text = tmp_path / "evil", tmp_path / "text.txt"
    GroupFormerTokenizer().save_pretrained(evil)
    (evil / "evil.py").write_text(EVIL_CODE.format(marker=str(marker)))
    (evil / "config.json").write_text('{"model_type": "evil"}')
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    change_json(evil / "tokenizer_config.json", **code)
    text.write_text("The river is wide.")
    words = ["eval", str(checkpoint), "--file", str(text), "--tokenizer", str(evil)]
    done = CliRunner().invoke(app, words, input="y\n")
    assert isinstance(done.exception, ValueError) and "choose another one" in str(done.exception)
    assert "[y/N]" not in done.output


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("backend", ["evil/kernel", "evil/kernel@main:run", "paged|evil/kernel", {"": "evil/kernel"}])
def test_a_config_file_cannot_fetch_a_kernel_from_the_hub(field, backend, checkpoint):
    change_json(checkpoint / "config.json", **{field: backend})
    with pytest.raises(ValueError, match=f"{field} .* would fetch code from the Hub"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=f"{field} .* would fetch code from the Hub"):
        AutoConfig.from_pretrained(checkpoint)


def test_a_config_file_may_name_a_backend_that_is_installed(checkpoint):
    change_json(checkpoint / "config.json", attn_implementation="eager")
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config._attn_implementation == "eager"


def test_a_chat_template_runs_in_a_sandbox(checkpoint, marker):
    template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
    (checkpoint / "chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_pickle_in_the_place_of_json_is_not_unpickled(name, checkpoint, marker):
    (checkpoint / name).write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(Exception):  # noqa: B017  each library has its own; what counts is the marker
        load_checked(AutoModelForCausalLM, checkpoint)
        AutoTokenizer.from_pretrained(checkpoint)


# Recipes, data and training state ------------------------------------------------------------------------------------


def test_a_recipe_is_data(tmp_path, marker):
    (tmp_path / "recipe.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']")
    with pytest.raises(ValueError, match="is not YAML"):
        PretrainRecipe.from_file(tmp_path / "recipe.yaml")


def test_code_is_no_data_file(tmp_path, marker):
    (tmp_path / "evil.py").write_text(EVIL_CODE.format(marker=str(marker)))
    with pytest.raises(ValueError, match=r"files \(\.py\) must be of one known kind"):
        load_files([tmp_path / "evil.py"])
    with pytest.raises(ValueError, match=r"files \(\.py\) must be of one known kind"):
        from groupformer.training.finetuning import finetune

        finetune(FinetuneRecipe(task="causal-lm", train_files=[str(tmp_path / "evil.py")]), tmp_path / "run")


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_training_state_is_not_unpickled(file, tmp_path, marker):
    pretrain(tiny_pretraining(tmp_path, max_steps=2), tmp_path / "run", keep_checkpoints=True)
    torch.save({"state": Attack(marker)}, tmp_path / "run" / "checkpoint-2" / file)
    with pytest.raises(pickle.UnpicklingError):
        pretrain(tiny_pretraining(tmp_path, max_steps=4), tmp_path / "run", resume=True)


# Secrets -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_token_is_printed_when_the_hub_cannot_be_reached(debug, tmp_path):
    token = "hf_" + "s3cr3t" * 6
    environment = {**os.environ, "HF_TOKEN": token, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [
        sys.executable,
        "-m",
        "groupformer.commands.main",
        *debug,
        "import",
        "someone/private",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "someone/private" in done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr
