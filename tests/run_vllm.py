"""Run by the interpreter that has vLLM: greedy tokens of prompts given as ids, as a line of JSON.

python run_vllm.py CHECKPOINT '{"prompts": [[1, 2, 3]], "count": 8, "tensor_parallel_size": 1}'
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(sys.argv[2])
    model = LLM(
        sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
        tensor_parallel_size=request["tensor_parallel_size"],
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["count"], ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], sampling)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
