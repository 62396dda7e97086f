"""Runs the fast tests with the oldest and the newest transformers and peft that we support.

    python scripts/version_tests.py [oldest] [newest] [--folder build/versions] [--workers 2] [-- PYTEST ARGUMENTS]

The oldest are the lower bounds of pyproject.toml, the newest what the package index has below our upper bounds. Each
pair gets an environment of its own, which takes every other package from this one. A pair that this environment has
already is not run again.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parent.parent
PACKAGES = ("transformers", "peft")

# Runs in the new environment: what the packages named on the command line need and do not find.
UNMET = """
import sys
from importlib import metadata
from packaging.requirements import Requirement
for package in sys.argv[1:]:
    for line in metadata.requires(package) or []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            try:
                found = metadata.version(needed.name)
            except metadata.PackageNotFoundError:
                found = "0"
            if not needed.specifier.contains(found, prereleases=True):
                print(f"{needed.name}{needed.specifier}")
"""


def requirements(extras: Sequence[str]) -> dict[str, Requirement]:
    """What pyproject.toml asks for, with these extras, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {Requirement(line).name: Requirement(line) for line in lines}


def oldest(requirement: Requirement) -> str:
    return next(str(Version(each.version)) for each in requirement.specifier if each.operator == ">=")


def newest(requirement: Requirement) -> str:
    """The last release that the index has and the requirement allows."""
    command = [sys.executable, "-m", "pip", "index", "versions", requirement.name]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    versions = re.search(r"Available versions: (.*)", listing)
    if versions is None:
        raise SystemExit(f"the package index lists no versions of {requirement.name}")
    return str(max(map(Version, requirement.specifier.filter(versions[1].split(", ")))))


def environment(folder: Path, versions: dict[str, str]) -> str:
    """The Python of an environment with these versions, and for the rest the packages of this one."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def install(*what: str) -> None:
        options = ["--quiet", "--no-deps", "--ignore-installed"]
        subprocess.run([python, "-m", "pip", "install", *options, *what], check=True)

    install(*(f"{name}=={version}" for name, version in versions.items()))
    names = list(versions)
    while True:  # what is installed for one may need more
        command = [python, "-c", UNMET, *names]
        unmet = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        if not unmet:
            return python
        print("also installed:", ", ".join(unmet), flush=True)
        install(*unmet)
        names += [Requirement(line).name for line in unmet]


def run(name: str, versions: dict[str, str], options: argparse.Namespace) -> int:
    """pytest's exit code."""
    if all(metadata.version(package) == version for package, version in versions.items()):
        print(f"{name}: {versions} is what this environment has; `make test` runs it", flush=True)
        return 0
    print(f"{name}: {versions}", flush=True)
    python = environment(options.folder / name, versions)
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-m", "pytest", "-q", "-n", str(options.workers), *options.arguments]
    return subprocess.run(command, env={**os.environ, **settings}, cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", default=["oldest", "newest"], help="oldest, newest")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions")
    parser.add_argument("--workers", type=int, default=2)
    own = sys.argv[1:]
    own, rest = (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])
    options = parser.parse_args(own)
    options.arguments = rest
    needed = requirements(["training"])
    choose = {"oldest": oldest, "newest": newest}
    codes = [run(name, {p: choose[name](needed[p]) for p in PACKAGES}, options) for name in options.which]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
