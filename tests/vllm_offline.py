"""A program of its own, because vLLM owns its process: runs saved models in vLLM, and writes what they gave.

`python vllm_offline.py JOBS.json`, a list of `{"path", "prompts", "task", "options"}`.
Each gets its "result" or "error".
"""

import json
import sys
import traceback

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


NEW_TOKENS = 12


def generate(llm, prompts):
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling)]


def classify(llm, prompts):
    return [output.outputs.probs for output in llm.classify(prompts)]


def token_classify(llm, prompts):
    return [output.outputs.data.tolist() for output in llm.encode(prompts, pooling_task="token_classify")]


TASKS = {"generate": generate, "classify": classify, "token_classify": token_classify}


def run(job):
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    options = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8, **job["options"]}
    llm = LLM(job["path"], skip_tokenizer_init=True, dtype="float32", **options)
    return TASKS[job["task"]](llm, prompts)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        try:
            job["result"] = run(job)
        except Exception:  # whatever it is, the test that reads the file shows it
            job["error"] = traceback.format_exc()
        cleanup_dist_env_and_memory()
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(jobs, file)
