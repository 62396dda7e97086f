"""Whatever is put in a module's place acts on prompts and on cached tokens, as it does in transformers' Llama.

Each way is tried on a Llama and on a GroupFormer of the same weights. The prompt must have Llama's logits, and tokens
that follow a cache those of the same model without one.
"""

import copy
import functools
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import groupformer
from groupformer.model import modeling_groupformer

from .helpers import random_ids, randomize


CONFIG = LlamaConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)


def build_pair():
    """A Llama, and a GroupFormer of the same weights."""
    native = randomize(LlamaForCausalLM(CONFIG)).eval()
    return native, groupformer.import_model(native).eval()


class Wrapper(nn.Module):
    """Adds one to a module's output, as steering tools do; other attributes are the module's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return add_one(self.module(*args, **kwargs))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def add_one(output):
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


def subclassed(module):
    """The module as an instance of a subclass whose forward adds one."""
    module.__class__ = type(
        "Sub",
        (type(module),),
        {"forward": lambda self, *args, **kw: add_one(super(type(self), self).forward(*args, **kw))},
    )
    return module


class Experts(nn.Module):
    """A mixture of two MLPs."""

    def __init__(self, mlp):
        super().__init__()
        other = copy.deepcopy(mlp)
        other.load_state_dict({name: tensor / 2 for name, tensor in mlp.state_dict().items()})
        self.gate, self.experts = nn.Linear(32, 2), nn.ModuleList([mlp, other])

    def forward(self, hidden_states):
        shares = self.gate(hidden_states).softmax(-1)
        outputs = torch.stack([expert(hidden_states) for expert in self.experts], dim=-1)
        return (outputs * shares.unsqueeze(-2)).sum(-1)


def patched_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: add_one(forward(*args, **kwargs))
    return module


def hooked_before(module):
    module.register_forward_pre_hook(
        lambda module, args, kwargs: (
            ((args[0] + 1, *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1})
        ),
        with_kwargs=True,
    )
    return module


def hooked_after(module):
    module.register_forward_hook(lambda module, args, output: add_one(output))
    return module


def like(size_in, size_out):
    """A replacement of another kind for a projection."""
    return lambda module: nn.Sequential(nn.Linear(size_in, 5), nn.Tanh(), nn.Linear(5, size_out, bias=False))


PLACES = {
    "layer": "model.layers.1",
    "attention": "model.layers.1.self_attn",
    "mlp": "model.layers.1.mlp",
    "norm": "model.layers.1.input_layernorm",
    "last norm": "model.norm",
    "projection": "model.layers.1.self_attn.k_proj",
    "output projection": "model.layers.1.self_attn.o_proj",
    "down projection": "model.layers.0.mlp.down_proj",
    "activation": "model.layers.0.mlp.act_fn",
    "head": "lm_head",
    "embeddings": "model.embed_tokens",
}
CHANGES = {
    "wrapped": Wrapper,
    "subclassed": subclassed,
    "forward on the instance": patched_forward,
    "hook before": hooked_before,
    "hook after": hooked_after,
}
REPLACED = {
    "experts": ("mlp", Experts),
    "sequential mlp": ("mlp", lambda mlp: nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 32))),
    "layer norm": ("norm", lambda norm: nn.LayerNorm(32)),
    "no norm": ("norm", lambda norm: nn.Identity()),
    "projection": ("projection", like(32, 16)),
    "output projection": ("output projection", like(32, 32)),
    "head": ("head", like(32, 99)),
    "activation": ("activation", lambda act_fn: nn.Tanh()),
}
WAYS = {f"{place}, {change}": (place, CHANGES[change]) for place in PLACES for change in CHANGES}
WAYS |= {f"another {name}": way for name, way in REPLACED.items()}
del WAYS["embeddings, hook before"]  # token ids plus one are other tokens


@torch.no_grad()
def check_tokens(model, logits_of_prompt=None, rows=1, atol=1e-4):
    """Cached tokens have the logits of a pass without a cache; the prompt those that are given."""
    ids = random_ids(rows, 6, seed=3)
    mask = torch.ones_like(ids)
    mask[-1, : rows - 1] = 0  # where there are several rows, the last one is padded on the left
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if logits_of_prompt is not None:
        torch.testing.assert_close(whole[mask == 1], logits_of_prompt[mask == 1], atol=atol, rtol=1e-4)
    cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    for place in (4, 5):
        step = model(
            input_ids=ids[:, place : place + 1], attention_mask=mask[:, : place + 1], past_key_values=cache
        ).logits
        torch.testing.assert_close(step[:, 0], whole[:, place], atol=atol, rtol=1e-4)
    return whole


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_module_in_anothers_place_is_called(way, rows):
    place, change = WAYS[way]
    native, ours = build_pair()
    before = check_tokens(ours, rows=rows)
    for model in (native, ours):
        torch.manual_seed(1)
        parent, _, name = PLACES[place].rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, name, change(getattr(parent, name)).eval())
    after = check_tokens(ours, check_tokens(native, rows=rows), rows=rows)
    assert (after - before).abs().max() > 1e-3


def test_every_usual_way_changes_what_a_prompt_gives():
    assert len(WAYS) == len(PLACES) * len(CHANGES) - 1 + len(REPLACED)


CLASSES = {"RMSNorm": "RMSNorm", "MLP": "GatedMLP", "Attention": "Attention", "DecoderLayer": "DecoderLayer"}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_forward_set_on_a_class_is_called(kind, monkeypatch):
    native, ours = build_pair()
    before = check_tokens(ours)
    for module, name in ((modeling_llama, f"Llama{kind}"), (modeling_groupformer, f"GroupFormer{CLASSES[kind]}")):
        forward = getattr(module, name).forward
        monkeypatch.setattr(
            getattr(module, name),
            "forward",
            functools.wraps(forward)(lambda *args, _forward=forward, **kwargs: add_one(_forward(*args, **kwargs))),
        )
    after = check_tokens(ours, check_tokens(native))
    assert (after - before).abs().max() > 1e-3


def test_global_hooks_see_every_module():
    native, ours = build_pair()
    seen = {}
    for name, model in (("native", native), ("ours", ours)):
        seen[name] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append(type(module).__name__.removeprefix("Llama"))
        )
        check_tokens(model)
        handle.remove()
    # Dropout of embeddings, which is 0 here, is a module of ours alone.
    ours_named = [
        name.removeprefix("GroupFormer").replace("GatedMLP", "MLP") for name in seen["ours"] if name != "Dropout"
    ]
    assert ours_named == seen["native"]


def test_backward_hooks_see_llamas_gradients():
    places = ("model.layers.0", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj", "lm_head", "model.norm")
    gradients = [{}, {}]
    for model, seen in zip(build_pair(), gradients):
        for name in places:
            model.get_submodule(name).register_full_backward_hook(
                lambda module, inputs, outputs, name=name, seen=seen: seen.update({name: outputs[0]})
            )
        model(random_ids(2, 6), labels=random_ids(2, 6, seed=1)).loss.backward()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, atol=1e-6, rtol=1e-4)


def embedded(model):
    return model.get_input_embeddings()(random_ids(2, 5)).detach()


def logits_of(model):
    return lambda embeddings: model(inputs_embeds=embeddings, use_cache=False).logits


TRANSFORMS = {
    "functional_call": lambda model: (
        torch.func.functional_call(
            model, {name: p * 1.1 for name, p in model.named_parameters()}, (random_ids(2, 5),)
        ).logits
    ),
    "grad": lambda model: torch.func.grad(lambda e: logits_of(model)(e).square().sum())(embedded(model)),
    "jvp": lambda model: torch.func.jvp(logits_of(model), (embedded(model),), (torch.ones(2, 5, 32),))[1],
    "jacrev": lambda model: torch.func.jacrev(lambda e: logits_of(model)(e)[:, -1, :3])(embedded(model)),
    "vmap": lambda model: torch.func.vmap(logits_of(model))(embedded(model).unsqueeze(1)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_gives_what_it_gives_for_llama(transform):
    native, ours = build_pair()
    for model in (native, ours):
        model.set_attn_implementation("eager")  # torch's fused kernel has no forward derivatives
    expected = TRANSFORMS[transform](native)
    torch.testing.assert_close(TRANSFORMS[transform](ours), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_directional_derivative_of_a_cached_token_is_the_uncached_one():
    _, model = build_pair()
    model.set_attn_implementation("eager")
    states = embedded(model)

    def cached(last):
        cache = model(inputs_embeds=states[:, :-1], use_cache=True).past_key_values
        return model(inputs_embeds=last, past_key_values=cache).logits[:, 0]

    def whole(last):
        return model(inputs_embeds=torch.cat((states[:, :-1], last), dim=1), use_cache=False).logits[:, -1]

    last, direction = states[:, -1:], torch.ones(2, 1, 32)
    expected = torch.func.jvp(whole, (last,), (direction,))[1]
    torch.testing.assert_close(torch.func.jvp(cached, (last,), (direction,))[1], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_flops_of_prompt_and_token_are_llamas():
    counts = []
    for model in build_pair():
        model.set_attn_implementation("eager")  # whose products are counted one by one
        with FlopCounterMode(display=False) as prompt:
            cache = model(random_ids(1, 6), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as token:
            model(random_ids(1, 1), past_key_values=cache)
        counts.append((prompt.get_total_flops(), token.get_total_flops()))
    assert counts[0] == counts[1] and min(counts[0]) > 0


@torch.no_grad()
def tokens_after_cache(model, rows):
    """Logits of two tokens that follow a cache."""
    ids = random_ids(rows, 6, seed=3)
    cache, steps = model(input_ids=ids[:, :4], use_cache=True).past_key_values, []
    for place in (4, 5):
        steps.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("rows", [1, 3])
def test_dynamic_quantization_gives_what_it_gives_for_llama(rows):
    pair = build_pair()
    plain = tokens_after_cache(pair[1], rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, which points to torchao
        native, ours = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8) for m in pair)
    quantized = tokens_after_cache(ours, rows)
    torch.testing.assert_close(quantized, tokens_after_cache(native, rows), atol=1e-4, rtol=1e-4)
    assert 1e-4 < (quantized - plain).abs().max() < 1


# What a model of 32 features, and the methods themselves, need beside their defaults.
PEFT_FIELDS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 20},
}


def configs_of_peft():
    """A config of every method of PEFT for causal language models."""
    configs = {}
    for kind, config_class in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(getattr(kind, "value", kind))
        fields = {"task_type": "CAUSAL_LM", **PEFT_FIELDS.get(name, {})}
        if issubclass(config_class, peft.PromptLearningConfig):
            fields["num_virtual_tokens"] = 2
        configs[name] = functools.partial(config_class, **fields)
    configs["DORA"] = functools.partial(peft.LoraConfig, task_type="CAUSAL_LM", use_dora=True)
    return configs


PEFT_METHODS = configs_of_peft()


@torch.no_grad()
def adapted(model, method):
    """The model with an adapter whose numbers are not those that change nothing."""
    torch.manual_seed(2)
    model = peft.get_peft_model(model, PEFT_METHODS[method]()).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "embed" not in name:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


@torch.no_grad()
def greedy_without_cache(model, ids, count):
    for _ in range(count):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


def generates_as_without_cache(model, ids, rows):
    mask = torch.ones_like(ids[:rows])
    tokens = model.generate(input_ids=ids[:rows], attention_mask=mask, max_new_tokens=4, eos_token_id=None)
    return torch.equal(tokens, greedy_without_cache(model, ids[:rows], 4))


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_every_method_of_peft_that_works_on_llama_works(method):
    native, ours = build_pair()
    ids = random_ids(3, 5, seed=3)
    mask = torch.ones_like(ids)
    try:
        native = adapted(native, method)
        expected = native(input_ids=ids, attention_mask=mask).logits
        works = all(generates_as_without_cache(native, ids, rows) for rows in (1, 3))
    except Exception as error:  # what PEFT cannot do for Llama with these fields is not asked of us
        pytest.skip(f"{method} does not work on Llama: {type(error).__name__}: {error}")
    model = adapted(ours, method)
    if method != "SHADOW":  # which draws a small model of its own, of the adapted one's class
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-4, rtol=1e-4)
    # Where PEFT does not know the name by which `generate` passes the cache, learned prompts are given at every token.
    if works or method in ("PREFIX_TUNING", "CARTRIDGE"):
        assert all(generates_as_without_cache(model, ids, rows) for rows in (1, 3))
