"""GroupFormer: transformers whose attention sharing is yours to choose.

Importing this package registers the architecture with transformers' Auto classes and PEFT: at once if transformers is
imported, else right after it. It stays light: torch and transformers are imported when they are used first.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from .integrations.imports import MovedModules, after_import
from .version import __version__


if TYPE_CHECKING:  # for editors and type checkers, which do not see what __getattr__ imports
    from .api import evaluate, plan, uptrain
    from .conversion import export_model, import_model
    from .model.configuration_groupformer import GroupFormerConfig
    from .model.modeling_groupformer import (
        GroupFormerForCausalLM,
        GroupFormerForQuestionAnswering,
        GroupFormerForSequenceClassification,
        GroupFormerForTokenClassification,
        GroupFormerModel,
        GroupFormerPreTrainedModel,
    )
    from .model.tokenization_groupformer import GroupFormerTokenizer
    from .regrouping import expand, regroup
    from .regrouping.heal import heal

# The public names, and the modules that are imported when they are first used.
PUBLIC = {
    "GroupFormerConfig": "model.configuration_groupformer",
    "GroupFormerForCausalLM": "model.modeling_groupformer",
    "GroupFormerForQuestionAnswering": "model.modeling_groupformer",
    "GroupFormerForSequenceClassification": "model.modeling_groupformer",
    "GroupFormerForTokenClassification": "model.modeling_groupformer",
    "GroupFormerModel": "model.modeling_groupformer",
    "GroupFormerPreTrainedModel": "model.modeling_groupformer",
    "GroupFormerTokenizer": "model.tokenization_groupformer",
    "evaluate": "api",
    "expand": "regrouping",
    "export_model": "conversion",
    "heal": "regrouping.heal",
    "import_model": "conversion",
    "plan": "api",
    "regroup": "regrouping",
    "uptrain": "api",
}
PACKAGES = ("conversion", "families", "integrations", "measuring", "model", "regrouping", "training")


def __getattr__(name: str):
    if name in PUBLIC:
        import transformers  # noqa: F401  registers

        return getattr(importlib.import_module(f".{PUBLIC[name]}", __name__), name)
    if name in PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC, *PACKAGES})


def _register() -> None:
    from .integrations.registration import register

    register()


if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
    sys.meta_path.append(MovedModules())
after_import("transformers", _register)

__all__ = [
    "GroupFormerConfig",
    "GroupFormerForCausalLM",
    "GroupFormerForQuestionAnswering",
    "GroupFormerForSequenceClassification",
    "GroupFormerForTokenClassification",
    "GroupFormerModel",
    "GroupFormerPreTrainedModel",
    "GroupFormerTokenizer",
    "__version__",
    "evaluate",
    "expand",
    "export_model",
    "heal",
    "import_model",
    "plan",
    "regroup",
    "uptrain",
]
