"""A page to try a decoder on: regroup it, generate, see where its heads look, and plan its cache.

    groupformer app                    # the checkpoint that ships
    groupformer app path/or/hub-id

Needs the extra `app` (Gradio and matplotlib). Everything runs on this machine; nothing is sent elsewhere.
"""

from __future__ import annotations

import functools
import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..measuring import planning
from .session import Session
from .views import attention_html, labels, table_html


SENTENCE = "I am sitting near a river bank"
PROMPT = "The cell membrane is"
NEW_TOKENS = 24  # of each model in the comparison
PLAN = ["KV heads", "bytes a token", "weights, GB", "cache, GB", "how many fit", "tokens/s at most"]


def as_gradio_error(work: Callable[..., Any]) -> Callable[..., Any]:
    """Turns errors that a user can mend into messages on the page."""

    @functools.wraps(work)
    def wrapped(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title="That did not work", print_exception=False) from error

    return wrapped


def as_gradio_error_stream(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same for what comes piece by piece."""

    @functools.wraps(work)
    def wrapped(*arguments: Any) -> Iterator[Any]:
        try:
            yield from work(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title="That did not work", print_exception=False) from error

    return wrapped


def build(source: str | Path | Session | None = None) -> gr.Blocks:
    """The page for a checkpoint: a folder, a Hub id, a session that is loaded, or `None` for the one that ships."""
    session = source if isinstance(source, Session) else Session.load(source)
    with gr.Blocks(title="GroupFormer", analytics_enabled=False) as page:
        gr.Markdown(f"# GroupFormer\n{describe(session)}")
        with gr.Tabs(overflow_behavior="wrap"):  # a phone shows all of them, in two lines
            with gr.Tab("Regroup", id="regroup"):
                regroup_tab(session)
            with gr.Tab("Generate", id="generate"):
                generate_tab(session)
            with gr.Tab("Attention", id="attention"):
                attention_tab(session)
            with gr.Tab("Memory", id="memory"):
                memory_tab(session)
    return page


def launch(
    source: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str | None = None,
    on_start: Callable[[str], None] = lambda address: None,
    **options: Any,
) -> None:
    """Builds the page and serves it until it is stopped.

    Args:
        source: Folder or Hub id. Default: the checkpoint that ships.
        host: Address to listen on.
        port: Default: the first free one from 7860.
        device: Default: the best there is.
        on_start: Called with the page's address once it answers.
        options: Of Gradio's `launch`.

    Raises:
        ValueError: another program listens on the port; or what `Session.load` raises.
    """
    if port is not None:
        check_port(host, port)
    page = build(Session.load(source, device))
    _, address, _ = page.queue().launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        **options,
    )
    on_start(address)
    page.block_thread()


def theme() -> gr.themes.Default:
    """Fonts of the reader's own system, so that nothing is fetched, and colours that white text can be read on."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    buttons = {"fill": "*primary_600", "fill_hover": "*primary_700"}
    return gr.themes.Default(primary_hue="indigo", **fonts).set(
        **{
            f"button_primary_background_{name}{mode}": color
            for name, color in buttons.items()
            for mode in ("", "_dark")
        }
    )


def check_port(host: str, port: int) -> None:
    """Refuses a port that another program listens on, before a model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise ValueError(f"port ({port}) on {host}: {error.strerror}; choose another --port, or none") from error


def describe(session: Session) -> str:
    config = session.model.config
    counts = " or ".join(map(str, sorted(set(session.kv_heads()))))
    heads = f"{config.num_attention_heads} query heads on {counts} key-value heads"
    size = f"{session.model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} layers"
    return f"`{session.name}`: {size}, {heads}."


# Tabs ----------------------------------------------------------------------------------------------------------------


def regroup_tab(session: Session) -> None:
    gr.Markdown(
        "Fewer key-value heads for any decoder of transformers, in its own class where that class can express it: "
        "merged in closed form (svd, similar heads together, calibrated on a short text), without training. Bits per "
        "byte are measured on text that the merge has not seen; less is better. Speed is measured now, on this "
        "machine. For checkpoints larger than the memory, `groupformer regroup` streams from folder to folder."
    )
    counts = session.legal_counts()
    source = gr.Textbox("", label="Folder or Hub id; empty: the model above", elem_id="regroup-source")
    with gr.Row():
        kv_heads = gr.Number(
            counts[max(0, len(counts) - 2)], label="KV heads", precision=0, minimum=1, elem_id="kv", min_width=120
        )
        target = gr.Textbox("", label="Save to a new folder; empty: only compare", elem_id="regroup-target")
    prompt = gr.Textbox(PROMPT, label="Text to go on from, with both", elem_id="regroup-prompt")
    start = gr.Button("Regroup", variant="primary", elem_id="regroup-button")
    note = gr.Markdown(elem_id="regroup-note")
    table = gr.HTML(elem_id="comparison")
    with gr.Row():
        before = gr.Textbox(label="Original", lines=4, interactive=False, elem_id="before")
        after = gr.Textbox(label="Regrouped", lines=4, interactive=False, elem_id="after")
    others: dict[str, Session] = {}  # the last checkpoint that was loaded here

    def session_of(text: str) -> Session:
        if not text:
            return session
        if text not in others:
            others.clear()
            others[text] = Session.load(text, str(session.model.device))
        return others[text]

    def work(text: str, wanted: float, folder: str, prompt: str) -> tuple[Any, ...]:
        chosen = session_of(text.strip())
        chosen.read(prompt, NEW_TOKENS)
        legal = chosen.legal_counts()
        if len(legal) == 1:
            raise ValueError("This model has one key-value head already: there is nothing left to share.")
        count, small = chosen.with_kv_heads(int(wanted or 1))
        lines = (
            [] if count == wanted else [f"{wanted} is not legal here ({', '.join(map(str, legal))}): {count} taken."]
        )
        lines.append(f"The cache shrinks to {count} of {legal[-1]} heads: {count / legal[-1]:.0%}.")
        lines.append(f"The result is a {type(small).__name__}.")
        if folder.strip():
            chosen.save(count, folder.strip())
            lines.append(f"Saved to `{folder.strip()}`.")
        texts = [list(chosen.stream(prompt, NEW_TOKENS, 0.0, model))[-1] for model in (chosen.model, small)]
        return " ".join(lines), table_html(["", "original", "regrouped"], chosen.compare(count)), *texts

    start.click(as_gradio_error(work), [source, kv_heads, target, prompt], [note, table, before, after])


def generate_tab(session: Session) -> None:
    prompt = gr.Textbox(PROMPT, label="Text to go on from", lines=2, elem_id="prompt")
    with gr.Row():
        length = gr.Slider(1, 200, value=60, step=1, label="New tokens, at most")
        temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0: the likeliest token each time)")
    with gr.Row():
        start = gr.Button("Generate", variant="primary", elem_id="generate-button")
        stop = gr.Button("Stop", elem_id="stop-button")
    output = gr.Textbox(label="Text", lines=6, interactive=False, elem_id="generated")
    inputs = [prompt, length, temperature]
    running = start.click(as_gradio_error_stream(session.stream), inputs, output)
    typed = prompt.submit(as_gradio_error_stream(session.stream), inputs, output)
    stop.click(None, cancels=[running, typed])


def attention_tab(session: Session) -> None:
    gr.Markdown(
        "Where a token looks, in every layer and head: the stronger the colour, the more. Heads in one box read the "
        "same key-value head."
    )
    sentence = gr.Textbox(SENTENCE, label="Sentence", elem_id="sentence")
    fewer = [(str(count), count) for count in reversed(session.legal_counts()[:-1])]
    # 0 stands for the model as it is: a radio takes None for no choice.
    kv_heads = gr.Radio([("as it is", 0), *fewer], value=0, label="KV heads", elem_id="attention-kv")
    start = gr.Button("Look", variant="primary", elem_id="look-button")
    first = session.attend(SENTENCE)
    last = len(first.tokens) - 1
    token = gr.Radio(labels(first.tokens), value=last, label="Token that looks", elem_id="token")
    picture = gr.HTML(attention_html(first, last), elem_id="attention")

    def look(text: str, count: int) -> tuple[Any, str]:
        found = session.attend(text, count or None)
        end = len(found.tokens) - 1
        return gr.Radio(labels(found.tokens), value=end), attention_html(found, end)

    def choose(text: str, count: int, index: int) -> str:
        found = session.attend(text, count or None)
        return attention_html(found, min(index, len(found.tokens) - 1))

    start.click(as_gradio_error(look), [sentence, kv_heads], [token, picture])
    sentence.submit(as_gradio_error(look), [sentence, kv_heads], [token, picture])
    for choice in (token, kv_heads):
        choice.change(as_gradio_error(choose), [sentence, kv_heads, token], picture)


def memory_tab(session: Session) -> None:
    gr.Markdown("What the KV cache of any decoder costs, and would cost with other numbers of key-value heads.")
    source = gr.Textbox(
        "", label="config.json, as text; or a folder or Hub id; empty: the model above", lines=3, elem_id="config"
    )
    longest = min(4096, session.position_limit or 4096)
    with gr.Row():
        context = gr.Number(longest, label="Tokens of each sequence", precision=0, minimum=1, elem_id="context")
        batch = gr.Number(1, label="Sequences together", precision=0, minimum=1)
        memory = gr.Number(24, label="GPU memory, GB", minimum=0.001)
        bandwidth = gr.Number(1000, label="Its bandwidth, GB/s", minimum=0.001)
    start = gr.Button("Plan", variant="primary", elem_id="plan-button")
    table = gr.HTML(elem_id="plan")
    plot = gr.Plot(show_label=False, elem_id="plan-plot")

    def work(text: str, context: float, batch: float, memory: float, bandwidth: float) -> tuple[str, Any]:
        config = session.model.config if not text.strip() else read_config(text.strip())
        check_context(config, int(context))
        hardware = planning.Hardware(memory=memory * 1e9, bandwidth=bandwidth * 1e9)
        plans = planning.plan(config, int(context), int(batch), hardware)
        rows = [
            [
                f"{each.kv_heads}{' (now)' if each.is_present else ''}",
                f"{each.bytes_per_token:,.0f}",
                f"{each.weights / 1e9:,.2f}",
                f"{each.cache / 1e9:,.3f}",
                f"{each.sequences:,}",
                "" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            ]
            for each in plans
        ]
        title = f"{int(batch)} x {int(context):,} tokens in {memory:g} GB, bfloat16"
        return table_html(PLAN, rows), planning.figure_of(plans, title)

    start.click(as_gradio_error(work), [source, context, batch, memory, bandwidth], [table, plot])


def check_context(config: Any, context: int) -> None:
    """Refuses more tokens than the model has positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise ValueError(
            f"{context:,} tokens exceed the {limit:,} positions of this model; choose {limit:,} or fewer."
        )


def read_config(text: str) -> Any:
    """A config from the text of a config.json, or of a folder or Hub id.

    Raises:
        ValueError: neither.
    """
    if not text.startswith("{"):
        return planning.load_config(text)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The config is not JSON: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(text, encoding="utf-8")
        try:
            return planning.load_config(None, path)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The config is not one that transformers knows: {error}") from error
