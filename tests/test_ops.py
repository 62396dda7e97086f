"""The faster operations give the plain ones' numbers, and step aside where something unusual is at work."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations import sdpa_attention
from transformers.loss.loss_utils import ForCausalLMLoss

from groupformer import GroupFormerForCausalLM
from groupformer.model import attention_groupformer, loss_groupformer, ops_groupformer
from groupformer.model.attention_groupformer import sdpa_attention_forward
from groupformer.model.loss_groupformer import HeadCrossEntropy
from groupformer.model.ops_groupformer import product_in_bands, project

from .helpers import random_ids, randomize, tiny_config


# Loss ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows at a time, so that a few rows are several chunks."""
    monkeypatch.setattr(loss_groupformer, "FEW_LOGITS", 0)
    monkeypatch.setattr(loss_groupformer, "CHUNK_SIZE", 5 * 99)


@pytest.fixture(params=["in chunks", "all at once"])
def either_loss(request):
    """Both ways to the loss: of many logits and of few."""
    if request.param == "in chunks":
        request.getfixturevalue("small_chunks")


def training_model(**overrides):
    return randomize(GroupFormerForCausalLM(tiny_config(**overrides))).train()


def labelled(ignored=True):
    ids = random_ids(3, 11)
    labels = ids.clone()
    if ignored:
        labels[0, :6] = -100
        labels[2] = -100
    return ids, labels


def gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SETTINGS = {
    "untied": dict(tie_word_embeddings=False),
    "tied": dict(tie_word_embeddings=True),
    "bias": dict(tie_word_embeddings=False, lm_head_bias=True),
    "scaled logits": dict(logits_scaling=3.0),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(17)}, {"ignore_index": 7}],
    ids=["mean", "count", "count in a tensor", "other ignored id"],
)
def test_the_loss_without_logits_is_the_plain_loss(either_loss, setting, options):
    model = training_model(**SETTINGS[setting])
    ids, labels = labelled()
    if "ignore_index" in options:
        labels = labels.masked_fill(labels == -100, 7)
    lean, lean_grads = gradients(model, input_ids=ids, labels=labels, **options)
    plain, plain_grads = gradients(model, input_ids=ids, labels=labels, skip_logits=False, **options)
    assert lean.logits is None and plain.logits.shape == (3, 11, 99)
    torch.testing.assert_close(lean.loss, plain.loss, rtol=1e-6, atol=0)
    assert lean_grads.keys() == plain_grads.keys()
    for name, gradient in plain_grads.items():
        torch.testing.assert_close(lean_grads[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_shifted_labels_can_be_given(either_loss):
    model = training_model()
    ids, labels = labelled()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    given = model(ids, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(given, model(ids, labels=labels).loss)


def test_the_loss_is_that_of_an_independent_float64_model(small_chunks):
    hidden, weight = torch.randn(12, 8, dtype=torch.float64), torch.randn(99, 8, dtype=torch.float64)
    labels = torch.randint(0, 99, (12,))
    loss = HeadCrossEntropy.apply(hidden.float(), weight.float(), None, labels, 1.0)
    logits = hidden @ weight.t()
    expected = sum(logits[row].exp().sum().log() - logits[row, label] for row, label in enumerate(labels))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_bfloat16_and_autocast_give_the_plain_loss_nearly(either_loss):
    ids, labels = labelled()
    for cast in (True, False):
        model = training_model()
        model = model if cast else model.to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            lean, lean_grads = gradients(model, input_ids=ids, labels=labels)
            plain, plain_grads = gradients(model, input_ids=ids, labels=labels, skip_logits=False)
        torch.testing.assert_close(lean.loss, plain.loss, rtol=1e-3, atol=1e-3)
        for name, gradient in plain_grads.items():
            distance = (lean_grads[name].float() - gradient.float()).norm() / gradient.float().norm()
            assert distance < 0.03, name


def test_labels_may_be_of_any_integer_type(either_loss):
    model = training_model()
    ids, labels = labelled()
    torch.testing.assert_close(model(ids, labels=labels.int()).loss, model(ids, labels=labels).loss)


def test_few_logits_leave_the_loss_to_torch(monkeypatch):
    model = training_model()
    ids, labels = labelled()
    monkeypatch.setattr(HeadCrossEntropy, "apply", None)  # calling it would fail
    assert model(ids, labels=labels).loss.grad_fn is not None


def test_one_chunk_leaves_the_heads_gradient_in_its_dtype():
    hidden, weight = torch.randn(4, 8).bfloat16(), torch.randn(99, 8).bfloat16().requires_grad_()
    loss = HeadCrossEntropy.apply(hidden, weight, None, torch.arange(4), 1.0)
    assert [gradient.dtype for gradient in loss.grad_fn.gradients if gradient is not None] == [torch.bfloat16]


def test_no_label_gives_zero_gradients(small_chunks):
    weight = torch.randn(99, 8, requires_grad=True)
    hidden, labels = torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)
    HeadCrossEntropy.apply(hidden, weight, None, labels, 1.0).backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_frozen_head_gets_no_gradient(small_chunks):
    model = training_model(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    ids, labels = labelled()
    grads = gradients(model, input_ids=ids, labels=labels)[1]
    assert "lm_head.weight" not in grads and "model.layers.0.mlp.up_proj.weight" in grads


def test_a_second_backward_gives_the_same_gradients(small_chunks):
    model = training_model(lm_head_bias=True, tie_word_embeddings=False, logits_scaling=2.0)
    ids, labels = labelled()
    parameters = list(model.parameters())
    loss = model(ids, labels=labels).loss
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, parameters), tuple(3 * gradient for gradient in first))


def curvature(model, ids, labels, **options):
    """The gradients of the square of a gradient's norm."""
    loss = model(ids, labels=labels, **options).loss
    by_embeddings = torch.autograd.grad(loss, model.model.embed_tokens.weight, create_graph=True)[0]
    return torch.autograd.grad(by_embeddings.square().sum(), list(model.parameters()))


def test_the_loss_has_second_derivatives(small_chunks):
    model = training_model(tie_word_embeddings=False)
    model.set_attn_implementation("eager")
    ids, labels = labelled()
    expected = curvature(model, ids, labels, skip_logits=False)
    torch.testing.assert_close(curvature(model, ids, labels), expected, rtol=1e-4, atol=1e-5)


def test_torch_func_takes_the_gradient_of_the_loss(small_chunks):
    model = training_model()
    ids, labels = labelled()
    embedded = model.model.embed_tokens(ids).detach()

    def loss(inputs_embeds, **options):
        return model(inputs_embeds=inputs_embeds, labels=labels, use_cache=False, **options).loss

    expected = torch.autograd.grad(loss(embedded.requires_grad_()), embedded)[0]
    torch.testing.assert_close(torch.func.grad(loss)(embedded.detach()), expected)


def test_hooks_on_the_heads_gradient_are_called(small_chunks):
    model, seen = training_model(), []
    model.lm_head.register_full_backward_hook(
        lambda module, grad_input, grad_output: seen.append(grad_output[0].shape)
    )
    ids, labels = labelled()
    model(ids, labels=labels).loss.backward()
    assert seen == [(*ids.shape, model.config.vocab_size)]


def test_a_model_on_the_meta_device_has_shapes_of_losses_and_tokens(small_chunks):
    model, ids = training_model().to("meta"), torch.zeros(2, 6, dtype=torch.long, device="meta")
    assert model(ids, labels=ids).loss.is_meta
    model.eval()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert model(ids[:, :1], past_key_values=cache).logits.shape == (2, 1, model.config.vocab_size)


def test_evaluation_returns_logits_unless_they_are_declined():
    model = training_model().eval()
    ids, labels = labelled()
    kept, declined = model(ids, labels=labels), model(ids, labels=labels, skip_logits=True)
    assert kept.logits is not None and declined.logits is None
    torch.testing.assert_close(kept.loss, declined.loss)


def test_a_loss_of_the_users_own_gets_its_logits():
    model = training_model()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: ForCausalLMLoss(logits, labels, vocab_size) * 2
    ids, labels = labelled()
    output = model(ids, labels=labels)
    assert output.logits is not None
    model.loss_function = ForCausalLMLoss
    torch.testing.assert_close(output.loss, 2 * model(ids, labels=labels).loss)


def test_an_adapted_head_keeps_its_adapter_in_the_loss():
    model = get_peft_model(training_model(tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"]))
    nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    ids, labels = labelled()
    output = model(input_ids=ids, labels=labels)
    assert output.logits is not None
    torch.testing.assert_close(output.loss, ForCausalLMLoss(output.logits, labels, 99))


def test_a_batch_without_labels_that_count_gives_what_the_plain_loss_gives():
    model = training_model()
    ids = random_ids(1, 4)
    labels = torch.full_like(ids, -100)
    assert torch.isnan(model(ids, labels=labels).loss) and torch.isnan(
        model(ids, labels=labels, skip_logits=False).loss
    )
    assert model(ids, labels=labels, num_items_in_batch=3).loss == 0


# Products ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(ops_groupformer, "PREFERS_ONEDNN", True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (3,), (2, 5), (0, 3)])
@pytest.mark.parametrize("outputs", [48, 47])
@pytest.mark.parametrize("bias", [True, False])
def test_faster_products_give_the_product(onednn, shape, outputs, bias):
    linear, hidden = nn.Linear(64, outputs, bias=bias), torch.randn(*shape, 64)
    with torch.no_grad():
        exact = hidden.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0)
        torch.testing.assert_close(project(linear, hidden).double(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (1,), (), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_bfloat16_are_rounded_once(monkeypatch, shape, bias):
    monkeypatch.setattr(ops_groupformer, "PREFERS_ONEDNN", False)
    linear, hidden = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16), torch.randn(*shape, 64, dtype=torch.bfloat16)
    exact = hidden.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0)
    output = project(linear, hidden)
    assert output.shape == (*shape, 48) and output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.fixture
def few_rows(monkeypatch):
    """Products of few rows in their own form, however small they are."""
    monkeypatch.setattr(ops_groupformer, "PREFERS_ONEDNN", False)
    monkeypatch.setattr(ops_groupformer, "FEW_ROWS", {torch.float32: (1, 2, 48, 1), torch.bfloat16: (1, 1, 256, 1)})
    monkeypatch.setattr(ops_groupformer, "WIDE", (1, 2, 1))


@torch.no_grad()
@pytest.mark.parametrize("outputs", [48, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (16,), (3, 3), (1, 40), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_feature", [True, False])
@pytest.mark.parametrize("any_layout", [True, False])
def test_few_rows_give_the_product(few_rows, dtype, shape, outputs, bias, by_feature, any_layout):
    linear, hidden = nn.Linear(64, outputs, bias=bias, dtype=dtype), torch.randn(*shape, 64, dtype=dtype)
    if by_feature:
        hidden = hidden.flatten(0, -2).t().contiguous().t().view(*shape, 64)
    exact = hidden.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0)
    output = project(linear, hidden, any_layout)
    assert output.shape == (*shape, outputs) and output.dtype == dtype and (any_layout or output.is_contiguous())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-2}
    torch.testing.assert_close(output.double(), exact, **tolerance)


@torch.no_grad()
def test_few_rows_lie_by_feature_where_any_layout_will_do(few_rows):
    output = project(nn.Linear(64, 48), torch.randn(1, 9, 64), any_layout=True)
    assert output.stride()[1:] == (1, 9)


@torch.no_grad()
def test_few_rows_of_float32_are_products_of_bands(few_rows, monkeypatch):
    counts = []

    def count(hidden_states, weight, bias, rows, bands):
        counts.append((rows, bands))
        return product_in_bands(hidden_states, weight, bias, rows, bands)

    monkeypatch.setattr(ops_groupformer, "product_in_bands", count)
    for outputs, rows in [(96, 4), (96, 15), (96, 16), (48, 4), (96, 1)]:
        project(nn.Linear(64, outputs), torch.randn(rows, 1, 64))
    assert counts == [(4, 3), (15, 3)]


def gated_mlp(act="silu"):
    return randomize(GroupFormerForCausalLM(tiny_config(hidden_act=act))).model.layers[0].mlp


@pytest.mark.parametrize("act", ["silu", "gelu", "relu", "linear", "gelu_pytorch_tanh"])
def test_a_large_gate_is_multiplied_in_place(act, monkeypatch):
    monkeypatch.setattr(ops_groupformer, "LARGE_GATE", 1)
    mlp = gated_mlp(act)
    gate, up = torch.randn(2, 3, mlp.up_proj.out_features), torch.randn(2, 3, mlp.up_proj.out_features)
    expected = mlp.act_fn(gate.clone()) * up
    with torch.no_grad():
        output = ops_groupformer.multiply_by_gate(mlp, gate, up)
    assert torch.equal(output, expected) and (output is gate) == (act == "silu")


@pytest.mark.parametrize("who", ["gate", "activation", "everywhere"])
def test_what_a_hook_holds_of_a_large_gate_stays(who, monkeypatch):
    monkeypatch.setattr(ops_groupformer, "LARGE_GATE", 1)
    mlp, seen = gated_mlp("linear"), []  # whose activation returns the gate itself
    if who == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
    else:
        hooked = mlp.gate_proj if who == "gate" else mlp.act_fn
        handle = hooked.register_forward_hook(lambda module, args, output: seen.append(output))
    hidden = torch.randn(1, 3, mlp.gate_proj.in_features)
    with torch.no_grad():
        mlp(hidden)
        handle.remove()
        assert any(torch.equal(output, mlp.gate_proj(hidden)) for output in seen)


def test_a_large_gate_guards_no_sizes_in_graphs(monkeypatch):
    mlp = gated_mlp().eval()
    monkeypatch.setattr(ops_groupformer, "LARGE_GATE", 10 * mlp.up_proj.out_features)
    hidden = torch.randn(1, 5, mlp.gate_proj.in_features)
    with torch.no_grad():
        dynamic = ({1: torch.export.Dim.DYNAMIC},)
        exported = torch.export.export(mlp, (hidden,), dynamic_shapes=dynamic, strict=True).module()
        longer = torch.randn(1, 20, mlp.gate_proj.in_features)
        torch.testing.assert_close(exported(longer), mlp(longer))


def test_gradients_pass_a_large_gate(monkeypatch):
    monkeypatch.setattr(ops_groupformer, "LARGE_GATE", 1)
    mlp = gated_mlp()
    hidden = torch.randn(1, 3, mlp.gate_proj.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp.double(), (hidden,))


def test_a_weight_that_is_a_transposed_view_is_not_cut_into_bands(onednn):
    linear, hidden = nn.Linear(64, 48), torch.randn(1, 1, 64)
    linear.weight.data = torch.randn(64, 48).t()
    with torch.no_grad():
        torch.testing.assert_close(project(linear, hidden), linear(hidden), rtol=1e-5, atol=1e-5)


def test_hooks_adapters_and_gradients_go_the_plain_way(onednn):
    linear, hidden, seen = nn.Linear(8, 8), torch.randn(2, 8), []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        project(linear, hidden)
    assert len(seen) == 1
    handle.remove()
    assert project(linear, hidden).grad_fn is not None
    linear.forward = lambda x: x + 1
    with torch.no_grad():
        assert torch.equal(project(linear, hidden), hidden + 1)


# Attention -----------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    is_causal = True

    def __init__(self, group):
        super().__init__()
        self.num_key_value_groups = group


def masks(kind, length, seen):
    visible = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)[None, None]
    padded = visible.repeat(2, 1, 1, 1)
    padded[1, :, :, :3] = False
    biases = torch.randn(1, 6, length, seen).masked_fill(~visible, torch.finfo(torch.float32).min)
    return {"none": None, "causal": visible, "left-padded": padded, "biases by head": biases}[kind]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("kind", ["none", "causal", "left-padded", "biases by head"])
def test_few_new_tokens_attend_as_with_repeated_heads(kv_heads, length, kind):
    if kind == "none" and length > 1:
        length = 9  # a prompt: without a mask and with as many queries as keys
    query, seen = torch.randn(2, 6, length, 8), 9
    key, value = torch.randn(2, 2, kv_heads, seen, 8).unbind(0)
    mask = masks(kind, length, seen)
    ours, _ = sdpa_attention_forward(Heads(6 // kv_heads), query, key, value, mask, scaling=0.3)
    repeated = (states.repeat_interleave(6 // kv_heads, dim=1).double() for states in (key, value))
    keys, values = repeated
    scores = query.double() @ keys.transpose(2, 3) * 0.3
    if mask is None:
        mask = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_decoding_repeats_no_heads(monkeypatch):
    def refuse(*args):
        raise AssertionError("keys or values were repeated")

    monkeypatch.setattr(sdpa_attention, "repeat_kv", refuse)
    model = randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2)))
    cache = model(random_ids(2, 7)).past_key_values
    for length in (1, 3):
        mask = torch.ones(2, cache.get_seq_length() + length, dtype=torch.long)
        mask[1, :2] = 0
        model(random_ids(2, length), past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("kind", ["none", "not causal", "causal", "window", "biases by head"])
def test_short_rows_are_trained_by_plain_products(kv_heads, kind, monkeypatch):
    monkeypatch.setattr(attention_groupformer, "transformers_sdpa", None)  # calling it would fail
    shapes = [(2, 6, 9, 8), (2, kv_heads, 9, 8), (2, kv_heads, 9, 8)]
    states = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in states]
    mask = masks(kind, 9, 9) if kind in ("causal", "biases by head") else None
    if kind == "window":
        mask = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)[None, None]
    options = {"is_causal": False} if kind == "not causal" else {}
    output, _ = sdpa_attention_forward(Heads(6 // kv_heads), *states, mask, scaling=0.3, **options)

    visible = masks("causal", 9, 9) if kind == "none" else mask
    biases = torch.zeros(1, 1, 9, 9) if visible is None else visible
    biases = torch.zeros(biases.shape).masked_fill(~biases, -1e9) if biases.dtype == torch.bool else biases
    query, key, value = exact[0], *(tensor.repeat_interleave(6 // kv_heads, 1) for tensor in exact[1:])
    expected = torch.softmax(query @ key.transpose(2, 3) * 0.3 + biases.double(), -1) @ value
    weights = torch.randn(2, 9, 6, 8)
    (output * weights).sum().backward()
    (expected.transpose(1, 2) * weights).sum().backward()
    for ours, theirs in [(output, expected.transpose(1, 2)), *((a.grad, b.grad) for a, b in zip(states, exact))]:
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("case", ["long", "float32", "dropout", "hidden row", "hidden row, additive"])
def test_other_rows_are_trained_by_torchs_kernel(case, monkeypatch):
    monkeypatch.setattr(attention_groupformer, "attend_eagerly", None)  # calling it would fail
    length, dtype = 129 if case == "long" else 9, torch.float32 if case == "float32" else torch.bfloat16
    states = [torch.randn(2, 2, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = masks("left-padded", 9, 9) if "hidden" in case else None
    if case == "hidden row, additive":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    options = {"dropout": 0.1 if case == "dropout" else 0.0, "scaling": 0.3}
    output = sdpa_attention_forward(Heads(1), *states, mask, **options)[0]
    output.sum().backward()
    assert output.isfinite().all() and states[0].grad is not None


def test_bfloat16_as_the_default_dtype_trains():
    model = training_model().to(torch.bfloat16)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert model(random_ids(2, 7), labels=random_ids(2, 7)).loss.isfinite()
    finally:
        torch.set_default_dtype(previous)


def test_products_of_few_rows_guard_no_sizes_in_graphs(few_rows):
    linear, graphs = nn.Linear(64, 48), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda hidden: project(linear, hidden), backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for rows in (5, 20, 60):
            compiled(torch.randn(rows, 64))
    assert len(graphs) == 1
