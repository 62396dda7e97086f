"""Runs transformers' own common tests on GroupFormer, and on Llama beside it.

    python scripts/upstream_tests.py [--folder build/upstream] [--workers 2] [-k EXPRESSION]

Takes the source distribution of the installed transformers from the package index, unpacks its tests as a package,
writes stand-ins for the modules that it lacks, runs tests/upstream/suite.py, and prints a table. It fails if a test
fails, and if a test is skipped here that Llama passes, unless ALLOWED gives the reason.
"""

import argparse
import collections
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers


ROOT = Path(__file__).parent.parent

# Modules that transformers' tests import and its source distribution lacks. The first three hold tests of their own;
# the last starts processes, which a few lines here do too.
STAND_INS = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "distributed_testing_utils.py": '''"""Starts processes that talk through gloo on the CPU."""
import functools
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    torch.set_num_threads(1)


def _start_rank_processes(function, args, nprocs):
    processes.spawn(_run_and_leave, args=(function, args), nprocs=nprocs)


def _run_and_leave(rank, function, args):
    function(rank, *args)
    _leave()


def _leave():
    """Torch can abort or hang while it takes its process groups down at the end of a process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _enter(rank, function, world_size, path, args, kwargs):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    _set_rank_device(rank)
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=world_size)
    function(rank, *args, **kwargs)
    dist.barrier()
    _leave()


def run_distributed(world_size):
    def decorate(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "store")
                processes.spawn(_enter, args=(function, world_size, path, args, kwargs), nprocs=world_size)

        return run

    return decorate
''',
}

# Skipped here though Llama passes: (start of the shape's name, start of the test's name) -> why.
ALLOWED: dict[tuple[str, str], str] = {
    ("", "test_bc_cache_name_forward"): "a cache is taken by both names, without a warning about the old one",
    ("MhaLearned", "test_model_rope"): "learned positions: there is no RoPE to scale",
    ("MqaAlibi", "test_model_rope"): "ALiBi: there is no RoPE to scale",
    ("MhaLearnedBidirectional", "test_training_overfit"): "a bidirectional model does not generate",
    ("GqaRopeBidirectional", "test_training_overfit"): "a bidirectional model does not generate",
}


def unpack(folder: Path) -> Path:
    """The folder that holds the package `transformers_tests` of the installed version."""
    version = transformers.__version__
    target = folder / version
    package = target / "transformers_tests"
    if not (package / "__init__.py").exists():
        archive = folder / f"transformers-{version}.tar.gz"
        if not archive.exists():
            options = ["--no-binary", "transformers", "--no-deps", "--no-build-isolation", "--quiet"]
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                *options,
                f"transformers=={version}",
                "-d",
                str(folder),
            ]
            subprocess.run(command, check=True)
        package.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    content = tar.extractfile(member)
                    assert content is not None
                    (package / parts[2]).write_bytes(content.read())
        for name, text in STAND_INS.items():
            path = package / name
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                (path.parent / "__init__.py").touch()
                path.write_text(text)
        (package / "__init__.py").touch()
    return target


def run(tests: Path, report: Path, options: argparse.Namespace) -> int:
    """pytest's exit code."""
    paths = os.pathsep.join([str(tests), str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    arguments = ["-q", "-n", str(options.workers), f"--junitxml={report}", "-p", "no:cacheprovider", "-m", ""]
    # Their tests warn as they please; what our code warns of is tested in our own suite.
    arguments += ["-o", "addopts=", "-p", "no:warnings", "--tb=short", *(["-k", options.k] if options.k else [])]
    # Torch's store or gloo now and then aborts a process that has passed and is leaving ("terminate called without an
    # active exception", in Llama's tests too), so a process killed by a signal is tried anew; a failed test is not.
    arguments += ["--reruns", "2", "--only-rerun", "ProcessExitedException.*terminated with signal"]
    command = [sys.executable, "-m", "pytest", *arguments, str(ROOT / "tests/upstream/suite.py")]
    return subprocess.run(command, env={**os.environ, **settings}, cwd=ROOT).returncode


def outcomes(report: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """For each shape and test what happened, and why."""
    found: dict[str, dict[str, tuple[str, str]]] = collections.defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        skipped, failed = case.find("skipped"), case.find("failure")
        failed = failed if failed is not None else case.find("error")
        state = "failed" if failed is not None else "skipped" if skipped is not None else "passed"
        reason = (skipped.get("message") or "") if skipped is not None else ""
        found[case.get("classname", "").split(".")[-1]][case.get("name", "")] = (state, reason)
    return found


def unexplained(found: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    """Skips of ours where Llama passes and no reason is known."""
    reference = found.get("LlamaTest", {})
    lines = []
    for shape, tests in found.items():
        for name, (state, reason) in tests.items():
            allowed = any(shape.startswith(where) and name.startswith(start) for where, start in ALLOWED)
            if state == "skipped" and reference.get(name, ("", ""))[0] == "passed" and not allowed:
                lines.append(f"{shape}.{name}: skipped here, but Llama passes: {reason}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "upstream")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-k", help="pytest's selection")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    report = options.folder / "report.xml"
    code = run(unpack(options.folder), report, options)
    found = outcomes(report)
    print(f"\n| transformers {transformers.__version__} | passed | skipped | failed |\n| --- | --- | --- | --- |")
    for shape, tests in sorted(found.items()):
        counts = collections.Counter(state for state, _ in tests.values())
        print(f"| {shape} | {counts['passed']} | {counts['skipped']} | {counts['failed']} |")
    problems = unexplained(found)
    print("\n".join(problems))
    return code or bool(problems)


if __name__ == "__main__":
    sys.exit(main())
