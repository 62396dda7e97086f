"""The benchmarks run, at sizes that only show that they do, and their arithmetic is right."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import served
from benchmarks.speed.measure import alternate, summary
from benchmarks.speed.shapes import Shape, llama, ours
from benchmarks.walk import build_models, walk_of_token
from groupformer.families.registry import FAMILIES


def test_parameters_are_those_of_the_model():
    shape = Shape("tiny", kv_heads=2, vocab_size=256)
    norms = 64 * (2 * 2 + 1)
    assert shape.parameters + norms == llama(shape, "cpu").num_parameters()


def test_bytes_of_a_decoding_step_grow_by_the_cache():
    shape = Shape("tiny", kv_heads=2, vocab_size=256)
    cache = ours(llama(shape, "cpu"))(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.decode_bytes(10) - shape.decode_bytes(0) == held


def test_a_cached_token_passes_few_functions_and_files():
    """8 layers; transformers' Llama passes 29 functions in 119 calls."""
    walk = walk_of_token(build_models()[1])
    assert walk["functions"] <= 36 and walk["calls"] <= 200 and walk["changes of file"] <= 45


def test_ratios_are_taken_round_by_round():
    table = summary({"base": [1.0, 2.0, 4.0], "ours": [0.5, 1.0, 8.0]}, "base")
    assert table["ours"]["ratio"] == 2.0
    assert table["ours"]["seconds"] == 1.0


def test_runs_alternate_in_changing_order():
    order = []

    def run(name):
        order.append(name)
        return 1.0

    alternate({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=2)
    assert order == ["a", "b", "a", "b", "b", "a"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "result"),
    [
        ("benchmarks.speed", ["--tiny", "--parts", "prefill", "decode", "batch", "training"], "speed.json"),
        ("benchmarks.speed.gpu", ["--tiny", "--device", "cpu", "--heads", "GQA"], "speed-gpu.json"),
    ],
)
def test_the_scripts_run(tmp_path, module, arguments, result):
    command = [sys.executable, "-m", module, *arguments, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / result).read_text())["rows"]
    assert {"transformers' Llama", "GroupFormer"} <= set(rows[0]["runs"])
    assert all(run["seconds"] > 0 and run["ceiling_share"] > 0 for row in rows for run in row["runs"].values())


def test_every_family_is_timed(tmp_path):
    arguments = ["--tiny", "--rounds", "1", "--dtypes", "float32", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.families", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "families.json").read_text())["rows"]
    assert [row["family"] for row in rows] == list(FAMILIES)
    assert all(case["GroupFormer"]["ratio"] > 0 for row in rows for case in row["cases"].values())


def test_servers_are_asked_in_turn_and_compared_within_a_round():
    assert list(served.turns(["a", "b"], 3)) == [["a", "b"], ["b", "a"], ["a", "b"]]
    base = [{"tokens_per_second": speed, "next_ms": 10.0, "cpu_ms": 9.0} for speed in (1.0, 2.0, 4.0)]
    other = [{"tokens_per_second": speed, "next_ms": 5.0, "cpu_ms": 3.0} for speed in (2.0, 3.0, 8.0)]
    assert math.isnan(served.summary([{**run, "next_ms": 0.0} for run in other], base)["step_ratio"])
    ratios = {"ratio": 2.0, "step_ratio": 2.0, "cpu_ratio": 3.0}
    assert served.summary(other, base) == {"tokens_per_second": 3.0, "next_ms": 5.0, "cpu_ms": 3.0, **ratios}


@pytest.mark.skipif(sys.platform != "linux", reason="binds by /proc")
def test_the_process_that_computes_is_bound_to_the_engine_s_cores():
    cores = os.sched_getaffinity(0)
    options = argparse.Namespace(engine_cores=[min(cores)])
    sleeping = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1], 'Wor' + 'ker']); print()"
    )
    command = [sys.executable, "-uc", f"{sleeping}; time.sleep(60)", "print(); import time; time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as front:
        front.stdout.readline(), front.stdout.readline()  # both run
        (worker,) = [int(path.name) for path in served.processes_of(front.pid)][1:]
        try:
            assert served.bind(front.pid, options, computing="Worker") == [worker]
            assert os.sched_getaffinity(worker) == {min(cores)}
            assert os.sched_getaffinity(front.pid) == (cores - {min(cores)} or cores)
        finally:
            os.kill(worker, signal.SIGKILL)
            front.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_a_server_that_does_not_end_is_killed_with_what_it_started():
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    front = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); {deaf}"
    with subprocess.Popen([sys.executable, "-c", front, deaf], stdout=subprocess.PIPE) as process:
        process.stdout.readline(), process.stdout.readline()  # both run
        started = time.monotonic()
        served.end(process, seconds=0.2)
        assert process.returncode == -signal.SIGKILL
        assert process.stdout.read() == b""  # the pipe ends when the other process has ended, too
        assert time.monotonic() - started < 30


@pytest.mark.slow
def test_the_same_shape_with_fewer_heads_is_served_by_continuous_batching(tmp_path):
    arguments = ["--random", "tiny", "--engine", "transformers", "--contexts", "48", "--concurrency", "2"]
    arguments += ["--rounds", "1", "--new-tokens", "4", "--cache-mib", "16", "--output", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks.served", *arguments], check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "served.json").read_text())["rows"]
    first, last = row["models"]
    assert last["cache_tokens"] == 4 * first["cache_tokens"]  # 8 KV heads and 2
    assert first["fits"] == 16 * 2**20 // (2 * 2 * 8 * 32 * 2 * 52)
    assert all(model["tokens_per_second"] > 0 and model["next_ms"] > 0 for model in row["models"])
