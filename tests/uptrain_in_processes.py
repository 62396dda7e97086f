"""A program for torchrun and `accelerate launch`: uptrains a saved model, on as many processes as it is started with.

`torchrun --nproc-per-node 2 -m tests.uptrain_in_processes JOB.json`: `{"recipe", "output"}`. The first process writes
what happened to OUTPUT/../result.json.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import DistributedType
from accelerate.utils import parse_flag_from_env
from transformers import TrainerCallback

from groupformer.training import uptraining

from .helpers import leave


class Kinds(TrainerCallback):
    """What each parameter is while training, and its size in this process."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        parameter = next(model.parameters())
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        self.seen = {"parameter": type(parameter).__name__, "share": local.numel() / parameter.numel()}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    kinds = Kinds()

    class Trainer(uptraining.DistillationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(kinds)

    def arguments_of(*args, build=uptraining.training_arguments, **kwargs):
        arguments = build(*args, **kwargs)
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            # On a CPU accelerate takes DDP in FSDP's place, without a word. Its FSDP2 itself works over gloo.
            arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
        return arguments

    uptraining.DistillationTrainer, uptraining.training_arguments = Trainer, arguments_of
    results = uptraining.uptrain(uptraining.UptrainRecipe(**job["recipe"]), job["output"])
    if os.environ.get("RANK", "0") == "0":
        path = Path(job["output"]).parent / "result.json"
        path.write_text(json.dumps({**results, **kinds.seen}), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()
