"""Uptraining: the loss is what it says, a regrouped model wins back what the merge lost, runs resume."""

import json

import pytest
import torch
from typer.testing import CliRunner

import groupformer
from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.cli import app
from groupformer.regrouping import uptraining
from groupformer.regrouping.uptraining import DistillationLoss, UptrainRecipe, uptrain

from .helpers import randomize, tiny_config


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
    monkeypatch.setattr(uptraining, "CHUNK_SIZE", 2 * 7)  # two rows at a time
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
    loss = DistillationLoss.apply(logits, taught, labels, given)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(it, logits)[0] for it in (loss, expected)]
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
    uptrain(plan, tmp_path / "cut")
    for path in (tmp_path / "cut").glob("*"):  # as if the run had ended after its last but one checkpoint
        if path.is_file():
            path.unlink()
    newest = max((tmp_path / "cut").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    (newest / "trainer_state.json").unlink()
    resumed = uptrain(plan, tmp_path / "cut", resume=True)
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert resumed["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-6)
    assert [point["tokens"] for point in resumed["curve"]] == [point["tokens"] for point in whole["curve"]]


REFUSALS = {
    "no_teacher": (dict(teacher=None), "teacher (None) is needed with kl_weight (1.0)"),
    "nothing_to_learn": (dict(kl_weight=0, ce_weight=0), "leave nothing to learn from"),
    "negative": (dict(kl_weight=-1), "kl_weight (-1) must be at least 0"),
    "temperature": (dict(temperature=0), "temperature (0) must be above 0"),
    "tokens": (dict(tokens=0), "tokens (0) must be at least 1"),
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


def test_the_command_prints_the_curve_as_json(folders, tmp_path):
    arguments = ["uptrain", str(folders / "regrouped"), "--teacher", str(folders / "original")]
    arguments += ["--data", str(folders / "text.txt"), "--tokens", "64", "--row-length", "16", "--batch-size", "2"]
    outcome = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out"), "--json"])
    assert outcome.exit_code == 0, outcome.output
    results = json.loads(outcome.stdout)
    assert results["tokens"] == 64
    assert len(results["curve"]) == 3
