"""Run by the interpreter that has vLLM: how it allots its cache to saved models, as a line of JSON each.

`python vllm_cache.py JOBS.json`, a list of `{"path", "options"}`; the results go into the same file.
"""

import json
import sys

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config


def measure(job):
    llm = LLM(job["path"], skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, **job["options"])
    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    config = llm.llm_engine.vllm_config
    return {
        "block_size": cache.kv_cache_groups[0].kv_cache_spec.block_size,
        "prefill_chunk": config.scheduler_config.max_num_batched_tokens,
        "sequences": get_max_concurrency_for_kv_cache_config(config, cache),
    }


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        job.update(measure(job))
        cleanup_dist_env_and_memory()
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(jobs, file)
