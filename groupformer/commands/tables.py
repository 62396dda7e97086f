"""Tables in the terminal, readable at 80 columns."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


LONGEST_PATH = 32  # characters; a longer path loses its beginning


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a title, and rows under their column names; numbers are set to the right, floats with four digits.

    Nothing is cut: names of columns wrap between words, and paths in the first column lose what they have in common,
    or their beginning.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    cells = [list(row) for row in rows]
    for row, name in zip(cells, shortened([row[0] for row in cells])):
        row[0] = name
    for index, column in enumerate(columns):
        is_number = all(isinstance(row[index], int | float) for row in cells)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        table.add_row(*(f"{cell:,.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console()
    console.print(title, style="italic", highlight=False, markup=False)  # as a table's title it would be folded
    console.print(table)


def shortened(names: list[Any]) -> list[Any]:
    """Paths without the folders that all share, or with the last folders only; other values as they are."""
    if not names or not all(isinstance(name, str) and os.sep in name for name in names):
        return names
    common = os.path.commonpath([os.path.dirname(name) for name in names]) if len(set(names)) > 1 else ""
    return [shorten(name, len(common) + 1 if common else 0) for name in names]


def shorten(path: str, start: int) -> str:
    """A path from `start` on, or from a folder on with which it is short enough."""
    rest = path[start:] if start > 1 else path
    while len(rest) > LONGEST_PATH and os.sep in rest[1:]:
        rest = rest[1:].split(os.sep, 1)[1]
    return path if rest == path else f"…{os.sep}{rest}"
