"""torch.nn's modules with fastnn's forward: subclasses that add neither parameters nor state.

Constructors, attributes, state_dicts and errors are torch.nn's. `backend` is None (automatic) unless
``fastnn.replace(model, backend=...)``, or you, set it on a module.
"""

from typing import Any

from torch import Tensor, nn

from . import functional as F

__all__ = [
    "ELU",
    "GELU",
    "GLU",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CrossEntropyLoss",
    "Dropout",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
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


# Pooling and normalisation


def _batch_norm(self: Any, input: Tensor) -> Tensor:
    """torch's forward of a BatchNorm: which statistics serve, and how the running ones move on."""
    self._check_input_dim(input)
    momentum = 0.0 if self.momentum is None else self.momentum
    if self.training and self.track_running_stats and self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # the mean of all batches
            momentum = 1.0 / float(self.num_batches_tracked)
    training = self.training or (self.running_mean is None and self.running_var is None)
    kept = not self.training or self.track_running_stats
    mean, var = (self.running_mean, self.running_var) if kept else (None, None)
    return F.batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps, backend=self.backend)


def _instance_norm(self: Any, input: Tensor) -> Tensor:
    own = self.training or not self.track_running_stats
    momentum = 0.0 if self.momentum is None else self.momentum
    kept = (self.running_mean, self.running_var)
    return F.instance_norm(input, *kept, self.weight, self.bias, own, momentum, self.eps, backend=self.backend)


class MaxPool1d(nn.MaxPool1d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool1d(input, *window, self.return_indices, backend=self.backend)



class MaxPool2d(nn.MaxPool2d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool2d(input, *window, self.return_indices, backend=self.backend)



class MaxPool3d(nn.MaxPool3d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool3d(input, *window, self.return_indices, backend=self.backend)



class AvgPool1d(nn.AvgPool1d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.padding, self.ceil_mode)
        return F.avg_pool1d(input, *window, self.count_include_pad, backend=self.backend)



class AvgPool2d(nn.AvgPool2d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.padding, self.ceil_mode)
        return F.avg_pool2d(input, *window, self.count_include_pad, self.divisor_override, backend=self.backend)



class AvgPool3d(nn.AvgPool3d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.padding, self.ceil_mode)
        return F.avg_pool3d(input, *window, self.count_include_pad, self.divisor_override, backend=self.backend)



class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices, backend=self.backend)



class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices, backend=self.backend)



class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices, backend=self.backend)



class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_avg_pool1d(input, self.output_size, backend=self.backend)



class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_avg_pool2d(input, self.output_size, backend=self.backend)



class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_avg_pool3d(input, self.output_size, backend=self.backend)



class LPPool1d(nn.LPPool1d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.ceil_mode)
        return F.lp_pool1d(input, float(self.norm_type), *window, backend=self.backend)



class LPPool2d(nn.LPPool2d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.ceil_mode)
        return F.lp_pool2d(input, float(self.norm_type), *window, backend=self.backend)



class LPPool3d(nn.LPPool3d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.ceil_mode)
        return F.lp_pool3d(input, float(self.norm_type), *window, backend=self.backend)



class MaxUnpool1d(nn.MaxUnpool1d):
    backend: str | None = None

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Any:
        window = (self.kernel_size, self.stride, self.padding)
        return F.max_unpool1d(input, indices, *window, output_size, backend=self.backend)



class MaxUnpool2d(nn.MaxUnpool2d):
    backend: str | None = None

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Any:
        window = (self.kernel_size, self.stride, self.padding)
        return F.max_unpool2d(input, indices, *window, output_size, backend=self.backend)



class MaxUnpool3d(nn.MaxUnpool3d):
    backend: str | None = None

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Any:
        window = (self.kernel_size, self.stride, self.padding)
        return F.max_unpool3d(input, indices, *window, output_size, backend=self.backend)



class BatchNorm1d(nn.BatchNorm1d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)



class BatchNorm2d(nn.BatchNorm2d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)



class BatchNorm3d(nn.BatchNorm3d):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)



class GroupNorm(nn.GroupNorm):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, backend=self.backend)



class InstanceNorm1d(nn.InstanceNorm1d):
    backend: str | None = None

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


class InstanceNorm2d(nn.InstanceNorm2d):
    backend: str | None = None

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


class InstanceNorm3d(nn.InstanceNorm3d):
    backend: str | None = None

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


# torch.nn's class: ours
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {getattr(nn, name): globals()[name] for name in __all__}
