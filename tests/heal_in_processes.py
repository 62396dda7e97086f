"""A program for torchrun: heals a saved model, on as many processes as it is started with.

`torchrun --nproc-per-node 2 -m tests.heal_in_processes JOB.json`: `{"student", "original", "target", "rows",
"recipe"}` with rows of token ids.
"""

import json
import sys
from pathlib import Path

import torch

from groupformer.regrouping.heal_folders import heal_folder
from groupformer.regrouping.heal_recipe import HealRecipe
from groupformer.regrouping.processes import Processes


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folders = (job["student"], job["original"], job["target"])
    rows, recipe = torch.tensor(job["rows"]), HealRecipe(**job["recipe"])
    heal_folder(*folders, rows, recipe, processes=Processes.from_environment())


if __name__ == "__main__":
    main()
