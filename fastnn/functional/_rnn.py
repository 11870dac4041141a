"""Recurrent layers: the arguments of torch.lstm, torch.gru, … and of torch.lstm_cell, …; QRNN."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.compiler import is_dynamo_compiling

from .. import backends
from ..ops import rnn as _rnn
from ..ops._operator import FLOATING
from ._activation import sigmoid, tanh
from ._arguments import any_requires_grad
from ._matmul import linear

_recurrent = _rnn.recurrent.call
_CELLS = {mode: (mode, True, 1) for mode in _rnn.MODES}


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM layers, by torch.lstm's rules: output, last states and last cells.

    input (T, B, I), or (B, T, I) if batch_first, or with ``batch_sizes`` a PackedSequence's data (N, I); hx: states
    (L·D, B, H) and cells (L·D, B, H), with a projection (L·D, B, P) and (L·D, B, H), of L layers in D directions;
    params: for each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr, as far as they exist.
    ``recompute``: for the backward only outputs are kept, and each layer's gates are made again when its turn comes: a
    third more time, and 5·T·B·H numbers in all instead of a layer.
    Raises RuntimeError for shapes, dtypes or devices that do not match, and for no steps.
    """
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _layers("lstm", input, hx[0], hx[1], params, *options, batch_sizes, recompute, backend)


def _layer_function(mode: str, doc: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of layers without cells, which differ in nothing but their mode."""

    def function(
        input: Tensor,
        hx: Tensor,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
        *,
        batch_sizes: Tensor | None = None,
        recompute: bool = False,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        return _layers(mode, input, hx, None, params, *options, batch_sizes, recompute, backend)[:2]

    function.__name__ = function.__qualname__ = mode
    function.__doc__ = doc
    return function


gru = _layer_function(
    "gru", "GRU layers, by torch.gru's rules: output and last states. Arguments as lstm's, without cells and projection."
)
rnn_tanh = _layer_function(
    "rnn_tanh", "Elman layers with tanh, by torch.rnn_tanh's rules: output and last states. Arguments as gru's."
)
rnn_relu = _layer_function(
    "rnn_relu", "Elman layers with relu, by torch.rnn_relu's rules: output and last states. Arguments as gru's."
)


def _only_torch(op: str, input: Tensor, backend: str | None) -> str | None:
    """Why torch serves a recurrent layer whole, rather than step by step as plain maths"""
    if input.dtype not in FLOATING:
        return f"dtype {input.dtype} has no fastnn kernel"
    if not (input.is_cpu or is_dynamo_compiling()):
        return f"there is no kernel for {op} on device {str(input.device)!r}"
    named = backend if is_dynamo_compiling() else backend or backends.context()
    return "backend 'torch' was named" if named == "torch" else None


def _side_by_side(input: Tensor) -> bool:
    """Whether layers are run all at once, as they are on a GPU, and not one after the other."""
    return input.is_cuda and not is_dynamo_compiling()


def _no_stack(
    mode: str, input: Tensor, hx: Tensor, num_layers: int, directions: int, projected: bool, dropping: bool, backend: str | None
) -> str | None:
    """Why torch serves layers on a GPU"""
    named = backends.chosen(backend)
    if named not in ("auto", "gpu") or input.dtype not in FLOATING:
        return _only_torch(mode, input, backend)
    if projected:
        return "the recurrent kernels for the GPU have no projection"
    if dropping:
        return "dropout between layers keeps the GPU's kernels from running them side by side"
    return _rnn.gpu_refusal(input, hx, mode, num_layers, directions, named)


def _states_rule(mode: str, input: Tensor) -> bool:
    """Whether autocast leaves the states' dtype as it is and lowers products only, as in torch's GRU and cells. Here all is
    computed in the states' dtype then; in an RNN, and an LSTM's layers, all is lowered."""
    return mode in ("gru", "lstm_cell", "gru_cell") and input.is_cpu and torch.is_autocast_enabled("cpu")


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [t if t is None else t.to(dtype) for t in tensors]


def _time_first(x: Tensor) -> Tensor:
    """(T, B, I) as steps one after the other; as it is where any strides are that"""
    return x.contiguous() if x.shape[0] > 1 else x


def _of_its_own(y: Tensor) -> Tensor:
    """The output apart from what is kept for the backward: the caller may change it in place"""
    return y.clone() if y.requires_grad and not is_dynamo_compiling() else y


def layers_again(
    mode: str,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    backend: str | None,
) -> Any:
    """Output and last states of layers that have been called alike before, the short way; else None. See ops.rnn.again."""
    if is_dynamo_compiling():
        return None
    options = (mode, False, 2 if bidirectional else 1)
    if not batch_first:
        return _rnn.again(options, input, states, params, backend)
    if input.dim() != 3:
        return None
    found = _rnn.again(options, _time_first(input.transpose(0, 1)), states, params, backend)
    return None if found is None else (found[0].transpose(0, 1), *found[1:])


def cell_again(mode: str, input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor | None], backend: str | None) -> Any:
    """The state, or state and cell, of a cell that has been called alike before, the short way; else None."""
    return _rnn.again(_CELLS[mode], input, states, params if params[2] is not None else params[:2], backend)


def _layers(
    mode: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    recompute: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    states: tuple[Tensor, ...] = (hx,) if cx is None else (hx, cx)
    short = batch_sizes is None and not (train and dropout > 0)
    found = layers_again(mode, input, states, params, bidirectional, batch_first, backend) if short else None
    if found is not None:
        return found if cx is not None else (*found, hx)
    directions = 2 if bidirectional else 1
    count = len(params) // (num_layers * directions)
    together = _side_by_side(input)
    if together:
        projected, dropping = count > (4 if has_biases else 2), train and dropout > 0 and num_layers > 1
        reason = _no_stack(mode, input, hx, num_layers, directions, projected, dropping, backend)
    else:
        reason = _only_torch(mode, input, backend)
    if reason is not None:
        backends.torch_serves(mode, (input, hx), backend, reason)
        given = hx if cx is None else (hx, cx)
        options = (params, has_biases, num_layers, dropout, train, bidirectional)
        by_torch = getattr(_VF, mode)
        if batch_sizes is not None:
            return by_torch(input, batch_sizes, given, *options)
        return by_torch(input, given, *options, batch_first)
    if _states_rule(mode, input):
        weights = _to(hx.dtype, *params)
        with torch.autocast("cpu", enabled=False):
            return _layers(mode, input.to(hx.dtype), hx, cx, weights, has_biases, num_layers, dropout, train, bidirectional,
                           batch_first, batch_sizes, recompute, backend)  # fmt: skip
    if batch_sizes is not None:
        rows = input
    elif input.dim() != 3:
        raise RuntimeError(f"{mode}(): input must have 3 dimensions, got shape {tuple(input.shape)}")
    else:
        steps, batch, size = (input := input.transpose(0, 1) if batch_first else input).shape
        if steps == 0:
            raise RuntimeError(f"{mode}(): Expected sequence length to be larger than 0 in RNN, got {tuple(input.shape)}")
        rows = input.reshape(steps * batch, size)
    least = 4 if has_biases else 2
    most = least + 1 if mode == "lstm" else least
    if len(params) != count * num_layers * directions or not least <= count <= most:
        raise RuntimeError(
            f"{mode}(): params must have {least} tensors for each of {num_layers} layers and {directions} directions"
            f"{', or one more for a projection' if most > least else ''}, got {len(params)}"
        )
    for name, state in (("hx", hx), ("cx", cx)):
        if state is not None and (state.dim() != 3 or state.shape[0] != num_layers * directions):
            raise RuntimeError(
                f"{mode}(): {name} must have 3 dimensions, the first {num_layers * directions}, got {tuple(state.shape)}"
            )
    keep = not recompute and torch.is_grad_enabled() and any_requires_grad(input, hx, cx, *params)
    if together:
        flat = _rnn.flat_weights(rows, params, mode, hx.shape[2], num_layers, directions)
        rows, h_n, c_n = _rnn.recurrent_stack.call(
            rows, hx, cx, flat, batch_sizes, mode, num_layers, bidirectional, has_biases, keep, backend
        )
        rows = _of_its_own(rows)
        if batch_sizes is None:
            rows = rows.view(steps, batch, rows.shape[1])
            rows = rows.transpose(0, 1) if batch_first else rows
        return rows, h_n, c_n
    initial, cells = hx.unbind(0), cx.unbind(0) if cx is not None else ()
    last: list[Tensor] = []
    last_cells: list[Tensor] = []
    for layer in range(num_layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            w_ih, w_hh, *rest = params[k * count : (k + 1) * count]
            y, h_n, c_n = _recurrent(
                rows,
                initial[k],
                cells[k] if cells else None,
                w_ih,
                w_hh,
                *(rest[:2] if has_biases else (None, None)),
                rest[-1] if count > least else None,
                batch_sizes,
                mode,
                k % directions == 1,
                keep,
                backend,
            )
            outputs.append(y)
            last.append(h_n)
            last_cells.append(c_n)
        rows = outputs[0] if directions == 1 else torch.cat(outputs, 1)
        if train and dropout > 0 and layer < num_layers - 1:  # torch's own, so that a seed gives torch's own mask
            rows = F.dropout(rows, dropout, True)
    if short:
        _rnn.prepare((mode, False, directions), _time_first(input), states, params)
    if directions == 1:
        rows = _of_its_own(rows)
    if batch_sizes is None:
        rows = rows.view(steps, batch, rows.shape[1])
        rows = rows.transpose(0, 1) if batch_first else rows
    if len(last) == 1:
        return rows, last[0].unsqueeze(0), last_cells[0].unsqueeze(0)
    return rows, torch.stack(last), torch.stack(last_cells) if cells else last_cells[0]


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: input (B, I), hx = (state, cell), each (B, H) → (state, cell)."""
    state, cell = hx
    found = cell_again("lstm", input, (state, cell), (w_ih, w_hh, b_ih, b_hh), backend)
    if found is not None:
        return found
    reason = _only_torch("lstm_cell", input, backend)
    if reason is not None:
        backends.torch_serves("lstm_cell", (input, state, cell), backend, reason)
        return _VF.lstm_cell(input, (state, cell), w_ih, w_hh, b_ih, b_hh)
    if _states_rule("lstm_cell", input):
        x, *params = _to(state.dtype, input, w_ih, w_hh, b_ih, b_hh)
        with torch.autocast("cpu", enabled=False):
            return lstm_cell(x, (state, cell), *params, backend=backend)
    keep = torch.is_grad_enabled() and any_requires_grad(input, state, cell, w_ih, w_hh, b_ih, b_hh)
    out = _recurrent(input, state, cell, w_ih, w_hh, b_ih, b_hh, None, None, "lstm", False, keep, backend)
    _prepare_cell("lstm", input, (state, cell), (w_ih, w_hh, b_ih, b_hh))
    return out[1], out[2]


def _cell_function(mode: str, doc: str) -> Callable[..., Tensor]:
    """The function of a cell without a cell state"""

    def function(
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        params = (w_ih, w_hh, b_ih, b_hh)
        found = cell_again(mode, input, (hx,), params, backend)
        if found is not None:
            return found
        reason = _only_torch(f"{mode}_cell", input, backend)
        if reason is not None:
            backends.torch_serves(f"{mode}_cell", (input, hx), backend, reason)
            return getattr(_VF, f"{mode}_cell")(input, hx, *params)
        if _states_rule(f"{mode}_cell", input):
            x, *lowered = _to(hx.dtype, input, *params)
            with torch.autocast("cpu", enabled=False):
                return function(x, hx, *lowered, backend=backend)
        keep = torch.is_grad_enabled() and any_requires_grad(input, hx, *params)
        out = _recurrent(input, hx, None, *params, None, None, mode, False, keep, backend)[1]
        _prepare_cell(mode, input, (hx,), params)
        return out

    function.__name__ = function.__qualname__ = f"{mode}_cell"
    function.__doc__ = doc
    return function


gru_cell = _cell_function("gru", "One step of a GRU: input (B, I), hx (B, H) → (B, H).")
rnn_tanh_cell = _cell_function("rnn_tanh", "One step of an Elman network with tanh: input (B, I), hx (B, H) → (B, H).")
rnn_relu_cell = _cell_function("rnn_relu", "One step of an Elman network with relu: input (B, I), hx (B, H) → (B, H).")


def _prepare_cell(mode: str, input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor | None]) -> None:
    _rnn.prepare(_CELLS[mode], input, states, params if params[2] is not None else params[:2])


def qrnn(
    input: Tensor,
    hx: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window: int = 2,
    pooling: str = "fo",
    zoneout: float = 0.0,
    train: bool = False,
    reverse: bool = False,
    before: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of a quasi-recurrent layer (Bradbury et al. 2016): output and last cell.

    input (T, B, I), hx (B, H); weight (G·H, window·I), bias (G·H), of the candidate and the gates f, o, i in this order, as
    many as ``pooling`` has: "f", "fo", "ifo". A step sees itself and the window - 1 before it (``reverse``: after it), the
    oldest first. ``zoneout``: the chance that a unit keeps its cell at a step, in training (section 2.2); else nothing.
    ``before``: the window - 1 inputs (window - 1, B, I) that a first window sees; zeros where none are given.
    → (T, B, H), (B, H). Raises RuntimeError for shapes that do not match and for no steps, ValueError for an unknown pooling.
    """
    if pooling not in ("f", "fo", "ifo"):
        raise ValueError(f"qrnn(): pooling got {pooling!r}, allowed are 'f', 'fo', 'ifo'")
    if input.dim() != 3 or hx.dim() != 2 or input.shape[1] != hx.shape[0] or window < 1:
        raise RuntimeError(
            f"qrnn(): input must be (T, B, I), hx (B, H) and window 1 or more, got {tuple(input.shape)}, {tuple(hx.shape)} "
            f"and {window}"
        )
    gates, units = 1 + len(pooling), hx.shape[1]
    if weight.shape != (gates * units, window * input.shape[2]):
        raise RuntimeError(
            f"qrnn(): weight must have shape {(gates * units, window * input.shape[2])}, got {tuple(weight.shape)}"
        )
    steps, batch, size = input.shape
    if steps == 0:
        raise RuntimeError(f"qrnn(): Expected sequence length to be larger than 0, got {tuple(input.shape)}")
    if window > 1:
        before = input.new_zeros(window - 1, batch, size) if before is None else before
        if before.shape != (window - 1, batch, size):
            raise RuntimeError(f"qrnn(): before must have shape {(window - 1, batch, size)}, got {tuple(before.shape)}")
        padded = torch.cat([input, before] if reverse else [before, input])
        views = [padded[k : k + steps] for k in range(window)]
        input = torch.cat(views[::-1] if reverse else views, 2)
    z, f, *others = linear(input, weight, bias, backend=backend).chunk(gates, 2)
    z, f = tanh(z, backend=backend), sigmoid(f, backend=backend)
    if train and zoneout > 0:
        f = 1 - (1 - f) * torch.empty_like(f).bernoulli_(1 - zoneout)
    if pooling == "ifo":
        u = sigmoid(others[1], backend=backend) * z
    else:
        u = (1 - f) * z
    c = _rnn.scan(f, u, hx, reverse, backend=backend)
    return c if pooling == "f" else sigmoid(others[0], backend=backend) * c, c[0 if reverse else -1]
