"""Sees what a run does on the device: its operations, and what it holds."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "lift_fresh", "_to_copy", "copy_", "nonzero", "is_nonzero", "equal")


class Watch(TorchDispatchMode):
    """Records operations, and the most state-sized tensors that were alive after one of them."""

    def __init__(self, numel, device):
        super().__init__()
        self.numel, self.device = numel, device
        self.names, self.alive, self.peak = [], weakref.WeakValueDictionary(), 0

    def track(self, tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() >= self.numel * tensor.element_size():
            self.alive[storage._cdata] = tensor
        self.peak = max(self.peak, len({t.untyped_storage()._cdata for t in self.alive.values()}))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() == self.numel:
                self.track(tensor)
        return out
