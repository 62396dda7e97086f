"""The demo shows what it claims: an exact share of the cache, quality won back, the same answer after loading."""

import json
import re
import subprocess
import sys

import pytest
import typer

from groupformer.commands import demo
from groupformer.commands.main import app


def run_demo(*arguments):
    command = [sys.executable, "-m", "groupformer", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_demo_leaves_a_folder_that_is_not_empty_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    done = run_demo("--output", tmp_path)
    assert done.returncode == 1 and "is not empty; choose another folder" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_the_commands_that_the_demo_prints_are_there():
    commands = typer.main.get_command(app).commands
    lines = re.findall(r"^  groupformer (\w+) (.*)$", demo.YOUR_OWN, flags=re.MULTILINE)
    assert len(lines) == 3
    for name, words in lines:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", words)) <= options


@pytest.mark.slow
def test_the_demo_keeps_its_claims(tmp_path):
    done = run_demo("--output", tmp_path / "small", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    original, merged, healed = results["rows"]
    assert (original["kv_heads"], merged["kv_heads"], healed["kv_heads"]) == (8, 2, 2)
    assert original["cache_bytes_per_token"] == 2 * 8 * 8 * 32 * 4  # keys and values, layers, heads, head_dim, float32
    assert merged["cache_ratio"] == healed["cache_ratio"] == 1 / 4
    assert original["bits_per_byte"] < healed["bits_per_byte"] < merged["bits_per_byte"]
    assert results["fine_tuned"] < healed["bits_per_byte"]
    assert results["reloaded"] == {"class": "GroupFormerForCausalLM", "text": results["answers"]["healed"]}
    assert (tmp_path / "small" / "model.safetensors").is_file()
    for step in range(1, 7):  # with --json the story goes to stderr
        assert re.search(rf"^{step}\. ", done.stderr, flags=re.MULTILINE)
