"""Recurrent layers. ``recompute``: see fastnn.functional.lstm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional as F
from ..functional._rnn import cell_again, layers_again


def _run_layers(module: Any, function: Any, input: Any, hx: Any, cells: bool) -> Any:
    """torch's forward of LSTM (which has cells), GRU and RNN: the input's kind, missing states, batched or not."""
    if hx is not None and type(input) is Tensor and not (module.training and module.dropout > 0):
        found = layers_again(
            module.mode.lower(), input, hx if cells else (hx,), [module._parameters.get(n) for n in module._flat_weights_names],
            module.bidirectional, module.batch_first, module.backend,
        )  # fmt: skip
        if found is not None:
            return (found[0], found[1:]) if cells else found
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
        if cells and len(hx) > 2:
            raise RuntimeError(f"{module._get_name()} expects two hidden states, got {len(hx)}")
        states = (hx[0], hx[1]) if cells else (hx,)
        if not packed and any(t.dim() != 3 - alone for t in states):
            kind, dims = ("unbatched 2-D", 2) if alone else ("batched 3-D", 3)
            got = ", ".join(f"{t.dim()}-D" for t in states)
            raise RuntimeError(
                f"For {kind} input, {'hx and cx' if cells else 'hx'} should also be {dims}-D but got "
                f"{f'({got}) tensors' if cells else f'{got} tensor'}"
            )
        states = tuple(t.unsqueeze(1) if alone else t if order is None else t.index_select(1, order) for t in states)
        hx = states if cells else states[0]
    try:
        module.check_forward_args(data, hx, sizes)
    except ValueError as error:  # torch's LSTM does not look at a packed sequence's dtype, and fails in a product
        raise RuntimeError(str(error)) if packed and cells else error from None
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


def _run_cell(module: Any, mode: str, input: Tensor, hx: Any, cells: bool) -> Any:
    """torch's forward of the cells"""
    get = module._parameters.get
    params = (get("weight_ih"), get("weight_hh"), get("bias_ih"), get("bias_hh"))
    if hx is not None:
        found = cell_again(mode, input, hx if cells else (hx,), params, module.backend)
        if found is not None:
            return found
    hx = _usual_states(module, input, hx, cells)
    alone = input.dim() == 1
    out = getattr(F, f"{mode}_cell")(
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
        return (state, torch.zeros_like(state)) if cells else state  # two: the short way takes no tensor twice
    if cells and isinstance(hx, Tensor):
        raise TypeError(f"{name}: hx must be two Tensors, the state and the cell, not Tensor")
    states = tuple(hx) if cells else (hx,)
    for k, state in enumerate(states):
        if state.dim() not in (1, 2):
            what = f"hx[{k}]" if cells else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
    if cells and len(states) != 2:
        raise RuntimeError(f"{name} expects two hidden states, got {len(states)}")
    if input.dim() == 1:
        states = tuple(t.unsqueeze(0) for t in states)
    for k, state in enumerate(states):
        if state.shape[0] != batch:
            raise RuntimeError(f"Input batch size {batch} doesn't match hidden{k} batch size {state.shape[0]}")
        if tuple(state.shape[1:]) != (module.hidden_size,):
            got = ", ".join(map(str, state.shape[1:]))
            raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {got}, expected {module.hidden_size}")
    return states if cells else states[0]


class LSTMCell(nn.LSTMCell):
    backend: str | None = None

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return _run_cell(self, "lstm", input, hx, True)


class GRUCell(nn.GRUCell):
    backend: str | None = None

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _run_cell(self, "gru", input, hx, False)


class RNNCell(nn.RNNCell):
    backend: str | None = None

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _run_cell(self, f"rnn_{self.nonlinearity}", input, hx, False)


def _newest(before: Tensor | None, x: Tensor, count: int) -> Tensor:
    """The last ``count`` steps of x and of so many before it; zeros are before everything"""
    past = x.new_zeros(count, *x.shape[1:]) if before is None else before
    return torch.cat([past, x[max(0, len(x) - count) :]])[-count:] if count else x[:0]


class QRNN(nn.Module):
    """Quasi-recurrent layers (Bradbury et al. 2016): products of windows of the input, and an elementwise recurrence.

    Arguments as nn.GRU's, and ``window``, ``pooling`` ("f", "fo", "ifo") and ``zoneout``: see fastnn.functional.qrnn.
    forward(input, hx=None): input (T, B, I), or (B, T, I) if batch_first, or (T, I); hx (L·D, B, H), or (L·D, H) → output
    (T, B, D·H), the last cells (L·D, B, H). Raises ValueError for an argument or an input's dimensions that are not allowed,
    RuntimeError for shapes that do not match.
    """

    backend: str | None = None

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, window: int = 2, pooling: str = "fo", zoneout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        whole = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "window": window}
        for name, number in whole.items():
            if number < 1:
                raise ValueError(f"{name} must be greater than zero, got {number}")
        for name, chance in (("dropout", dropout), ("zoneout", zoneout)):
            if not 0 <= chance <= 1:
                raise ValueError(f"{name} should be a number in range [0, 1], got {chance}")
        if pooling not in ("f", "fo", "ifo"):
            raise ValueError(f"pooling got {pooling!r}, allowed are 'f', 'fo', 'ifo'")
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
        if not isinstance(input, Tensor):
            raise TypeError(f"QRNN: input must be Tensor, not {type(input).__name__}")
        if input.dim() == 2:
            y, last = self.forward(input.unsqueeze(1 - self.batch_first), None if hx is None else hx.unsqueeze(1))
            return y.squeeze(1 - self.batch_first), last.squeeze(1)
        x, last, _ = self._run(input, hx, [None] * self.num_layers)
        return x, last

    def stream(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """A piece of longer sequences, (T, B, I) or (B, T, I): its output, and what to call this with for the next piece.

        All pieces together give what ``forward`` gives for the whole, but for the rounding of products. Raises ValueError for
        layers in both directions.
        """
        if self.bidirectional:
            raise ValueError("QRNN.stream(): bidirectional is True, and a backward direction starts at the end")
        hx, before = (None, [None] * self.num_layers) if state is None else state
        x, last, inputs = self._run(input, hx, before)
        return x, (last, inputs)

    def _run(self, input: Tensor, hx: Tensor | None, before: list[Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The output, the last cells, and of each layer the inputs that the window of a next step would see."""
        if input.dim() != 3:
            raise ValueError(f"QRNN: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.shape[2] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[2]}"
            )
        x = input.transpose(0, 1) if self.batch_first else input
        directions = 1 + self.bidirectional
        shape = (self.num_layers * directions, x.shape[1], self.hidden_size)
        if hx is None:
            hx = x.new_zeros(shape)
        elif hx.shape != shape:
            raise RuntimeError(f"Expected hidden size {shape}, got {list(hx.shape)}")
        last, inputs = [], []
        for layer in range(self.num_layers):
            outputs = []
            inputs.append(_newest(before[layer], x, self.window - 1))
            for d, end in enumerate(("", "_reverse")[:directions]):
                y, c = F.qrnn(
                    x, hx[layer * directions + d],
                    getattr(self, f"weight_l{layer}{end}"), getattr(self, f"bias_l{layer}{end}"),
                    window=self.window, pooling=self.pooling, zoneout=self.zoneout, train=self.training, reverse=d == 1,
                    before=before[layer], backend=self.backend,
                )  # fmt: skip
                outputs.append(y)
                last.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
            if self.training and self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, True, backend=self.backend)
        return x.transpose(0, 1) if self.batch_first else x, torch.stack(last), inputs

    def extra_repr(self) -> str:
        sizes = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        return f"{sizes}, window={self.window}, pooling={self.pooling!r}"
