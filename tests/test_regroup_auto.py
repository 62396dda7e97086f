"""`auto`: what a count costs is measured, and the budget is spent where it saves most."""

import copy
import itertools

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import groupformer
from groupformer.regrouping.budget import choose_counts
from groupformer.regrouping.sensitivity import measured_losses
from groupformer.regrouping.sources import ModelSource
from groupformer.regrouping.steps import find_moments, layer_problem, plan_regrouping, tokens_kept

from .helpers import random_ids, randomize, tiny_config
from .helpers_regroup import float64_model, with_copies


IDS = random_ids(2, 12)
CALIBRATION = random_ids(4, 60, seed=1)


def assert_same_logits(model, other):
    with torch.no_grad():
        expected, found = other(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_auto_meets_the_budget_and_spares_the_layer_that_needs_its_heads():
    redundant = with_copies(float64_model(num_key_value_heads=1))
    layer = {name: tensor for name, tensor in float64_model().state_dict().items() if "layers.1." in name}
    redundant.load_state_dict(layer, strict=False)  # the first layer is redundant, the second is not
    chosen = groupformer.regroup(redundant, "auto", budget=0.625, grouping="adjacent")
    counts = [layer.num_key_value_heads for layer in chosen.config.per_layer_config]
    assert counts == [1, 8]
    assert_same_logits(chosen, redundant)


@pytest.mark.parametrize("budget", [0.125, 0.25, 0.5, 1.0])
def test_auto_never_exceeds_the_budget(budget):
    chosen = groupformer.regroup(float64_model(), "auto", budget=budget, method="mean")
    assert sum(layer.num_key_value_heads for layer in chosen.config.per_layer_config) <= 16 * budget


# What a count costs --------------------------------------------------------------------------------------------------


@torch.no_grad()
def seen(model, ids) -> list[dict[str, torch.Tensor]]:
    """For each layer, what enters it, what its attention's output projection reads, and what the attention adds."""
    layers = [{} for _ in model.get_decoder().layers]
    hooks = []
    for layer, values in zip(model.get_decoder().layers, layers):
        hooks += [
            layer.register_forward_pre_hook(lambda _, args, values=values: values.update(stream=args[0])),
            layer.self_attn.o_proj.register_forward_hook(
                lambda _, args, out, values=values: values.update(features=args[0], added=out)
            ),
        ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return layers


def error_left(own: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> float:
    """Of the last row, |error|² / |stream + added|² once the output projection is solved for on the other rows."""
    features, added = (own[name].double() for name in ("features", "added"))
    goal, stream = (original[name].double() for name in ("added", "stream"))
    weights = 1 / (stream + goal).square().sum(-1, keepdim=True)
    known, missing = (each[:-1].flatten(0, 1) for each in (features, goal - added))
    gram = known.T @ (weights[:-1].flatten(0, 1) * known)
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    change = torch.linalg.solve(gram + ridge, known.T @ (weights[:-1].flatten(0, 1) * missing))
    before, after = ((goal - got)[-1].square().sum(-1, keepdim=True) for got in (added, added + features @ change))
    return min(float((weights[-1] * error).mean()) for error in (before, after))


def native_llama():
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return randomize(LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, max_position_embeddings=64)))


@pytest.mark.parametrize("build", [lambda: groupformer.GroupFormerForCausalLM(tiny_config()), native_llama])
def test_measured_losses_are_what_a_solution_of_the_output_leaves_of_one_merged_layer(build):
    model = randomize(build())
    source = ModelSource(model)
    plan = plan_regrouping(source, "auto", "svd", None, 0.5, 0)
    moments = find_moments(source, plan, CALIBRATION)
    problems = (layer_problem(source, plan, moments, layer_idx) for layer_idx in range(2))

    found = measured_losses(source, plan.layouts, plan.request, problems, CALIBRATION)

    ours = groupformer.import_model(model) if isinstance(model, LlamaForCausalLM) else model
    original = seen(ours, CALIBRATION)
    for layer_idx, count in itertools.product(range(2), (1, 2)):
        merged = groupformer.regroup(copy.deepcopy(ours), {layer_idx: count}, calibration=CALIBRATION)
        left = error_left(seen(merged, CALIBRATION)[layer_idx], original[layer_idx])
        assert found[layer_idx][count] == pytest.approx(left, rel=1e-3)
        assert found[layer_idx][4] == 0


def test_a_single_row_is_enough_to_measure():
    source = ModelSource(native_llama())
    plan = plan_regrouping(source, "auto", "svd", None, 0.5, 0)
    moments = find_moments(source, plan, CALIBRATION[:1])
    problems = (layer_problem(source, plan, moments, layer_idx) for layer_idx in range(2))
    losses = measured_losses(source, plan.layouts, plan.request, problems, CALIBRATION[:1])
    assert all(0 < layer[2] < layer[1] and layer[4] == 0 for layer in losses)


def test_with_calibration_auto_spends_the_cache_where_measuring_says():
    model = randomize(groupformer.GroupFormerForCausalLM(tiny_config()))
    with torch.no_grad():  # the second layer's attention adds next to nothing, however its heads differ
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)
    chosen = groupformer.regroup(model, "auto", budget=0.625, calibration=CALIBRATION)
    assert [layer.num_key_value_heads for layer in chosen.config.per_layer_config] == [4, 1]


# The budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_counts_are_the_best_of_all_that_fit(budget):
    generator = torch.Generator().manual_seed(0)
    tokens = [7, 64, 7, 64, 7]
    losses = [dict(zip((4, 2, 1), [0.0, *torch.rand(2, generator=generator).cumsum(0).tolist()])) for _ in tokens]

    def cache(counts):
        return sum(size * count for size, count in zip(tokens, counts))

    fitting = [counts for counts in itertools.product((1, 2, 4), repeat=5) if cache(counts) <= budget * cache([4] * 5)]
    best = min(fitting, key=lambda counts: sum(layer[count] for layer, count in zip(losses, counts)))
    assert choose_counts(losses, budget, tokens) == list(best)


def test_a_window_counts_by_the_tokens_that_it_keeps():
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=512, max_position_embeddings=4096)
    assert tokens_kept(config) == [512] * 5 + [4096]
