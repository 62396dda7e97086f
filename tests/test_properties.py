"""What must hold for any configuration, tried on random ones (hypothesis)."""

import tempfile

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import groupformer
from groupformer import GroupFormerConfig, GroupFormerForCausalLM, GroupFormerModel

from .helpers import random_ids, randomize
from .helpers_families import cases, native_model
from .strategies import ILLEGAL, legal_configs


# The same examples in every default run; many more, and others each time, in the slow one.
FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((left - right).abs().max() <= tolerance * max(1.0, right.abs().max().item()))


def built(config: GroupFormerConfig) -> GroupFormerForCausalLM:
    return randomize(GroupFormerForCausalLM(config))


def exact(config: GroupFormerConfig) -> GroupFormerForCausalLM:
    """In float64: in float32 a norm of a small vector multiplies the rounding, by what the random weights say."""
    return built(config).double()


def logits_of(model, ids, **inputs) -> torch.Tensor:
    return model(ids, use_cache=False, **inputs).logits


# Properties: each takes a config and asserts ------------------------------------------------------------------------


def builds_trains_saves_and_loads(config: GroupFormerConfig) -> None:
    model = built(config)
    ids = random_ids(2, 7, config.vocab_size)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = GroupFormerForCausalLM.from_pretrained(folder, attn_implementation=config._attn_implementation)
        ignored = ("_name_or_path", "transformers_version", "architectures", "dtype")
        saved, loaded = (
            {k: v for k, v in each.config.to_dict().items() if k not in ignored} for each in (model, again)
        )
        assert loaded == saved
        assert torch.equal(logits_of(again.eval(), ids), logits_of(model, ids))


@torch.no_grad()
def cached_equals_uncached(config: GroupFormerConfig) -> None:
    model = exact(config)
    ids = random_ids(2, 11, config.vocab_size)
    expected = logits_of(model, ids)
    step = model(ids[:, :4], use_cache=True)
    pieces = [step.logits]
    for start, stop in ((4, 5), (5, 8), (8, 9), (9, 11)):
        step = model(ids[:, start:stop], past_key_values=step.past_key_values, use_cache=True)
        pieces.append(step.logits)
    assert close(torch.cat(pieces, dim=1), expected)


@torch.no_grad()
def padding_changes_nothing(config: GroupFormerConfig) -> None:
    model = exact(config)
    ids = random_ids(1, 6, config.vocab_size)
    expected = logits_of(model, ids)
    for before, after in ((3, 0), (0, 3), (2, 2)):
        padded = torch.nn.functional.pad(ids, (before, after))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
        got = logits_of(model, padded, attention_mask=mask)
        assert got.isfinite().all()
        assert close(got[:, before : before + 6], expected)


@torch.no_grad()
def packed_equals_separate(config: GroupFormerConfig) -> None:
    model = exact(config)
    first, second = random_ids(1, 5, config.vocab_size), random_ids(1, 4, config.vocab_size, seed=1)
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    packed = logits_of(model, torch.cat([first, second], dim=1), position_ids=positions)
    assert close(packed, torch.cat([logits_of(model, first), logits_of(model, second)], dim=1))


def regrouping_to_as_many_heads_keeps_the_layers(config: GroupFormerConfig) -> None:
    model = built(config)
    small = groupformer.regroup(model, 1, method="mean")
    ids = random_ids(2, 5, config.vocab_size)
    with torch.no_grad():
        assert logits_of(small, ids).isfinite().all()
        if all(layer.num_key_value_heads == 1 for layer in config.per_layer_config):
            assert torch.equal(logits_of(small, ids), logits_of(model, ids))


ANY = [builds_trains_saves_and_loads, padding_changes_nothing, regrouping_to_as_many_heads_keeps_the_layers]
CAUSAL = [cached_equals_uncached, packed_equals_separate]


def check(property_of_config, profile) -> None:
    configs = legal_configs(causal=True if property_of_config in CAUSAL else None)
    profile(given(configs)(property_of_config))()


@pytest.mark.parametrize("property_of_config", ANY + CAUSAL, ids=lambda each: each.__name__)
def test_property(property_of_config):
    check(property_of_config, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("property_of_config", ANY + CAUSAL, ids=lambda each: each.__name__)
def test_property_many_times(property_of_config):
    check(property_of_config, MANY)


@pytest.mark.parametrize("field", ILLEGAL)
def test_illegal_configs_are_refused_by_the_field(field):
    @FEW
    @given(ILLEGAL[field])
    def refused(value):
        fields = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 8}
        with pytest.raises((ValueError, TypeError, StrictDataclassError), match=field):
            GroupFormerModel(GroupFormerConfig(**{"pad_token_id": 0, **fields, field: value}))

    refused()


# The bridge: other sizes for every family's examples ----------------------------------------------------------------


@torch.no_grad()
def comes_in_and_goes_out(name: str, option: str, vocab_size: int, seed: int) -> None:
    try:
        native = native_model(name, option, vocab_size=vocab_size)
    except TypeError:
        return
    randomize(native, seed=seed)
    ids = random_ids(2, 6, vocab_size, seed=seed)
    ours = groupformer.import_model(native)
    expected = native(ids).logits
    assert close(ours.eval()(ids).logits, expected)
    back = groupformer.export_model(ours)
    for key, value in native.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _ in cases()}))
def test_random_models_of_every_family_come_in_and_go_out(name):
    options = [option for family, option in cases() if family == name]

    @settings(MANY, max_examples=15)
    @given(st.sampled_from(options), st.integers(90, 120), st.integers(0, 2**30))
    def holds(option, vocab_size, seed):
        comes_in_and_goes_out(name, option, vocab_size, seed)

    holds()
