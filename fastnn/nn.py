"""torch.nn's modules with fastnn's forward: subclasses that add neither parameters nor state.

Constructors, attributes, state_dicts and errors are torch.nn's. `backend` is None (automatic) unless
``fastnn.replace(model, backend=...)``, or you, set it on a module.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from . import functional as F

__all__ = [
    "ELU",
    "GELU",
    "GLU",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "CrossEntropyLoss",
    "Dropout",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "Mish",
    "NLLLoss",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Tanh",
]  # fmt: skip


class Linear(nn.Linear):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias, backend=self.backend)


class ReLU(nn.ReLU):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace, backend=self.backend)


class LeakyReLU(nn.LeakyReLU):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace, backend=self.backend)


class ReLU6(nn.ReLU6):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input, self.inplace, backend=self.backend)


class ELU(nn.ELU):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha, self.inplace, backend=self.backend)


class GELU(nn.GELU):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, self.approximate, backend=self.backend)


class SiLU(nn.SiLU):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, self.inplace, backend=self.backend)


class Mish(nn.Mish):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.mish(input, self.inplace, backend=self.backend)


class Sigmoid(nn.Sigmoid):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input, backend=self.backend)


class Tanh(nn.Tanh):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input, backend=self.backend)


class Hardswish(nn.Hardswish):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.hardswish(input, self.inplace, backend=self.backend)


class Hardsigmoid(nn.Hardsigmoid):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.hardsigmoid(input, self.inplace, backend=self.backend)


class Hardtanh(nn.Hardtanh):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace, backend=self.backend)


class Softplus(nn.Softplus):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.softplus(input, self.beta, self.threshold, backend=self.backend)


class PReLU(nn.PReLU):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight, backend=self.backend)


class GLU(nn.GLU):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.glu(input, self.dim, backend=self.backend)


class Softmax(nn.Softmax):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5, backend=self.backend)


class LogSoftmax(nn.LogSoftmax):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5, backend=self.backend)


class Dropout(nn.Dropout):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace, backend=self.backend)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    backend: str | None = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )


class NLLLoss(nn.NLLLoss):
    backend: str | None = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction, backend=self.backend
        )


class MSELoss(nn.MSELoss):
    backend: str | None = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction, backend=self.backend)


# Convolutions


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


# torch.nn's class: ours
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {getattr(nn, name): globals()[name] for name in __all__}
