"""A program for torchrun: loads models split over the ranks, and writes their logits or the error.

`torchrun --nproc-per-node 2 -m tests.parallel_logits JOBS.json`: a list of `{"path", "parallel", "token_ids"}`.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from groupformer import GroupFormerForCausalLM

from .helpers import leave


@torch.no_grad()
def logits(job) -> list:
    config = DistributedConfig(**job["parallel"])
    model = GroupFormerForCausalLM.from_pretrained(job["path"], distributed_config=config)
    result = model(torch.tensor(job["token_ids"])).logits
    return (result.full_tensor() if isinstance(result, DTensor) else result).tolist()


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    dist.init_process_group("gloo")
    for job in jobs:
        try:
            job["logits"] = logits(job)
        except ValueError as error:  # ours, raised by every rank before any communication
            job["error"] = str(error)
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(jobs, file)
    leave()
