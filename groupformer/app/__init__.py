"""A page to try a GroupFormer on: generate, regroup it live, see where its heads look, and plan its cache.

    groupformer app                    # the checkpoint that ships
    groupformer app path/or/hub-id

Needs the extra `app` (Gradio and matplotlib). Everything runs on this machine; nothing is sent elsewhere.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..commands.shared import checkpoint
from ..measuring import planning
from .session import Session
from .views import attention_html, labels


SENTENCE = "I am sitting near a river bank"
PROMPT = "The cell membrane is"
COMPARISON = ["model", "KV heads", "cache bytes per token", "tokens per second", "bits per byte"]
PLAN = [
    "KV heads",
    "bytes per token",
    "weights, GB",
    "cache, GB",
    "share of now",
    "sequences that fit",
    "tokens/s at most",
]
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing is fetched


def told(work: Callable[..., Any]) -> Callable[..., Any]:
    """Turns errors that a user can mend into messages on the page."""

    @functools.wraps(work)
    def wrapped(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title="That did not work", print_exception=False) from error

    return wrapped


def told_stream(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
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
        with gr.Tab("Generate", id="generate"):
            generate_tab(session)
        with gr.Tab("Regroup", id="regroup"):
            regroup_tab(session)
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
    **options: Any,
) -> None:
    """Builds the page and serves it until it is stopped."""
    theme = gr.themes.Default(**FONTS)
    build(Session.load(source, device)).queue().launch(
        server_name=host, server_port=port, theme=theme, footer_links=[], **options
    )


def describe(session: Session) -> str:
    config = session.model.config
    counts = sorted({layer.num_key_value_heads for layer in config.per_layer_config})
    heads = f"{config.num_attention_heads} query heads on {' or '.join(map(str, counts))} key-value heads"
    size = f"{session.model.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} layers"
    return f"`{session.name}`: {size}, {heads}."


# Tabs ----------------------------------------------------------------------------------------------------------------


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
    running = start.click(told_stream(session.stream), inputs, output)
    typed = prompt.submit(told_stream(session.stream), inputs, output)
    stop.click(None, cancels=[running, typed])


def regroup_tab(session: Session) -> None:
    counts = session.legal_counts()
    gr.Markdown(
        "Merges key-value heads in closed form (svd, similar heads together), without training. Bits per byte are "
        "measured on text that the merge has not seen; less is better. Speed is measured now, on this machine."
    )
    if len(counts) == 1:
        gr.Markdown("This model has one key-value head already: there is nothing left to share.")
        return
    slider = gr.Slider(
        1, counts[-1], value=counts[-2], step=1, label=f"KV heads (legal: {', '.join(map(str, counts))})", elem_id="kv"
    )
    prompt = gr.Textbox(PROMPT, label="Text to go on from, with both", elem_id="regroup-prompt")
    start = gr.Button("Regroup", variant="primary", elem_id="regroup-button")
    note = gr.Markdown(elem_id="regroup-note")
    table = gr.Dataframe(headers=COMPARISON, interactive=False, elem_id="comparison", column_widths=widths(COMPARISON))
    with gr.Row():
        before = gr.Textbox(label="Original", lines=4, interactive=False, elem_id="before")
        after = gr.Textbox(label="Regrouped", lines=4, interactive=False, elem_id="after")

    def work(wanted: float, text: str) -> tuple[Any, ...]:
        session.read(text, 24)
        count, small = session.with_kv_heads(int(wanted))
        snapped = f"{int(wanted)} is not legal here: {count} taken. " if count != int(wanted) else ""
        dtype = str(session.model.dtype).removeprefix("torch.")
        share = (
            f"{snapped}The cache shrinks to {count} of {counts[-1]} heads: {count / counts[-1]:.0%}. "
            f"Its bytes are counted in {dtype}, in which the model runs here."
        )
        texts = [list(session.stream(text, 24, 0.0, model))[-1] for model in (session.model, small)]
        return share, session.compare(count), *texts

    start.click(told(work), [slider, prompt], [note, table, before, after])


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
    shown = session.attend(SENTENCE)
    last = len(shown.tokens) - 1
    token = gr.Radio(labels(shown.tokens), value=last, label="Token that looks", elem_id="token")
    picture = gr.HTML(attention_html(shown, last), elem_id="attention")

    def look(text: str, count: int) -> tuple[Any, str]:
        found = session.attend(text, count or None)
        end = len(found.tokens) - 1
        return gr.Radio(labels(found.tokens), value=end), attention_html(found, end)

    def choose(text: str, count: int, index: int) -> str:
        found = session.attend(text, count or None)
        return attention_html(found, min(index, len(found.tokens) - 1))

    start.click(told(look), [sentence, kv_heads], [token, picture])
    sentence.submit(told(look), [sentence, kv_heads], [token, picture])
    for choice in (token, kv_heads):
        choice.change(told(choose), [sentence, kv_heads, token], picture)


def memory_tab(session: Session) -> None:
    gr.Markdown("What the KV cache of any decoder costs, and would cost with other numbers of key-value heads.")
    source = gr.Textbox(
        "", label="config.json, as text; or a folder or Hub id; empty: the model above", lines=3, elem_id="config"
    )
    with gr.Row():
        context = gr.Number(4096, label="Tokens of each sequence", precision=0, minimum=1, elem_id="context")
        batch = gr.Number(1, label="Sequences together", precision=0, minimum=1)
        memory = gr.Number(24, label="GPU memory, GB", minimum=0.001)
        bandwidth = gr.Number(1000, label="Its bandwidth, GB/s", minimum=0.001)
    start = gr.Button("Plan", variant="primary", elem_id="plan-button")
    table = gr.Dataframe(headers=PLAN, interactive=False, elem_id="plan", column_widths=widths(PLAN))
    plot = gr.Plot(show_label=False, elem_id="plan-plot")

    def work(text: str, context: float, batch: float, memory: float, bandwidth: float) -> tuple[list, Any]:
        config = session.model.config if not text.strip() else read_config(text.strip())
        hardware = planning.Hardware(memory=memory * 1e9, bandwidth=bandwidth * 1e9)
        plans = planning.plan(config, int(context), int(batch), hardware)
        rows = [
            [
                f"{each.kv_heads}{' (now)' if each.is_present else ''}",
                f"{each.bytes_per_token:,.0f}",
                f"{each.weights / 1e9:,.2f}",
                f"{each.cache / 1e9:,.3f}",
                f"{each.share:.0%}",
                f"{each.sequences:,}",
                "" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            ]
            for each in plans
        ]
        return rows, planning.figure_of(plans, f"{int(batch)} x {int(context):,} tokens in {memory:g} GB, bfloat16")

    start.click(told(work), [source, context, batch, memory, bandwidth], [table, plot])


def widths(headers: list[str]) -> list[str]:
    """Columns as wide as their names: a phone scrolls the table instead of breaking words."""
    return [f"{max(110, 40 + 9 * len(header))}px" for header in headers]


def read_config(text: str) -> Any:
    """A config from the text of a config.json, or of a folder or Hub id.

    Raises:
        ValueError: neither.
    """
    if not text.startswith("{"):
        checkpoint(text)
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
