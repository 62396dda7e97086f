"""The last step in memory: a new model of the same class, with other attention."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .result import Result
from .sources import is_tied


def build_regrouped(
    model: PreTrainedModel, result: Result, attention: Mapping[str, Mapping[str, torch.Tensor]]
) -> Any:
    """A model like the old one with another config and other attention, sharing no storage with it.

    Args:
        result: The new config and attention.
        attention: Path of each changed attention module to all its tensors.

    Raises:
        RuntimeError: the weights are not all and only those of the new model (an error of ours).
    """
    stems = tuple(f"{path}." for path in attention)
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(stems)}
    state_dict |= {f"{path}.{name}": tensor for path, new in attention.items() for name, tensor in new.items()}
    with no_init_weights():
        new = type(model)(copy.deepcopy(result.config))
    own = {
        name: tensor.detach().to(model.device).clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
        if not is_tied(new, name)
    }
    report = new.load_state_dict(own, strict=False, assign=True)
    # What was not loaded would be memory that nobody initialised.
    wrong = [*report.unexpected_keys, *(name for name in report.missing_keys if not is_tied(new, name))]
    if wrong:
        raise RuntimeError(f"regrouping left {', '.join(wrong[:3])} over or out; please report this")
    new.tie_weights()
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    for parameter in new.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    new.to(model.device)  # type: ignore[arg-type]
    return new.train(model.training)
