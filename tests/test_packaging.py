"""What the package index shows and what a release says: whole addresses, one version, files that are there."""

import re
from pathlib import Path

import pytest
import yaml

from groupformer.version import __version__


ROOT = Path(__file__).parent.parent
SOURCE = "https://github.com/groupformer/groupformer"


def project_table():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_index_shows_the_readme_with_whole_addresses():
    hook = project_table()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme
    for substitution in hook["substitutions"]:
        shown = re.sub(substitution["pattern"], substitution["replacement"], shown)
    before, after = (re.findall(r"\]\(([^)\s]+)\)", text) for text in (readme, shown))
    assert len(before) == len(after) > 10
    assert not [target for target in after if not target.startswith(("https://", "#"))]
    for target, whole in zip(before, after):
        if not target.startswith(("https://", "#")):
            assert whole.endswith(f"/main/{target}")
            assert whole.startswith("https://raw.githubusercontent.com/") == target.endswith((".png", ".svg"))


def test_a_release_has_one_version_and_one_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["repository-code"] == SOURCE == project_table()["project"]["urls"]["Source"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.stem)
def test_workflows_and_forms_name_what_is_there(path):
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)
    for script in re.findall(r"scripts/\w+\.py", text):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("form", ["bug", "checkpoint"])
def test_an_issue_asks_for_config_versions_and_info(form):
    fields = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8"))["body"]
    assert {"config", "info", "versions"} <= {field["id"] for field in fields}
