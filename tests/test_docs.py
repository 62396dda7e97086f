"""The documentation does what it says: its programs run, its quotations are there, its figure is the data's."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import groupformer

from .hub_server import running_hub


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "guides").glob("*.md"))]


def script(name):
    """A module of scripts/, which is no package."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


hooks = script("docs_hooks")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, tmp_path):
    for name in ("groupformer", "hub_card", "recipes"):  # a clone, as far as the pages use it; runs/ is of this test
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"}
    with running_hub() as (endpoint, _):
        if "push_to_hub" in page.read_text(encoding="utf-8"):
            environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, str(ROOT / "tests" / "run_page.py"), str(page)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


TOUR = DOCS / "tour.ipynb"


def test_the_tour_has_eight_cells_and_what_they_print():
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 8 and all(cell["source"] and cell["outputs"] for cell in cells)
    assert not [cell for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
    page, pictures = hooks.notebook_page(json.loads(TOUR.read_text(encoding="utf-8")), "tour")
    assert page.startswith("# A tour") and "query heads | 0 1 2 3 | 4 5 6 7 |" in page
    assert [name in page for name in pictures] == [True, True] and min(map(len, pictures.values())) > 10_000
    assert page.count("```text") == sum(
        "stream" in {each["output_type"] for each in cell["outputs"]} for cell in cells
    )
    assert not [path for path in (str(ROOT), str(Path.home())) if path in page]


@pytest.mark.slow
def test_the_tour_prints_today_what_stands_in_it(tmp_path):
    pytest.importorskip("nbclient", reason="a notebook needs nbclient: make test-docs")
    for name in ("groupformer", "hub_card"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = TOUR.read_text(encoding="utf-8")
    stored, today = (
        [cell for cell in each["cells"] if cell["cell_type"] == "code"]
        for each in (json.loads(text), hooks.executed(text, tmp_path))
    )
    for old, new in zip(stored, today):
        assert words_of(old) == words_of(new)


def words_of(cell):
    """What a cell prints, but for numbers, which depend on the machine."""
    texts = ["".join(output.get("text", "")) for output in cell["outputs"]]
    return re.sub(r"[\d.,]+(e[+-]\d+)?", "", "".join(texts))


def test_every_public_name_is_in_the_reference():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    public = set(groupformer.__all__) - {"__version__"}
    assert not [name for name in public if not re.search(rf"^::: groupformer\.[\w.]+\.{name}$", page, re.MULTILINE)]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    assert not [page for page in pages if f": {page}\n" not in navigation]


QUOTES = [name for path in DOCS.rglob("*.md") for _, name in hooks.QUOTE.findall(path.read_text(encoding="utf-8"))]


def test_search_works_from_files_without_fetching_anything():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (shim,) = re.findall(r"polyfills: \[([^\]]+)\]", site)
    assert "  - offline" in site and (DOCS / shim).is_file() and "https:" not in shim
    assert "class IFrameWorker" in (DOCS / shim).read_text(encoding="utf-8")  # the name that the theme looks for


def test_the_pages_quote_code():
    assert len(QUOTES) > 10


@pytest.mark.parametrize("name", QUOTES)
def test_quoted_code_is_there_without_its_docstring(name):
    code = hooks.quoted(name)
    assert name.split(".")[-1] in code and '"""' not in code


def test_a_quotation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="groupformer.model.modeling_groupformer.Missing"):
        hooks.quoted("groupformer.model.modeling_groupformer.Missing")


@pytest.mark.parametrize(
    "page, link, on_the_site",
    [
        ("hub.md", "(../hub_card)", "(repository/hub_card/README.md)"),
        ("guides/push.md", "(../../groupformer/commands/main.py)", "(../repository/groupformer/commands/main.py.md)"),
        ("guides/push.md", "(../hub.md#safety)", "(../hub.md#safety)"),
        ("repository/CONTRIBUTING.md", "(docs/families.md#gguf)", "(../families.md#gguf)"),
        ("architecture.md", "(tour.ipynb)", "(tour.ipynb.md)"),
        ("hub.md", "(nowhere.md)", "(nowhere.md)"),
    ],
)
def test_a_link_leads_to_the_same_file_on_the_site(page, link, on_the_site):
    assert hooks.relink(f"[words]{link}", page) == f"[words]{on_the_site}"


def test_a_docstring_s_type_is_shown_as_words_and_code():
    html = hooks.on_page_content(
        "<code>`int`, *optional*, defaults to `2 * x`</code> <code>x</code>", None, None, None
    )
    assert html == "<code>int</code>, <em>optional</em>, defaults to <code>2 * x</code> <code>x</code>"


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *DOCS.rglob("*.md")], ids=lambda page: page.stem)
def test_the_site_shows_every_block_as_one(page):
    """Its Markdown knows no word after the language."""
    assert not re.findall(r"^ *```\w+ .*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


FIGURES = script("figures")


@pytest.mark.parametrize("drawn", FIGURES.STUDIES, ids=lambda drawn: drawn.name)
def test_the_study_s_picture_is_drawn_from_the_data_that_is_here(drawn, tmp_path):
    study = json.loads(drawn.data.read_text(encoding="utf-8"))
    mean, merged, uptrained = FIGURES.lines_of(study)
    assert list(mean) == list(merged) == [8, 4, 2, 1] and {8, 2} <= set(uptrained)
    FIGURES.draw(study, FIGURES.cache_bytes_per_kv_head(drawn.recipe), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_study_s_tables_are_those_of_its_data():
    page = FIGURES.PAGE.read_text(encoding="utf-8")
    for drawn in FIGURES.STUDIES:
        assert page == FIGURES.write_tables(page, drawn.name, json.loads(drawn.data.read_text(encoding="utf-8")))


def test_the_readme_s_caption_table_and_picture_are_those_of_its_data(tmp_path):
    real = json.loads(FIGURES.REAL.read_text(encoding="utf-8"))
    readme = FIGURES.README.read_text(encoding="utf-8")
    assert readme == FIGURES.write_states(readme, real)
    for state in real["states"]:  # 30 layers of 64 features to a head, a key and a value, 2 bytes each
        assert state["cache_bytes_per_token"] == 30 * 64 * 2 * 2 * state["kv_heads"]
    FIGURES.draw_states(real["states"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_gpu_script_s_report_becomes_a_page_and_a_picture(tmp_path):
    """Run on a CPU, at sizes that only show that it works."""
    text, run = ROOT / "groupformer" / "samples" / "river.txt", tmp_path / "run"
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--device", "cpu", "--tiny", "--checkpoint", "hub_card"]
    command += ["--train", str(text), "--test", str(text), "--output", str(run)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    report = json.loads((run / "on_gpu.json").read_text())
    FIGURES.write_gpu(report, tmp_path / "on_gpu.json")
    page = (tmp_path / "on_gpu.md").read_text()
    assert re.findall("^## (.*)$", page, re.MULTILINE) == [
        "Attention's kernels in bfloat16, against float32",
        "Beside transformers' Llama",
        "Fewer KV heads, healed and uptrained",
        "In vLLM",
    ]
    assert "failed" not in page and "| MQA, sdpa, window | 0." in page
    for state, heads in {"original": "8 KV heads", "merged": "1 KV head", "uptrained": "1 KV head"}.items():
        assert f"| {state} ({heads}) |" in page
    assert f"{report['heal']['healed']['bits_per_byte']:.3f} (+" in page
    assert (tmp_path / "on_gpu.png").stat().st_size > 10_000


def test_a_kv_head_of_the_reference_keeps_what_its_card_says():
    assert FIGURES.cache_bytes_per_kv_head(ROOT / "recipes" / "reference.yaml") * 8 == 8192


def test_cells_measured_again_replace_those_of_the_same_labels():
    setting = {"checkpoint": "abc", "documents": 1}
    known = {**setting, "cells": [{"part": "scratch", "kv_heads": heads, "bits_per_byte": 2.0} for heads in (1, 2)]}
    new = {**setting, "cells": [{"part": "scratch", "kv_heads": 2, "bits_per_byte": 1.5}]}
    assert FIGURES.points(FIGURES.joined(known, new), part="scratch") == {2: 1.5, 1: 2.0}
    with pytest.raises(ValueError, match="checkpoint is abc in the file and def in the cells"):
        FIGURES.joined(known, {**new, "checkpoint": "def"})


def test_condensed_cells_keep_what_was_trained_on(tmp_path):
    cell = {"part": "uptrain", "kv_heads": 2, "percent": 5.0, "loss": 3.1, "bits_per_byte": 1.5, "checkpoint": "abc"}
    cell |= {"documents": 1, "window": 512, "stride": 256}
    (tmp_path / "part=uptrain_percent=5.0_loss=text-only_documents=1.json").write_text(json.dumps(cell))
    study = FIGURES.condense(tmp_path)
    assert study["checkpoint"] == "abc" and study["cells"][0]["loss"] == "text-only"
    (tmp_path / "part=other.json").write_text(json.dumps({**cell, "checkpoint": "def"}))
    with pytest.raises(ValueError, match="2 settings"):
        FIGURES.condense(tmp_path)


def test_each_test_in_the_compatibility_table_is_there():
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "compatibility.md").read_text(encoding="utf-8")))
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in code]
