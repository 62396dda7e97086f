"""What the app draws itself: the attention of every head, boxed by the KV head that it shares."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from .session import Attention


STYLE = """
<style>
.gf-layer { margin: 0 0 1rem 0; }
.gf-layer > h4 { margin: 0.2rem 0; }
.gf-groups { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.gf-group { border: 2px solid; border-radius: 0.5rem; padding: 0.3rem 0.5rem; max-width: 100%; }
.gf-group { box-sizing: border-box; }
.gf-group > p { margin: 0 0 0.2rem 0; font-size: 0.75rem; opacity: 0.75; }
.gf-head { display: flex; flex-wrap: wrap; align-items: baseline; font-size: 0.8rem; line-height: 1.5; }
.gf-head > b { font-weight: normal; opacity: 0.75; min-width: 3.6rem; }
.gf-head > span { padding: 0 0.12rem; white-space: pre; border-radius: 0.2rem; }
.gf-head > span.gf-query { outline: 1px dashed; }
</style>
"""
# Gradio has a style of its own for tables in text, which these rules must outweigh.
TABLE_STYLE = """
<style>
.gf-table.gf-table { width: 100%; border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
.gf-table, .gf-table tr { border: 0 !important; }
.gf-table.gf-table :is(th, td) { padding: 0.3rem 0.4rem; border: 0; text-align: right; }
.gf-table.gf-table :is(th, td) { border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
.gf-table.gf-table th { font-weight: 600; vertical-align: bottom; }
.gf-table.gf-table th:first-child { text-align: left; }
@media (max-width: 640px) { .gf-table.gf-table { font-size: 0.75rem; } }
@media (max-width: 640px) { .gf-table.gf-table :is(th, td) { padding: 0.25rem 0.15rem; } }
</style>
"""


def hue(kv_head: int, kv_heads: int) -> int:
    """The colour of a KV head, as far as possible from those of the others."""
    return round(360 * kv_head / kv_heads)


def visible_span(token: str) -> str:
    """A token as it can be seen: no invisible ones."""
    return html.escape(token.replace("\n", "⏎").replace("\t", "⇥")) or "∅"


def labels(tokens: list[str]) -> list[tuple[str, int]]:
    """Names and values of a choice among tokens; equal tokens stay apart by their places."""
    return [(f"{index + 1} · {token.strip() or repr(token)}", index) for index, token in enumerate(tokens)]


def attention_html(attention: Attention, query: int) -> str:
    """Where one token looks, for every layer and head; the darker, the more."""
    parts = [STYLE]
    for layer_idx, (probabilities, kv_heads) in enumerate(zip(attention.layers, attention.kv_heads)):
        share = probabilities.shape[0] // kv_heads
        groups = [
            group_html(attention.tokens, probabilities, query, kv_head, kv_heads, share) for kv_head in range(kv_heads)
        ]
        parts.append(
            f'<section class="gf-layer"><h4>layer {layer_idx}</h4>'
            f'<div class="gf-groups">{"".join(groups)}</div></section>'
        )
    return "".join(parts)


def group_html(tokens: list[str], probabilities: Any, query: int, kv_head: int, kv_heads: int, share: int) -> str:
    """The box of one KV head, with the query heads that read it; all count from 0, as in a config.

    The colour stays pale enough for text on it to be read, dark or light.
    """
    color = hue(kv_head, kv_heads)
    rows = []
    for head in range(kv_head * share, (kv_head + 1) * share):
        cells = [
            f'<span class="{"gf-query" if index == query else ""}" title="{weight:.0%}" '
            f'style="background: hsla({color}, 85%, 50%, {0.6 * weight:.3f})">{visible_span(token)}</span>'
            for index, (token, weight) in enumerate(zip(tokens, probabilities[head, query].tolist()))
        ]
        rows.append(f'<div class="gf-head"><b>head {head}</b>{"".join(cells)}</div>')
    title = f"KV head {kv_head}, read by {share} query head{'s' if share > 1 else ''}"
    return f'<div class="gf-group" style="border-color: hsl({color}, 85%, 45%)"><p>{title}</p>{"".join(rows)}</div>'


def table_html(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column names the rows; it is as wide as the page, also on a phone."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    lines = []
    for name, *cells in rows:
        values = "".join(f"<td>{html.escape(in_words(cell))}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{html.escape(str(name))}</th>{values}</tr>')
    return (
        f'{TABLE_STYLE}<table class="gf-table"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )


def in_words(cell: Any) -> str:
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
