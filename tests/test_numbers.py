"""Numbers: dtypes, extremes, gradients, seeds, and models that nobody has trained yet."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call
from transformers import set_seed

import groupformer
from groupformer import GroupFormerConfig, GroupFormerForCausalLM

from .helpers import random_ids, randomize, tiny_config
from .reference import reference_hidden_states


POSITIONS = ["learned", "sinusoidal", "rope", "alibi", "none"]
HEADS = ["CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


# Dtypes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_dtype_gives_the_logits_of_float64(dtype, positions, backend):
    config = tiny_config(position_embedding_type=positions, num_key_value_heads=2, attn_implementation=backend)
    model = randomize(GroupFormerForCausalLM(config)).to(dtype)
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    hidden = reference_hidden_states(state, config, ids, mask)
    expected = hidden @ state["lm_head.weight"].T
    found = model(ids, attention_mask=mask).logits
    assert found.dtype is dtype
    error = (found.double() - expected)[mask.bool()].abs().max() / expected.abs().max()
    assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_head_trains_in_every_dtype(dtype, head):
    model = getattr(groupformer, f"GroupFormerFor{head}")(tiny_config()).to(dtype)
    ids = random_ids(2, 6)
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    labels = {"CausalLM": ids, "SequenceClassification": torch.tensor([0, 1]), "TokenClassification": ids % 2}
    inputs = spans if head == "QuestionAnswering" else {"labels": labels[head]}
    model(ids, **inputs).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Extremes ------------------------------------------------------------------------------------------------------------


def with_scores_of(limit, model, ids):
    """The model with its first layer's queries and keys stretched until the largest score is `limit`."""
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids)).float()
    queries, keys = (hidden @ getattr(layer.self_attn, name).weight.float().T for name in ("q_proj", "k_proj"))
    scale = (limit / (queries @ keys.mT * layer.self_attn.scaling).abs().max()).sqrt()
    layer.self_attn.q_proj.weight *= scale
    layer.self_attn.k_proj.weight *= scale
    return model


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_scores_ten_thousand_apart_do_not_overflow(dtype, positions, backend):
    """Scores of up to +-10,000; one row is all padding, one begins with some."""
    config = tiny_config(
        hidden_size=64,
        head_dim=64,
        num_attention_heads=1,
        num_hidden_layers=1,
        position_embedding_type=positions,
        attn_implementation=backend,
    )
    model = randomize(GroupFormerForCausalLM(config)).to(dtype)
    ids = random_ids(3, 12)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0
    mask[1] = 0
    with torch.no_grad():
        with_scores_of(1e4, model, ids)
    logits = model(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    (logits.float() * mask[..., None]).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Gradients -----------------------------------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=7,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=8,
    num_labels=2,
    is_causal=True,
)
VARIANTS = {
    **{f"positions: {kind}": dict(position_embedding_type=kind) for kind in POSITIONS},
    "layer norm": dict(norm_type="layer_norm"),
    "layer norm without bias": dict(norm_type="layer_norm", norm_bias=False),
    "norms around one": dict(norm_type="rms_norm_1p", qk_norm="head"),
    "norm after": dict(norm_position="after"),
    "qk norm of heads": dict(qk_norm="head"),
    "qk norm of projections": dict(qk_norm="projection"),
    "plain MLP": dict(mlp_type="plain", hidden_act="gelu", mlp_bias=True),
    "parallel": dict(parallel_residual=True),
    "parallel, one norm": dict(parallel_residual=True, shared_parallel_norm=True),
    "biases": dict(attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "bidirectional": dict(is_causal=False),
    "multi-head": dict(num_key_value_heads=2),
    "window": dict(sliding_window=2),
    "multipliers": dict(embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=3.0),
}


def check_gradients(model):
    """All parameters and the embeddings of the input, against differences of the float64 outputs."""
    model = randomize(model, std=0.5).double()
    names = [name for name, _ in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name]
    parameters = [dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names]
    embeddings = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    direction = None

    def output(embeddings, *tensors):
        nonlocal direction
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "use_cache": False}
        found = functional_call(model, dict(zip(names, tensors)), kwargs=inputs)
        logits = found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], -1)
        if direction is None:
            direction = torch.randn_like(logits)
            if logits.shape[-2] == 4:  # a value for each token: padding's is not looked at
                direction = direction * mask[..., None]
        return (logits * direction).sum()

    assert gradcheck(output, (embeddings, *parameters), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_every_variant(variant, backend):
    config = GroupFormerConfig(**{**SMALL, **VARIANTS[variant]}, attn_implementation=backend)
    check_gradients(GroupFormerForCausalLM(config))


@pytest.mark.parametrize("head", HEADS[1:])
def test_gradients_of_every_head(head):
    check_gradients(getattr(groupformer, f"GroupFormerFor{head}")(GroupFormerConfig(**SMALL, pad_token_id=0)))


# Seeds ---------------------------------------------------------------------------------------------------------------


def test_a_seed_fixes_weights_dropout_and_samples():
    def run():
        set_seed(3)
        model = GroupFormerForCausalLM(tiny_config(hidden_dropout=0.3, attention_dropout=0.3)).train()
        logits = model(random_ids(2, 8)).logits
        return logits, model.eval().generate(random_ids(1, 3), do_sample=True, max_new_tokens=8)

    assert all(torch.equal(first, second) for first, second in zip(run(), run()))


# Fresh models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm_position", ["before", "after"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_fresh_model_knows_nothing(positions, norm_position, tied):
    """Its loss is that of a fair guess, ln(vocabulary)."""
    config = GroupFormerConfig(
        position_embedding_type=positions, norm_position=norm_position, tie_word_embeddings=tied, num_hidden_layers=4
    )
    ids = random_ids(2, 64, vocab_size=config.vocab_size)
    with torch.no_grad():
        loss = GroupFormerForCausalLM(config)(ids, labels=ids).loss
    assert abs(loss / math.log(config.vocab_size) - 1) < 0.02


@pytest.mark.parametrize(
    "options", [{}, {"parallel_residual": True}, {"norm_type": "layer_norm"}, {"mlp_type": "plain"}]
)
def test_sixty_four_layers_neither_explode_nor_vanish(options):
    config = GroupFormerConfig(num_hidden_layers=64, vocab_size=200, **options)
    model = GroupFormerForCausalLM(config)
    ids = random_ids(1, 32, vocab_size=200)
    output = model(ids, labels=ids, output_hidden_states=True)
    variances = torch.stack([states.float().var() for states in output.hidden_states[:-1]])
    output.loss.backward()
    assert torch.isfinite(output.loss) and variances.max() < 2.0
    first, last = (model.model.layers[layer].self_attn.q_proj.weight.grad.norm() for layer in (0, -1))
    assert 1e-2 < first / last < 1e2


def test_norms_after_the_sublayers_add_two_a_layer_and_no_more():
    """Each layer adds two normed outputs of variance 1 to the residual stream: it grows linearly, as in OLMo 2."""
    model = GroupFormerForCausalLM(GroupFormerConfig(num_hidden_layers=64, vocab_size=200, norm_position="after"))
    with torch.no_grad():
        states = model(random_ids(1, 32, vocab_size=200), output_hidden_states=True).hidden_states[:-1]
    variances = [float(state.var()) for state in states]
    assert variances[32] < 2.2 * 32 and variances[-1] < 2.2 * 64
