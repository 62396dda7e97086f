"""Healing: the attention of a merged model gets closer to the original's, whatever the decoder, and nothing else."""

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import groupformer
from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.regrouping import heal_folders
from groupformer.regrouping.heal import heal
from groupformer.regrouping.heal_folders import heal_folder
from groupformer.regrouping.heal_jointly import divergence
from groupformer.regrouping.heal_recipe import HealRecipe
from groupformer.regrouping.processes import Processes

from .helpers import random_ids, randomize, tiny_config


RECIPE = HealRecipe(epochs=4, batch_size=4, bf16=False, joint_epochs=0)
JOINT = HealRecipe(epochs=1, batch_size=4, bf16=False, joint_epochs=2, joint_learning_rate=0.03)
NATIVE = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
# Norms on queries and keys, norms after attention, experts, parallel layers, windows and soft caps.
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**NATIVE),
    "qwen3": lambda: transformers.Qwen3Config(**NATIVE),
    "olmo2": lambda: transformers.Olmo2Config(**NATIVE),
    "gemma2": lambda: transformers.Gemma2Config(**NATIVE, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**NATIVE, num_local_experts=4),
    "cohere": lambda: transformers.CohereConfig(**NATIVE),
    "granite": lambda: transformers.GraniteConfig(**NATIVE, residual_multiplier=0.3),
    "groupformer": lambda: tiny_config(),
    "groupformer like gpt2": lambda: tiny_config(
        position_embedding_type="learned", norm_type="layer_norm", attention_bias=True, attention_output_bias=True
    ),
    "groupformer after": lambda: tiny_config(norm_position="after", qk_norm="projection"),
}


def pair(name: str, kv_heads: int = 1):
    """A random model, and the same with fewer key-value heads: the mean of its own, which no table needs to know."""
    config = DECODERS[name]()
    original = randomize(AutoModelForCausalLM.from_config(config))
    fields = {**config.to_dict(), "num_key_value_heads": kv_heads}
    merged = AutoModelForCausalLM.from_config(type(config)(**fields))
    state = original.state_dict()
    for key, tensor in merged.state_dict().items():
        if tensor.shape != state[key].shape:  # keys' and values' projections, and norms over them
            state[key] = state[key].unflatten(0, (-1, tensor.shape[0])).mean(dim=0)
    merged.load_state_dict(state)
    return merged.eval(), original.eval()


def decoder_layers(model):
    return model.base_model.layers


@torch.no_grad()
def distance(model, original, token_ids) -> float:
    """KL(original || model), the mean over tokens."""
    expected, got = (each(token_ids).logits.double().log_softmax(-1) for each in (original, model))
    return float((expected.exp() * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("name", DECODERS)
def test_healing_brings_a_merged_model_closer_to_the_original_and_changes_its_attention_alone(name):
    model, original = pair(name)
    before, state = distance(model, original, random_ids(8, 24, seed=1)), copy.deepcopy(model.state_dict())
    report = heal(model, original, random_ids(48, 24), RECIPE)
    assert distance(model, original, random_ids(8, 24, seed=1)) < 0.9 * before
    assert report.joint is None and not report.failed
    assert all(layer.is_healed and layer.healed < layer.merged for layer in report.layers)
    check_attention_alone_changed(model, state)


def check_attention_alone_changed(model, state):
    attention = {
        f".{place}." for place, child in decoder_layers(model)[0].named_children() if "Att" in str(type(child))
    }
    for key, tensor in model.state_dict().items():
        if not any(part in key for part in attention):
            assert torch.equal(tensor, state[key]), key
    assert not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma2", "groupformer like gpt2"])
def test_all_layers_together_come_closer_than_each_alone_and_change_their_attention_alone(name):
    (model, original), (alone, _) = pair(name), pair(name)
    token_ids, state = random_ids(128, 24), copy.deepcopy(model.state_dict())
    recipe = dataclasses.replace(JOINT, layer_tokens=48 * 24, joint_learning_rate=0.02)
    report = heal(model, original, token_ids, recipe)
    heal(alone, original, token_ids, dataclasses.replace(recipe, joint_epochs=0))
    held_out = random_ids(8, 24, seed=1)
    assert distance(model, original, held_out) < 0.98 * distance(alone, original, held_out)
    assert report.joint.is_healed and report.joint.after < report.joint.before
    assert report.joint.before == pytest.approx(distance(alone, original, token_ids[-12:]), rel=1e-4)
    assert report.joint.after == pytest.approx(distance(model, original, token_ids[-12:]), rel=1e-4)
    check_attention_alone_changed(model, state)


@pytest.mark.parametrize(("tokens", "passes"), [(100, 4), (4000, 4), (8000, 2), (16000, 1), (99999, 1)])
def test_a_layer_reads_so_many_tokens_in_all_passes(tokens, passes):
    assert HealRecipe(epochs=4, layer_tokens=16000).passes(tokens) == passes
    assert HealRecipe(epochs=0, layer_tokens=16000).passes(tokens) == 0


def test_steps_that_raise_the_divergence_are_taken_back():
    _, original = pair("llama")
    model = copy.deepcopy(original)
    with torch.no_grad():
        decoder_layers(model)[1].self_attn.v_proj.weight.mul_(1.1)
    alone = copy.deepcopy(model)
    wild = dataclasses.replace(JOINT, joint_learning_rate=30.0)
    report = heal(model, original, random_ids(16, 24), wild)
    heal(alone, original, random_ids(16, 24), dataclasses.replace(JOINT, joint_epochs=0))
    assert report.failed == ["all layers together"] and report.joint.after > report.joint.before
    for own, other in zip(model.parameters(), alone.parameters()):
        assert torch.equal(own, other)


def test_the_layers_read_a_part_of_the_text_and_the_joint_phase_all_of_it():
    few, many = random_ids(4, 24), random_ids(12, 24)
    assert torch.equal(few, many[:4])
    (short, original), (long, _) = pair("llama"), pair("llama")
    recipe = dataclasses.replace(RECIPE, layer_tokens=96)
    assert heal(short, original, few, recipe) == heal(long, original, many, recipe)
    steps = []
    heal(long, original, many, JOINT, progress=lambda what, done, total: steps.append((what, done, total)))
    assert steps[-1] == ("steps", 4, 4)  # 12 rows are 3 batches, of which one is held out


def test_the_divergence_is_the_mean_over_tokens():
    model, original = pair("llama")
    ids = random_ids(2, 24)
    assert float(divergence(model, original, ids).detach()) == pytest.approx(distance(model, original, ids), rel=1e-4)


def test_a_model_without_a_head_is_healed_layer_by_layer():
    model, original = (each.model for each in pair("llama"))
    report = heal(model, original, random_ids(16, 24), JOINT)
    assert report.joint is None and not report.failed


def test_the_closed_form_alone_gives_the_attention_that_was_lost_where_a_linear_map_can():
    _, original = pair("llama")
    model = copy.deepcopy(original)
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.self_attn.o_proj.weight.mul_(0.5)
    reports = heal(model, original, random_ids(48, 24), HealRecipe(epochs=0, ridge=1e-9, bf16=False, joint_epochs=0))
    assert [report.solved < 1e-6 for report in reports.layers] == [True, True]
    for own, other in zip(model.parameters(), original.parameters()):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)


def test_a_model_that_lost_nothing_stays_bit_for_bit():
    _, original = pair("llama")
    model = copy.deepcopy(original)
    report = heal(model, original, random_ids(8, 16), JOINT)
    assert report.joint is None and all(layer.merged < 1e-12 for layer in report.layers)
    for own, other in zip(model.parameters(), original.parameters()):
        assert torch.equal(own, other)


def test_a_layer_whose_loss_is_not_finite_keeps_its_merged_weights_and_is_named():
    model, original = pair("llama")
    with torch.no_grad():
        decoder_layers(model)[1].self_attn.v_proj.weight.fill_(3e38)
    state = copy.deepcopy(model.state_dict())
    report = heal(model, original, random_ids(16, 16), JOINT)
    assert report.failed == ["layer 1", "all layers together"]
    for key, tensor in model.state_dict().items():
        if "layers.1." in key:
            assert torch.equal(tensor, state[key])


def test_the_dtype_stays_and_healing_works_in_float32():
    model, original = (each.to(torch.bfloat16) for each in pair("llama"))
    before = distance(model, original, random_ids(8, 24, seed=1))
    heal(model, original, random_ids(32, 24), JOINT)
    assert {parameter.dtype for parameter in [*model.parameters(), *original.parameters()]} == {torch.bfloat16}
    assert distance(model, original, random_ids(8, 24, seed=1)) < before


def test_progress_is_told_after_each_layer():
    model, original = pair("llama")
    seen = []
    heal(model, original, random_ids(8, 16), RECIPE, progress=lambda *what: seen.append(what))
    assert seen == [("layers", 1, 2), ("layers", 2, 2)]


def other_original(**fields):
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**NATIVE, **fields}))


REFUSALS = {
    "another class": (
        dict(original=lambda: GroupFormerForCausalLM(tiny_config())),
        "original is a 'groupformer', but model a 'llama'",
    ),
    "another size": (dict(original=lambda: other_original(hidden_size=64)), "original has hidden_size 64, but model"),
    "another depth": (dict(original=lambda: other_original(num_hidden_layers=3)), "original has num_hidden_layers 3"),
    "one row": (dict(token_ids=random_ids(1, 16)), "healing needs at least 2 rows of 2 tokens"),
    "no rows": (dict(token_ids=random_ids(0, 16)), "healing needs at least 2 rows of 2 tokens"),
    "other ids": (dict(token_ids=random_ids(4, 16) + 99), "but vocab_size is 99; use the model's own tokenizer"),
    "no integers": (dict(token_ids=torch.zeros(4, 16)), "token_ids has shape (4, 16) and dtype torch.float32"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_healed_is_refused_before_any_work(case):
    fields, message = REFUSALS[case]
    model, original = pair("llama")
    state = copy.deepcopy(model.state_dict())
    original = fields["original"]() if "original" in fields else original
    with pytest.raises(ValueError) as refusal:
        heal(model, original, fields.get("token_ids", random_ids(8, 16)), RECIPE)
    assert message in str(refusal.value)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_heal_is_a_public_function():
    assert groupformer.heal is heal


@pytest.mark.parametrize("fields", [dict(epochs=-1), dict(batch_size=0), dict(learning_rate=0), dict(held_out=1)])
def test_a_recipe_that_makes_no_sense_is_refused_by_field(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        HealRecipe(**fields)


@pytest.mark.parametrize("options, warns", [(dict(), True), (dict(method="mean"), False)])
def test_a_merge_that_should_know_its_inputs_warns_without_them(options, warns, caplog):
    groupformer.regroup(pair("llama")[1], 1, **options)
    assert ("give calibration=token_ids, or --calibration FILE" in caplog.text) == warns


@pytest.mark.slow
def test_regroup_heals_what_it_merged():
    _, original = pair("llama")
    token_ids = random_ids(48, 24)
    merged = groupformer.regroup(original, 1, calibration=token_ids)
    healed = groupformer.regroup(original, 1, calibration=token_ids, heal={"epochs": 2, "joint_epochs": 1})
    heal(merged, original, token_ids, HealRecipe(epochs=2, joint_epochs=1))
    for own, other in zip(healed.parameters(), merged.parameters()):
        assert torch.equal(own, other)
    assert healed.config.regrouping[-1]["healing"] == {"tokens": 48 * 24, "epochs": 2, "joint_epochs": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(heal={}), r"heal needs calibration \(None\)"),
        (dict(heal={"epoch": 2}, calibration=random_ids(4, 24)), "heal has no field 'epoch'; choose from epochs"),
        (dict(heal={}, calibration=random_ids(1, 48)), "healing needs at least 2 rows"),
    ],
)
def test_healing_that_cannot_follow_is_refused_before_the_merge(options, message):
    with pytest.raises(ValueError, match=message):
        groupformer.regroup(pair("llama")[1], 1, **options)


# From folder to folder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Mixtral in bfloat16, the same with one key-value head, and a text."""
    root = tmp_path_factory.mktemp("healing")
    tokenizer = GroupFormerTokenizer()
    fields = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_local_experts=2, head_dim=4)
    original = randomize(AutoModelForCausalLM.from_config(transformers.MixtralConfig(**{**NATIVE, **fields})))
    original = original.to(torch.bfloat16)
    merged = groupformer.regroup(original, 1, method="mean")
    for name, model in (("original", original), ("merged", merged)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text("The river rises in the hills and runs to the sea, and fish live in it. " * 60)
    return root


IDS = random_ids(16, 16, vocab_size=1000)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_is_healed_as_the_model_in_memory_and_all_but_its_attention_is_copied(folders, tmp_path):
    report = heal_folder(folders / "merged", folders / "original", tmp_path / "out", IDS, JOINT)
    model, original = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("merged", "original"))
    assert heal(model, original, IDS, JOINT) == report and report.joint.is_healed
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert healed.dtype == torch.bfloat16
    for (name, own), other in zip(healed.state_dict().items(), model.state_dict().values()):
        assert torch.equal(own, other), name
    for name, tensor in load_file(folders / "merged" / "model.safetensors").items():
        same = torch.equal(tensor, load_file(tmp_path / "out" / "model.safetensors")[name])
        assert same != ("_proj" in name and "self_attn" in name), name
    assert healed.config.regrouping[-1]["healing"] == {"tokens": 256, "epochs": 1, "joint_epochs": 2}
    assert not list(tmp_path.glob(".*"))


def test_a_native_original_teaches_its_import(folders, tmp_path):
    original = randomize(AutoModelForCausalLM.from_config(transformers.LlamaConfig(**NATIVE)))
    original.save_pretrained(tmp_path / "original")
    student = groupformer.regroup(groupformer.import_model(original), 1, method="mean")
    student.save_pretrained(tmp_path / "merged")
    report = heal_folder(tmp_path / "merged", tmp_path / "original", tmp_path / "out", random_ids(16, 16), JOINT)
    assert not report.failed and report.joint.after < report.joint.before
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is GroupFormerForCausalLM


@pytest.mark.slow
def test_two_processes_heal_as_one_does(folders, tmp_path):
    recipe = {**dataclasses.asdict(JOINT), "epochs": 2}
    sources = {name: str(folders / folder) for name, folder in (("student", "merged"), ("original", "original"))}
    job = {**sources, "target": str(tmp_path / "two"), "rows": IDS.tolist(), "recipe": recipe}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.heal_in_processes", str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    heal_folder(*sources.values(), tmp_path / "one", IDS, HealRecipe(**recipe))
    merged, one, two = (
        load_file(folder / "model.safetensors") for folder in (folders / "merged", tmp_path / "one", tmp_path / "two")
    )
    assert any(not torch.equal(one[name], merged[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0.01, atol=1e-4)  # a bfloat16 next to it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "one", "two"]


def test_a_batch_that_processes_cannot_share_evenly_is_refused(folders, tmp_path):
    sources = (folders / "merged", folders / "original")
    with pytest.raises(ValueError, match=r"batch_size \(4\) cannot be shared out evenly among 3 processes"):
        heal_folder(*sources, tmp_path / "out", IDS, JOINT, processes=Processes(rank=0, count=3))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("at", ["layers", "steps"])
def test_an_interrupted_run_leaves_no_target_and_resumes_to_the_same_bytes(at, folders, tmp_path):
    sources = (folders / "merged", folders / "original")

    def interrupt(what, done, total):
        if what == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_folder(*sources, tmp_path / "out", IDS, JOINT, progress=interrupt)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds the layers of an interrupted run; pass --resume to go on"):
        heal_folder(*sources, tmp_path / "out", IDS, JOINT)
    with pytest.raises(ValueError, match=r"epochs \(3\) was 1 in the run that"):
        heal_folder(*sources, tmp_path / "out", IDS, HealRecipe(epochs=3, bf16=False), resume=True)
    resumed = heal_folder(*sources, tmp_path / "out", IDS, JOINT, resume=True)
    assert heal_folder(*sources, tmp_path / "whole", IDS, JOINT) == resumed
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_target_that_exists_is_refused_and_stays(folders, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists; choose another folder, or pass --overwrite"):
        heal_folder(folders / "merged", folders / "original", tmp_path / "out", IDS, RECIPE)
    with pytest.raises(ValueError, match="is, or holds, the source"):
        heal_folder(folders / "merged", folders / "original", folders / "original", IDS, RECIPE, overwrite=True)


def test_the_command_heals_and_says_what_it_gave(folders, tmp_path):
    sources = [str(folders / "merged"), str(folders / "original"), str(tmp_path / "out")]
    arguments = ["heal", *sources, "--text", str(folders / "text.txt"), "--epochs", "1", "--row-length", "16"]
    outcome = CliRunner().invoke(app, [*arguments, "--json"])
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert [layer["layer_idx"] for layer in report["layers"]] == [0, 1]
    assert all(layer["healed"] < layer["merged"] for layer in report["layers"])
    assert report["joint"]["after"] < report["joint"]["before"]
    outcome = CliRunner().invoke(app, [*arguments, "--tokens", "16", "--overwrite"])
    assert outcome.exit_code == 1
    assert "healing needs at least 2 rows of 2 tokens; give more text, or shorter rows" in str(outcome.exception)


def test_tokens_whose_states_do_not_fit_into_memory_are_refused_before_any_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 100}.__getitem__)
    with pytest.raises(ValueError, match="on 256 tokens needs about 0.0 GB for hidden states, .* pass --tokens 86 or"):
        heal_folder(folders / "merged", folders / "original", tmp_path / "out", IDS, RECIPE)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit_into_memory_together_are_refused_before_any_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 200}.__getitem__)
    with pytest.raises(ValueError, match="this machine has 0.0; pass --joint-epochs 0 to `groupformer heal`"):
        heal_folder(folders / "merged", folders / "original", tmp_path / "out", IDS, JOINT)
    assert not list(tmp_path.iterdir())
    heal_folder(folders / "merged", folders / "original", tmp_path / "out", IDS, RECIPE)


def regroup_arguments(folders, target, *more):
    text = str(folders / "text.txt")
    return ["regroup", str(folders / "original"), str(target), "--kv-heads", "1", "--calibration", text, *more]


def test_regroup_merges_and_heals_in_one_command(folders, tmp_path):
    done = CliRunner().invoke(app, regroup_arguments(folders, tmp_path / "out", "--heal", "--heal-tokens", "1024"))
    assert done.exit_code == 0, done.output
    assert f"next:    groupformer eval {tmp_path / 'out'} --file TEXT" in done.stdout
    line = f"groupformer uptrain {tmp_path / 'out'} --teacher {folders / 'original'} --data TEXT"
    assert f"{line} --tokens N --learning-rate 1e-4" in " ".join(done.stdout.split())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 1
    assert config["regrouping"][-1]["healing"] == {"tokens": 1024, "epochs": 4, "joint_epochs": 1}
    assert "healed on 1,024 tokens" in (tmp_path / "out" / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))
    assert CliRunner().invoke(app, regroup_arguments(folders, tmp_path / "merged")).exit_code == 0
    model, merged, original = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "out", tmp_path / "merged", folders / "original")
    )
    tokenizer = GroupFormerTokenizer.from_pretrained(folders / "original")
    ids = tokenizer("The river runs to the sea, and fish live in it.", return_tensors="pt").input_ids
    assert distance(model, original, ids) < distance(merged, original, ids)


def test_regroup_heals_on_rows_as_long_as_asked_for(folders, tmp_path):
    options = ["--heal", "--heal-tokens", "40", "--heal-row-length", "20"]  # two rows; one of 40 would be refused
    done = CliRunner().invoke(app, regroup_arguments(folders, tmp_path / "out", *options))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resume"], "--resume needs --heal"),
        (["--heal", "--heal-tokens", "8"], "healing needs at least 2 rows of 2 tokens"),
        (["--heal", "--heal-tokens", "40", "--heal-row-length", "40"], "token_ids has shape (1, 40)"),
    ],
)
def test_regroup_refuses_healing_that_cannot_be(options, message, folders, tmp_path):
    done = CliRunner().invoke(app, regroup_arguments(folders, tmp_path / "out", *options))
    assert done.exit_code == 1 and message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_regroup_without_text_cannot_heal(folders, tmp_path):
    arguments = ["regroup", str(folders / "original"), str(tmp_path / "out"), "--kv-heads", "1", "--heal"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "--heal needs --calibration: the text to learn from" in str(done.exception)


def test_a_page_that_ships_calibrates_where_no_text_is_at_hand(folders, tmp_path):
    arguments = ["regroup", str(folders / "original"), str(tmp_path / "out"), "--kv-heads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--calibration", "sample"])
    assert done.exit_code == 0, done.output
    (entry,) = json.loads((tmp_path / "out" / "config.json").read_text())["regrouping"]
    assert 1000 < entry["calibration_tokens"] < 2000


@pytest.mark.slow
def test_an_interrupted_regroup_goes_on_with_the_merge_that_it_made_and_with_no_other(folders, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    few = ["--heal", "--heal-tokens", "1024"]
    assert CliRunner().invoke(app, regroup_arguments(folders, whole, *few)).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(heal_folders, "heal_layers", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
        CliRunner().invoke(app, regroup_arguments(folders, out, *few))
    assert not out.exists() and (tmp_path / ".out.merged").exists()
    done = CliRunner().invoke(app, regroup_arguments(folders, out, *few, "--resume", "--kv-heads", "2"))
    assert done.exit_code == 1 and "num_key_value_heads (2) was 1 in the run that" in str(done.exception)
    with monkeypatch.context() as patch:
        patch.setattr(heal_folders, "regroup_folder", None)  # it would be called to merge again
        done = CliRunner().invoke(app, regroup_arguments(folders, out, *few, "--resume"))
    assert done.exit_code == 0, done.output
    assert files(out) == files(whole)
    assert not list(tmp_path.glob(".*"))
