"""GroupFormer's speed beside every family that the bridge imports, each in its own class, with the same weights.

    python -m benchmarks.families [--families gpt2 qwen3 ...] [--output FOLDER]

Reading a prompt, decoding through `generate`, and a training step, in turn. Prints and writes a Markdown table of
ratios (above 1: GroupFormer is faster), and JSON with medians and quartiles.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import groupformer
from benchmarks.speed import torch_runs
from benchmarks.speed.__main__ import machine
from benchmarks.speed.measure import Run, alternate, summary, timed
from benchmarks.speed.shapes import DTYPES, fast_dtypes
from groupformer.conversion.configs import config_class_of
from groupformer.conversion.weights import native_class
from groupformer.families.family import Family
from groupformer.families.registry import FAMILIES


def sizes(layers: int, hidden: int, heads: int) -> dict[str, int]:
    """What the families call their sizes, with a quarter of the heads as KV heads."""
    return {
        **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), hidden),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), layers),
        **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), heads),
        **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 1024),
        **dict.fromkeys(("n_inner", "ffn_dim", "ffn_hidden_size"), 4 * hidden),
        "intermediate_size": 3 * hidden,
        "num_key_value_heads": heads // 4,
        "head_dim": hidden // heads,
        "vocab_size": 4096,
    }


SIZES, TINY = sizes(layers=6, hidden=512, heads=8), sizes(layers=2, hidden=64, heads=4)
CASES = ["prompt of 64", "prompt of 512", "decode", "decode, batch 8", "training, 8 x 64"]


def sized(family: Family, tiny: bool) -> dict[str, Any]:
    """The fields of a native config: the family's first example at these sizes, as far as it has them."""
    fields = {**family.tiny, **next(iter(family.examples.values()))}
    new = TINY if tiny else SIZES
    fields |= {name: size for name, size in new.items() if type(fields.get(name)) is int}
    for name in ("layer_types", "no_rope_layers"):
        if name in fields:
            layers = new["num_hidden_layers"]
            fields[name] = (fields[name] * layers)[:layers]
    return fields | {"bos_token_id": 0, "eos_token_id": None}  # nothing ends a generation; CWM wants a begin token


def prefill(model: Any, length: int) -> Run:
    ids = torch_runs.random_prompt(model, 1, length)
    mask = torch.ones_like(ids)

    @torch.no_grad()
    def run() -> float:
        return timed(lambda: model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1))

    return run


def decode(model: Any, batch: int, tokens: int) -> Run:
    """Seconds a token of `generate`, with the prompt of 64 tokens."""
    ids = torch_runs.random_prompt(model, batch, 64)
    # Some native configs decline the cache by default.
    return lambda: (
        timed(lambda: torch_runs.generate(model, ids, torch.ones_like(ids), tokens, use_cache=True)) / tokens
    )


def train(model: Any, batch: int, length: int) -> Run:
    ids = torch_runs.random_prompt(model, batch, length)

    def step() -> None:
        model.train()
        model(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        model.eval()

    return lambda: timed(step)


def cases(tiny: bool) -> dict[str, Callable[[Any], Run]]:
    tokens, long = (2, 16) if tiny else (32, 512)
    runs: list[Callable[[Any], Run]] = [
        lambda model: prefill(model, 16 if tiny else 64),
        lambda model: prefill(model, long),
        lambda model: decode(model, 1, tokens),
        lambda model: decode(model, 8, tokens),
        lambda model: train(model, 8, 16 if tiny else 64),
    ]
    return dict(zip(CASES, runs))


def compare(family: Family, dtype: torch.dtype, rounds: int, tiny: bool) -> dict[str, Any]:
    """Medians, quartiles and ratios of every case."""
    torch.manual_seed(0)
    native = native_class(family, "ForCausalLM")(config_class_of(family)(**sized(family, tiny))).to(dtype).eval()
    ours = groupformer.import_model(native).eval()
    table = {}
    for case, run_of in cases(tiny).items():
        seconds = alternate({"native": run_of(native), "GroupFormer": run_of(ours)}, rounds, twice=not tiny)
        table[case] = summary(seconds, "native")
    return table


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [["family", "dtype", *CASES], ["---"] * (len(CASES) + 2)]
    for row in rows:
        ratios = [f"{row['cases'][case]['GroupFormer']['ratio']:.2f}" for case in CASES]
        lines.append([f"`{row['family']}`", row["dtype"], *ratios])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(fast_dtypes("cpu")))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("runs/families"))
    parser.add_argument("--tiny", action="store_true", help="Sizes that only show that it works.")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = []
    for name in options.families:
        for dtype in options.dtypes:
            table = compare(FAMILIES[name], DTYPES[dtype], options.rounds, options.tiny)
            rows.append({"family": name, "dtype": dtype, "cases": table})
            print(markdown(rows).splitlines()[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine("cpu", torch.get_num_threads()), "rows": rows}
    (options.output / "families.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "families.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
