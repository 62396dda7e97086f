"""The documentation does what it says: its programs run, its quotations are there, its figure is the data's."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
