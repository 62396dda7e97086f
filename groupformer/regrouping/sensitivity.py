"""What each layer loses with fewer key-value heads, measured: how wrong its attention's output becomes.

Energy (`Request.losses`) misleads: most of the keys' energy on a trained checkpoint is what the softmax does not see.
Here each layer reads the original's residual stream h, once with its own heads, whose attention adds a, and once with
each smaller count, whose output projection is solved for as healing does first (`heal.Problem`): what that wins back
need not be paid for in cache. The loss is the mean over tokens that the solution has not seen of |error|² / |h + a|²,
because the next norm divides by that: the measure that healing learns by.
"""

from collections.abc import Iterator

import torch

from ..model.configuration_groupformer import divisors
from .expansion import expanded
from .heal import Problem
from .heal_recipe import HealRecipe
from .layer_by_layer import Attended, Call, DecoderLayers, Layer, Streams
from .layers import LayerProblem
from .layouts import AttentionLayout
from .processes import ALONE, Processes
from .request import Request
from .sources import Source


TOKENS = 16384  # of the calibration text that each process reads at most
RECIPE = HealRecipe(held_out=0.25)


@torch.no_grad()
def measured_losses(
    source: Source,
    layouts: list[AttentionLayout],
    request: Request,
    problems: Iterator[LayerProblem],
    token_ids: torch.Tensor,
    *,
    device: str = "cpu",
    processes: Processes = ALONE,
) -> list[dict[int, float]]:
    """For each layer, the loss of each count that it can have; 0 for the present one.

    Args:
        problems: Each layer's heads and inputs, in the layers' order.
        token_ids: Text (batch, seq), of which the first rows are read; the last quarter of them measures. A single row
            is both solved for and measured.
        device: Where the layers are computed, in float32, one at a time.
    """
    rows = processes.rows(token_ids)
    batches = list(rows[: max(1, TOKENS // rows.shape[1])].split(1))
    layers = DecoderLayers(source, layouts, device)
    streams, all_losses = layers.embed(batches if len(batches) > 1 else 2 * batches), []
    for layer_idx, (layout, problem) in enumerate(zip(layouts, problems)):
        geometry, losses = layout.geometry, {layout.geometry.num_key_value_heads: 0.0}
        with layers.layer(layer_idx) as layer:
            calls = layer.calls(streams)
            following, attended = layer.run(streams)
            tensors = layer.state()
            for count in divisors(geometry.num_key_value_heads)[:-1]:
                merged = request.merge(problem, count, layer_idx)
                repeated = expanded(merged, geometry.num_heads, geometry.num_key_value_heads)
                layer.load(layout.write_heads(repeated, tensors))
                losses[count] = least_error(layer, calls, attended, streams, processes)
        all_losses.append(losses)
        streams = following
    return all_losses


def least_error(
    layer: Layer, calls: list[Call], attended: list[Attended], streams: Streams, processes: Processes
) -> float:
    """The mean over held-out tokens of |error|² / |stream + attended|², before or after the output is solved for."""
    goals, outputs = [each.added for each in attended], [each.raw for each in attended]
    weights = [
        1 / (stream + goal).square().mean(-1, keepdim=True).clamp(min=1e-12) for stream, goal in zip(streams, goals)
    ]
    attention = Problem(layer, calls, goals, weights, 1.0, RECIPE, processes)
    merged = attention.error()
    attention.solve(outputs if layer.has_norm_after else goals)
    return min(merged, attention.error())
