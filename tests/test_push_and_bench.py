"""The commands that push a folder to the Hub and that time checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import groupformer as groupformer_package
from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.integrations.hub import card_of, missing_code, push_folder, read_config
from groupformer.measuring.speed import measure

from .helpers import randomize, tiny_config
from .helpers_families import native_model
from .hub_server import running_hub
from .test_hub import LOAD, WITHOUT_PACKAGE, run


def groupformer(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    model = randomize(GroupFormerForCausalLM(tiny_config(vocab_size=16384, num_key_value_heads=2)))
    model.save_pretrained(tmp_path / "model")
    GroupFormerTokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


PUSH_FOLDER = """
import sys
from groupformer.integrations.hub import missing_code, push_folder
print(push_folder(sys.argv[1], "me/pushed"))
"""


# Push ----------------------------------------------------------------------------------------------------------------


def test_what_the_folder_lacks_of_the_code_goes_along(folder):
    code = {path.name for path in folder.glob("*_groupformer.py")}
    assert {"configuration_groupformer.py", "modeling_groupformer.py", "tokenization_groupformer.py"} <= code
    assert missing_code(folder) == []
    (folder / "tokenization_groupformer.py").unlink()
    assert missing_code(folder) == ["tokenization_groupformer.py"]
    for path in folder.glob("*_groupformer.py"):
        path.unlink()
    assert set(missing_code(folder)) == code
    (folder / "tokenizer_config.json").unlink()
    assert set(missing_code(folder)) == code - {"tokenization_groupformer.py"}


def test_the_code_that_a_save_writes_is_all_that_the_code_imports(folder):
    """`save_pretrained` copies the files that the modeling file imports, as transformers finds them."""
    expected = {path.name for path in (Path(groupformer_package.__file__).parent / "model").glob("*_groupformer.py")}
    assert {path.name for path in folder.glob("*.py")} == expected


def test_a_push_is_one_commit_with_code_and_card(folder, tmp_path):
    for path in folder.glob("*_groupformer.py"):
        path.unlink()
    with running_hub() as (endpoint, hub):
        run(PUSH_FOLDER, folder, endpoint=endpoint, home=tmp_path / "pushing")
        assert len(hub.commits["me/pushed"]) == 2  # the first one is the empty repository
        files = set(hub.snapshot("me/pushed", "main")[1])
    code = {path.name for path in (Path(groupformer_package.__file__).parent / "model").glob("*_groupformer.py")}
    assert files >= code | {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert not list(folder.glob("*_groupformer.py"))  # the folder is as it was


def test_a_pushed_card_says_what_was_done_to_the_heads(tmp_path):
    """Also of models that were regrouped in memory, native ones too; a native model as it was needs no card."""
    llama = native_model("llama", "every head its own keys")
    models = {
        "native": groupformer_package.regroup(llama, 3),
        "ours": groupformer_package.regroup(llama, {0: 2}, method="mean"),
        "as it was": llama,
    }
    cards = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        cards[name] = card_of(tmp_path / name, "me/pushed", read_config(tmp_path / name))
    assert cards["as it was"] is None
    assert "- 6 -> 3 KV heads: svd, similar" in cards["native"] and "trust_remote_code" not in cards["native"]
    assert "- 6 -> by layer KV heads: mean, similar" in cards["ours"] and "# pushed" in cards["ours"]


@pytest.mark.slow
@pytest.mark.parametrize("code", ["its own code", "without code"])
def test_a_pushed_folder_loads_without_the_package(code, folder, tmp_path):
    if code == "without code":
        for path in folder.glob("*_groupformer.py"):
            path.unlink()
    (folder / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/optimizer.pt", "checkpoint-3/model.safetensors", "results.json", "training_args.bin"):
        (folder / name).write_bytes(b"stays at home")
    with running_hub() as (endpoint, hub):
        assert "me/pushed" in run(PUSH_FOLDER, folder, endpoint=endpoint, home=tmp_path / "pushing")
        _, files = hub.snapshot("me/pushed", "main")
        arguments = ("me/pushed", "", "{}")
        result = json.loads(run(WITHOUT_PACKAGE + LOAD, *arguments, endpoint=endpoint, home=tmp_path / "loading"))
    assert {"config.json", "model.safetensors", "modeling_groupformer.py", "tokenizer.json", "README.md"} <= set(files)
    assert not any("stays at home" in content.decode(errors="ignore") for content in files.values())
    assert result["names"][0] == "GroupFormerForCausalLM"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert "4 query heads on 2 key-value heads in each of 2 layers" in " ".join(card.text.split())
    assert "Its KV cache takes 256 bytes a token" in " ".join(card.text.split())


@pytest.mark.parametrize(
    "missing, message",
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds no .safetensors file"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_not_pushed(missing, message, folder):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        push_folder(folder, "me/pushed")


def test_broken_weights_are_not_pushed(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or broken"):
        push_folder(folder, "me/pushed")


@pytest.mark.parametrize("name", ["pushed", "me/pushed/again", "/pushed", "./pushed"])
def test_a_repository_is_a_user_and_a_name(name, folder):
    done = groupformer("push", folder, name)
    assert done.exit_code == 1 and "must be USER/NAME" in str(done.exception)


# Bench ---------------------------------------------------------------------------------------------------------------


def test_caches_are_weighed_and_speeds_related_to_the_first():
    models = {
        heads: GroupFormerForCausalLM(tiny_config(num_key_value_heads=heads)).eval() for heads in (4, 1)
    }  # 2 layers of heads of 8 features
    first, second = measure(models, context=10, batch=2, new_tokens=3, rounds=2)
    assert first["cache_bytes"] == 2 * 2 * 2 * 4 * 8 * 12 * torch.float32.itemsize
    assert first["cache_bytes"] == 4 * second["cache_bytes"]
    assert first["decode_ratio"] == 1.0
    assert second["decode_ratio"] == second["decode_tokens_per_second"] / first["decode_tokens_per_second"]


def test_the_command_prints_a_table_or_json(folder):
    options = ("--context", 8, "--new-tokens", 2, "--rounds", 1)
    assert "8 tokens, then 2 decoded" in groupformer("bench", folder, *options).stdout
    rows = json.loads(groupformer("bench", folder, *options, "--json").stdout)
    assert rows[0]["model"] == str(folder) and rows[0]["milliseconds_per_step"] > 0


def test_a_prompt_beyond_the_positions_is_refused(folder):
    done = groupformer("bench", folder, "--context", 60, "--new-tokens", 10)
    assert done.exit_code == 1
    assert "--context and --new-tokens (60 + 10) exceed the 64 positions" in str(done.exception)
