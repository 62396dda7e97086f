"""Uptraining: the loss is what it says, a regrouped model wins back what the merge lost, runs resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import groupformer
from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.measuring.evaluation import evaluate
from groupformer.training import distillation, uptraining
from groupformer.training.distillation import DistillationLoss
from groupformer.training.readiness import check_keeps_documents_apart
from groupformer.training.uptraining import UptrainRecipe, load_rows, uptrain

from .helpers import randomize, tiny_config
from .helpers_families import native_model


TEXT = "The river rises in the hills and runs to the sea. Its water is cold, and fish live in it. " * 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An original, the same with one key-value head, and a text."""
    root = tmp_path_factory.mktemp("uptraining")
    tokenizer = GroupFormerTokenizer()
    fields = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    model = randomize(GroupFormerForCausalLM(tiny_config(**fields))).to(torch.bfloat16)
    for name, saved in (("original", model), ("regrouped", groupformer.regroup(model, 1, method="mean"))):
        saved.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text(TEXT)
    return root


def recipe(folders, **overrides) -> UptrainRecipe:
    fields = dict(
        model=str(folders / "regrouped"),
        teacher=str(folders / "original"),
        train_files=[str(folders / "text.txt")],
        tokens=16 * 32,
        row_length=16,
        batch_size=2,
        evaluations=2,
    )
    return UptrainRecipe(**{**fields, **overrides})


@pytest.mark.parametrize("kl_weight, ce_weight, temperature", [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.3, 2.0)])
def test_loss_and_gradient_equal_their_definition(monkeypatch, kl_weight, ce_weight, temperature):
    monkeypatch.setattr(distillation, "CHUNK_SIZE", 2 * 7)  # two rows at a time
    logits, taught = torch.randn(2, 6, 7, dtype=torch.float64).unbind(0)
    logits.requires_grad_()
    labels = torch.tensor([1, -100, 6, 0, 2, -100])
    given = UptrainRecipe("model", "teacher", kl_weight=kl_weight, ce_weight=ce_weight, temperature=temperature)
    expected = torch.zeros(())
    for row in (0, 2, 3, 4):
        p = torch.softmax(taught[row] / temperature, -1)
        q = torch.softmax(logits[row] / temperature, -1)
        expected = expected + kl_weight * temperature**2 * (p * (p / q).log()).sum()
        expected = expected - ce_weight * torch.softmax(logits[row], -1)[labels[row]].log()
    loss = DistillationLoss.apply(logits.view(2, 3, 7), taught.view(2, 3, 7).__getitem__, labels.view(2, 3), given)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_uptraining_brings_the_student_closer_to_its_teacher(folders, tmp_path, options):
    results = uptrain(recipe(folders, tokens=16 * 128, ce_weight=0.0, learning_rate=1e-2, **options), tmp_path / "out")
    tuned = GroupFormerForCausalLM.from_pretrained(tmp_path / "out")
    assert tuned.config.num_key_value_heads == 1
    assert tuned.dtype == torch.bfloat16  # as the checkpoint that it came from
    assert tuned.config.use_cache

    ids = torch.tensor([GroupFormerTokenizer()(TEXT)["input_ids"][:48]])
    models = [GroupFormerForCausalLM.from_pretrained(folders / name) for name in ("original", "regrouped")]
    with torch.no_grad():
        teacher, before, after = (m.float()(ids).logits.log_softmax(-1) for m in (*models, tuned))
    distances = [float((teacher.exp() * (teacher - student)).sum(-1).mean()) for student in (before, after)]
    assert distances[1] < 0.9 * distances[0]
    assert [point["tokens"] for point in results["curve"]][0] == 0
    assert results["curve"][-1]["tokens"] == results["tokens"] == 16 * 128


def test_the_original_is_measured_on_the_same_rows(folders, tmp_path):
    results = uptrain(recipe(folders, model=str(folders / "original"), tokens=16 * 2, bf16=False), tmp_path / "out")
    assert results["original"]["loss"] == pytest.approx(results["curve"][0]["loss"], rel=1e-2)  # in bfloat16
    assert results["original"]["bits_per_byte"] < results["original"]["loss"]


def test_the_same_text_has_the_same_bits_per_byte_in_eval(folders, tmp_path):
    tokenizer = GroupFormerTokenizer()
    text = tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"][:31])  # a row, with the begin token
    (tmp_path / "held_out.txt").write_text(text)
    validated = recipe(
        folders, validation_files=[str(tmp_path / "held_out.txt")], tokens=32 * 2, row_length=32, bf16=False
    )
    results = uptrain(validated, tmp_path / "out")
    model = GroupFormerForCausalLM.from_pretrained(folders / "regrouped", dtype=torch.float32)
    scores = evaluate(model, tokenizer, [text], window=32)
    assert scores["tokens"] == 31
    assert results["curve"][0]["bits_per_byte"] == pytest.approx(scores["bits_per_byte"], rel=1e-5)
    assert results["curve"][0]["loss"] == pytest.approx(scores["loss"], rel=1e-5)


def test_attention_alone_learns_where_it_is_asked_for(folders, tmp_path):
    uptrain(recipe(folders, attention_only=True, learning_rate=1e-2), tmp_path / "out")
    before, after = (
        GroupFormerForCausalLM.from_pretrained(folder) for folder in (folders / "regrouped", tmp_path / "out")
    )
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        assert torch.equal(old, new) != ("self_attn" in name), name


@pytest.mark.parametrize("tokens, rows", [(16 * 32, 3), (16 * 20, 2), (16 * 8, 1)])
def test_validation_takes_a_tenth_of_the_run_at_most(folders, tokens, rows):
    _, validation = load_rows(recipe(folders, tokens=tokens), GroupFormerTokenizer())
    assert len(validation) == rows
    assert rows * 4 <= max(4, 0.4 * tokens / 16)  # the student's three evaluations and the original's


def test_without_a_teacher_the_text_alone_teaches(folders, tmp_path):
    results = uptrain(recipe(folders, teacher=None, kl_weight=0, ce_weight=1, learning_rate=1e-2), tmp_path / "out")
    losses = [point["loss"] for point in results["curve"]]
    assert losses[-1] < losses[0]


def test_the_weight_of_the_text_counts_without_a_teacher_too(folders, tmp_path):
    def loss(ce_weight):
        alone = recipe(folders, teacher=None, kl_weight=0.0, ce_weight=ce_weight, tokens=16 * 2)  # one step
        uptrain(alone, tmp_path / str(ce_weight))
        log = json.loads((tmp_path / str(ce_weight) / "results.json").read_text())["log"]
        return next(entry["train_loss"] for entry in log if "train_loss" in entry)

    assert loss(3.0) == pytest.approx(3 * loss(1.0), rel=1e-5)


def test_a_run_that_was_cut_off_resumes_to_the_same_weights(folders, tmp_path):
    plan = recipe(folders, evaluations=4)
    uptrain(plan, tmp_path / "whole")
    uptrain(plan, tmp_path / "cut", keep_checkpoints=True)
    for path in (tmp_path / "cut").glob("*"):  # as if the run had ended after its last but one checkpoint
        if path.is_file():
            path.unlink()
    newest = max((tmp_path / "cut").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    (newest / "trainer_state.json").unlink()
    resumed = uptrain(plan, tmp_path / "cut", resume=True)
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert resumed["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-6)
    assert [point["tokens"] for point in resumed["curve"]] == [point["tokens"] for point in whole["curve"]]


def test_every_step_is_full_where_data_are_repeated(folders, tmp_path, monkeypatch):
    seen = []
    compute_loss = uptraining.DistillationTrainer.compute_loss

    def counting(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.append(inputs["input_ids"].numel())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(uptraining.DistillationTrainer, "compute_loss", counting)
    rows, _ = load_rows(recipe(folders, tokens=16), GroupFormerTokenizer())
    plan = recipe(folders, batch_size=len(rows) - 1, tokens=16 * 3 * (len(rows) - 1))
    results = uptrain(plan, tmp_path / "out")
    assert seen == [16 * (len(rows) - 1)] * 3
    assert results["tokens"] == sum(seen)


def test_rows_that_are_enough_stay_as_they_are(folders):
    few, many = (load_rows(recipe(folders, tokens=tokens), GroupFormerTokenizer())[0] for tokens in (32, 16 * 1000))
    assert len(few) < len(many) == 1000
    assert many["input_ids"][: len(few)] == many["input_ids"][len(few) : 2 * len(few)] == few["input_ids"][:]


@pytest.mark.parametrize("steps, evaluations, every", [(10, 4, 3), (10, 10, 1), (19, 10, 2), (3, 10, 1)])
def test_there_are_no_more_evaluations_than_were_asked_for(folders, tmp_path, steps, evaluations, every):
    plan = recipe(folders, tokens=32 * steps, evaluations=evaluations)
    assert uptraining.training_arguments(plan, tmp_path, resumed=False).eval_steps == every


REFUSALS = {
    "no_teacher": (dict(teacher=None), "teacher (None) is needed with kl_weight (1.0)"),
    "nothing_to_learn": (dict(kl_weight=0, ce_weight=0), "leave nothing to learn from"),
    "negative": (dict(kl_weight=-1), "kl_weight (-1) must be at least 0"),
    "two ways": (dict(lora=True, attention_only=True), "lora (True) and attention_only (True) train different"),
    "temperature": (dict(temperature=0), "temperature (0) must be above 0"),
    "tokens": (dict(tokens=0), "tokens (0) must be at least 1"),
    "no_learning": (dict(learning_rate=0), "learning_rate (0) must be above 0"),
    "long_rows": (dict(row_length=65), "row_length (65) is longer than max_position_embeddings (64) of model"),
    "missing_file": (dict(train_files=["no/such.txt"]), "file (no/such.txt) is not there"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_name_and_nothing_written(folders, tmp_path, case):
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError) as refusal:
        uptrain(recipe(folders, **arguments), tmp_path / "out")
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_vocabulary_is_refused(folders, tmp_path):
    GroupFormerForCausalLM(tiny_config(vocab_size=50)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="teacher has vocab_size 50, but model has 16384"):
        uptrain(recipe(folders, teacher=str(tmp_path / "other")), tmp_path / "out")


# What would go wrong unseen ------------------------------------------------------------------------------------------


# Falcon too, until transformers 5.24.
@pytest.mark.parametrize("name, option", [("bloom", "four heads"), ("mpt", "four heads"), ("opt", "biases")])
def test_a_model_in_which_packed_documents_see_each_other_is_refused(name, option):
    with pytest.raises(ValueError) as refusal:
        check_keeps_documents_apart("teacher", "here", native_model(name, option))
    message = f"teacher (here) is a '{name}', in which packed documents see each other; import it first"
    assert message in str(refusal.value)


@pytest.mark.parametrize("name, option", [("llama", "all biases"), ("gpt2", "odd heads")])
def test_a_model_that_reads_positions_may_teach(name, option):
    check_keeps_documents_apart("teacher", "here", native_model(name, option))


def native(tmp_path, config_class, **fields) -> str:
    """The folder of a small native model with our vocabulary."""
    tokenizer = GroupFormerTokenizer()
    config = config_class(vocab_size=len(tokenizer), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    return str(tmp_path / "native")


def test_a_leaking_teacher_is_refused_before_anything_is_written(folders, tmp_path):
    teacher = native(tmp_path, transformers.BloomConfig, hidden_size=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match="is a 'bloom', in which packed documents see each other"):
        uptrain(recipe(folders, teacher=teacher), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_projections_that_a_model_has_not_are_refused_and_the_last_run_stays(folders, tmp_path):
    model = native(tmp_path, transformers.GPT2Config, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is a 'gpt2' without q_proj, k_proj, v_proj, o_proj; import it first"):
        uptrain(recipe(folders, model=model, lora=True), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious.txt").exists()


def test_a_run_that_cannot_start_leaves_the_one_that_it_would_replace(folders, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    monkeypatch.setattr(uptraining, "TrainingArguments", lambda **fields: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        uptrain(recipe(folders), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious.txt").exists()


@pytest.mark.parametrize("source", ["regrouped", "original", "original/inside"])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["", "resume", "overwrite"])
def test_an_output_that_is_or_lies_in_a_source_is_refused(folders, source, options):
    before = (folders / source.split("/")[0] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is, or lies inside, .*, which is read; choose another folder"):
        uptrain(recipe(folders), folders / source, **options)
    assert (folders / source.split("/")[0] / "model.safetensors").read_bytes() == before


def test_a_tokenizer_with_ids_beyond_the_model_is_refused_before_anything_is_written(folders, tmp_path):
    small = GroupFormerForCausalLM(tiny_config(vocab_size=100, num_hidden_layers=1))
    small.save_pretrained(tmp_path / "small")
    alone = recipe(
        folders, model=str(tmp_path / "small"), tokenizer=str(folders / "original"), teacher=None, kl_weight=0
    )
    with pytest.raises(ValueError, match=r"tokenizer gives the training text token ids up to \d+, but .* 100"):
        uptrain(alone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_whose_tokenizer_numbers_tokens_otherwise_is_refused(folders, tmp_path):
    shutil.copytree(folders / "original", tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    one, two = list(vocab)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="gives the token .* the id .*; distillation needs one vocabulary"):
        uptrain(recipe(folders, teacher=str(tmp_path / "teacher")), tmp_path / "out")


def test_a_run_resumes_with_more_tokens_but_not_with_other_adapters(folders, tmp_path):
    plan = dict(lora=True, lora_rank=2, evaluations=1)
    uptrain(recipe(folders, tokens=16 * 4, **plan), tmp_path / "out", keep_checkpoints=True)
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["lora_rank"] == 2
    with pytest.raises(ValueError, match=r"lora_rank \(4\) was 2 in the run"):
        uptrain(recipe(folders, **{**plan, "lora_rank": 4}), tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match=r"lora \(False\) was True in the run"):
        uptrain(recipe(folders, **{**plan, "lora": False}), tmp_path / "out", resume=True)
    assert uptrain(recipe(folders, tokens=16 * 8, **plan), tmp_path / "out", resume=True)["tokens"] == 16 * 8


def test_a_run_without_a_record_of_its_settings_resumes(folders, tmp_path):
    uptrain(recipe(folders, tokens=16 * 4, evaluations=1), tmp_path / "out", keep_checkpoints=True)
    (tmp_path / "out" / "recipe.json").unlink()
    assert uptrain(recipe(folders, tokens=16 * 8, evaluations=1), tmp_path / "out", resume=True)["steps"] == 4
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_a_finished_run_keeps_its_model_alone_and_says_that_nothing_is_left_to_resume(folders, tmp_path):
    uptrain(recipe(folders, tokens=16 * 4, evaluations=2), tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="holds a finished run without checkpoints.*pass --keep-checkpoints"):
        uptrain(recipe(folders, tokens=16 * 8, evaluations=2), tmp_path / "out", resume=True)


def test_the_command_prints_the_curve_as_json(folders, tmp_path):
    arguments = ["uptrain", str(folders / "regrouped"), "--teacher", str(folders / "original")]
    arguments += ["--data", str(folders / "text.txt"), "--tokens", "64", "--row-length", "16", "--batch-size", "2"]
    outcome = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out"), "--json"])
    assert outcome.exit_code == 0, outcome.output
    results = json.loads(outcome.stdout)
    assert results["tokens"] == 64
    assert len(results["curve"]) == 3


# What `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` sets.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
SPLIT = {"ddp": {"parameter": "Parameter", "share": 1.0}, "fsdp": {"parameter": "DTensor", "share": 0.5}}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora": True, "lora_rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("kind, environment", [("ddp", {}), ("fsdp", FSDP2)], ids=["ddp", "fsdp"])
def test_two_processes_uptrain_as_one_does(folders, tmp_path, kind, environment, options):
    """With half the rows each, over gloo."""
    found = {}
    for processes in (1, 2):
        output = tmp_path / str(processes) / "out"
        output.parent.mkdir()
        fields = vars(recipe(folders, batch_size=4 // processes, evaluations=4, bf16=False, **options))
        job = output.parent / "job.json"
        job.write_text(json.dumps({"recipe": fields, "output": str(output)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*command, "-m", "tests.uptrain_in_processes", str(job)],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment if processes > 1 else {})},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = json.loads((output.parent / "result.json").read_text())
    one, two = found[1], found[2]
    assert {name: two[name] for name in SPLIT[kind]} == SPLIT[kind]  # not one process's training twice
    assert two["steps"] == one["steps"] and two["tokens"] == one["tokens"] == 16 * 32
    assert [point["tokens"] for point in two["curve"]] == [point["tokens"] for point in one["curve"]]
    for name in ("loss", "bits_per_byte"):
        assert [p[name] for p in two["curve"]] == pytest.approx([p[name] for p in one["curve"]], abs=1e-4)
        assert two["original"][name] == pytest.approx(one["original"][name], abs=1e-4)
    assert two["curve"][-1]["loss"] != two["curve"][0]["loss"]
    first, second = (
        GroupFormerForCausalLM.from_pretrained(tmp_path / str(processes) / "out").state_dict() for processes in (1, 2)
    )
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0.02, atol=1e-3)  # bfloat16
