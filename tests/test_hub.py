"""The Hub, end to end: pushed by us, loaded and pushed on by processes that do not have this package.

The client is the real `huggingface_hub`, the server a small one on loopback that speaks the Hub's protocol.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForQuestionAnswering,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerModel,
    GroupFormerTokenizer,
)

from .helpers import randomize, tiny_config
from .hub_server import running_hub


# A process in which this package cannot be imported, though it is installed.
WITHOUT_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "groupformer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import groupformer
    raise SystemExit("the package was not to be importable")
except ModuleNotFoundError:
    pass
"""

PUSH = """
import sys, torch
from groupformer import GroupFormerConfig, GroupFormerForCausalLM, GroupFormerTokenizer
torch.manual_seed(0)
tokenizer = GroupFormerTokenizer()
config = GroupFormerConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2)
model = GroupFormerForCausalLM(config)
model.push_to_hub(sys.argv[1])
tokenizer.push_to_hub(sys.argv[1])
"""

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True, **options)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, **options)
inputs = tokenizer("The river bank", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
logits = model(**inputs).logits
if target:
    model.push_to_hub(target)
    tokenizer.push_to_hub(target)
names = [type(model).__name__, type(tokenizer).__name__, type(model).__module__.split(".")[0]]
print(json.dumps({"names": names, "tokens": tokens.tolist(), "logits": logits.flatten()[:50].tolist()}))
"""


def run(code, *arguments, endpoint=None, home=None):
    """Runs Python code in a fresh process, online only to `endpoint`; returns what its last line printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(home)} if home else {}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""


@pytest.mark.slow
def test_a_push_is_loaded_and_pushed_on_by_processes_without_the_package(tmp_path):
    with running_hub() as (endpoint, hub):
        run(PUSH, "tester/first", endpoint=endpoint, home=tmp_path / "home1")
        files = set(hub.snapshot("tester/first", "main")[1])
        code = {f"{part}_groupformer.py" for part in ("configuration", "modeling", "tokenization")}
        assert code | {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= files

        clean = WITHOUT_PACKAGE + LOAD
        second = json.loads(
            run(clean, "tester/first", "tester/second", "{}", endpoint=endpoint, home=tmp_path / "home2")
        )
        assert second["names"] == ["GroupFormerForCausalLM", "GroupFormerTokenizer", "transformers_modules"]
        assert code <= set(hub.snapshot("tester/second", "main")[1])

        third = json.loads(run(clean, "tester/second", "", "{}", endpoint=endpoint, home=tmp_path / "home3"))
        assert third == second
        assert any(request.startswith("GET /tester/second/resolve/") for request in hub.requests)

        revision = {"revision": hub.commits["tester/first"][-1][0]}
        pinned = run(clean, "tester/first", "", json.dumps(revision), endpoint=endpoint, home=tmp_path / "home4")
        assert json.loads(pinned) == second


LOAD_ALL = """
import json, sys, torch, transformers
source, target = sys.argv[1:3]
results = {}
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
             "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"):
    model = getattr(transformers, name).from_pretrained(source, trust_remote_code=True)
    results[name] = type(model).__name__
    model.save_pretrained(f"{target}/{name}")
results["AutoConfig"] = type(transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)).__name__
print(json.dumps(results))
"""
HEADS = [
    GroupFormerModel,
    GroupFormerForCausalLM,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerForQuestionAnswering,
]


@pytest.mark.slow
def test_whatever_head_was_saved_all_auto_classes_load_it_without_the_package_twice_over(tmp_path):
    saved = tmp_path / "saved"
    randomize(GroupFormerForTokenClassification(tiny_config())).save_pretrained(saved)
    results = json.loads(run(WITHOUT_PACKAGE + LOAD_ALL, saved, tmp_path / "again", home=tmp_path / "home1"))
    assert set(results.values()) == {"GroupFormerConfig", *(head.__name__ for head in HEADS)}
    again = tmp_path / "again" / "AutoModelForSequenceClassification"
    results = json.loads(run(WITHOUT_PACKAGE + LOAD_ALL, again, tmp_path / "third", home=tmp_path / "home2"))
    assert set(results.values()) == {"GroupFormerConfig", *(head.__name__ for head in HEADS)}


OLDER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
options = {"trust_remote_code": True} if sys.argv[2] == "trusted" else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32", **options).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **options)
inputs = tokenizer("The river bank", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
logits = model(**inputs).logits.flatten()[:50].tolist()
print(json.dumps([type(model).__module__.split(".")[0], tokens.tolist(), logits]))
"""


@pytest.fixture
def older_push(tmp_path):
    """A repository as it was pushed by 0.1: every derived value in its config, and its code beside it."""
    folder = tmp_path / "older"
    shutil.copytree(Path(__file__).parent.parent / "hub_card", folder, ignore=shutil.ignore_patterns("space"))
    with zipfile.ZipFile(Path(__file__).parent / "data" / "code_of_an_older_push.zip") as code:
        code.extractall(folder)
    return folder


@pytest.mark.slow
def test_an_older_push_loads_with_its_own_code_and_with_the_package(older_push, tmp_path):
    runs = {
        "its code": (WITHOUT_PACKAGE + OLDER, "trusted", "transformers_modules"),
        "the package": ("import groupformer" + OLDER, "not trusted", "groupformer"),
        "the package, with trust": ("import groupformer" + OLDER, "trusted", "groupformer"),
    }
    results = {}
    for name, (code, trust, module) in runs.items():
        found, *results[name] = json.loads(run(code, older_push, trust, home=tmp_path / name))
        assert found == module
    tokens, logits = results["its code"]
    for others in results.values():
        assert others[0] == tokens
        assert others[1] == pytest.approx(logits, abs=1e-3)


REMOTE_FIRST = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
import groupformer
native = groupformer.export_model(model, family="llama")
ids = torch.tensor([[5, 6, 7]])
torch.testing.assert_close(native(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
small = groupformer.regroup(model, {3: 2})
assert [layer.num_key_value_heads for layer in small.config.per_layer_config] == [8, 8, 8, 2, 8, 8, 8, 8]
assert torch.isfinite(small(ids).logits).all() and len(groupformer.plan(model)) == 4
print(type(native).__name__)
"""


@pytest.mark.slow
def test_a_model_of_remote_code_is_known_to_the_package_that_is_imported_later(older_push, tmp_path):
    assert run(REMOTE_FIRST, older_push, home=tmp_path / "home") == "LlamaForCausalLM"


NOT_TRUSTED = """
import sys
from transformers import AutoModel, AutoTokenizer
for load in (AutoModel.from_pretrained, AutoTokenizer.from_pretrained):
    try:
        load(sys.argv[1], trust_remote_code=False)
        raise SystemExit("remote code was run without trust")
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "does not exist" in str(error), error
print("refused")
"""


def test_without_trust_no_remote_code_is_run(tmp_path):
    GroupFormerModel(tiny_config()).save_pretrained(tmp_path)
    GroupFormerTokenizer().save_pretrained(tmp_path)
    assert run(WITHOUT_PACKAGE + NOT_TRUSTED, tmp_path) == "refused"


@pytest.mark.parametrize("head", HEADS)
def test_every_head_saves_the_code_and_loads_bit_for_bit(head, tmp_path):
    model = randomize(head(tiny_config()))
    model.save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"configuration_groupformer.py", "modeling_groupformer.py", "config.json", "model.safetensors"} <= saved
    loaded = head.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
