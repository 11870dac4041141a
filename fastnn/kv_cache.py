"""The keys and values of a sequence that is generated step by step."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch._C import DisableTorchFunction, _is_torch_function_mode_enabled, is_grad_enabled

from .ops._operator import PLAIN


class KVCache:
    """Keys (batch, heads, positions, size) and values of one attention layer, in memory that is set aside once.

    Args:
        batch, heads, capacity, size: of the keys; heads are those of keys and values. At most ``capacity`` positions fit.
        value_size: size of a value's head, if it is another.
        dtype, device: as torch.empty takes them.

    Raises:
        ValueError: a size is negative.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_size = size if value_size is None else value_size
        if min(batch, heads, capacity, size, value_size) < 0:
            raise ValueError(f"KVCache(): sizes must not be negative, got {(batch, heads, capacity, size, value_size)}")
        self._keys = torch.empty(batch, heads, capacity, size, dtype=dtype, device=device)
        self._values = torch.empty(batch, heads, capacity, value_size, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """A view of the positions so far."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """A view of the positions so far."""
        return self._values[:, :, : self.length]

    def __len__(self) -> int:
        return self.length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the next positions; returns views of all: no gradient goes through them.

        Raises RuntimeError if the cache is too full for them, or shapes, dtypes or devices differ from the cache's.
        """
        if is_grad_enabled() or (_is_torch_function_mode_enabled() and type(key) in PLAIN and type(value) in PLAIN):
            with torch.no_grad(), DisableTorchFunction():  # a mode, use() for one, would be asked about each property
                return self.append(key, value)
        if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
            kinds = type(key).__name__, type(value).__name__
            raise TypeError(f"KVCache.append(): key and value must be tensors, got {kinds[0]} and {kinds[1]}")
        start, shape, keys, values = self.length, key.shape, self._keys, self._values
        count = shape[2] if len(shape) == 4 else 0
        for name, new, own in (("key", key, keys), ("value", value, values)):
            batch, heads, _, size = own.shape
            if new.shape != (batch, heads, count, size) or new.dtype is not own.dtype or new.device != own.device:
                self._refuse(name, new, own, count)
        end = start + count
        if end > keys.shape[2]:
            raise RuntimeError(
                f"KVCache.append(): the cache is full: {start} of {self.capacity} positions are taken, "
                f"{count} more do not fit"
            )
        keys.narrow(2, start, count).copy_(key)
        values.narrow(2, start, count).copy_(value)
        self.length = end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    @staticmethod
    def _refuse(name: str, new: Tensor, own: Tensor, count: int) -> NoReturn:
        """Say what is wrong with new keys or values."""
        if new.dtype != own.dtype or new.device != own.device:
            raise RuntimeError(
                f"KVCache.append(): {name} must have the cache's dtype and device, {own.dtype} on {own.device}, "
                f"got {new.dtype} on {new.device}"
            )
        if new.dim() != 4 or new.shape[:2] != own.shape[:2] or new.shape[3] != own.shape[3]:
            raise RuntimeError(
                f"KVCache.append(): {name} must have shape ({own.shape[0]}, {own.shape[1]}, positions, "
                f"{own.shape[3]}), got {tuple(new.shape)}"
            )
        raise RuntimeError(f"KVCache.append(): key has {count} positions, value {new.shape[2]}")

    def crop(self, length: int) -> None:
        """Forget the positions from ``length`` on. ValueError if there are not so many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KVCache.crop(): length must be in [0, {self.length}], got {length}")
        self.length = length

    def reorder(self, beams: Tensor) -> None:
        """Batch item i goes on from what item beams[i] was. IndexError if there is no such item.

        Raises RuntimeError if beams is no vector of the batch's size of int32 or int64.
        """
        batch = self._keys.shape[0]
        if not isinstance(beams, Tensor):
            raise TypeError(f"KVCache.reorder(): beams must be a tensor, got {type(beams).__name__}")
        if beams.dtype not in (torch.int32, torch.int64) or tuple(beams.shape) != (batch,):
            raise RuntimeError(
                f"KVCache.reorder(): beams must be ({batch},) of int64, got {tuple(beams.shape)} of {beams.dtype}"
            )
        if batch and not 0 <= int(beams.min()) <= int(beams.max()) < batch:
            raise IndexError(f"KVCache.reorder(): beams must be in [0, {batch}), got {beams.tolist()}")
        for t in (self.keys, self.values):
            t.copy_(t.index_select(0, beams))
