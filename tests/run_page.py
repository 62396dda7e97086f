"""Runs a page of the documentation as a reader would: python tests/run_page.py PAGE.

Its bash and Python blocks run in their order, in the folder where this starts: each bash block in a shell of its own,
the Python blocks in one session. The first failure ends it. `console` and `text` blocks are for reading.
"""

import os
import re
import subprocess
import sys
from pathlib import Path


BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def main(page: Path) -> None:
    # The commands of this environment, also when it was not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    session = {"__name__": "__main__"}
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        print(f"--- {language}\n{code}---", flush=True)
        if language == "bash":
            subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", code], check=True)
        else:
            exec(compile(code, str(page), "exec"), session)
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
