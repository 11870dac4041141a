"""What a layer's last step does beside the bias."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activation as _activation


class Epilogue:
    """A layer with an activation of its own: its name, on the instance, if ``fastnn.fuse`` gave it one."""

    activation: str | None = None

    def extra_repr(self) -> str:
        own: str = super().extra_repr()  # type: ignore[misc]
        return own if self.activation is None else f"{own}, activation={self.activation!r}"


def may_add(residual: Any, input: Tensor, weight: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``output + residual`` has the output's shape and dtype, so that it can be a part of the last step."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == shape
        and residual.dtype == input.dtype == weight.dtype
        and residual.device == input.device
        and not torch.is_autocast_enabled(input.device.type)
    )


def apart(out: Tensor, residual: Any, activation: str | None, backend: str | None) -> Tensor:
    """activation(out + residual) as steps of their own, by torch's rules for the shapes and dtypes of a sum."""
    out = out + residual
    return out if activation is None else _activation.activation.call(out, activation, (), backend)


class WithDims(nn.Module):
    """In a folded BatchNorm1d's place, which also took inputs whose second dimension is not what the layer before it makes."""

    def __init__(self, dims: int, layer: str) -> None:
        super().__init__()
        self.dims, self.layer = dims, layer
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != self.dims:
            raise RuntimeError(
                f"{self.layer}: a batch norm was folded into this layer by fastnn.fuse, so its input must have {self.dims} "
                f"dimensions, got {input.dim()}"
            )
        return input
