"""litgpt as a worker of peers.py: python worker_litgpt.py CONFIG.json THREADS (the fields of a LlamaConfig)."""

import json
import sys
import time

import torch
from litgpt.config import Config
from litgpt.model import GPT


ROOM = 4352


def build(fields: dict) -> GPT:
    """litgpt's Llama of the same sizes; the weights' values do not matter to its speed."""
    config = Config(
        block_size=ROOM,
        vocab_size=fields["vocab_size"],
        padded_vocab_size=fields["vocab_size"],
        n_layer=fields["num_hidden_layers"],
        n_head=fields["num_attention_heads"],
        n_query_groups=fields["num_key_value_heads"],
        n_embd=fields["hidden_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=fields["intermediate_size"],
    )
    return GPT(config).eval()


@torch.no_grad()
def main(path: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    with open(path) as file:
        model = build(json.load(file))
    model.set_kv_cache(batch_size=1, max_seq_length=ROOM)
    ids = torch.randint(1, model.config.vocab_size, (1, ROOM))

    def prefill(length: int, _: int) -> float:
        started = time.perf_counter()
        model(ids[:, :length], torch.arange(length), input_pos_maxp1=length)
        return time.perf_counter() - started

    def decode(length: int, tokens: int) -> float:
        prefill(length, 0)
        steps = []
        for place in range(length, length + tokens):
            started = time.perf_counter()
            model(ids[:, place : place + 1], torch.tensor([place]), input_pos_maxp1=place + 1)
            steps.append(time.perf_counter() - started)
        return sorted(steps)[len(steps) // 2]

    for line in sys.stdin:
        request = json.loads(line)
        seconds = {"prefill": prefill, "decode": decode}[request["task"]](request["length"], request["tokens"])
        print(json.dumps({"seconds": seconds}), flush=True)


main(*sys.argv[1:])
