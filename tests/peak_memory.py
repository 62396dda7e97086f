"""A program: the most memory of its own that a step of regrouping takes, in bytes, beyond what it holds before.

`python -m tests.peak_memory STEP BIG SMALL WARM ROWS`: a folder, the same merged, both in a small size to begin with
(WARM/big, WARM/small), and rows of 256 tokens. Pages of files, which the system can take back, do not count.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig

from groupformer.regrouping.heal_folders import heal_folder
from groupformer.regrouping.heal_recipe import HealRecipe
from groupformer.regrouping.streaming import regroup_folder


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def run(step: str, big: Path, small: Path, rows: int) -> None:
    vocab_size = AutoConfig.from_pretrained(big).vocab_size
    token_ids = torch.randint(1, vocab_size, (rows, 256), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out"
        if step.startswith("merged"):
            regroup_folder(big, target, 2, calibration=token_ids if step == "merged by text" else None)
        else:
            recipe = HealRecipe(layer_tokens=10**9, joint_epochs=int("together" in step), bf16=False)
            heal_folder(small, big, target, token_ids, recipe)


def main() -> None:
    step, big, small, warm, rows = sys.argv[1:]
    run(step, Path(warm) / "big", Path(warm) / "small", 4)
    most = before = own_bytes()

    def watch() -> None:
        nonlocal most
        while True:
            most = max(most, own_bytes())
            time.sleep(0.003)

    threading.Thread(target=watch, daemon=True).start()
    run(step, Path(big), Path(small), int(rows))
    print(most - before)


if __name__ == "__main__":
    main()
