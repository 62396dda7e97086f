"""`transformers serve` with a GroupFormer, over HTTP; it needs the packages that `make test-serving` brings."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import groupformer  # noqa: F401  registers the architecture


CARD = Path(__file__).parent.parent / "hub_card"
TURNS = [{"role": "user", "content": "The cell membrane is"}]
NEW_TOKENS = 12
PLUGIN = "import groupformer; from transformers.cli.transformers import main; main()"

pytestmark = pytest.mark.slow


def ask(port: int, path: str, body: dict | None = None, timeout: float = 300) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def server():
    """The port of a server that has the plugin imported."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen([sys.executable, "-c", PLUGIN, *options], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(240):
            assert process.poll() is None, "the server ended before it answered"
            try:
                ask(port, "/health", timeout=5)
                break
            except OSError:  # not listening yet
                time.sleep(0.5)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)  # by itself: transformers' command then says "Aborted!" and ends with 1
        except subprocess.TimeoutExpired:
            process.kill()  # what hangs fails here, but does not outlive the test
            raise


@pytest.fixture(scope="module")
def expected():
    """What `generate` says."""
    tokenizer = AutoTokenizer.from_pretrained(CARD)
    model = AutoModelForCausalLM.from_pretrained(CARD, dtype="float32")
    inputs = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def body(stream: bool) -> dict:
    generation = json.dumps({"max_new_tokens": NEW_TOKENS, "do_sample": False})
    return {"model": str(CARD), "messages": TURNS, "stream": stream, "generation_config": generation}


def test_the_server_chats_as_generate_does(server, expected):
    answer = json.loads(ask(server, "/v1/chat/completions", body(stream=False)))
    assert answer["choices"][0]["message"]["content"].strip() == expected.strip()


def test_the_server_streams_the_same_text(server, expected):
    events = ask(server, "/v1/chat/completions", body(stream=True)).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
    parts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert len([part for part in parts if part]) > 1  # it came in pieces
    assert "".join(parts).strip() == expected.strip()


def test_transformers_chat_prints_the_same_text(server, expected):
    """The client is another process, which knows nothing of GroupFormer; it reads what would be typed."""
    program = [sys.executable, "-m", "transformers.cli.transformers", "chat"]
    generation = [f"max_new_tokens={NEW_TOKENS}", "do_sample=False"]
    # Offline, the Hub's client refuses any address, the loopback too; so it is told of a Hub that is not there.
    settings = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "200"}
    typed = f"{TURNS[0]['content']}\nn\n!exit\n"  # the answer stops at its limit: no, it need not go on
    done = subprocess.run(
        [*program, str(CARD), f"http://127.0.0.1:{server}/v1", *generation],
        input=typed,
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected.strip() in done.stdout
