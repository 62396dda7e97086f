"""Functions that run after an import of others: registration waits for transformers and PEFT, and imports neither."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType


def after_import(name: str, callback: Callable[[], None]) -> None:
    """Call `callback` as soon as the module `name` has been imported: now, if it has been already.

    Transformers' own package imports nothing before it is asked for a name, so at that moment none of its modules is
    half imported. Asking twice for the same module and function is asking once.
    """
    if sys.modules.get(name) is not None:  # None forbids importing it
        callback()
    elif not any(isinstance(finder, ImportWaiter) and finder.waits_for(name, callback) for finder in sys.meta_path):
        sys.meta_path.insert(0, ImportWaiter(name, callback))


class ImportWaiter(importlib.abc.MetaPathFinder):
    """Lets the other finders find one module, and calls a function after it has run; other imports pass by."""

    def __init__(self, name: str, callback: Callable[[], None]):
        self.name = name
        self.callback = callback

    def waits_for(self, name: str, callback: Callable[[], None]) -> bool:
        return (self.name, self.callback) == (name, callback)

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader = spec.loader

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # uncovers the class's
                loader.exec_module(module)
                sys.meta_path.remove(self)
                self.callback()

            loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader, which loads one module
        return spec


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`groupformer.modeling_groupformer` and the like, where they were in 0.1, are those of `groupformer.model`."""

    package = __name__.split(".")[0]

    def find_spec(self, fullname, path, target=None):
        package, _, name = fullname.rpartition(".")
        if package != self.package or not name.endswith("_groupformer"):
            return None
        if importlib.util.find_spec(f"{package}.model.{name}") is None:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        package, _, name = module.__name__.rpartition(".")
        new = f"{package}.model.{name}"
        warnings.warn(f"{module.__name__} has moved; import {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)
