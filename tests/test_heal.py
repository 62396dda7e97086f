"""Healing: the attention of a merged model gets closer to the original's, whatever the decoder, and nothing else."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import groupformer
from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.regrouping.heal import HealRecipe, heal
from groupformer.regrouping.heal_folders import heal_folder

from .helpers import random_ids, randomize, tiny_config


RECIPE = HealRecipe(epochs=4, batch_size=4, bf16=False)
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
    reports = heal(model, original, random_ids(48, 24), RECIPE)
    assert distance(model, original, random_ids(8, 24, seed=1)) < 0.9 * before
    assert all(report.is_healed and report.healed < report.merged for report in reports)
    attention = {
        f".{place}." for place, child in decoder_layers(model)[0].named_children() if "Att" in str(type(child))
    }
    for key, tensor in model.state_dict().items():
        if not any(part in key for part in attention):
            assert torch.equal(tensor, state[key]), key
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_closed_form_alone_gives_the_attention_that_was_lost_where_a_linear_map_can():
    _, original = pair("llama")
    model = copy.deepcopy(original)
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.self_attn.o_proj.weight.mul_(0.5)
    reports = heal(model, original, random_ids(48, 24), HealRecipe(epochs=0, ridge=1e-9, bf16=False))
    assert [report.solved < 1e-6 for report in reports] == [True, True]
    for own, other in zip(model.parameters(), original.parameters()):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)


def test_a_model_that_lost_nothing_stays_bit_for_bit():
    _, original = pair("llama")
    model = copy.deepcopy(original)
    reports = heal(model, original, random_ids(8, 16), RECIPE)
    assert all(report.merged < 1e-12 for report in reports)
    for own, other in zip(model.parameters(), original.parameters()):
        assert torch.equal(own, other)


def test_a_layer_whose_loss_is_not_finite_keeps_its_merged_weights_and_is_named():
    model, original = pair("llama")
    with torch.no_grad():
        decoder_layers(model)[1].self_attn.v_proj.weight.fill_(3e38)
    state = copy.deepcopy(model.state_dict())
    reports = heal(model, original, random_ids(16, 16), RECIPE)
    assert [report.is_healed for report in reports] == [True, False]
    assert reports[1].layer_idx == 1
    for key, tensor in model.state_dict().items():
        if "layers.1." in key:
            assert torch.equal(tensor, state[key])


def test_the_dtype_stays_and_healing_works_in_float32():
    model, original = (each.to(torch.bfloat16) for each in pair("llama"))
    before = distance(model, original, random_ids(8, 24, seed=1))
    heal(model, original, random_ids(32, 24), RECIPE)
    assert {parameter.dtype for parameter in [*model.parameters(), *original.parameters()]} == {torch.bfloat16}
    assert distance(model, original, random_ids(8, 24, seed=1)) < before


def test_progress_is_told_of_each_layer():
    model, original = pair("llama")
    seen = []
    heal(model, original, random_ids(8, 16), RECIPE, progress=lambda report, layers: seen.append((report, layers)))
    assert [(report.layer_idx, layers) for report, layers in seen] == [(0, 2), (1, 2)]


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


def test_regroup_heals_what_it_merged():
    _, original = pair("llama")
    token_ids = random_ids(48, 24)
    merged = groupformer.regroup(original, 1, calibration=token_ids)
    healed = groupformer.regroup(original, 1, calibration=token_ids, heal={"epochs": 2, "bf16": False})
    heal(merged, original, token_ids, HealRecipe(epochs=2, bf16=False))
    for own, other in zip(healed.parameters(), merged.parameters()):
        assert torch.equal(own, other)
    assert healed.config.regrouping[-1]["healing"] == {"tokens": 48 * 24, "epochs": 2}


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
    reports = heal_folder(folders / "merged", folders / "original", tmp_path / "out", IDS, RECIPE)
    model, original = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("merged", "original"))
    assert heal(model, original, IDS, RECIPE) == reports
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert healed.dtype == torch.bfloat16
    for (name, own), other in zip(healed.state_dict().items(), model.state_dict().values()):
        assert torch.equal(own, other), name
    for name, tensor in load_file(folders / "merged" / "model.safetensors").items():
        same = torch.equal(tensor, load_file(tmp_path / "out" / "model.safetensors")[name])
        assert same != ("_proj" in name and "self_attn" in name), name
    assert healed.config.regrouping[-1]["healing"] == {"tokens": 256, "epochs": 4}
    assert not list(tmp_path.glob(".*"))


def test_a_native_original_teaches_its_import(folders, tmp_path):
    original = randomize(AutoModelForCausalLM.from_config(transformers.LlamaConfig(**NATIVE)))
    original.save_pretrained(tmp_path / "original")
    student = groupformer.regroup(groupformer.import_model(original), 1, method="mean")
    student.save_pretrained(tmp_path / "merged")
    reports = heal_folder(tmp_path / "merged", tmp_path / "original", tmp_path / "out", random_ids(16, 16), RECIPE)
    assert all(report.healed < report.merged for report in reports)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is GroupFormerForCausalLM


def test_an_interrupted_run_leaves_no_target_and_resumes_to_the_same_bytes(folders, tmp_path):
    sources = (folders / "merged", folders / "original")

    def interrupt(report, layers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_folder(*sources, tmp_path / "out", IDS, RECIPE, progress=interrupt)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds the layers of an interrupted run; pass --resume to go on"):
        heal_folder(*sources, tmp_path / "out", IDS, RECIPE)
    with pytest.raises(ValueError, match=r"epochs \(3\) was 4 in the run that"):
        heal_folder(*sources, tmp_path / "out", IDS, HealRecipe(epochs=3, bf16=False), resume=True)
    resumed = heal_folder(*sources, tmp_path / "out", IDS, RECIPE, resume=True)
    assert heal_folder(*sources, tmp_path / "whole", IDS, RECIPE) == resumed
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
    reports = json.loads(outcome.stdout)
    assert [report["layer_idx"] for report in reports] == [0, 1]
    assert all(report["healed"] < report["merged"] for report in reports)
    outcome = CliRunner().invoke(app, [*arguments, "--tokens", "16", "--overwrite"])
    assert outcome.exit_code == 1
    assert "healing needs at least 2 rows of 2 tokens; give more text, or shorter rows" in str(outcome.exception)
