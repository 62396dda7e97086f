"""Checks every attention backend of this machine against the float64 reference, in one call.

    python scripts/check_flash_attention.py --device cuda      # real flash attention, sdpa, flex, in bf16 and fp16
    python scripts/check_flash_attention.py --device cpu       # what runs without a GPU

Prints a table of relative errors and exits with 1 if one is above its tolerance. Backends that are not installed are
listed as such; on a GPU, a missing flash attention is a failure.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from groupformer import GroupFormerModel
from tests.helpers import random_ids, randomize, tiny_config
from tests.reference import reference_hidden_states


CASES = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "learned": {"position_embedding_type": "learned"},
    "sliding window": {"num_key_value_heads": 2, "sliding_window": 5},
    "bidirectional": {"num_key_value_heads": 2, "is_causal": False},
    "bidirectional window": {"num_key_value_heads": 2, "is_causal": False, "sliding_window": 5},
    "heads by layer": {"per_layer_config": {1: {"num_key_value_heads": 1}}},
}
PADDINGS = {"whole": [16, 16], "right": [16, 9], "left": [16, -9]}
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def mask_of(lengths: list[int]) -> torch.Tensor:
    """A mask (2, 16): so many real tokens at the start of a row, or, when negative, at its end."""
    mask = torch.zeros(2, 16, dtype=torch.long)
    for row, length in zip(mask, lengths):
        row[:length] = 1 if length > 0 else 0
        if length < 0:
            row[length:] = 1
    return mask


@torch.no_grad()
def errors(case: dict, backend: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The relative error of one case, for each padding."""
    config = tiny_config(
        hidden_size=512, head_dim=64, num_attention_heads=8, intermediate_size=256, attn_implementation=backend, **case
    )
    model = randomize(GroupFormerModel(config), std=0.03).to(dtype)
    state = model.state_dict()
    model = model.to(device)
    found = {}
    for name, lengths in PADDINGS.items():
        input_ids, mask = random_ids(2, 16), mask_of(lengths)
        expected = reference_hidden_states(state, config, input_ids, mask)
        actual = model(input_ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        real = mask.bool()
        error = (actual.double().cpu() - expected)[real].abs().max() / expected[real].abs().max()
        found[name] = error.item()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
    failed = 0
    for backend in BACKENDS[:2] if device == "cpu" else BACKENDS:
        for dtype in dtypes:
            if backend.startswith("flash") and dtype == torch.float32:
                continue  # the kernels take half precision only
            for name, case in CASES.items():
                try:
                    found = errors(case, backend, dtype, device)
                except (ImportError, ValueError) as error:
                    missing = f"not available: {str(error).splitlines()[0][:80]}"
                    failed += device == "cuda" and backend == "flash_attention_2"
                    print(f"{backend:18} {dtype!s:15} {name:22} {missing}")
                    break
                bad = max(found.values()) > TOLERANCES[dtype]
                failed += bad
                figures = "  ".join(f"{padding} {error:.1e}" for padding, error in found.items())
                print(f"{backend:18} {dtype!s:15} {name:22} {figures}{'  TOO LARGE' if bad else ''}")
    print(f"{failed} failed" if failed else "all within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
