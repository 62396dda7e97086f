"""The README's Python runs, as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .hub_server import running_hub


ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_a_readme_block_runs_by_itself(index, tmp_path):
    for name in ("groupformer", "hub_card"):  # a clone, as far as the blocks use it
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"}
    with running_hub() as (endpoint, _):
        if "push_to_hub" in BLOCKS[index]:
            environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", BLOCKS[index]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout or "print" not in BLOCKS[index]


def test_every_relative_link_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_models_card_says_what_its_template_says():
    card, template = (
        (ROOT / "hub_card" / name).read_text(encoding="utf-8") for name in ("README.md", "card_template.md")
    )
    assert not [line for line in template.splitlines() if "{{" not in line and line not in card.splitlines()]
