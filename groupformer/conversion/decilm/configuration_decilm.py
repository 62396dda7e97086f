# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a Llama whose layers differ in their key-value heads and MLPs, as engines read DeciLMForCausalLM.

This file travels with the checkpoint, so it imports nothing but transformers. There is no modeling file: vLLM, SGLang
and llama.cpp have their own.
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict):
    """A dictionary whose entries are attributes, too: engines read these, and JSON holds a dictionary."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no {name} among {', '.join(self)}")


class DeciLMConfig(LlamaConfig):
    """Llama's fields, and `block_configs`: for each layer

    - `attention`: `n_heads_in_group`, how many query heads share a key-value head, and `no_op`;
    - `ffn`: `ffn_mult`, of which the MLP's width is `2 / 3 * ffn_mult * hidden_size`, and `no_op`.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            Block({name: Block(part) for name, part in block.items()}) for block in block_configs or []
        ]
