"""llama.cpp as a worker of peers.py: python worker_llama_cpp.py MODEL.gguf THREADS [QUANTIZATION]."""

import json
import sys
import time

import llama_cpp
import numpy


ROOM = 4352
TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def quantized(path: str, kind: str) -> str:
    """The same model with its matrices in llama.cpp's own quantization."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    target = f"{path}.{kind}"
    if llama_cpp.llama_model_quantize(path.encode(), target.encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize {path} to {kind}")
    return target


def main(path: str, threads: str, kind: str | None = None) -> None:
    path = quantized(path, kind) if kind else path
    model = llama_cpp.Llama(path, n_ctx=ROOM, n_batch=2048, n_ubatch=512, n_threads=int(threads), verbose=False)
    ids = numpy.random.default_rng(0).integers(1, model.n_vocab(), ROOM).tolist()

    def prefill(length: int, _: int) -> float:
        model.reset()
        started = time.perf_counter()
        model.eval(ids[:length])
        return time.perf_counter() - started

    def decode(length: int, tokens: int) -> float:
        prefill(length, 0)
        steps = []
        for token in ids[length : length + tokens]:
            started = time.perf_counter()
            model.eval([token])
            steps.append(time.perf_counter() - started)
        return sorted(steps)[len(steps) // 2]

    for line in sys.stdin:
        request = json.loads(line)
        seconds = {"prefill": prefill, "decode": decode}[request["task"]](request["length"], request["tokens"])
        print(json.dumps({"seconds": seconds}), flush=True)


main(*sys.argv[1:])
