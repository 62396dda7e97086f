"""The whole study of docs/regroup.md on one GPU, many small processes side by side, within a time limit.

    groupformer tokenizer train --prose '.../textbooks/train-*.parquet' --vocab-size 4096 --output runs/tokenizer-4096
    python benchmarks/study_on_gpu.py --data .../textbooks --output runs --minutes 8

Trains both checkpoints by their recipes, then measures the cells of `benchmarks/study.py`, the most telling first, and
trains models of the same shape with fewer key-value heads. One small model leaves most of a GPU idle; ten fill it.
What the time does not allow is missing, and a second call, or `make study`, goes on from there. `--trained
reference=hub_card learned=runs/learned` measures checkpoints that are there, instead of training them.
"""

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from groupformer import GroupFormerTokenizer


HERE = Path(__file__).parent
RECIPES = {"reference": "recipes/reference.yaml", "learned": "recipes/learned.yaml"}
# What to measure, in the order of its worth: options of study.py. Each is one process.
JOBS = (
    *(f"--parts scratch --kv-heads {count} --seeds 0" for count in (4, 2, 1)),
    *(f"--parts uptrain --kv-heads {count} --methods svd --losses distilled --seeds 0" for count in (2, 4, 1)),
    "--parts merge",
    *(f"--parts uptrain --kv-heads {count} --methods svd --losses 'text only' --seeds 0" for count in (2, 4, 1)),
    *(f"--parts uptrain --kv-heads {count} --methods mean --losses distilled --seeds 0" for count in (2, 4, 1)),
    *(f"--parts scratch --kv-heads {count} --seeds 1" for count in (2, 1, 8, 4)),
    *(f"--parts uptrain --kv-heads {count} --methods mean --losses 'text only' --seeds 0" for count in (2, 4, 1)),
    "--parts uptrain --kv-heads 2 4 1 --methods svd --losses distilled --seeds 1 2 --percents 5",
    *(f"--parts scratch --kv-heads {count} --seeds 2" for count in (2, 8, 1, 4)),
)


@dataclass
class Runner:
    """Runs commands in threads of their own until the time is over; their output goes to a file each."""

    options: argparse.Namespace
    deadline: float

    def run(self, name: str, *command: str) -> bool:
        """Whether the command ended well in the time that was left."""
        left = self.deadline - time.monotonic()
        if left < 5:
            return False
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
        started = time.monotonic()
        with open(self.options.output / "logs" / f"{name}.log", "a") as log:
            try:
                code = subprocess.run(
                    [sys.executable, *command], stdout=log, stderr=log, env=environment, timeout=left
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
        print(f"{name}: exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
        return code == 0

    def study(self, name: str, checkpoint: Path, label: str, *arguments: str) -> bool:
        """Some cells of the study of one checkpoint."""
        fields = yaml.safe_load(self.recipe(name).read_text())
        rows = fields["max_steps"] * fields["batch_size"] * fields["gradient_accumulation_steps"]
        tokens = rows * fields["row_length"]
        data = ["--data", str(self.options.data), "--output", str(self.options.output / "study")]
        source = ["--checkpoint", str(checkpoint), "--recipe", str(self.recipe(name))]
        sizes = ["--pretraining-tokens", str(tokens), "--batch-size", "16", "--evaluation-batch", "32"]
        sizes += ["--tokenizer", self.tokenizer(name)]
        print(f"{name}-{label}: {shlex.join(arguments)}", flush=True)
        return self.run(f"{name}-{label}", str(HERE / "study.py"), *data, *source, *sizes, *arguments)

    def recipe(self, name: str) -> Path:
        """The recipe, with another number of steps where the options say so."""
        path = self.options.output / f"{name}.yaml"
        if not path.exists():
            fields = yaml.safe_load((HERE.parent / RECIPES[name]).read_text())
            fields["tokenizer"] = self.tokenizer(name)
            if self.options.steps:
                fields |= {"max_steps": self.options.steps, "eval_steps": max(1, self.options.steps // 5)}
            path.write_text(yaml.safe_dump(fields))
        return path

    def tokenizer(self, name: str) -> str:
        """A folder of its own, so that all runs read the same tokenized texts from the cache of `datasets`."""
        folder = self.options.output / f"tokenizer-{name}"
        if name == "learned":
            return "runs/tokenizer-4096"
        if not folder.exists():
            GroupFormerTokenizer().save_pretrained(folder)
        return str(folder)

    def checkpoint(self, name: str) -> None:
        """One checkpoint: its training, where it is not there, and then everything that is measured on it."""
        self.recipe(name)  # written before several threads ask for it
        if name in self.options.trained:
            self.measure(name, Path(self.options.trained[name]))
            return
        folder = self.options.output / name
        files = [
            f"--{kind}-file={self.options.data / kind}-*.parquet" for kind in ("train", "validation")
        ]  # patterns: the program expands them
        command = [
            "-m",
            "groupformer",
            "pretrain",
            str(self.recipe(name)),
            *files,
            "--output",
            str(folder),
        ]
        if not self.run(f"{name}-pretrain", *command, "--resume"):
            return
        halved = folder.with_name(f"{name}-bf16")  # what the Hub gets is what is measured
        self.run(f"{name}-halve", "-c", HALVE, str(folder), str(halved))
        self.measure(name, halved)

    def measure(self, name: str, checkpoint: Path) -> None:
        """Every cell of the study of one checkpoint, some processes at a time."""
        with ThreadPoolExecutor(self.options.processes) as pool:
            for index, job in enumerate(JOBS):
                pool.submit(self.study, name, checkpoint, f"{index:02}", *shlex.split(job))


HALVE = """
import sys, torch, groupformer
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


def together(*jobs) -> None:
    """Runs jobs side by side, and waits for all."""
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Folder with train-, validation-, test-*.parquet.")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--minutes", type=float, default=8, help="Everything that runs then is ended.")
    parser.add_argument("--steps", type=int, default=None, help="Of training, instead of the recipes'.")
    parser.add_argument("--processes", type=int, default=8, help="For each checkpoint, at a time.")
    parser.add_argument("--checkpoints", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--trained", nargs="+", default=[], metavar="NAME=FOLDER", help="Checkpoints that are there.")
    options = parser.parse_args()
    options.trained = dict(choice.split("=", 1) for choice in options.trained)
    if unknown := set(options.trained) - set(RECIPES):
        parser.error(f"--trained names {sorted(unknown)}; choose of {list(RECIPES)}")
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    runner = Runner(options, time.monotonic() + 60 * options.minutes)
    together(*(lambda name=name: runner.checkpoint(name) for name in options.checkpoints))


if __name__ == "__main__":
    main()
