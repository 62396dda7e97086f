"""Transformers' own conversion of checkpoint tensors to a model's parameters, for a part of a model at a time.

Files hold experts one by one and older names; transformers turns them into today's parameters while it loads. This is
the only place that calls its loader below `from_pretrained`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging


def load_checkpoint_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives some of a model's parameters their values, in the dtype that the model has; the others stay as they are.

    Args:
        model: Any model, its parameters on the meta device or not.
        tensors: By their names in a checkpoint file.
    """
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        mapping: Any = get_model_conversion_mapping(model)
        options = LoadStateDictConfig(device_map={"": "cpu"}, weight_mapping=mapping, dtype=model.dtype)
        convert_and_load_state_dict_in_model(model=model, state_dict=dict(tensors), load_config=options)
    finally:
        if was_enabled:
            logging.enable_progress_bar()
