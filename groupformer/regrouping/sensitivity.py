"""What each layer loses with fewer key-value heads, measured: how wrong its attention's output becomes.

Energy (`Request.losses`) misleads: most of the keys' energy on a trained checkpoint is what the softmax does not see.
Here each layer reads the original's residual stream h, once with its own heads, whose attention adds a, and once with
each smaller count. The loss is the mean over tokens of |error|² / |h + a|², because the next norm divides by that: the
measure that healing learns by.
"""

from collections.abc import Iterator

import torch

from ..model.configuration_groupformer import divisors
from .expansion import expanded
from .layer_by_layer import Attended, DecoderLayers, Streams
from .layers import LayerProblem
from .layouts import AttentionLayout
from .processes import ALONE, Processes
from .request import Request
from .sources import Source


TOKENS = 4096  # of the calibration text that each process reads at most


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
        token_ids: Text (batch, seq), of which the first rows are read.
        device: Where the layers are computed, in float32, one at a time.
    """
    rows = processes.rows(token_ids)
    rows = rows[: max(1, TOKENS // rows.shape[1])]
    layers = DecoderLayers(source, layouts, device)
    streams, all_losses = layers.embed(list(rows.split(1))), []
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
                found = [layer.attend(call) for call in calls]
                losses[count] = processes.mean(relative_error(found, attended, streams))
        all_losses.append(losses)
        streams = following
    return all_losses


def relative_error(found: list[Attended], attended: list[Attended], streams: Streams) -> float:
    """The mean over tokens of |found - attended|² / |stream + attended|²."""
    errors = [
        (one.added.to(h.device) - two.added).square().sum(-1) / (h + two.added).square().sum(-1).clamp(min=1e-12)
        for one, two, h in zip(found, attended, streams)
    ]
    return float(torch.cat([error.flatten() for error in errors]).mean())
