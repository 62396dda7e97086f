"""The commands of the command line, one module for each topic.

A module has `add_commands(app)`, which adds its commands to the Typer app. Modules import what is heavy (torch,
transformers, datasets) inside their functions, so that `groupformer --help` answers at once.
"""

import importlib
from types import ModuleType


# In the order in which the help lists their commands.
TOPICS = (
    "demo",
    "info",
    "plan",
    "regrouping",
    "healing",
    "bridge",
    "evaluation",
    "pretraining",
    "finetuning",
    "tokenizer",
    "generate",
    "bench",
    "push",
    "app",
)


def modules() -> list[ModuleType]:
    """All command modules, in the order of the help."""
    return [importlib.import_module(f"{__name__}.{topic}") for topic in TOPICS]
