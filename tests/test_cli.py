"""The command line as a shell sees it: help, results, errors in one line, exit codes."""

import json
import subprocess
import sys

import pytest


def groupformer(*arguments):
    """Runs the command in a fresh process."""
    command = [sys.executable, "-m", "groupformer.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_lists_the_commands():
    done = groupformer("--help")
    assert done.returncode == 0
    for command in ("demo", "tokenizer", "pretrain", "finetune", "import", "export"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("finetune", "--task", "translation"), "error: task ('translation') is unknown; choose from causal-lm"),
        (("pretrain", "no-such-recipe.yaml"), "error: recipe (no-such-recipe.yaml) is not there; check the path"),
        (("tokenizer", "eval", "no-such-file.txt"), "error: file (no-such-file.txt) is not there; check the path"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(arguments, message):
    done = groupformer(*arguments)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr


def test_debug_shows_the_traceback():
    done = groupformer("--debug", "pretrain", "no-such-recipe.yaml")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_wrong_option_is_exit_code_2():
    assert groupformer("pretrain", "--no-such-option").returncode == 2


def test_a_tokenizer_is_measured_as_json(tmp_path):
    (tmp_path / "text.txt").write_text("The river bank is made of clay and gravel.\n" * 3)
    done = groupformer("tokenizer", "eval", tmp_path / "text.txt", "--json")
    row = json.loads(done.stdout.splitlines()[-1])[str(tmp_path / "text.txt")]
    assert row["bytes"] == 129 and row["bytes_per_token"] > 3


def test_the_demo_leaves_a_folder_that_is_not_empty_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    done = groupformer("demo", "--output", tmp_path)
    assert done.returncode == 1 and "is not empty; choose another folder" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "keep me"


@pytest.mark.slow
def test_the_demo_adapts_a_model_and_reloads_it(tmp_path):
    done = groupformer("demo", "--output", tmp_path / "out", "--steps", "30")
    assert done.returncode == 0, done.stderr
    assert "after, reloaded" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
