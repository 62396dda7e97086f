"""What regrouping costs on paper, from a config alone: bytes of memory, and floating point operations.

A product with a matrix takes 2 operations for each of its numbers and tokens (Kaplan et al. 2020, section 2.1), twice
that backward. Not counted: torch itself, about half a gigabyte; the activations of a batch; scores of attention, which
grow with the row; decompositions.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .heal_recipe import HealRecipe


FLOAT32, FLOAT64 = 4, 8
# As measured (tests/test_costs.py): copies of the attention in float64 while a layer is merged, beside the one that is
# being written; of hidden states and copies of the attention in float32 while a layer is healed; logits of a batch
# while distributions are compared.
MERGED_COPIES, HEALED_STATES, HEALED_COPIES, LOGITS = 6, 9, 10, 8
UPTRAINED_ROWS, UPTRAINED_LOGITS = 8, 2  # of `UptrainRecipe`; the student's logits and their gradient


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of the model, of its decoder layers, of the largest one and of the attention in it."""

    hidden_size: int
    vocab_size: int
    model: int
    layers: int
    largest_layer: int
    attention: int
    all_attention: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Sizes":
        """Those of a causal language model, without its memory."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config(decoder=True)
        paths = [name for name, module in model.named_modules() if "Attention" in type(module).__name__]
        attention = [count_parameters(model.get_submodule(path)) for path in paths]
        layers = [count_parameters(model.get_submodule(path.rpartition(".")[0])) for path in paths]
        return cls(
            text.hidden_size,
            text.vocab_size,
            count_parameters(model),
            sum(layers),
            max(layers),
            max(attention),
            sum(attention),
        )


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Step:
    """The most bytes that a step of regrouping holds, and its floating point operations."""

    memory: int
    operations: int


def regrouping_steps(
    sizes: Sizes, tokens: int, recipe: HealRecipe | None = None, row_length: int = 512
) -> dict[str, Step]:
    """Merging without text, with it, healing each layer alone, all together, and uptraining, each on so many tokens.

    The counts of the merged model are taken to be those of the original, which is a little more than they are.
    """
    recipe = recipe or HealRecipe()
    state = sizes.hidden_size * FLOAT32  # of a token
    moment = 3 * sizes.hidden_size**2 * FLOAT64  # its root and the sum of products
    merging = MERGED_COPIES * sizes.attention * FLOAT64 + moment
    logits = row_length * sizes.vocab_size * FLOAT32  # of a row
    alone = min(tokens, recipe.layer_tokens)
    passed = sizes.layers + sizes.vocab_size * sizes.hidden_size  # numbers that a token meets on its way to its logits
    return {
        "merged by the norms": Step(merging, 0),
        "merged by text": Step(
            max(merging, sizes.largest_layer * FLOAT32 + moment + tokens * state), 2 * sizes.layers * tokens
        ),
        "healed, each layer alone": Step(
            (2 * sizes.largest_layer + HEALED_COPIES * sizes.attention) * FLOAT32 + HEALED_STATES * alone * state,
            (4 * sizes.layers + (4 + 6 * recipe.passes(alone)) * sizes.all_attention) * alone,
        ),
        # The student in float32 beside both models in 16 bits; of the attention gradients, AdamW's moments, a copy.
        "healed, all together": Step(
            2 * sizes.model * FLOAT32 + 4 * sizes.all_attention * FLOAT32 + LOGITS * recipe.batch_size * logits,
            (6 * passed + 2 * sizes.all_attention) * tokens * recipe.joint_epochs,
        ),
        "uptrained": Step(5 * sizes.model * FLOAT32 + UPTRAINED_LOGITS * UPTRAINED_ROWS * logits, 8 * passed * tokens),
    }
