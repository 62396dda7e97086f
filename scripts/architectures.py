"""Writes the table of architectures in docs/families.md from the code: `python scripts/architectures.py`.

A row is tried, not told: the tiny models of the tests are understood, and the class that can hold half of their
key-value heads is asked for.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from groupformer.conversion.gguf.shapes import ARCHITECTURES as GGUF  # noqa: E402
from groupformer.families.registry import FAMILIES  # noqa: E402
from groupformer.model.configuration_groupformer import divisors  # noqa: E402
from groupformer.regrouping.attention import find_attention  # noqa: E402
from groupformer.regrouping.result import find_result  # noqa: E402
from tests.helpers_attention import ARCHITECTURES, tiny_native_config  # noqa: E402
from tests.helpers_families import native_config  # noqa: E402


PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"


def configs_of(name: str) -> Iterator:
    """Configs of every option that the tests try."""
    if name in FAMILIES:
        yield from (native_config(FAMILIES[name], option) for option in FAMILIES[name].examples)
    yield from (tiny_native_config(name, option) for option in ARCHITECTURES.get(name, {}))


def result_of(name: str) -> str:
    """The class that holds a regrouped model, for the first option with heads to merge."""
    for config in configs_of(name):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        layouts = find_attention(model_class, config)
        present = layouts[0].geometry.num_key_value_heads
        if present == 1:
            continue
        holding = [
            count
            for count in divisors(present)
            if count < present and find_result(model_class, config, layouts, [count] * len(layouts))
        ]
        smaller = [count for count in divisors(present) if count < present]
        ours = "GroupFormer" if name in FAMILIES else "no class"
        if not holding:
            return ours
        return model_class.__name__ if holding == smaller else f"{model_class.__name__} with 1 head, else {ours}"
    return "has one KV head"


def render() -> str:
    """The table, as Markdown."""
    rows = ["| architecture | regrouped, it is a | imports and exports | GGUF |", "| --- | --- | --- | --- |"]
    for name in sorted({*FAMILIES, *ARCHITECTURES}):
        rows.append(f"| `{name}` | {result_of(name)} | {yes(name in FAMILIES)} | {yes(name in GGUF)} |")
    return "\n".join(rows)


def yes(is_so: bool) -> str:
    return "yes" if is_so else ""


def main() -> None:
    logging.set_verbosity_error()
    text = PAGE.read_text(encoding="utf-8")
    table = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
    PAGE.write_text(table.sub(lambda match: f"{BEGIN}\n{render()}\n{END}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
