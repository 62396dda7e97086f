"""Fine-tuning as its users meet it: resuming, adapters, odd rows, and the command line around it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, TrainerCallback

from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.training import finetuning, pretraining
from groupformer.training.finetuning import FinetuneRecipe, finetune
from groupformer.training.pretraining import PretrainRecipe
from groupformer.training.run import EpochLengthSampler, last_checkpoint, prepare_output
from groupformer.training.tasks import TokenClassificationTask

from .helpers import tiny_config


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
WORDS = ["the", "ferry", "crosses", "a", "cold", "river", "while", "the", "clerk", "counts", "coins"]
ROWS = [{"text": " ".join(WORDS[: 1 + index % 9]), "label": "abc"[index % 3]} for index in range(24)]


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def recipe(file, **options):
    fields = {"task": "sequence-classification", "config": TINY, "epochs": 2, "batch_size": 4, "learning_rate": 1e-3}
    return FinetuneRecipe(**{**fields, "train_files": [file], "validation_files": [file], **options})


def logged_losses(folder):
    history = json.loads((folder / "results.json").read_text())["log"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


# Resuming ------------------------------------------------------------------------------------------------------------


class PressCtrlC(TrainerCallback):
    """What a user does at a step in the middle of the second epoch."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_the_middle_of_an_epoch_resumes_to_the_same_losses(rows, tmp_path, monkeypatch):
    plan = recipe(rows, config={**TINY, "hidden_dropout": 0.1})
    finetune(plan, tmp_path / "whole")
    with monkeypatch.context() as patch:
        trainer = finetuning.LengthGroupedTrainer
        patch.setattr(
            finetuning,
            "LengthGroupedTrainer",
            lambda *, callbacks, **options: trainer(callbacks=[*callbacks, PressCtrlC()], **options),
        )
        with pytest.raises(KeyboardInterrupt):
            finetune(plan, tmp_path / "cut")
    assert "checkpoint-8" in [path.name for path in (tmp_path / "cut").iterdir()]
    finetune(plan, tmp_path / "cut", resume=True)
    assert len(logged_losses(tmp_path / "whole")) == 12
    assert logged_losses(tmp_path / "cut") == logged_losses(tmp_path / "whole")


def test_a_finished_run_keeps_its_model_alone_unless_told_otherwise(rows, tmp_path):
    plan = recipe(rows, epochs=1)
    finetune(plan, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="holds a finished run without checkpoints.*pass --keep-checkpoints"):
        finetune(plan, tmp_path / "run", resume=True)
    finetune(plan, tmp_path / "run", overwrite=True, keep_checkpoints=True)
    assert last_checkpoint(tmp_path / "run") is not None


def test_length_grouped_batches_hold_every_row_once_and_change_with_the_epoch():
    sampler = EpochLengthSampler(list(range(100, 0, -1)), batch_size=4, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second and first == list(sampler)


# What is saved -------------------------------------------------------------------------------------------------------


def test_an_adapter_reloads_onto_its_base_with_the_same_answers(rows, tmp_path):
    base = GroupFormerForCausalLM(tiny_config(vocab_size=16384, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    base.save_pretrained(tmp_path / "base")
    GroupFormerTokenizer().save_pretrained(tmp_path / "base")
    plan = recipe(rows, model=str(tmp_path / "base"), config={}, lora=True, epochs=4, learning_rate=1e-2)
    scores = finetune(plan, tmp_path / "run")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        answers = [model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item() for row in ROWS]
    right = sum("abc"[answer] == row["label"] for answer, row in zip(answers, ROWS))
    assert right / len(ROWS) == pytest.approx(scores["validation_accuracy"])


def test_a_fresh_base_is_never_lost_behind_its_adapter(rows):
    with pytest.raises(ValueError, match="its fresh base would be lost; give model or merge"):
        recipe(rows, lora=True)


def test_the_saved_config_keeps_the_cache_that_training_turned_off(rows, tmp_path):
    finetune(recipe(rows, epochs=1), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["use_cache"] is True


# Rows ----------------------------------------------------------------------------------------------------------------


def test_labels_of_rows_held_out_for_validation_are_known(tmp_path):
    rare = write_rows(tmp_path / "rare.jsonl", [{"text": "a b", "label": str(index)} for index in range(20)])
    results = finetune(recipe(rare, validation_files=[], epochs=1), tmp_path / "run")
    assert results["validation_loss"] > 0


@pytest.mark.parametrize("causal", [True, False])
def test_each_word_gets_its_own_tag_at_its_own_tokens(causal, tmp_path):
    from datasets import Dataset

    words = ["Antidisestablishmentarianism", "is", "n't", "a", "word-like", "thing", "."]
    tags = ["W0", "W1", "W2", "W3", "W4", "W5", "W6"]
    dataset = Dataset.from_list([{"tokens": words, "tags": tags}])
    tokenizer = GroupFormerTokenizer()
    task = TokenClassificationTask(tokenizer, "tokens", "tags", None, causal=causal)
    task.learn_labels(dataset)
    train, scored = task.encode(dataset, "train")[0], task.encode(dataset, "validation")[0]
    for word, label in zip(words, range(len(tags))):
        pieces = [token for token, tag in zip(train["input_ids"], train["labels"]) if tag == label]
        assert tokenizer.decode(pieces).strip() == word
        [place] = [place for place, tag in enumerate(scored["labels"]) if tag == label]
        assert scored["input_ids"][place] == pieces[-1 if causal else 0]


BAD_ROWS = [
    ([{"text": "", "label": "a"}, {"text": "x", "label": "b"}], {}, "train, row 0, is empty; remove such rows"),
    ([{"text": None, "label": "a"}, {"text": "x", "label": "b"}], {}, "column ('text') has rows without text"),
    ([{"text": 1, "label": "a"}, {"text": 2, "label": "b"}], {}, "not text; choose a column of text"),
    ([{"text": "x", "label": None}, {"text": "y", "label": "b"}], {}, "column ('label') has rows without a label"),
    ([{"text": "x", "label": "a"}] * 4, {}, "column ('label') has only the label ['a']; give at least two"),
    (
        [{"tokens": "ab", "tags": ["X", "Y"]}] * 4,
        {"task": "token-classification"},
        "column ('tokens'), row 0, is not a list of words",
    ),
    (
        [{"tokens": [], "tags": []}, {"tokens": ["a", "b"], "tags": ["X", "Y"]}],
        {"task": "token-classification"},
        "train, row 0, is empty; remove such rows",
    ),
]


@pytest.mark.parametrize("bad,options,message", BAD_ROWS)
def test_rows_that_cannot_be_learnt_from_are_refused(bad, options, message, tmp_path):
    file = write_rows(tmp_path / "bad.jsonl", bad)
    with pytest.raises(ValueError) as error:
        finetune(recipe(file, **options), tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a", ')
    with pytest.raises(ValueError, match=r"bad.jsonl\) cannot be read"):
        finetune(recipe(str(tmp_path / "bad.jsonl")), tmp_path / "run")


# Recipes -------------------------------------------------------------------------------------------------------------


BAD_FIELDS = [
    ({"config": {**TINY, "hiden_size": 8}}, "model has unknown fields (hiden_size); choose from "),
    ({"config": {}, "model": "nowhere/at/all"}, "nowhere/at/all is not there"),
    ({"tokenizer": "/nowhere"}, "/nowhere is not there"),
    ({"config": TINY, "model": "gpt2"}, "--config is for fresh models, but --model is given"),
    ({"learning_rate": -1.0}, "learning_rate (-1.0) must be at least 0"),
    ({"learning_rate": 0.0}, "learning_rate (0.0) must be above 0"),
    ({"warmup_ratio": 2.0}, "warmup_ratio (2.0) must be between 0 and 1"),
    ({"epochs": "three"}, "epochs ('three') must be a number"),
    ({"batch_size": 2.5}, "batch_size (2.5) must be a whole number"),
    ({"train_files": 3}, "train_files (3) must be a list of files"),
]


@pytest.mark.parametrize("fields,message", BAD_FIELDS)
def test_a_recipe_with_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ValueError) as error:
        recipe("rows.jsonl", **fields)
    assert message in str(error.value)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 2e-3\ntrain_files: one.parquet\n")
    plan = PretrainRecipe.from_file(tmp_path / "recipe.yaml")
    assert plan.learning_rate == 0.002 and plan.train_files == ["one.parquet"]


def test_bits_per_byte_count_the_bytes_of_predicted_tokens_only():
    tokenizer = GroupFormerTokenizer()
    row = tokenizer("naïve ferry")["input_ids"]
    labels = [-100, *row[1:]]
    skipped = len(tokenizer.decode(row[:1]).encode())
    expected = (len("naïve ferry".encode()) - skipped) / (len(row) - 1)
    assert pretraining.bytes_per_token({"labels": [labels]}, tokenizer) == pytest.approx(expected)


# The output folder ---------------------------------------------------------------------------------------------------


def test_overwriting_never_deletes_an_input_or_the_folder_one_works_in(rows, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="which overwrite would delete"):
        prepare_output(tmp_path, resume=False, overwrite=True, inputs=[rows])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="which overwrite would delete"):
        prepare_output(Path("."), resume=False, overwrite=True)
    assert Path(rows).exists()


# The command line ----------------------------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, "-m", "groupformer", *map(str, arguments)]


@pytest.mark.slow
def test_json_is_all_that_the_command_prints(rows, tmp_path):
    arguments = ["--task", "sequence-classification", "--train-file", rows, "--epochs", 1, "--json"]
    arguments += ["--config", json.dumps(TINY), "--output", tmp_path / "run"]
    done = subprocess.run(command("finetune", *arguments), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"validation_accuracy", "trained_parameters"} <= json.loads(done.stdout).keys()


@pytest.mark.slow
def test_ctrl_c_ends_the_command_with_130_and_a_checkpoint(rows, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"model": TINY, "row_length": 16, "max_steps": 100000, "save_steps": 100000, "logging_steps": 1})
    )
    process = subprocess.Popen(
        command("pretrain", tmp_path / "recipe.yaml", "--train-file", rows, "--output", tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout:  # the first logged step: training is under way
        if "loss" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130
    assert len(list((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))) == 1


@pytest.mark.parametrize("config", ["{", "[1]"])
def test_a_config_that_is_no_json_mapping_is_refused_in_one_line(config, rows):
    from typer.testing import CliRunner

    from groupformer.commands.main import app

    arguments = ["finetune", "--task", "causal-lm", "--train-file", rows, "--config", config]
    outcome = CliRunner().invoke(app, arguments)
    assert isinstance(outcome.exception, ValueError)
    assert "config (" in str(outcome.exception)
