"""The page about families says what the tables say."""

from pathlib import Path

import pytest

from groupformer.conversion.gguf.shapes import ARCHITECTURES
from groupformer.families.family import Required
from groupformer.families.registry import FAMILIES, REFUSED


PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
ROWS = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_a_row_that_names_all_it_refuses(name):
    family = FAMILIES[name]
    required = {field for field, row in family.fields.items() if isinstance(row, Required)}
    everywhere = {"quantization_config", "sliding_window"}
    missing = {field for field in {*required, *family.refused} - everywhere if field not in ROWS[name]}
    assert not missing


@pytest.mark.parametrize("name", REFUSED)
def test_refused_family_is_named(name):
    assert f"- `{name}`: " in PAGE


def test_gguf_families_are_listed():
    section = PAGE.split("## GGUF")[1].split("##")[0]
    assert all(f"`{name}`" in section for name in ARCHITECTURES)
