"""Every command with everything that can be wrong about its input: one line that says why, and nothing left behind.

Commands run in this process, but Ctrl-C, which needs one of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config
from typer.testing import CliRunner

from groupformer import GroupFormerTokenizer
from groupformer.commands.main import app, in_one_line
from groupformer.commands.shared import TrainingInterruptedError, resumable_healing
from groupformer.conversion import import_folder
from groupformer.conversion.gguf.writer import export_gguf
from groupformer.conversion.sources import check_on_hub
from groupformer.regrouping.heal_folders import merged_folder, work_folder


TEXT = "The river is wide, and the ferry is slow. " * 60
ROWS = 4  # of a text file: fine-tuning holds some out


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A Llama with its tokenizer, without one, with one of few words, as an adapter and as GGUF; and texts."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=16384, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.update({"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "head_dim": 8})
    config.update({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    model = LlamaForCausalLM(config)
    for name in ("whole", "bare", "few"):
        model.save_pretrained(folder / name)
    GroupFormerTokenizer().save_pretrained(folder / "whole")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "lorem": 1, "ipsum": 2, "dolor": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "few")
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "whole"), LoraConfig(task_type="CAUSAL_LM", r=2)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "whole")
    adapted.save_pretrained(folder / "adapter")
    import_folder(folder / "whole", folder / "ours")
    export_gguf(folder / "ours", folder / "model.gguf", tokenizer=False)
    (folder / "empty.txt").write_text("")
    for name, text in (("text", TEXT), ("other", "zzz qqq www " * 60)):
        (folder / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * ROWS)
    return folder


def prompt_of(file):
    """The beginning of a file's first row."""
    text = Path(file).read_text()
    return json.loads(text.splitlines()[0])["text"][:200] if text else text


# Every command that reads text: the words after the command, for a model, a text and an output.
WITH_TEXT = {
    "generate": lambda model, text, out: [model, prompt_of(text)],
    "eval": lambda model, text, out: [model, "--file", text],
    "regroup": lambda model, text, out: [model, out, "--kv-heads", "2", "--calibration", text],
    "heal": lambda model, text, out: [model, model, out, *f"--text {text} --tokens 64 --row-length 16".split()],
    "uptrain": lambda model, text, out: [
        *f"{model} --teacher {model} --data {text} --tokens 64 --output {out} --row-length 16".split(),
        *["--batch-size", "1", "--evaluations", "1"],
    ],
    "finetune": lambda model, text, out: [
        *f"--task causal-lm --model {model} --train-file {text} --output {out}".split()
    ],
    "pretrain": lambda model, text, out: [
        *f"--tokenizer {model} --train-file {text} --max-steps 1 --output {out}".split()
    ],
    "tokenizer eval": lambda model, text, out: [text, "--tokenizer", model],
}

SHORT = {"finetune": ["--epochs", "1", "--max-length", "32"], "generate": ["--max-new-tokens", "2"]}

# The others that read a checkpoint.
WITH_MODEL = {
    "info": lambda model, out: [model],
    "plan": lambda model, out: [model],
    "bench": lambda model, out: [model, "--context", "8", "--new-tokens", "2", "--rounds", "1"],
    "import": lambda model, out: [model, out],
    "export": lambda model, out: [model, out],
    "expand": lambda model, out: [model, out, "--kv-heads", "4"],
    "push": lambda model, out: [model, "nobody/nothing"],
    "demo": lambda model, out: ["--model", model, "--output", out],
    "app": lambda model, out: [model],
}


def run(command, words):
    return CliRunner().invoke(app, [*command.split(), *map(str, words)])


def refused(command, words, out, *parts):
    """Runs a command that must fail with one line that holds the parts, and leave nothing behind."""
    done = run(command, words)
    assert done.exit_code == 1, done.output
    line = in_one_line(done.exception)
    assert [part for part in parts if part not in line] == [], line
    assert isinstance(done.exception, ValueError)
    assert not out.exists() and not list(out.parent.glob(".*partial*"))


@pytest.mark.parametrize("command", WITH_TEXT)
def test_a_folder_without_a_tokenizer_is_refused(command, sources, tmp_path):
    words = WITH_TEXT[command](sources / "bare", sources / "text.jsonl", tmp_path / "out")
    remedy = "choose another one" if command in ("pretrain", "tokenizer eval") else "--tokenizer FOLDER"
    refused(command, words, tmp_path / "out", "has no tokenizer", remedy)


@pytest.mark.parametrize("command", [name for name in WITH_TEXT if name not in ("pretrain", "tokenizer eval")])
def test_another_tokenizer_stands_in_for_the_one_that_is_missing(command, sources, tmp_path):
    words = WITH_TEXT[command](sources / "bare", sources / "text.jsonl", tmp_path / "out")
    done = run(command, [*words, "--tokenizer", sources / "whole", *SHORT.get(command, [])])
    assert done.exit_code == 0, done.exception
    is_saved = (tmp_path / "out" / "tokenizer.json").exists()
    for line in (line for line in done.stdout.splitlines() if "groupformer eval" in line):
        assert f"--tokenizer {sources / 'whole'}" in line or is_saved, "the line to type next would fail"


@pytest.mark.parametrize("command", WITH_TEXT)
def test_empty_text_is_refused(command, sources, tmp_path):
    words = WITH_TEXT[command](sources / "whole", sources / "empty.txt", tmp_path / "out")
    refused(command, words, tmp_path / "out", "empty")


@pytest.mark.parametrize("command", [name for name in WITH_TEXT if name != "tokenizer eval"])
def test_text_of_unknown_tokens_is_refused(command, sources, tmp_path):
    words = WITH_TEXT[command](sources / "few", sources / "other.jsonl", tmp_path / "out")
    words += ["--max-length", "16"] if command == "finetune" else []
    if command == "pretrain":
        (tmp_path / "recipe.yaml").write_text("{row_length: 16}")
        words = [tmp_path / "recipe.yaml", *words]
    refused(command, words, tmp_path / "out", "only unknown tokens (<unk>)", "--tokenizer FOLDER")


def test_the_demo_takes_another_tokenizer_and_refuses_one_that_does_not_know_its_text(sources, tmp_path):
    words = WITH_MODEL["demo"](sources / "bare", tmp_path / "out")
    refused("demo", words, tmp_path / "out", "has no tokenizer", "--tokenizer FOLDER")
    words += ["--tokenizer", sources / "few"]
    refused("demo", words, tmp_path / "out", "the sample text has only unknown tokens", "--tokenizer FOLDER")


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("regroup", ["calibration has", "give at least as many tokens"]),
        ("heal", ["token_ids has shape", "give more text, or shorter rows"]),
        ("uptrain", ["row_length (16) leaves no row of training text", "give more text"]),
        ("finetune", ["train has 1 row, too few to hold some out", "give more rows"]),
        ("pretrain", ["row_length (512) is longer than all the training text", "choose a shorter row"]),
    ],
)
def test_text_that_is_too_short_is_refused_with_what_would_do(command, parts, sources, tmp_path):
    (tmp_path / "short.txt").write_text("The river.")
    words = WITH_TEXT[command](sources / "whole", tmp_path / "short.txt", tmp_path / "out")
    refused(command, words, tmp_path / "out", *parts)


MISSING = {
    **{name: ("datasets", "training") for name in WITH_TEXT if name != "generate"},
    "app": ("gradio", "app"),
    "plan": ("matplotlib", "app"),
}


@pytest.mark.parametrize("command", MISSING)
def test_a_missing_extra_is_named_with_the_line_that_installs_it(command, sources, tmp_path, monkeypatch):
    module, extra = MISSING[command]
    monkeypatch.setitem(sys.modules, module, None)
    if command in WITH_TEXT:
        words = WITH_TEXT[command](sources / "whole", sources / "text.jsonl", tmp_path / "out")
    else:
        words = WITH_MODEL[command](sources / "whole", tmp_path / "out")
    words += ["--plot", tmp_path / "out"] if command == "plan" else []
    refused(command, words, tmp_path / "out", module, f'pip install "groupformer[{extra}]"')


@pytest.mark.parametrize(
    ("source", "module", "extra"), [("model.gguf", "gguf", "serving"), ("adapter", "peft", "training")]
)
def test_a_missing_reader_of_files_is_named(source, module, extra, sources, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    words = ["generate", sources / source, "The river", "--tokenizer", sources / "whole"]
    refused(words[0], words[1:], tmp_path / "out", module, f'pip install "groupformer[{extra}]"')


@pytest.mark.parametrize("command", [name for name in (*WITH_TEXT, *WITH_MODEL) if name not in ("app", "push")])
def test_a_hub_id_without_a_network_is_one_line_at_once(command, sources, tmp_path):
    if command in WITH_TEXT:
        words = WITH_TEXT[command]("nobody/nothing", sources / "text.jsonl", tmp_path / "out")
    else:
        words = WITH_MODEL[command]("nobody/nothing", tmp_path / "out")
    started = time.perf_counter()
    refused(command, words, tmp_path / "out", "nobody/nothing is not there", "HF_HUB_OFFLINE=1 forbids")
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("source", "token", "parts"),
    [
        ("nobody/nothing", "hf_test", ["nobody/nothing is not a folder"]),
        ("model.gguf", "hf_test", ["model.gguf is not a folder"]),
        ("adapter", "hf_test", ["is an adapter without its model", "groupformer import"]),
        ("whole", "", ["someone/model cannot be pushed without a token", "hf auth login"]),
        ("whole", "hf_test", ["someone/model: the Hub cannot be reached (", "check the network"]),
        ("whole", "offline", ["someone/model cannot be pushed while HF_HUB_OFFLINE=1", "unset it"]),
    ],
)
def test_a_push_that_cannot_be_is_one_line(source, token, parts, sources, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    def fail(self, repo_id, **options):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", token == "offline")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token or None)
    monkeypatch.setattr(HfApi, "create_repo", fail)
    path = source if "/" in source else sources / source
    refused("push", [path, "someone/model"], tmp_path / "out", *parts)


def test_a_network_that_fails_is_told_after_one_try(monkeypatch):
    from huggingface_hub import HfApi, constants

    tries = []

    def fail(self, repo_id, **options):
        tries.append(repo_id)
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", fail)
    with pytest.raises(ValueError, match=r"the Hub cannot be reached \(\[Errno -2\].*hf download someone/else"):
        check_on_hub("someone/else")
    assert tries == ["someone/else"]


# Files that transformers loads whole: they are taken as they are --------------------------------------------------

TAKES_ANY_SOURCE = ["generate", "eval", "regroup", "info", "plan", "bench", "import", "finetune", "heal", "uptrain"]
WRITES = ("regroup", "import", "finetune", "heal", "uptrain")


@pytest.mark.parametrize("source", ["adapter", "model.gguf"])
@pytest.mark.parametrize("command", TAKES_ANY_SOURCE)
def test_adapters_and_gguf_files_are_taken_like_folders(command, source, sources, tmp_path):
    if command in WITH_TEXT:
        words = WITH_TEXT[command](sources / source, sources / "text.jsonl", tmp_path / "out")
        words += ["--tokenizer", sources / "whole"] if source == "model.gguf" else []
        words += SHORT.get(command, [])
    else:
        words = WITH_MODEL[command](sources / source, tmp_path / "out")
    done = run(command, words)
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "out").exists() == (command in WRITES)


@pytest.mark.parametrize("source", ["adapter", "model.gguf"])
def test_what_is_loaded_from_them_is_what_they_hold(source, sources, tmp_path):
    from groupformer import import_model

    expected = LlamaForCausalLM.from_pretrained(sources / "whole").eval()
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(import_model(sources / source)(ids).logits, expected(ids).logits, atol=2e-5, rtol=2e-5)


def test_an_adapter_whose_base_is_gone_names_it(sources, tmp_path):
    config = json.loads((sources / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter").mkdir()
    path = tmp_path / "adapter" / "adapter_config.json"
    for base, part in ((None, "names no base model"), (str(tmp_path / "gone"), "which is not there")):
        path.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        for command in TAKES_ANY_SOURCE:
            if command in WITH_TEXT:
                words = WITH_TEXT[command](tmp_path / "adapter", sources / "text.jsonl", tmp_path / "out")
            else:
                words = WITH_MODEL[command](tmp_path / "adapter", tmp_path / "out")
            refused(command, words, tmp_path / "out", part, "base_model_name_or_path")


@pytest.mark.parametrize("command", ["generate", "eval", "bench", "finetune", "uptrain"])
def test_a_model_that_predicts_no_next_token_is_refused_in_a_short_line(command, sources, tmp_path):
    T5Config(vocab_size=16384).save_pretrained(tmp_path / "t5")
    GroupFormerTokenizer().save_pretrained(tmp_path / "t5")
    if command in WITH_TEXT:
        words = WITH_TEXT[command](tmp_path / "t5", sources / "text.jsonl", tmp_path / "out")
    else:
        words = WITH_MODEL[command](tmp_path / "t5", tmp_path / "out")
    refused(command, words, tmp_path / "out", "t5 cannot be loaded", "T5Config")
    assert len(in_one_line(run(command, words).exception)) < 400


@pytest.mark.parametrize("command", ["finetune", "uptrain"])
def test_a_generation_config_that_transformers_would_not_save_costs_no_training(command, sources, tmp_path):
    shutil.copytree(sources / "whole", tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "length_penalty": 2.0, "eos_token_id": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    words = WITH_TEXT[command](tmp_path / "model", sources / "text.jsonl", tmp_path / "out")
    done = run(command, [*words, *SHORT.get(command, [])])
    assert done.exit_code == 0, done.exception
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id in (1, [1])


# Ctrl-C --------------------------------------------------------------------------------------------------------------


def interrupted(arguments, seconds):
    """The command in a process of its own, with Ctrl-C pressed after some seconds."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "groupformer", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, [line for line in errors.splitlines() if "interrupted" in line], errors


def test_ctrl_c_while_layers_heal_says_how_to_go_on_or_leaves_nothing(tmp_path):
    work, merged = work_folder(tmp_path / "out"), merged_folder(tmp_path / "out")
    for layers, error in ((0, KeyboardInterrupt), (2, TrainingInterruptedError)):
        for folder in (work, merged):
            folder.mkdir()
        for layer_idx in range(layers):
            (work / f"layer-{layer_idx}.safetensors").touch()
        with pytest.raises(error) as raised, resumable_healing(tmp_path / "out"):
            raise KeyboardInterrupt
        assert work.exists() == merged.exists() == (layers > 0)
    assert "2 healed layers saved: type the same line with --resume" in str(raised.value)


# Every command that can take long: what makes it take long. Of training runs a checkpoint may stay, of others nothing.
LONG = {
    "eval": [],
    "regroup": ["--calibration-tokens", "9999999"],
    "heal": ["--tokens", "9999999"],
    "uptrain": ["--tokens", "9999999"],
    "finetune": ["--epochs", "999"],
    "pretrain": ["--max-steps", "99999"],
    "bench": ["--rounds", "99999"],
    "demo": [],
    "tokenizer train": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 10])
@pytest.mark.parametrize("command", LONG)
def test_ctrl_c_is_one_line_and_leaves_nothing_or_a_checkpoint(command, seconds, sources, tmp_path):
    text = tmp_path / ("rows.jsonl" if command == "finetune" else "long.txt")  # a text file is one row
    text.write_text((json.dumps({"text": TEXT * 30}) + "\n") * 100 if command == "finetune" else TEXT * 3000)
    if command == "tokenizer train":
        text.write_text(" ".join(map(str, range(10**6))))
        words = ["--prose", text, "--output", tmp_path / "out"]
    elif command in WITH_TEXT:
        words = WITH_TEXT[command](sources / "whole", text, tmp_path / "out")
    else:
        words = [] if command == "demo" else WITH_MODEL[command](sources / "whole", tmp_path / "out")
        words += ["--output", tmp_path / "out"] if command == "demo" else []
    code, _, lines, errors = interrupted([*command.split(), *words, *LONG[command]], seconds)
    assert code == 130 and len(lines) == 1 and "Traceback" not in errors, errors
    left = list((tmp_path / "out").glob("checkpoint-*"))
    assert bool(left) == (tmp_path / "out").exists() and bool(left) == any("--resume" in line for line in lines)
    assert not list(tmp_path.glob(".*partial*"))
