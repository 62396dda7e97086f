"""Engines outside transformers, each in a process, and if need be an environment, of its own.

A worker reads one JSON object a line ({"task": "prefill" | "decode", "length": N, "tokens": M}) and answers with one
({"seconds": ...}); `Peer` is its handle here. Environment variables (LLAMA_CPP_PYTHON, LITGPT_PYTHON) name
interpreters that have an engine which this one lacks; an engine that is installed nowhere is left out of the tables.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groupformer.conversion.folders import import_folder
from groupformer.conversion.gguf.writer import export_gguf


HERE = Path(__file__).parent
VARIABLES = {"llama_cpp": "LLAMA_CPP_PYTHON", "litgpt": "LITGPT_PYTHON"}


def interpreter(module: str) -> str | None:
    """The interpreter that can import an engine, or None."""
    python = os.environ.get(VARIABLES[module], sys.executable)
    found = subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0
    return python if found else None


class Peer:
    """A worker process; use as a context manager."""

    def __init__(self, python: str, worker: str, *arguments: Any):
        command = [python, str(HERE / worker), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, task: str, length: int, tokens: int = 0) -> Callable[[], float]:
        request = json.dumps({"task": task, "length": length, "tokens": tokens})
        return lambda: self.ask(request)

    def ask(self, request: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} ended with exit code {self.process.wait()}; its errors are above")
        return json.loads(answer)["seconds"]

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def write_gguf(native: Any, folder: Path) -> Path:
    """The model as a GGUF file without a tokenizer: llama.cpp is given token ids."""
    native.save_pretrained(folder / "native")
    import_folder(folder / "native", folder / "imported")
    export_gguf(folder / "imported", folder / "model.gguf", tokenizer=False)
    return folder / "model.gguf"
