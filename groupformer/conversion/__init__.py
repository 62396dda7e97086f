"""The bridge: native checkpoints to GroupFormer with the same logits, and back bit for bit.

A family is data: a table of config fields and a table of weights, in a module of its own (see `families.registry`).
`configs` and `weights` apply the tables, `convert` joins them, `folders` streams from folder to folder, `models`
converts in memory. Public names are imported when they are first used: `sources` must stay light.
"""

import importlib
from typing import Any


LAZY = {
    "FAMILIES": "..families.registry",
    "Conversion": ".convert",
    "export_folder": ".folders",
    "export_model": ".models",
    "families_for": ".convert",
    "import_folder": ".folders",
    "import_model": ".models",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY[name], __name__), name)


__all__ = list(LAZY)
