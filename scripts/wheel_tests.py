"""Builds the sdist and the wheel, checks them, and runs the fast tests on the wheel alone.

    python scripts/wheel_tests.py [oldest] [newest] [--dist FOLDER] [--folder build/wheel] [-- PYTEST ARGUMENTS]

Each run gets a fresh environment with the pinned torch, and the wheel with its extras; `oldest` takes the lower bound
of every package that pyproject.toml names for users, torch aside. The tests run in a folder without the package's
source, so that they can only import what is in the wheel. Needs the packages build, twine and packaging.
"""

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from version_tests import ROOT, oldest, requirements


EXTRAS = ("training", "serving")  # beside `dev`, which the tests need
WITHOUT_SOURCE = ("tests", "hub_card", "recipes", "benchmarks", "scripts", "docs", "pyproject.toml", "README.md")
# What reads the repository itself, and not the package.
OF_THE_REPOSITORY = (
    "test_docs.py",
    "test_readme.py",
    "test_benchmarks.py",
    "test_families_docs.py",
    "test_packaging.py",
)
WHERE = "import groupformer, pathlib; print(pathlib.Path(groupformer.__file__).parent)"


def build(dist: Path) -> Path:
    """The wheel; it and the sdist have passed twine's check."""
    shutil.rmtree(dist, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)], check=True)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())], check=True)
    return next(dist.glob("*.whl"))


def environment(folder: Path, wheel: Path, which: str) -> str:
    """The Python of a fresh environment with the wheel."""
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    needed = {name: line for name, line in requirements(EXTRAS).items() if name != "torch"}
    bounds = [f"{name}=={oldest(requirement)}" for name, requirement in needed.items()] if which == "oldest" else []
    package = f"{wheel}[{','.join((*EXTRAS, 'dev'))}]"
    for packages in ([torch], [torch, package, *bounds]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def run(which: str, wheel: Path, options: argparse.Namespace) -> int:
    """pytest's exit code."""
    python = environment(options.folder / which, wheel, which)
    work = options.folder / f"{which}-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in WITHOUT_SOURCE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, work / name)
    for name in OF_THE_REPOSITORY:
        (work / "tests" / name).unlink()
    where = subprocess.run([python, "-c", WHERE], cwd=work, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(where).is_relative_to(options.folder / which):
        raise SystemExit(f"the tests would import {where}, not the wheel; unset PYTHONPATH")
    return subprocess.run([python, "-m", "pytest", "-q", *options.arguments], cwd=work).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", default=["newest"], help="oldest, newest (default)")
    parser.add_argument("--dist", type=Path, default=ROOT / "build" / "dist", help="where the sdist and wheel go")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "wheel", help="of the environments")
    own = sys.argv[1:]
    own, rest = (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])
    options = parser.parse_args(own)
    options.folder, options.arguments = options.folder.resolve(), rest
    if unknown := set(options.which) - {"oldest", "newest"}:
        parser.error(f"{unknown.pop()} is neither oldest nor newest")
    wheel = build(options.dist)
    return max(run(which, wheel, options) for which in options.which)


if __name__ == "__main__":
    sys.exit(main())
