"""Convolutions and transposed convolutions."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from .. import functional as F


def _convolution(self: Any, convolve: Callable[..., Tensor], input: Tensor) -> Tensor:
    """torch.nn._ConvNd's own way: a padding mode other than zeros is a padding of its own, then nothing is left to pad."""
    padding = self.padding
    if self.padding_mode != "zeros":
        input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding = 0
    options = (self.stride, padding, self.dilation, self.groups)
    return convolve(input, self.weight, self.bias, *options, backend=self.backend)


def _transposed(self: Any, convolve: Callable[..., Tensor], input: Tensor, output_size: list[int] | None) -> Tensor:
    if self.padding_mode != "zeros":
        raise ValueError(f"{type(self).__name__}: padding_mode must be 'zeros', got {self.padding_mode!r}")
    dims = len(self.kernel_size)
    more = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
    options = (self.stride, self.padding, more, self.groups, self.dilation)
    return convolve(input, self.weight, self.bias, *options, backend=self.backend)


class Conv1d(nn.Conv1d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _convolution(self, F.conv1d, input)


class ConvTranspose1d(nn.ConvTranspose1d):
    backend: str | None = None

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose1d, input, output_size)


class Conv2d(nn.Conv2d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _convolution(self, F.conv2d, input)


class ConvTranspose2d(nn.ConvTranspose2d):
    backend: str | None = None

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose2d, input, output_size)


class Conv3d(nn.Conv3d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _convolution(self, F.conv3d, input)


class ConvTranspose3d(nn.ConvTranspose3d):
    backend: str | None = None

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose3d, input, output_size)
