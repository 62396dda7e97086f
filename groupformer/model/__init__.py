"""What travels to the Hub as remote code, flat: files that import torch, transformers and each other, nothing else."""

import transformers  # noqa: F401  registration follows it, so it never runs inside a half imported file of ours
