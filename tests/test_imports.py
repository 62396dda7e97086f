"""What `import groupformer` imports and registers, however people import it; and which part imports which."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import groupformer


PACKAGE = Path(groupformer.__file__).parent


def python(code, *options):
    """Run code in a fresh process and return what it printed."""
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# How people import us, each in a process of its own; the last of each line is what must be there afterwards.
KNOWN = "from transformers import AutoConfig; print(type(AutoConfig.for_model('groupformer')).__module__)"
WAYS = {
    "transformers first": "import transformers, groupformer",
    "a public name, after somebody looked for transformers": (
        "import groupformer, importlib.util; importlib.util.find_spec('transformers')\n"
        "groupformer.GroupFormerForCausalLM"
    ),
    "the file of the model": "from groupformer.model.modeling_groupformer import GroupFormerForCausalLM",
    "ours, then a model of transformers": "import groupformer, transformers.models.llama.modeling_llama",
    "an attribute": "import groupformer; groupformer.model.modeling_groupformer",
    "every name, after transformers could not be imported": (
        "import groupformer, sys; sys.modules['transformers'] = None\n"
        "try: import transformers\n"
        "except ImportError: del sys.modules['transformers']\n"
        "from groupformer import *; GroupFormerConfig, regroup"
    ),
    "a name of 0.1": (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from groupformer.modeling_groupformer import GroupFormerForCausalLM as old\n"
        "from groupformer import GroupFormerForCausalLM as new; assert old is new"
    ),
}


@pytest.mark.parametrize(
    "way", [*list(WAYS)[:3], *(pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[3:])]
)
def test_transformers_knows_us_in_whichever_way_we_are_imported(way):
    assert python(f"{WAYS[way]}\n{KNOWN}") == "groupformer.model.configuration_groupformer"


def test_a_pickled_tokenizer_and_config_are_read_in_a_fresh_process(tmp_path):
    """As data loaders read them, whose processes are spawned."""
    from groupformer import GroupFormerConfig, GroupFormerTokenizer

    (tmp_path / "objects").write_bytes(pickle.dumps((GroupFormerTokenizer(), GroupFormerConfig())))
    path = str(tmp_path / "objects")
    code = f"import pickle; print([type(each).__name__ for each in pickle.load(open({path!r}, 'rb'))])"
    assert python(f"{code}\n{KNOWN}").splitlines()[0] == "['GroupFormerTokenizer', 'GroupFormerConfig']"


def test_the_import_is_light_until_something_is_used():
    heavy = ("torch", "transformers", "numpy", "typer", "rich", "peft", "datasets")
    assert python(f"import groupformer, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_old_paths_warn_of_the_new_ones():
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", "import groupformer.tokenization_groupformer"],
        capture_output=True,
        text=True,
    )
    assert "import groupformer.model.tokenization_groupformer" in done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error():
    code = "import groupformer; print(hasattr(groupformer, 'nothing'), 'regroup' in dir(groupformer))"
    assert python(code) == "False True"
    assert "no module named" in python(
        "try:\n import groupformer.nothing\nexcept ImportError as e: print(str(e).lower())"
    )


@pytest.mark.slow
def test_every_name_is_imported_without_the_extras():
    extras = ("accelerate", "datasets", "peft", "evaluate", "sklearn", "seqeval", "gguf", "gradio", "matplotlib")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\nfrom groupformer import *; print(uptrain.__name__)"
    )
    assert python(code) == "uptrain"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["regroup", "--help"], ["nonsense"], []])
def test_the_command_line_answers_without_torch_and_transformers(arguments):
    code = (
        "import sys, groupformer.__main__ as entry\n"
        f"sys.argv[1:] = {arguments}\n"
        "try: entry.main()\n"
        "except SystemExit: pass\n"
        "print('loaded:', [name for name in ('torch', 'transformers', 'numpy', 'datasets') if name in sys.modules])"
    )
    assert python(code).splitlines()[-1] == "loaded: []"


def test_completion_answers_without_torch_and_transformers():
    code = (
        "import os, sys, groupformer.__main__ as entry\n"
        "os.environ.update(_GROUPFORMER_COMPLETE='complete_bash', COMP_WORDS='groupformer reg', COMP_CWORD='1')\n"
        "sys.argv[1:] = []\n"
        "try: entry.main()\n"
        "except SystemExit: pass\n"
        "print('loaded:', [name for name in ('torch', 'transformers', 'numpy', 'datasets') if name in sys.modules])"
    )
    assert python(code).splitlines() == ["regroup", "loaded: []"]


@pytest.mark.parametrize(
    "seconds", [0.5, 2.0, *(pytest.param(slow, marks=pytest.mark.slow) for slow in (0.2, 1.0, 1.5, 3.0, 5.0, 10.0))]
)
def test_ctrl_c_is_one_line_at_any_moment(seconds, tmp_path):
    (tmp_path / "long.txt").write_text("A river flows to the sea. " * 40_000)
    code = (
        "import os, runpy, signal, sys, threading\n"
        f"threading.Timer({seconds}, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        f"sys.argv = ['groupformer', 'eval', 'hub_card', '--file', {str(tmp_path / 'long.txt')!r}]\n"
        "runpy.run_module('groupformer', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


# What each part of the package may import beside itself. `version` and `samples` are leaves that all may read.
ARROWS: dict[str, set[str]] = {"model": set(), "families": {"model"}}
ARROWS["conversion"] = {"families", *ARROWS["families"]}
ARROWS["measuring"] = {"conversion", *ARROWS["conversion"]}
ARROWS["integrations"] = {"model"}
ARROWS["regrouping"] = {"measuring", *ARROWS["measuring"]}
ARROWS["training"] = ARROWS["regrouping"]
ARROWS["app"] = {"regrouping", "training", "integrations", "groupformer", *ARROWS["training"]}
ARROWS["commands"] = {"app", *ARROWS["app"]}

# Arrows beyond these, each with what needs it. No part of `integrations` that they name imports the other way.
EXCEPTIONS = {
    ("integrations.hub", "conversion"): "push refuses broken folders, as everything that reads one does",
    ("integrations.hub", "measuring"): "the card tells what the KV cache costs",
    ("integrations.model_card", "measuring"): "the card tells what the KV cache costs",
    ("integrations.vllm.plugin", "groupformer"): "vLLM starts the plugin before anybody imported the package",
    ("regrouping.streaming", "integrations"): "a regrouped folder's card says what was merged",
    ("regrouping.heal_folders", "integrations"): "a healed folder's card says what was merged",
    ("regrouping.sources", "integrations"): "transformers' private names are used in `integrations` only",
}


def imports_of(file: Path) -> set[tuple[str, str]]:
    """A file's imports from the package, as (module that imports, part that it imports from)."""
    *folders, stem = file.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = ["groupformer", *folders][: len(folders) + 2 - node.level] if node.level else []
            path = [*above, *(node.module or "").split(".")]
            names = [[*path, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for name in (list(filter(None, name)) for name in names):
            if name[0] == "groupformer":
                found.add(name[1] if len(name) > 1 and name[1] in {*ARROWS, "version", "samples"} else "groupformer")
    return {(".".join([*folders, stem]), part) for part in found - {folders[0], "version", "samples"}}


def test_imports_go_one_way():
    files = [file for part in ARROWS for file in (PACKAGE / part).rglob("*.py")]
    found = {arrow for file in files for arrow in imports_of(file)}
    beyond = {(module, part) for module, part in found if part not in ARROWS[module.split(".")[0]]}
    assert beyond == set(EXCEPTIONS)


def test_the_files_that_travel_import_torch_transformers_and_each_other():
    allowed = {"torch", "transformers", "tokenizers", "huggingface_hub", *sys.stdlib_module_names}
    for file in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (
                    node.level == 1 if node.module.endswith("_groupformer") else node.module.split(".")[0] in allowed
                )
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
