"""The commands of the command line, one module for each topic.

A module has `add_commands(app)`, which adds its commands to the Typer app. Modules import what is heavy (torch,
transformers, datasets) inside their functions, so that `groupformer --help` answers at once.
"""

import importlib
import pkgutil
from types import ModuleType


def modules() -> list[ModuleType]:
    """All command modules, in alphabetical order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]
