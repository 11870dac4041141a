"""torch.nn's modules with fastnn's forward: subclasses that add neither parameters nor state.

Constructors, attributes, state_dicts and errors are torch.nn's. `backend` is None (automatic) unless
``fastnn.replace(model, backend=...)``, or you, set it on a module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence

from . import functional as F

__all__ = [
    "ELU",
    "GELU",
    "GLU",
    "GRU",
    "LSTM",
    "QRNN",
    "RNN",
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
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "CrossEntropyLoss",
    "Dropout",
    "GRUCell",
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
    "LSTMCell",
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
    "RNNCell",
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


# Recurrent layers. ``recompute``: see fastnn.functional.lstm.


def _run_layers(module: Any, function: Any, input: Any, hx: Any, cells: bool) -> Any:
    """torch's forward of LSTM (which has cells), GRU and RNN: the input's kind, missing states, batched or not."""
    module._update_flat_weights()
    packed = isinstance(input, PackedSequence)
    data, sizes, order, back = input if packed else (input, None, None, None)
    batch_dim = 0 if module.batch_first else 1
    alone = not packed and data.dim() == 2
    if not packed and data.dim() not in (2, 3):
        raise ValueError(f"{module._get_name()}: Expected input to be 2D or 3D, got {data.dim()}D instead")
    if alone:
        data = data.unsqueeze(batch_dim)
    if hx is None:
        directions = module.num_layers * (2 if module.bidirectional else 1)
        batch = data.shape[batch_dim] if sizes is None else int(sizes[0])
        state = data.new_zeros(directions, batch, module.proj_size or module.hidden_size)
        hx = (state, data.new_zeros(directions, batch, module.hidden_size)) if cells else state
    else:
        states = hx if cells else (hx,)
        if not packed and any(t.dim() != 3 - alone for t in states):
            kind, dims = ("unbatched 2-D", 2) if alone else ("batched 3-D", 3)
            got = ", ".join(f"{t.dim()}-D" for t in states)
            raise RuntimeError(
                f"For {kind} input, {'hx and cx' if cells else 'hx'} should also be {dims}-D but got ({got}) "
                f"tensor{'s' if cells else ''}"
            )
        states = tuple(t.unsqueeze(1) if alone else t if order is None else t.index_select(1, order) for t in states)
        hx = states if cells else states[0]
    module.check_forward_args(data, hx, sizes)
    given: Any = hx if cells else (hx,)
    for name, state in zip(("hidden[0]", "hidden[1]") if cells else ("hidden",), given, strict=True):
        if state.dtype != data.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"Expected {name} dtype {data.dtype}, got {state.dtype}")
    output, *last = function(
        data, hx, module._flat_weights, module.bias, module.num_layers, module.dropout, module.training,
        module.bidirectional, module.batch_first and not packed, batch_sizes=sizes, recompute=module.recompute,
        backend=module.backend,
    )  # fmt: skip
    last = [t.squeeze(1) if alone else t if back is None else t.index_select(1, back) for t in last]
    if packed:
        output = PackedSequence(output, sizes, order, back)
    return output.squeeze(batch_dim) if alone else output, tuple(last) if cells else last[0]


class LSTM(nn.LSTM):
    backend: str | None = None
    recompute = False

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        return _run_layers(self, F.lstm, input, hx, True)


class GRU(nn.GRU):
    backend: str | None = None
    recompute = False

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        return _run_layers(self, F.gru, input, hx, False)


class RNN(nn.RNN):
    backend: str | None = None
    recompute = False

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        return _run_layers(self, F.rnn_tanh if self.mode == "RNN_TANH" else F.rnn_relu, input, hx, False)


def _run_cell(module: Any, function: Any, input: Tensor, hx: Any, cells: bool) -> Any:
    """torch's forward of the cells"""
    dims = input.dim()
    state = hx[0] if cells and hx is not None else hx
    if not (dims == 2 and state is not None and state.shape == (input.shape[0], module.hidden_size)
            and input.shape[1] == module.input_size):  # fmt: skip
        hx = _usual_states(module, input, hx, cells)
    alone = dims == 1
    out = function(
        input.unsqueeze(0) if alone else input, hx, module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh,
        backend=module.backend,
    )  # fmt: skip
    if not alone:
        return out
    return tuple(t.squeeze(0) for t in out) if cells else out.squeeze(0)


def _usual_states(module: Any, input: Tensor, hx: Any, cells: bool) -> Any:
    """A cell's states as matrices; torch's errors for what does not fit."""
    name = type(module).__name__
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    batch, size = input.shape if input.dim() == 2 else (1, input.shape[0])
    if size != module.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {size} expected {module.input_size}")
    if hx is None:
        state = input.new_zeros(batch, module.hidden_size)
        return (state, state) if cells else state
    states = hx if cells else (hx,)
    for k, state in enumerate(states):
        if state.dim() not in (1, 2):
            what = f"hx[{k}]" if cells else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
    if input.dim() == 1:
        states = tuple(t.unsqueeze(0) for t in states)
    for state in states:
        if state.shape[0] != batch:
            raise RuntimeError(f"Input batch size {batch} doesn't match hidden batch size {state.shape[0]}")
        if state.shape[-1] != module.hidden_size:
            raise RuntimeError(f"hidden has inconsistent hidden_size: got {state.shape[-1]}, expected {module.hidden_size}")
    return states if cells else states[0]


class LSTMCell(nn.LSTMCell):
    backend: str | None = None

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return _run_cell(self, F.lstm_cell, input, hx, True)


class GRUCell(nn.GRUCell):
    backend: str | None = None

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _run_cell(self, F.gru_cell, input, hx, False)


class RNNCell(nn.RNNCell):
    backend: str | None = None

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _run_cell(self, F.rnn_tanh_cell if self.nonlinearity == "tanh" else F.rnn_relu_cell, input, hx, False)
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


class QRNN(nn.Module):
    """Quasi-recurrent layers (Bradbury et al. 2016): products of windows of the input, and an elementwise recurrence.

    Arguments as nn.GRU's, and ``window``, ``pooling`` ("f", "fo", "ifo") and ``zoneout``: see fastnn.functional.qrnn.
    forward(input, hx=None): input (T, B, I), or (B, T, I) if batch_first; hx (L·D, B, H) → output (T, B, D·H), the last cells
    (L·D, B, H).
    """

    backend: str | None = None

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, window: int = 2, pooling: str = "fo", zoneout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.window, self.pooling, self.zoneout = window, pooling, zoneout
        directions, rows = 1 + bidirectional, (1 + len(pooling)) * hidden_size
        for layer in range(num_layers):
            columns = window * (directions * hidden_size if layer else input_size)
            for end in ("", "_reverse")[:directions]:
                weight = torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5)
                self.register_parameter(f"weight_l{layer}{end}", nn.Parameter(weight))
                self.register_parameter(f"bias_l{layer}{end}", nn.Parameter(torch.zeros(rows)) if bias else None)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = input.transpose(0, 1) if self.batch_first else input
        directions = 1 + self.bidirectional
        if hx is None:
            hx = x.new_zeros(self.num_layers * directions, x.shape[1], self.hidden_size)
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for d, end in enumerate(("", "_reverse")[:directions]):
                y, c = F.qrnn(
                    x, hx[layer * directions + d],
                    getattr(self, f"weight_l{layer}{end}"), getattr(self, f"bias_l{layer}{end}"),
                    window=self.window, pooling=self.pooling, zoneout=self.zoneout, train=self.training, reverse=d == 1,
                    backend=self.backend,
                )  # fmt: skip
                outputs.append(y)
                last.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
            if self.training and self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, True, backend=self.backend)
        return x.transpose(0, 1) if self.batch_first else x, torch.stack(last)

    def extra_repr(self) -> str:
        sizes = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        return f"{sizes}, window={self.window}, pooling={self.pooling!r}"


# torch.nn's class: ours
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): globals()[name] for name in __all__ if hasattr(nn, name)
}
