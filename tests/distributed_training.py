"""A program for torchrun: trains a saved model with transformers' Trainer, on as many processes as it is started with.

`torchrun --nproc-per-node 2 -m tests.distributed_training JOB.json`: `{"model", "output", "rows", "arguments"}` with
TrainingArguments' arguments, and where wanted "distributed" (DistributedConfig's arguments) and "resume" (a checkpoint
or true). The first process writes what happened to OUTPUT/result.json.
"""

import json
import sys
from pathlib import Path

from accelerate import DistributedType
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from groupformer import GroupFormerForCausalLM

from .helpers import leave


def main(job: dict) -> None:
    arguments = TrainingArguments(
        job["output"], report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **job["arguments"]
    )
    if arguments.fsdp:
        # On a CPU accelerate takes DDP in FSDP's place, without a word. Its FSDP2 itself works over gloo.
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    split = {"distributed_config": DistributedConfig(**job["distributed"])} if "distributed" in job else {}
    model = GroupFormerForCausalLM.from_pretrained(job["model"], **split)
    rows = [{"input_ids": row, "labels": row} for row in job["rows"]]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    trainer.save_model(job["output"])
    if trainer.is_world_process_zero():
        parameter = next(trainer.model_wrapped.parameters())
        result = {
            "losses": {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row},
            "wrapped": type(trainer.model_wrapped).__name__,
            "parameter": type(parameter).__name__,
        }
        Path(job["output"], "result.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
