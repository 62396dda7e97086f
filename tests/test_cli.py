"""The command line as a shell sees it: help, results, errors in one line, exit codes."""

import json
import os
import subprocess
import sys

import pytest
import typer

from groupformer.commands.main import app
from groupformer.commands.regrouping import Grouping, Method
from groupformer.regrouping.grouping import GROUPINGS
from groupformer.regrouping.merging import METHODS


def groupformer(*arguments):
    """Runs the command in a fresh process."""
    command = [sys.executable, "-m", "groupformer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_lists_the_commands():
    done = groupformer("--help")
    assert done.returncode == 0
    for command in ("demo", "tokenizer", "pretrain", "finetune", "import", "export"):
        assert command in done.stdout


def commands(command=None, words=()):
    """Every command with its words, e.g. ("tokenizer", "train")."""
    command = command or typer.main.get_command(app)
    if hasattr(command, "commands"):
        return [found for name, each in command.commands.items() for found in commands(each, (*words, name))]
    return [(" ".join(words), command)]


@pytest.mark.parametrize("name, command", commands(), ids=[name for name, _ in commands()])
def test_the_help_of_a_command_has_an_example_that_is_one(name, command):
    example = command.help.split("Example: ")[1].splitlines()[0].split()
    assert example[: 1 + len(name.split())] == ["groupformer", *name.split()]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in example if word.startswith("--")} <= known


@pytest.mark.parametrize("option", ["--json", "--device", "--overwrite", "--seed", "--text-column", "--resume"])
def test_an_option_is_of_one_kind_wherever_it_stands(option):
    found = [each for _, command in commands() for each in command.params if option in each.opts]
    assert len(found) > 1
    assert len({(each.is_flag, each.multiple, each.nargs) for each in found}) == 1


@pytest.mark.parametrize(
    "name", ["demo", "info", "plan", "tokenizer eval", "pretrain", "finetune", "eval", "uptrain", "bench"]
)
def test_what_prints_a_table_prints_json_too(name):
    assert any("--json" in parameter.opts for parameter in dict(commands())[name].params)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "hub_card", "The"),
        ("eval", "hub_card", "--file", "README.md"),
        ("bench", "hub_card"),
        ("pretrain", "--train-file", "README.md"),
        ("finetune", "--task", "causal-lm", "--train-file", "README.md"),
        ("uptrain", "hub_card", "--teacher", "hub_card", "--data", "README.md", "--tokens", "1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_device_that_is_not_there_is_refused_by_name(arguments, tmp_path):
    output = ("--output", tmp_path / "out") if arguments[0] in ("pretrain", "finetune", "uptrain") else ()
    done = groupformer(*arguments, *output, "--device", "tpu")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert (
        done.stderr.startswith("error: device (tpu) is not there; choose cpu") and len(done.stderr.splitlines()) == 1
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
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
    for arguments in (("--debug", "pretrain", "no-such-recipe.yaml"), ("pretrain", "no-such-recipe.yaml", "--debug")):
        done = groupformer(*arguments)
        assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("pretrain", "--no-such-option"), "No such option: --no-such-option"),
        (("import",), "Missing argument 'SRC'"),
        (("finetune", "--task", "translation"), "Invalid value for '--task'"),
        (("improt",), "No such command 'improt'"),
        (("bench", "hub_card", "--context", "0"), "Invalid value for '--context'"),
    ],
)
def test_a_wrong_line_is_one_line_that_names_the_help_and_exit_code_2(arguments, message):
    done = groupformer(*arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {message}") and done.stderr.endswith("--help\n")


@pytest.mark.parametrize("group", [(), ("tokenizer",)])
def test_a_group_by_itself_shows_its_help(group):
    done = groupformer(*group)
    assert done.returncode == 2 and "Usage: groupformer" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["info", "plan", "generate", "import", "regroup", "bench", "demo", "uptrain"])
def test_a_path_that_is_not_there_is_named(command, tmp_path):
    wrong = tmp_path / "no" / "model"
    more = {"generate": ["x"], "import": ["out"], "regroup": ["out", "--kv-heads", "1"]}.get(command, [])
    more = ["--data", "x", "--tokens", "1"] if command == "uptrain" else more
    done = groupformer(command, *(["--model"] if command == "demo" else []), wrong, *more)
    assert done.returncode == 1
    assert done.stderr == f"error: {wrong} is not there, and is no Hub id (USER/NAME) either; check the path\n"


def test_a_folder_without_a_config_is_named(tmp_path):
    done = groupformer("eval", tmp_path, "--file", "README.md")
    assert done.stderr == f"error: {tmp_path} holds no config.json; give the folder of a checkpoint\n"


def test_a_name_that_the_hub_does_not_give_is_named():
    done = groupformer("info", "hub_crad")
    assert done.returncode == 1 and done.stderr.startswith("error: hub_crad is not there, and not in the Hub's cache")


# Reading its prompt from a standard input that presses Ctrl-C.
CTRL_C = """
import os, signal, sys, types
from groupformer.commands import main as cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that a shell starts in the background ignore it
sys.stdin = types.SimpleNamespace(read=lambda: os.kill(os.getpid(), signal.SIGINT) or "text")
sys.argv = ["groupformer", "generate", "hub_card", "-"]
cli.main()
"""


def test_ctrl_c_is_exit_code_130():
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_completion_knows_the_commands():
    asked = {"_GROUPFORMER_COMPLETE": "complete_bash", "COMP_WORDS": "groupformer re", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "groupformer"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["regroup"]


def test_a_tokenizer_is_measured_as_json(tmp_path):
    (tmp_path / "text.txt").write_text("The river bank is made of clay and gravel.\n" * 3)
    done = groupformer("tokenizer", "eval", tmp_path / "text.txt", "--json")
    row = json.loads(done.stdout)[str(tmp_path / "text.txt")]
    assert row["bytes"] == 129 and row["bytes_per_token"] > 3


def test_the_choices_in_the_help_are_the_methods_and_groupings_that_there_are():
    assert [method.value for method in Method] == list(METHODS)
    assert [grouping.value for grouping in Grouping] == list(GROUPINGS)
