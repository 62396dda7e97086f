"""A stand-in for an accelerator, on machines without one."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten


class Accelerator(TorchDispatchMode):
    """Inside it the meta device is an accelerator, whose numbers can be read: they are 0.5, 0, or True.

    An operation on tensors of this device and of the CPU fails, as it would on a GPU; that is what it is for. As on
    Apple's, there is no float64.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
        if func is aten._local_scalar_dense.default and tensor.is_meta:
            return torch.full((), 0.5).to(tensor.dtype).item()
        if func is aten._to_copy.default and tensor.is_meta and is_cpu(kwargs.get("device")):
            return torch.full(tensor.shape, 0.5, dtype=kwargs.get("dtype") or tensor.dtype)
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].fill_(0.5)
        output = func(*args, **kwargs)
        if isinstance(output, torch.Tensor) and output.is_meta and output.dtype == torch.float64:
            raise TypeError(f"{func}: this device has no float64")
        return output


def is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"
