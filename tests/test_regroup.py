"""Regrouping a model in memory: what must not change does not, what is redundant goes without loss, what is wrong is
refused before any work."""

import copy

import numpy
import pytest
import torch

import groupformer
from groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForQuestionAnswering,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerModel,
)
from groupformer.regrouping.grouping import GROUPINGS, similar
from groupformer.regrouping.memory import build_regrouped
from groupformer.regrouping.merging import METHODS
from groupformer.regrouping.result import find_result
from groupformer.regrouping.sources import ModelSource, check_finite
from groupformer.regrouping.steps import Plan, find_moments, layer_problem, plan_regrouping

from .helpers import random_ids, randomize, tiny_config
from .helpers_regroup import KINDS, float64_model, with_copies


IDS = random_ids(2, 12)
CALIBRATION = random_ids(4, 60, seed=1)
MOVABLE = [kind for kind in KINDS if not kind.startswith("alibi")]


def logits(model: GroupFormerForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_same_logits(model, other):
    expected = logits(other)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def planned(model, method) -> tuple[ModelSource, Plan]:
    source = ModelSource(model)
    return source, plan_regrouping(source, 1, method, "adjacent", None, 0)


@torch.no_grad()
def rewrite_layers(model, method, groups):
    """The model after every layer was merged into the given groups, its counts unchanged."""
    source, plan = planned(model, method)
    moments, model = find_moments(source, plan, None), copy.deepcopy(model)
    for layer_idx, layout in enumerate(plan.layouts):
        heads = layer_problem(source, plan, moments, layer_idx).merged(groups, torch.Generator())
        attention = model.get_submodule(layout.path)
        attention.load_state_dict(layout.write_heads(heads, source.read_module(layout.path)))
    return model


# Steps that preserve the function ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MOVABLE)
def test_permuting_heads_leaves_the_logits(kind):
    model = float64_model(**KINDS[kind])
    permuted = rewrite_layers(model, "mean", [[head] for head in (5, 2, 7, 0, 1, 6, 3, 4)])
    weights = [m.model.layers[0].self_attn.k_proj.weight for m in (model, permuted)]
    assert not torch.equal(*weights)
    assert_same_logits(permuted, model)


@pytest.mark.parametrize("kind", KINDS)
def test_rotating_and_scaling_heads_leaves_the_logits(kind):
    model = float64_model(**KINDS[kind])
    rewritten = rewrite_layers(model, "svd", [[head] for head in range(8)])
    weights = [m.model.layers[0].self_attn.v_proj.weight for m in (model, rewritten)]
    assert not torch.allclose(*weights)
    assert_same_logits(rewritten, model)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_steps_leave_the_logits_to_rounding(kind):
    model = float64_model(**KINDS[kind]).float()
    assert_same_logits(rewrite_layers(model, "svd", [[head] for head in range(8)]), model)


# Redundancy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", [None, CALIBRATION], ids=["norms", "calibrated"])
@pytest.mark.parametrize("kind", KINDS)
def test_svd_merges_redundant_heads_without_loss(kind, calibration):
    grouped = float64_model(num_key_value_heads=2, **KINDS[kind])
    copied = with_copies(grouped)
    assert_same_logits(copied, grouped)  # the maps are undone, in every position kind
    merged = groupformer.regroup(copied, 2, method="svd", calibration=calibration)
    assert merged.config.num_key_value_heads == 2
    assert_same_logits(merged, grouped)


@pytest.mark.parametrize("kind", MOVABLE)
def test_similar_grouping_finds_the_copies(kind):
    grouped = float64_model(num_key_value_heads=4, **KINDS[kind])
    copied = with_copies(grouped, order=[0, 2, 4, 6, 1, 3, 5, 7])
    merged = groupformer.regroup(copied, 4, method="svd", grouping="similar")
    assert_same_logits(merged, grouped)
    adjacent = groupformer.regroup(copied, 4, method="svd", grouping="adjacent")
    assert (logits(adjacent) - logits(grouped)).abs().max() > 1e-2


def test_grouped_models_regroup_further():
    grouped = float64_model(num_key_value_heads=2)
    four = groupformer.regroup(with_copies(grouped), 4, method="svd")
    assert_same_logits(groupformer.regroup(four, 2, method="svd"), grouped)


def test_aligned_merges_rotated_copies_without_loss():
    grouped = float64_model(num_key_value_heads=2)
    copied = groupformer.regroup(with_copies(grouped), 8, method="svd")
    state = copied.state_dict()
    generator = torch.Generator().manual_seed(0)
    base = grouped.state_dict()
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        for head in range(8):
            rows, source = slice(head * 4, head * 4 + 4), slice(head // 4 * 4, head // 4 * 4 + 4)
            turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
            angle = torch.rand(2, generator=generator, dtype=torch.float64) * 6
            cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
            phase = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
            state[prefix + "v_proj.weight"][rows] = turn @ base[prefix + "v_proj.weight"][source]
            state[prefix + "k_proj.weight"][rows] = phase @ base[prefix + "k_proj.weight"][source]
            state[prefix + "q_proj.weight"][rows] = phase @ base[prefix + "q_proj.weight"][rows]
            state[prefix + "o_proj.weight"][:, rows] = base[prefix + "o_proj.weight"][:, rows] @ turn.T
    copied.load_state_dict(state)
    assert_same_logits(copied, grouped)
    assert_same_logits(groupformer.regroup(copied, 2, method="aligned"), grouped)


# Methods against their definitions -----------------------------------------------------------------------------------


def test_mean_is_the_papers_mean_pooling():
    model = float64_model()
    merged = groupformer.regroup(model, 2, method="mean", grouping="adjacent").model.layers[1].self_attn
    original = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        pooled = getattr(original, name).weight.view(2, 4, 4, 32).mean(dim=1).reshape(8, 32)
        torch.testing.assert_close(getattr(merged, name).weight, pooled)
    for name in ("q_proj", "o_proj"):
        assert torch.equal(getattr(merged, name).weight, getattr(original, name).weight)


def test_first_takes_the_first_head_of_each_group():
    model = float64_model()
    merged = groupformer.regroup(model, 4, method="first", grouping="adjacent").model.layers[0].self_attn
    original = model.model.layers[0].self_attn
    torch.testing.assert_close(merged.v_proj.weight, original.v_proj.weight.view(4, 2, 4, 32)[:, 0].reshape(16, 32))


def test_random_depends_on_its_seed_alone():
    model = float64_model(attention_bias=True)
    one, same, other = (groupformer.regroup(model, 2, method="random", seed=seed) for seed in (1, 1, 2))
    keys = [m.model.layers[0].self_attn.k_proj for m in (one, same, other)]
    assert torch.equal(keys[0].weight, keys[1].weight)
    assert not torch.equal(keys[0].weight, keys[2].weight)
    assert float(keys[0].weight.detach().std()) == pytest.approx(model.config.initializer_range, rel=0.2)
    assert not keys[0].bias.any()


@torch.no_grad()
def test_svd_of_values_is_the_best_of_its_rank():
    """Against numpy-style SVD of the stacked maps O_h W_V,h S^½, written out."""
    model = float64_model()
    layer = model.model.layers[0]
    weight = layer.input_layernorm.weight
    root = torch.diag((weight**2 * (1 + 1e-3 * (weight**2).mean() / weight**2)).sqrt())  # S^½ with its ridge
    original = layer.self_attn
    merged = groupformer.regroup(model, 1, method="svd").model.layers[0].self_attn

    def stacked(attention, groups):
        outputs = attention.o_proj.weight.view(32, 8, 4).transpose(0, 1)
        values = attention.v_proj.weight.view(groups, 4, 32).repeat_interleave(8 // groups, dim=0)
        return (outputs @ values @ root).reshape(-1, 32)

    expected = torch.linalg.svdvals(stacked(original, 8))[4:].square().sum()
    lost = (stacked(original, 8) - stacked(merged, 1)).square().sum()
    torch.testing.assert_close(lost, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["rope", "partial_rope_bias", "learned_bias"])
def test_svd_loses_the_least_energy_of_all_methods(kind):
    model = float64_model(**KINDS[kind])
    losses = {}
    for method in METHODS:
        source, plan = planned(model, method)
        losses[method] = layer_problem(source, plan, find_moments(source, plan, None), 0).loss([0, 1, 2, 3])
    assert losses["svd"] < losses["aligned"] < losses["mean"] < min(losses["first"], losses["random"])


# Grouping and budget -------------------------------------------------------------------------------------------------


class PairwiseProblem:
    """Heads on a line; merging them loses the sum of their squared distances."""

    def __init__(self, places):
        self.places = places
        geometry = type("Geometry", (), {"num_key_value_heads": len(places)})
        self.heads = type("Heads", (), {"geometry": geometry})

    def loss(self, group):
        return sum((self.places[a] - self.places[b]) ** 2 for a in group for b in group) / 2


@pytest.mark.parametrize("count, clusters", [(8, 4), (8, 2), (12, 3), (32, 8)])
def test_similar_grouping_finds_balanced_clusters(count, clusters):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    places = [10 * (head % clusters) + head / count for head in order]
    groups = similar(PairwiseProblem(places), clusters)
    assert sorted(head for group in groups for head in group) == list(range(count))
    assert {len(group) for group in groups} == {count // clusters}
    for group in groups:
        assert len({int(places[head] // 10) for head in group}) == 1


# The new model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_class",
    [
        GroupFormerModel,
        GroupFormerForCausalLM,
        GroupFormerForSequenceClassification,
        GroupFormerForTokenClassification,
        GroupFormerForQuestionAnswering,
    ],
)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_any_model_gives_a_new_one_and_stays_as_it_was(model_class, grouping):
    model = randomize(model_class(tiny_config())).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    merged = groupformer.regroup(model, 2, grouping=grouping, calibration=CALIBRATION)
    assert type(merged) is model_class
    assert not merged.training
    assert merged.dtype == torch.bfloat16
    assert merged.config.num_key_value_heads == 2
    assert model.config.num_key_value_heads == 4
    merged(IDS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() != merged.state_dict()[name].data_ptr()


def test_cache_shrinks_with_the_heads():
    merged = groupformer.regroup(float64_model(), {0: 2})
    cache = merged(IDS, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [2, 8]


def test_layers_that_keep_their_count_stay_bit_for_bit():
    model = float64_model()
    merged = groupformer.regroup(model, {1: 1})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]) == ("layers.1.self_attn" not in name)
    assert [layer.num_key_value_heads for layer in merged.config.per_layer_config] == [8, 1]


def test_per_layer_counts_survive_saving_and_equal_again(tmp_path):
    merged = groupformer.regroup(float64_model(), {0: 2})
    merged.save_pretrained(tmp_path)
    loaded = GroupFormerForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same_logits(loaded, merged)
    even = groupformer.regroup(loaded, {1: 2})
    assert even.config.num_key_value_heads == 2
    assert not even.config.is_heterogeneous


def test_tied_embeddings_stay_tied():
    merged = groupformer.regroup(float64_model(), 2)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_regroup_is_a_function_even_after_the_package_was_imported():
    import groupformer.regrouping  # noqa: F401

    assert callable(groupformer.regroup)


# Refusals ------------------------------------------------------------------------------------------------------------

REFUSALS = {
    "not_a_divisor": (dict(num_key_value_heads=3), "num_key_value_heads (3) must divide the 4 there are"),
    "zero": (dict(num_key_value_heads=0), "num_key_value_heads (0) must divide the 4"),
    "too_many": (dict(num_key_value_heads=8), "num_key_value_heads (8) is more than the 4 there are"),
    "no_number": (dict(num_key_value_heads=2.0), "must be a number"),
    "unknown_layer": (dict(num_key_value_heads={5: 1}), "names layer 5; choose from 0 to 1"),
    "not_a_divisor_in_layer": (dict(num_key_value_heads={1: 3}), "(3) in layer 1 must divide"),
    "method": (dict(num_key_value_heads=2, method="median"), "method ('median') is unknown; choose first, random"),
    "grouping": (
        dict(num_key_value_heads=2, grouping="odd"),
        "grouping ('odd') is unknown; choose adjacent or similar",
    ),
    "no_budget": (dict(num_key_value_heads="auto"), "budget (None) must be above 0 and at most 1"),
    "small_budget": (dict(num_key_value_heads="auto", budget=0.1), "choose at least 0.25"),
    "budget_without_auto": (dict(num_key_value_heads=2, budget=0.5), "budget (0.5) needs num_key_value_heads='auto'"),
    "short": (
        dict(num_key_value_heads=2, calibration=random_ids(1, 31)),
        "calibration has 31 tokens, but hidden_size",
    ),
    "shape": (dict(num_key_value_heads=2, calibration=random_ids(1, 99)[0]), "LongTensor (batch, seq)"),
    "floats": (dict(num_key_value_heads=2, calibration=torch.rand(9, 9)), "LongTensor (batch, seq)"),
    "short_integers": (dict(num_key_value_heads=2, calibration=IDS.to(torch.int16)), "dtype torch.int16"),
    "numpy_float": (dict(num_key_value_heads=numpy.float64(2)), "must be a number"),
    "bool": (dict(num_key_value_heads=True), "num_key_value_heads (True) must be a number"),
    "vocabulary": (dict(num_key_value_heads=2, calibration=torch.full((9, 9), 99)), "vocab_size is 99"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_name(case):
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError) as refusal:
        groupformer.regroup(randomize(GroupFormerForCausalLM(tiny_config())), **arguments)
    assert message in str(refusal.value)


def test_weights_with_nan_are_refused_by_name():
    model = randomize(GroupFormerForCausalLM(tiny_config()))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight holds numbers that are not finite"):
        groupformer.regroup(model, 2)


def test_similar_grouping_is_refused_with_alibi():
    with pytest.raises(ValueError, match="each place has its own slope; choose 'adjacent'"):
        groupformer.regroup(float64_model(position_embedding_type="alibi"), 2, grouping="similar")


def test_long_calibration_rows_are_refused_with_learned_positions():
    with pytest.raises(ValueError, match="give shorter rows"):
        groupformer.regroup(float64_model(position_embedding_type="learned"), 2, calibration=random_ids(1, 65))


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"model \(Linear\) is no model of transformers"):
        groupformer.regroup(torch.nn.Linear(2, 2), 2)


def test_an_adapter_is_refused_by_its_tensors():
    from peft import LoraConfig, inject_adapter_in_model

    model = randomize(GroupFormerForCausalLM(tiny_config()))
    inject_adapter_in_model(LoraConfig(target_modules=["gate_proj"]), model)  # as `add_adapter` does
    with pytest.raises(ValueError, match="model holds model.layers.0.mlp.gate_proj.base_layer.weight, no tensor of"):
        groupformer.regroup(model, 2)


def test_quantized_weights_are_refused():
    model = randomize(GroupFormerForCausalLM(tiny_config()))
    weight = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj.weight is \(32, 32\) in torch.int8, .* regroup before quantizing"):
        groupformer.regroup(model, 2)


def test_a_layer_without_its_weights_is_refused():
    model = randomize(GroupFormerForCausalLM(tiny_config()))
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="model lacks model.layers.1.mlp.up_proj.weight"):
        groupformer.regroup(model, 2)


def test_a_tensor_that_was_not_loaded_is_an_error():
    model = randomize(GroupFormerForCausalLM(tiny_config()))
    _, plan = planned(model, "svd")
    result = find_result(type(model), model.config, plan.layouts, [4, 4])
    with pytest.raises(RuntimeError, match="self_attn"):
        build_regrouped(model, result, {plan.layouts[0].path: {}})


def test_untied_heads_and_heads_for_classes_are_no_strangers():
    untied = randomize(GroupFormerForCausalLM(tiny_config(tie_word_embeddings=False)))
    assert torch.equal(groupformer.regroup(untied, 2).lm_head.weight, untied.lm_head.weight)
    classifier = randomize(GroupFormerForSequenceClassification(tiny_config(num_labels=5)))
    assert torch.equal(groupformer.regroup(classifier, 2).score.weight, classifier.score.weight)


@pytest.mark.parametrize("wanted", [numpy.int64(2), {numpy.int32(0): numpy.int64(2), 1: 2}], ids=["one", "by layer"])
def test_whole_numbers_of_numpy_are_counts(wanted):
    config = groupformer.regroup(randomize(GroupFormerForCausalLM(tiny_config())), wanted).config
    assert type(config.num_key_value_heads) is int and config.num_key_value_heads == 2


def test_calibration_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"calibration \(list\) is no tensor; give token ids"):
        groupformer.regroup(randomize(GroupFormerForCausalLM(tiny_config())), 2, calibration=[[1, 2]])


def test_float8_is_checked_too():
    check_finite("weight", torch.ones(2).to(torch.float8_e4m3fn), "model")
    with pytest.raises(ValueError, match="weight holds numbers that are not finite"):
        check_finite("weight", torch.full((2,), float("nan")).to(torch.float8_e4m3fn), "model")
