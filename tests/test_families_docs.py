"""The page about families says what the tables say."""

from pathlib import Path

import pytest

from groupformer.conversion.gguf.shapes import ARCHITECTURES
from groupformer.families.family import Required
from groupformer.families.registry import FAMILIES, REFUSED
from scripts.architectures import BEGIN, END, render, yes

from .helpers_attention import ARCHITECTURES as OTHERS


PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
TABLE = PAGE.split(BEGIN)[1].split(END)[0].strip()
ROWS = {line.split("`")[1]: line for line in PAGE.replace(TABLE, "").splitlines() if line.startswith("| `")}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_a_row_that_names_all_it_refuses(name):
    family = FAMILIES[name]
    required = {field for field, row in family.fields.items() if isinstance(row, Required)}
    everywhere = {"quantization_config", "sliding_window"}
    missing = {field for field in {*required, *family.refused} - everywhere if field not in ROWS[name]}
    assert not missing


@pytest.mark.parametrize("name", REFUSED)
def test_refused_family_is_named(name):
    section = PAGE.split("Refused by name:")[1].split("Refused everywhere:")[0]
    assert f"`{name}`" in section


def test_gguf_families_are_listed():
    section = PAGE.split("## GGUF")[1].split("##")[0]
    assert all(f"`{name}`" in section for name in ARCHITECTURES)


def test_table_of_architectures_names_all_that_are_tried_and_what_they_can_do():
    rows = {row.split("`")[1]: [cell.strip() for cell in row.split("|")] for row in TABLE.splitlines()[2:]}
    assert sorted(rows) == sorted({*FAMILIES, *OTHERS})
    for name, cells in rows.items():
        assert cells[3:5] == [yes(name in FAMILIES), yes(name in ARCHITECTURES)], name


@pytest.mark.slow
def test_table_of_architectures_is_what_the_code_finds():
    assert render() == TABLE
