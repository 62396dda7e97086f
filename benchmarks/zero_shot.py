"""Zero-shot multiple choice on local files, by lm-evaluation-harness: points in each set, and their mean.

    pip install lm-eval
    python -m benchmarks.zero_shot ../data/tasks SmolLM2-135M-Instruct runs/smollm2-1

A file `NAME.jsonl` is a set. Its rows hold "context" and "choices", or "contexts" and a common "target" (whose
log-likelihood after each of them counts), and "gold", the right one's index. The score is accuracy, and by
log-likelihood per byte in the sets named NORMALIZED, as the harness's own tasks of these names have it. Models are
read in bfloat16 where the machine multiplies faster in it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from groupformer.commands.tables import print_table
from groupformer.conversion.loading import best_device, has_fast_bf16


NORMALIZED = ("arc_challenge", "openbookqa", "piqa")


def task(path: Path) -> dict[str, Any]:
    """The harness's description of a file: what its task is called, reads and measures."""
    first = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
    by_context = {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "target"}
    by_choice = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"}
    metric = "acc_norm" if path.stem in NORMALIZED else "acc"
    return {
        "task": f"local_{path.stem}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        **(by_context if "contexts" in first else by_choice),
    }


def zero_shot(checkpoint: str | Path, tasks: Path, limit: int | None = None) -> dict[str, float]:
    """Percent right in each set of a folder, of its first `limit` rows or all, and their "mean"."""
    import lm_eval

    device = best_device(None)
    descriptions = [task(path) for path in sorted(tasks.glob("*.jsonl"))]
    with tempfile.TemporaryDirectory() as folder:
        for description in descriptions:
            # JSON is YAML, which the harness reads.
            Path(folder, f"{description['task']}.yaml").write_text(json.dumps(description), encoding="utf-8")
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(checkpoint),
                "dtype": "bfloat16" if has_fast_bf16(device) else "float32",
                "device": device,
                "batch_size": 32,
            },
            tasks=[description["task"] for description in descriptions],
            task_manager=lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
        )["results"]
    points = {
        name.removeprefix("local_"): 100 * scores.get("acc_norm,none", scores.get("acc,none"))
        for name, scores in found.items()
    }
    return {**points, "mean": sum(points.values()) / len(points)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path, help="Folder with the sets.")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--limit", type=int, help="Rows of each set; all by default.")
    options = parser.parse_args()
    rows = [(name, zero_shot(name, options.tasks, options.limit)) for name in options.checkpoints]
    sets = list(rows[0][1])
    print_table(
        "points", ["checkpoint", *sets], [[name, *(f"{points[s]:.1f}" for s in sets)] for name, points in rows]
    )


if __name__ == "__main__":
    main()
