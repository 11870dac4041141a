"""Convolutions and transposed convolutions. `activation` and a residual are what ``fastnn.fuse`` gives to a layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from .. import functional as F
from ._epilogue import Epilogue, apart, may_add


def _convolution(self: Any, convolve: Callable[..., Tensor], input: Tensor, residual: Tensor | None) -> Tensor:
    """torch.nn._ConvNd's own way: a padding mode other than zeros is a padding of its own, then nothing is left to pad."""
    padding, activation = self.padding, self.activation
    if self.padding_mode != "zeros":
        input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding = 0
    options = (self.stride, padding, self.dilation, self.groups)
    if residual is None:
        return convolve(input, self.weight, self.bias, *options, activation=activation, backend=self.backend)
    if may_add(residual, input, self.weight, _shape(self, input, padding)):
        more = {"activation": activation, "residual": residual}
        return convolve(input, self.weight, self.bias, *options, **more, backend=self.backend)
    return apart(convolve(input, self.weight, self.bias, *options, backend=self.backend), residual, activation, self.backend)


def _shape(self: Any, input: Tensor, padding: Any) -> tuple[int, ...]:
    """The output's shape."""
    dims = len(self.kernel_size)
    if padding == "same":
        return (*input.shape[: -dims - 1], self.out_channels, *input.shape[-dims:])
    pads = (0,) * dims if isinstance(padding, (int, str)) else padding
    each = zip(input.shape[-dims:], self.kernel_size, self.stride, pads, self.dilation)
    size = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)
    return (*input.shape[: -dims - 1], self.out_channels, *size)


def _transposed(
    self: Any, convolve: Callable[..., Tensor], input: Tensor, output_size: list[int] | None, residual: Tensor | None
) -> Tensor:
    if self.padding_mode != "zeros":
        raise ValueError(f"{type(self).__name__}: padding_mode must be 'zeros', got {self.padding_mode!r}")
    dims, activation = len(self.kernel_size), self.activation
    more = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
    options = (self.stride, self.padding, more, self.groups, self.dilation)
    if residual is None:
        return convolve(input, self.weight, self.bias, *options, activation=activation, backend=self.backend)
    each = zip(input.shape[-dims:], self.kernel_size, self.stride, self.padding, self.dilation, more)
    size = ((n - 1) * s - 2 * p + d * (k - 1) + 1 + m for n, k, s, p, d, m in each)
    if may_add(residual, input, self.weight, (*input.shape[: -dims - 1], self.out_channels, *size)):
        both = {"activation": activation, "residual": residual}
        return convolve(input, self.weight, self.bias, *options, **both, backend=self.backend)
    return apart(convolve(input, self.weight, self.bias, *options, backend=self.backend), residual, activation, self.backend)


class Conv1d(Epilogue, nn.Conv1d):
    backend: str | None = None

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        return _convolution(self, F.conv1d, input, residual)


class ConvTranspose1d(Epilogue, nn.ConvTranspose1d):
    backend: str | None = None

    def forward(self, input: Tensor, output_size: list[int] | None = None, *, residual: Tensor | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose1d, input, output_size, residual)


class Conv2d(Epilogue, nn.Conv2d):
    backend: str | None = None

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        return _convolution(self, F.conv2d, input, residual)


class ConvTranspose2d(Epilogue, nn.ConvTranspose2d):
    backend: str | None = None

    def forward(self, input: Tensor, output_size: list[int] | None = None, *, residual: Tensor | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose2d, input, output_size, residual)


class Conv3d(Epilogue, nn.Conv3d):
    backend: str | None = None

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        return _convolution(self, F.conv3d, input, residual)


class ConvTranspose3d(Epilogue, nn.ConvTranspose3d):
    backend: str | None = None

    def forward(self, input: Tensor, output_size: list[int] | None = None, *, residual: Tensor | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose3d, input, output_size, residual)
