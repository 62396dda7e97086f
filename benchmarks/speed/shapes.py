"""The models that are timed, as data, and what they must compute and read: the arithmetic of the ceilings."""

from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import groupformer


SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9},
    "125m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fast_dtypes(device: str) -> dict[str, torch.dtype]:
    """The dtypes worth timing: a CPU without instructions for bfloat16 multiplies hundreds of times as slowly."""
    has_bfloat16 = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {name: dtype for name, dtype in DTYPES.items() if has_bfloat16 or dtype is torch.float32}


@dataclass(frozen=True)
class Shape:
    """One model: a row of SHAPES, its key-value heads, its vocabulary and its dtype."""

    name: str
    kv_heads: int
    vocab_size: int
    dtype: str = "float32"
    config: LlamaConfig = field(init=False, compare=False)

    def __post_init__(self):
        config = LlamaConfig(
            **SHAPES[self.name],
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=16384,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        object.__setattr__(self, "config", config)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def parameters(self) -> int:
        """Numbers in the matrices that every token passes: the layers and the (tied) head; norms are neglected."""
        config = self.config
        attention = config.hidden_size * config.head_dim * (2 * config.num_attention_heads + 2 * self.kv_heads)
        mlp = 3 * config.hidden_size * config.intermediate_size
        return config.num_hidden_layers * (attention + mlp) + self.vocab_size * config.hidden_size

    def decode_bytes(self, context: int, batch: int = 1) -> int:
        """Bytes that one decoding step must read: every weight once, and the keys and values of the context."""
        cache = 2 * self.config.num_hidden_layers * self.kv_heads * self.config.head_dim * context * batch
        return (self.parameters + cache) * self.itemsize

    def prefill_flops(self, length: int) -> float:
        """Floating-point operations of a prompt: two a weight and token (the head: last token only), and attention."""
        config = self.config
        body = self.parameters - self.vocab_size * config.hidden_size
        causal = length * (length + 1) / 2
        scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * causal
        return 2 * body * length + 2 * self.vocab_size * config.hidden_size + scores

    def training_flops(self, batch: int, length: int) -> float:
        """Three times the forward pass, with the head for every token: what model FLOPs utilisation counts."""
        head = 2 * self.vocab_size * self.config.hidden_size * (length - 1)
        return 3 * batch * (self.prefill_flops(length) + head)


def llama(shape: Shape, device: str) -> LlamaForCausalLM:
    """Transformers' own Llama with random weights that no run changes."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config).eval().to(DTYPES[shape.dtype])
    model.generation_config.pad_token_id = 0
    return model


def ours(native: LlamaForCausalLM) -> groupformer.GroupFormerForCausalLM:
    """The same weights as a GroupFormer."""
    model = groupformer.import_model(native).eval().to(native.device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
