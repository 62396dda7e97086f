"""What the bridge costs: memory and speed of importing and exporting a checkpoint of several gigabytes.

Writes a synthetic Llama-shaped checkpoint, copies it, imports it, exports it again, and compares the result with the
original bit by bit. Each step is a process of its own, so that its peak memory is its own. Everything is deleted in
the end. Run it where there are four times `--gigabytes` of free disk:

    python benchmarks/bridge.py --gigabytes 3
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig

from groupformer.conversion.checkpoint import Entry
from groupformer.conversion.shards import bytes_of, header_of, shard_names, write_index
from groupformer.conversion.weights import native_class, shapes_of
from groupformer.families.registry import FAMILIES


SHARD_GIGABYTES = 1


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """A bfloat16 Llama of TinyLlama's layers, as many as it takes; returns its bytes."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - 262_144_000) / 88_088_576) + 1),
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: list[dict[str, Entry]] = [{}]
    for name, shape in shapes_of(native_class(FAMILIES["llama"], "ForCausalLM"), config).items():
        entry = Entry(torch.bfloat16, shape)
        if sum(each.size for each in shards[-1].values()) + entry.size > SHARD_GIGABYTES * 1e9:
            shards.append({})
        shards[-1][name] = entry
    files = shard_names(len(shards))
    for file_name, entries in zip(files, shards):
        with open(folder / file_name, "wb") as file:
            file.write(header_of(entries))
            for entry in entries.values():
                file.write(bytes_of(torch.randn(entry.shape).to(torch.bfloat16)))
    write_index(folder, dict(zip(files, shards)))
    return sum(entry.size for entries in shards for entry in entries.values())


# Starts a child from a small process and prints what it prints, and its peak kilobytes: a child that is started from a
# large process counts its parent's memory too.
LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
output = process.stdout.read()
_, status, usage = os.wait4(process.pid, 0)
print(status, output.strip() or 0, usage.ru_maxrss)
"""

# A child times its work by itself: starting Python and importing torch costs the same for a checkpoint of any size.
TIMED = """
import sys, time
{imports}
started = time.perf_counter()
{work}
print(time.perf_counter() - started)
"""


def step(work: str, source: Path, target: Path, imports: str = "from groupformer.conversion import *") -> list[str]:
    """The command of a step; `work` finds its folders in `sys.argv`."""
    return [sys.executable, "-c", TIMED.format(imports=imports, work=work), str(source), str(target)]


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds of its work, and peak resident megabytes, of a process of its own."""
    launched = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    status, seconds, kilobytes = launched.stdout.split()
    if status != "0":
        raise RuntimeError(f"{' '.join(command)} failed")
    return float(seconds), float(kilobytes) / 1024


def same_tensors(left: Path, right: Path) -> bool:
    """Whether two folders hold the same tensors, wherever in their shards."""
    places = [
        {name: file for file in sorted(folder.glob("*.safetensors")) for name in safe_open(file, "pt").keys()}  # noqa: SIM118
        for folder in (left, right)
    ]
    if set(places[0]) != set(places[1]):
        return False
    return all(torch.equal(*(safe_open(files[name], "pt").get_tensor(name) for files in places)) for name in places[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=None, help="Where to write; default: the temporary folder.")
    parser.add_argument("--output", type=Path, default=None, help="Also write the numbers here, as JSON.")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    copy = ("shutil.copytree(sys.argv[1], sys.argv[2])", work / "native", work / "copy", "import shutil")
    sharded = f"max_shard_bytes={int(SHARD_GIGABYTES * 1e9)}"
    steps = {
        "copy": step(*copy),
        "import": step(f"import_folder(sys.argv[1], sys.argv[2], {sharded})", work / "native", work / "ours"),
        "export": step(f"export_folder(sys.argv[1], sys.argv[2], {sharded})", work / "ours", work / "back"),
        "copy again": step(*copy),
    }
    try:
        size = write_checkpoint(work / "native", arguments.gigabytes)
        os.sync()
        print(f"{size / 1e9:.2f} GB in {len(list((work / 'native').glob('*.safetensors')))} shards")
        results: dict = {"bytes": size}
        for name, command in steps.items():
            shutil.rmtree(work / "copy", ignore_errors=True)
            seconds, megabytes = measure(command)
            os.sync()  # the next step must not pay for this one's writes
            results[name] = {"seconds": seconds, "MB/s": size / 1e6 / seconds, "peak MB": megabytes}
            print(f"{name:>10}: {seconds:6.1f} s, {size / 1e6 / seconds:6.0f} MB/s, peak {megabytes:5.0f} MB")
        results["same"] = same_tensors(work / "native", work / "back")
        print(f"weights after import and export are bit for bit the same: {results['same']}")
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
