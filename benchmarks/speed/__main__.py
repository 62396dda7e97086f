"""GroupFormer's speed beside its peers, with the same weights, in one run.

    python -m benchmarks.speed                        # on this machine's CPU: about half an hour on two cores
    python -m benchmarks.speed --parts decode batch   # some parts
    python -m benchmarks.speed --tiny                 # sizes that only show that it works

Prints ratios to transformers' Llama (above 1: faster), and the share of the machine's measured ceilings: of its read
bandwidth where bytes bound the work, of its matrix product where operations do. Writes JSON and a plot to --output.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from . import cases, measure
from .shapes import DTYPES, fast_dtypes


def processor() -> str:
    """The CPU's name."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def ceilings(device: str, tiny: bool) -> dict[str, Any]:
    """The machine's limits, measured."""
    size = 256 if tiny else (2048 if device == "cpu" else 8192)
    megabytes = 8 if tiny else (512 if device == "cpu" else 4096)
    dtypes = DTYPES if tiny else fast_dtypes(device)
    return {
        "read_bandwidth": measure.read_bandwidth(device, megabytes),
        "copy_bandwidth": measure.copy_bandwidth(device, megabytes),
        "flops": {name: measure.gemm_flops(device, dtype, size) for name, dtype in dtypes.items()},
    }


def add_shares(row: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """The share of its ceiling that each run reaches."""
    for run in row["runs"].values():
        if "bytes" in row:
            run["ceiling_share"] = row["bytes"] / limits["read_bandwidth"] / run["seconds"]
        elif "flops" in row:
            run["ceiling_share"] = row["flops"] / limits["flops"][row["dtype"]] / run["seconds"]
    return row


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table: a line for each run of each case."""
    table = []
    for row in rows:
        for name, run in row["runs"].items():
            low, high = run["quartiles"]
            ratio = f"{run['ratio']:.2f} ({run['ratio_quartiles'][0]:.2f}-{run['ratio_quartiles'][1]:.2f})"
            share = f"{run['ceiling_share']:.0%}" if "ceiling_share" in run else ""
            notes = []
            if "memory_ratio" in run:
                notes.append(f"peak {run['peak_mib']:,.0f} MiB ({run['memory_ratio']:.2f})")
            if "kernel_seconds" in run:
                notes.append(f"the GPU computes for {run['kernel_seconds'] * 1e3:.2f} ms")
            if "first_call" in run:
                notes.append(f"first call {run['first_call']:.1f} s")
            if "added_seconds" in row and name == cases.OURS:
                notes.append(f"adds {row['added_seconds']:.2f} s")
            time = f"{run['seconds'] * 1e3:,.1f} ({low * 1e3:,.1f}-{high * 1e3:,.1f})"
            table.append([row["case"], name, time, ratio if "ratio" in run else "", share, "; ".join(notes)])
    return table


COLUMNS = ["case", "run", "ms (quartiles)", "ratio (quartiles)", "of the ceiling", "notes"]


def markdown(report: dict[str, Any]) -> str:
    """The same table for the docs."""
    body, last = [], ""
    for line in lines(report["rows"]):
        body.append(["" if line[0] == last else line[0], *line[1:]])
        last = line[0]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [COLUMNS, ["---"] * len(COLUMNS), *body]) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Ratios to the base of each case, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row['case']}: {name}", run["ratio"])
        for row in report["rows"]
        for name, run in row["runs"].items()
        if name != row["base"] and "ratio" in run
    ]
    figure, axes = pyplot.subplots(figsize=(10, 0.3 * len(bars) + 1))
    names, ratios = zip(*reversed(bars))
    axes.barh(names, ratios, color=["C0" if cases.OURS in name else "C7" for name in names])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed, as a ratio to transformers' Llama (or the case's base)")
    axes.tick_params(labelsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def earlier_rows(path: Path, where: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What earlier runs on the same machine measured, by case: parts can be run one by one."""
    report = json.loads(path.read_text()) if path.exists() else {}
    return {row["case"]: row for row in report.get("rows", []) if report.get("machine") == where}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=cases.PARTS, default=list(cases.PARTS))
    parser.add_argument("--output", type=Path, default=Path("runs/speed"), help="Folder of the JSON and the plot.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="Sizes that only show that it works.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.child:
        return cases.answer(options.child)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    small = cases.TINY if options.tiny else {"rounds": options.rounds}
    setting = cases.Setting(threads=options.threads, **small)
    limits = ceilings("cpu", options.tiny)
    report: dict[str, Any] = {"machine": machine("cpu", options.threads), "ceilings": limits, "rows": []}
    options.output.mkdir(parents=True, exist_ok=True)
    rows = earlier_rows(options.output / "speed.json", report["machine"])
    for part in options.parts:
        for row in cases.PARTS[part](setting):
            rows[row["case"]] = row
            report["rows"] = [add_shares(each, limits) for each in rows.values()]
            (options.output / "speed.json").write_text(json.dumps(report, indent=1))
            print(*(" | ".join(line) for line in lines([row])), sep="\n", flush=True)
    (options.output / "speed.md").write_text(markdown(report))
    print(markdown(report))
    draw(report, options.output / "speed.png")


if __name__ == "__main__":
    main()
