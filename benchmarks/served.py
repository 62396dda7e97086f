"""What fewer key-value heads give in a server: a model with several head counts, in vLLM, llama.cpp or transformers.

    python -m benchmarks.served runs/smollm2 runs/smollm2-1 --engine vllm --cache-mib 96
    python -m benchmarks.served --random 1b --contexts 512 2048 --output runs/served-1b
    python -m benchmarks.served runs/smollm2.gguf runs/smollm2-1.gguf --engine llama.cpp --tokenizer runs/smollm2
    python -m benchmarks.served runs/smollm2 runs/smollm2-1 --engine transformers

Each checkpoint gets the engine's own server, all at once and idle but for the one that is measured. vLLM's benchmark
client asks them in turn, A B B A, and a ratio is the median over rounds, each of which compares neighbours. On a CPU
the servers compute on the same cores (--engine-cores), and front ends and client run on the others: where they share
cores, a ratio says who got them. Name a checkpoint twice to see what the ratio of a model to itself is. Printed beside
each ratio is what `groupformer plan` predicts: the bytes that a step reads for each of its tokens, over those of the
first checkpoint, and the sequences that the cache holds. The prediction leaves prompts out; they cost both the same.

The client and vLLM's server run in an environment of their own, made by `make test-vllm` (--vllm names its folder);
llama.cpp's server comes with the package `xllamacpp` in the environment of --llama-cpp. Transformers' continuous
batching (`generate_batch`) runs in a process for each checkpoint: its own server refuses what the client sends.
"""

import argparse
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from groupformer import GroupFormerTokenizer
from groupformer.measuring.cache import cache_bytes_per_token
from groupformer.measuring.planning import parameter_counts


# Shapes of random models: (hidden_size, intermediate_size, layers, query heads, counts of KV heads).
RANDOM = {"1b": (2048, 5632, 18, 32, (32, 8, 2)), "tiny": (256, 512, 2, 8, (8, 2))}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class Server:
    """A running server of one checkpoint.

    Args:
        name: The checkpoint's name in the tables.
        config: Its folder, or that of the model that a GGUF file was written from.
        cache_tokens: Tokens that the server says its cache holds; None where it does not say.
        computing: The processes that compute the model.
        worker: The process that is asked by lines instead, where there is no server.
    """

    name: str
    model: str
    config: Path
    port: int
    cache_tokens: int | None
    computing: list[int]
    worker: subprocess.Popen | None = None


def engine_cores(options: argparse.Namespace) -> set[int]:
    """The cores that servers compute on: as given, else all but the last, and all beside a GPU."""
    cores = sorted(os.sched_getaffinity(0))
    return set(options.engine_cores or (cores if torch.cuda.is_available() else cores[:-1]) or cores)


def other_cores(options: argparse.Namespace) -> set[int]:
    """The cores of front ends and client."""
    return os.sched_getaffinity(0) - engine_cores(options) or os.sched_getaffinity(0)


def processes_of(pid: int) -> Iterator[Path]:
    """The folders in /proc of a process and of all that it started."""
    yield Path(f"/proc/{pid}")
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from processes_of(int(child))


def bind(pid: int, options: argparse.Namespace, computing: str = "") -> list[int]:
    """Binds the threads of a process tree to cores: those of a process with `computing` in its command line, which is
    every process by default, to the engine's; the rest to the others. Returns the processes that compute."""
    found = []
    for process in processes_of(pid):
        is_computing = computing in (process / "cmdline").read_text()
        found += [int(process.name)] if is_computing else []
        for task in (process / "task").iterdir():
            with suppress(ProcessLookupError):  # a thread that has ended since
                os.sched_setaffinity(int(task.name), engine_cores(options) if is_computing else other_cores(options))
    return found


def cpu_seconds(server: Server) -> float:
    """What the processes that compute have used, which other programs on the machine do not lengthen."""
    ticks = 0
    for pid in server.computing:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return ticks / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, port: int, log: Path, seconds: float = 600) -> None:
    """Returns when the server answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of its log.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


@contextmanager
def running(command: list[str], environment: dict[str, str], port: int, log: Path) -> Iterator[int]:
    """Runs a server until it is no longer needed; yields its process id once it answers."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=file)
        try:
            wait_until_ready(process, port, log)
            yield process.pid
        finally:
            end(process)


def end(process: subprocess.Popen, seconds: float = 60) -> None:
    """Ends a server and, where it does not end itself in time (vLLM's, while it warms up), all that it started."""
    process.terminate()
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        for folder in list(processes_of(process.pid)):
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(int(folder.name), signal.SIGKILL)
        process.wait()


@contextmanager
def vllm_server(checkpoint: Path, options: argparse.Namespace, log: Path) -> Iterator[Server]:
    port = free_port()
    longest = max(options.contexts) + options.new_tokens
    command = [str(options.vllm / "bin" / "vllm"), "serve", str(checkpoint), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", options.dtype, "--max-model-len", str(longest)]
    command += ["--kv-cache-memory-bytes", str(options.cache_mib << 20), "--no-enable-prefix-caching"]
    command += ["--max-num-seqs", str(max(options.concurrency))] + (["--enforce-eager"] if options.eager else [])
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "groupformer"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(engine_cores(options))))
    with running(command, environment, port, log) as pid:
        computing = bind(pid, options, computing="VLLM::Worker")
        said = re.search(r"KV cache size: ([\d,]+) tokens", log.read_text())
        tokens = None if said is None else int(said[1].replace(",", ""))
        yield Server(log.stem, str(checkpoint), checkpoint, port, tokens, computing)


LLAMA_CPP = """
import json, sys, time, xllamacpp
options = json.loads(sys.argv[1])
parameters = xllamacpp.CommonParams()
parameters.model.path = options["model"]
parameters.port, parameters.hostnames = options["port"], ["127.0.0.1"]
parameters.cache_prompt, parameters.cache_ram_mib = False, 0  # every prompt is read
parameters.n_ctx, parameters.n_parallel, parameters.kv_unified = options["tokens"], options["slots"], True
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options["threads"]
parameters.cache_type_k = parameters.cache_type_v = getattr(xllamacpp.ggml_type, options["cache_type"])
server = xllamacpp.Server(parameters)
while True:
    time.sleep(60)
"""


def config_folder(checkpoint: Path) -> Path:
    """The folder with a checkpoint's config: a GGUF file's lies beside it, under its name without the suffix."""
    return checkpoint.with_suffix("") if checkpoint.suffix == ".gguf" else checkpoint


@contextmanager
def llama_cpp_server(checkpoint: Path, options: argparse.Namespace, log: Path) -> Iterator[Server]:
    """llama.cpp allots its cache by tokens, so each checkpoint gets as many as the memory of --cache-mib holds."""
    port, config = free_port(), config_folder(checkpoint)
    tokens = (options.cache_mib << 20) // bytes_per_token(config, options)
    content = {
        "model": str(checkpoint),
        "port": port,
        "tokens": tokens,
        "slots": max(options.concurrency),
        "threads": len(engine_cores(options)),
        "cache_type": options.cache_type,
    }
    command = [str(options.llama_cpp / "bin" / "python"), "-c", LLAMA_CPP, json.dumps(content)]
    with running(command, {}, port, log) as pid:
        yield Server(log.stem, str(checkpoint), config, port, tokens, bind(pid, options))


TRANSFORMERS = """
import json, sys, statistics, time, torch
import groupformer
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
options = json.loads(sys.argv[1])
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=options["dtype"], attn_implementation="sdpa")
model = model.to(device).eval()
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    batching = ContinuousBatchingConfig(
        page_size=256, num_blocks=options["tokens"] // 256, max_requests_per_batch=asked["concurrency"]
    )
    tokens = torch.randint(3, model.config.vocab_size, (asked["requests"], asked["context"])).tolist()
    generation = GenerationConfig(max_new_tokens=asked["new_tokens"], eos_token_id=-1, pad_token_id=0, do_sample=False)
    started = time.perf_counter()
    done = model.generate_batch(tokens, generation, batching, record_timestamps=True).values()
    seconds, count = time.perf_counter() - started, sum(len(each.generated_tokens) for each in done)
    times = [each.timestamps for each in done]
    print(json.dumps({
        "tokens_per_second": count / seconds,
        "first_ms": 1e3 * statistics.median(each.timestamps[0] - each.created_time for each in done),
        "next_ms": 1e3 * statistics.median((each[-1] - each[0]) / (len(each) - 1) for each in times),
        "completed": len(times),
    }), flush=True)
"""


@contextmanager
def transformers_worker(checkpoint: Path, options: argparse.Namespace, log: Path) -> Iterator[Server]:
    """Continuous batching, whose cache is allotted by blocks of 256 tokens."""
    tokens = (options.cache_mib << 20) // bytes_per_token(checkpoint, options) // 256 * 256
    content = {"model": str(checkpoint), "dtype": options.dtype, "tokens": tokens}
    command = [sys.executable, "-c", TRANSFORMERS, json.dumps(content)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(engine_cores(options)))}
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with open(log, "w") as file, subprocess.Popen(command, env=environment, stderr=file, **pipes) as worker:
        try:
            answer_of(worker, log)
            computing = bind(worker.pid, options)
            yield Server(log.stem, str(checkpoint), checkpoint, 0, tokens, computing, worker)
        finally:
            worker.terminate()


def answer_of(worker: subprocess.Popen, log: Path) -> str:
    assert worker.stdout is not None
    if not (line := worker.stdout.readline()):
        raise RuntimeError(f"the process ended:\n{log.read_text()[-3000:]}")
    return line


ENGINES = {"vllm": vllm_server, "llama.cpp": llama_cpp_server, "transformers": transformers_worker}
# Bytes of a cached number: blocks of 32 eight-bit numbers share a half precision scale in llama.cpp.
CACHE_TYPE_BYTES = {"GGML_TYPE_F16": 2.0, "GGML_TYPE_Q8_0": 34 / 32}


def bytes_per_token(config: Path, options: argparse.Namespace) -> int:
    """Of the cache, as `groupformer plan` computes it."""
    numbers = cache_bytes_per_token(AutoConfig.from_pretrained(config), torch.int8)
    size = CACHE_TYPE_BYTES[options.cache_type] if options.engine == "llama.cpp" else DTYPE_BYTES[options.dtype]
    return int(numbers * size)


def ask(server: Server, context: int, concurrency: int, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second, milliseconds to the first token and for each further one: a run of vLLM's benchmark client."""
    if server.worker is not None:
        return ask_worker(server, context, concurrency, options)
    with tempfile.TemporaryDirectory() as folder:
        command = [str(options.vllm / "bin" / "vllm"), "bench", "serve", "--backend", "openai"]
        command += ["--base-url", f"http://127.0.0.1:{server.port}", "--model", server.model, "--disable-tqdm"]
        command += ["--tokenizer", str(options.tokenizer or server.config), "--dataset-name", "random", "--ignore-eos"]
        command += ["--random-input-len", str(context), "--random-output-len", str(options.new_tokens)]
        command += ["--num-prompts", str(concurrency * options.waves), "--max-concurrency", str(concurrency)]
        command += ["--ready-check-timeout-sec", "0"]  # no request but those that are counted
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json", "--temperature", "0"]
        done = subprocess.run(
            ["taskset", "--cpu-list", ",".join(map(str, sorted(other_cores(options)))), *command],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the benchmark client failed:\n{done.stderr[-3000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != concurrency * options.waves:
        raise RuntimeError(f"{server.name} answered {result['completed']} of {concurrency * options.waves} requests")
    names = {"tokens_per_second": "output_throughput", "first_ms": "median_ttft_ms", "next_ms": "median_tpot_ms"}
    return {name: result[theirs] for name, theirs in names.items()}


def ask_worker(server: Server, context: int, concurrency: int, options: argparse.Namespace) -> dict[str, float]:
    """The same figures from a process without a server; requests are there from the beginning, and wait in it."""
    assert server.worker is not None and server.worker.stdin is not None
    asked = {"context": context, "concurrency": concurrency, "new_tokens": options.new_tokens}
    print(json.dumps({**asked, "requests": concurrency * options.waves}), file=server.worker.stdin, flush=True)
    answer = json.loads(answer_of(server.worker, options.output / f"{server.name}.log"))
    if answer.pop("completed") != concurrency * options.waves:
        raise RuntimeError(f"{server.name} did not answer all of {concurrency * options.waves} requests")
    return answer


def predict(server: Server, context: int, concurrency: int, options: argparse.Namespace) -> dict[str, float]:
    """`groupformer plan`'s bytes of a decoding step, and the sequences that the cache holds at once."""
    config = AutoConfig.from_pretrained(server.config)
    sequence = bytes_per_token(server.config, options) * (context + options.new_tokens)
    held = int((options.cache_mib << 20) // sequence)
    together = min(concurrency, held)
    is_gguf = server.model.endswith(".gguf")
    weights = os.path.getsize(server.model) if is_gguf else parameter_counts(config)[1] * DTYPE_BYTES[options.dtype]
    return {"fits": held, "bytes_per_token": (weights + together * sequence) / together if together else float("nan")}


def turns(servers: list[Server], rounds: int) -> Iterator[list[Server]]:
    """Who is asked in each round: A B, then B A, so that no server always follows the same one."""
    for number in range(rounds):
        yield servers[:: -1 if number % 2 else 1]


def measure(servers: list[Server], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each context and concurrency: medians over rounds, and of each round's ratio to the first server."""
    for context in options.contexts:
        for concurrency in options.concurrency:
            runs: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
            for order in turns(servers, options.rounds):
                for server in order:
                    before = cpu_seconds(server)
                    run = ask(server, context, concurrency, options)
                    count = concurrency * options.waves * options.new_tokens
                    runs[server.name].append(run | {"cpu_ms": 1e3 * (cpu_seconds(server) - before) / count})
            row: dict[str, Any] = {"context": context, "concurrency": concurrency, "models": []}
            for server in servers:
                told = {name: value for name, value in vars(server).items() if name not in ("worker", "computing")}
                told |= predict(server, context, concurrency, options)
                row["models"].append(told | summary(runs[server.name], runs[servers[0].name]))
            yield row


def summary(runs: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, float]:
    """Medians over rounds, and medians of the ratios to the first server in the same round: `ratio` of tokens a
    second, `step_ratio` of the time for each further token, `cpu_ratio` of CPU time for each; above 1 means faster.
    """
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    pairs = list(zip(runs, first))
    ratio = statistics.median(run["tokens_per_second"] / base["tokens_per_second"] for run, base in pairs)
    # Of llama.cpp's server the client once gave 0 ms between tokens; perhaps these had no text. That is no time.
    is_timed = all(run["next_ms"] and base["next_ms"] for run, base in pairs)
    step_ratio = statistics.median(base["next_ms"] / run["next_ms"] for run, base in pairs) if is_timed else math.nan
    cpu_ratio = statistics.median(base["cpu_ms"] / run["cpu_ms"] for run, base in pairs)
    return {**medians, "ratio": ratio, "step_ratio": step_ratio, "cpu_ratio": cpu_ratio}


def lines(row: dict[str, Any]) -> list[str]:
    """A line for each model: speed, its ratio to the first model's, and the ratio that the bytes predict."""
    first = row["models"][0]
    return [
        f"| {row['context']:,} | {row['concurrency']} | {model['name']} | {model['tokens_per_second']:,.1f} "
        f"| {model['ratio']:.2f} | {first['bytes_per_token'] / model['bytes_per_token']:.2f} "
        f"| {model['next_ms']:.1f} ({model['step_ratio']:.2f}) | {model['cpu_ms']:.1f} ({model['cpu_ratio']:.2f}) "
        f"| {model['first_ms']:,.0f} | {model['fits']} "
        f"| {model['cache_tokens'] or ''} |"
        for model in row["models"]
    ]


COLUMNS = (
    "context, at once, model, tokens/s, ratio, predicted, ms a token (ratio), CPU ms a token (ratio), "
    "ms to the first, fit, cache tokens"
)


def random_models(kind: str, folder: Path) -> list[Path]:
    """Llama-shaped models of random weights that differ in their KV heads alone, in bfloat16."""
    hidden_size, intermediate_size, layers, heads, counts = RANDOM[kind]
    tokenizer, folders = GroupFormerTokenizer(), []
    for count in counts:
        target = folder / f"random-{kind}-{count}"
        folders.append(target)
        if (target / "config.json").exists():
            continue
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=count,
            max_position_embeddings=16_384,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, help="The first is what the others are compared with.")
    parser.add_argument("--random", choices=RANDOM, help="Models of random weights instead of checkpoints.")
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--waves", type=int, default=2, help="Requests for each that runs at once.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache-mib", type=int, default=256, help="Memory of the cache, the same for each model.")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16")
    parser.add_argument("--cache-type", choices=CACHE_TYPE_BYTES, default="GGML_TYPE_F16", help="llama.cpp's.")
    parser.add_argument(
        "--engine-cores", nargs="+", type=int, help="What servers compute on. Default: all but the last."
    )
    parser.add_argument("--eager", action="store_true", help="vLLM without compiling.")
    parser.add_argument("--tokenizer", type=Path, help="Folder of the client's tokenizer. Default: the checkpoint's.")
    parser.add_argument("--vllm", type=Path, default=Path(".venv-vllm"))
    parser.add_argument("--llama-cpp", type=Path, default=Path(".venv-llama-cpp"))
    parser.add_argument("--output", type=Path, default=Path("runs/served"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the servers end, too
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoints = options.checkpoints or (random_models(options.random, options.output) if options.random else [])
    if not checkpoints:
        parser.error("nothing to serve; name checkpoints, or --random 1b")
    for checkpoint in checkpoints:
        positions = AutoConfig.from_pretrained(config_folder(checkpoint)).max_position_embeddings
        if (longest := max(options.contexts) + options.new_tokens) > positions:
            parser.error(f"--contexts: {checkpoint} has {positions} positions, the longest sequence {longest} tokens")
    with ExitStack() as stack:
        servers = []
        for number, checkpoint in enumerate(checkpoints):
            again = "-again" * checkpoints[:number].count(checkpoint)
            log = options.output / f"{config_folder(checkpoint).name}{again}.log"
            servers.append(stack.enter_context(ENGINES[options.engine](checkpoint, options, log)))
        names = COLUMNS.split(", ")
        print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
        rows: list[dict[str, Any]] = []
        for row in measure(servers, options):
            print("\n".join(lines(row)), flush=True)
            rows.append(row)
            write_report(rows, checkpoints, options)


def write_report(rows: list[dict[str, Any]], checkpoints: list[Path], options: argparse.Namespace) -> None:
    """What has been measured so far, in a file: long contexts take their time."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings["checkpoints"] = [checkpoint.name for checkpoint in checkpoints]
    report = {"settings": settings, "rows": rows}
    (options.output / "served.json").write_text(json.dumps(report, indent=2, default=str))


if __name__ == "__main__":
    main()
