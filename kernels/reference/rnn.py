"""Recurrent layers as plain maths: one direction of one layer, step by step. Differentiable any number of times.

LSTM: Hochreiter & Schmidhuber 1997, with forget gates (Gers et al. 2000), and optionally a projection (Sak et al. 2014,
section 2); GRU: Cho et al. 2014, in the variant that resets after the product, as cuDNN and torch have it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
KEPT = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}  # numbers a unit and row that the backward needs besides the output


def _step(mode: str, x: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """From the input's part of the gates and the last state: the new state, the new cell, and what is kept."""
    z = torch.nn.functional.linear(h, w_hh, b_hh)
    if mode == "lstm":
        i, f, g, o = (x + z).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, [i, f, g, o, c]
    if mode == "gru":
        x_r, x_z, x_n = x.chunk(3, 1)
        h_r, h_z, h_n = z.chunk(3, 1)
        r, u = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return n + u * (h - n), c, [r, u, n, h_n]
    return ((x + z).tanh() if mode == "rnn_tanh" else (x + z).relu()), c, []


def recurrent(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = hx.shape[0]
    sizes = [batch] * (input.shape[0] // max(1, batch)) if batch_sizes is None else batch_sizes.tolist()
    gates = torch.nn.functional.linear(input, w_ih, b_ih).split(sizes)
    h, c = hx, hx.new_zeros(batch, 0) if cx is None else cx
    states: list[Tensor] = [hx] * len(sizes)
    kept: list[Tensor] = [hx] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        new, cell, parts = _step(mode, gates[t], h[:n], c[:n], w_hh, b_hh)
        states[t] = new if w_hr is None else new @ w_hr.t()
        kept[t] = torch.cat(parts, 1) if parts else new[:, :0]
        h, c = torch.cat([states[t], h[n:]]), torch.cat([cell, c[n:]])
    y = torch.cat(states) if states else hx[:0]
    reserve = torch.cat(kept) if keep and kept else hx.new_empty(0)
    return y, h, c if cx is not None else hx.new_empty(0), reserve.detach()


def recurrent_backward(
    grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, input: Tensor, hx: Tensor, cx: Tensor | None, w_ih: Tensor,
    w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, y: Tensor, reserve: Tensor,
    batch_sizes: Tensor | None, mode: str, reverse: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of input, hx, cx and the weights, by differentiating the forward; those not needed are empty."""
    create_graph = torch.is_grad_enabled()
    given = (input, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr)
    with torch.enable_grad():
        leaves: list[Any] = [
            None if t is None else t if create_graph and t.requires_grad else t.detach().requires_grad_() for t in given
        ]
        out = recurrent(*leaves, batch_sizes, mode, reverse, False)  # type: ignore[call-arg]
        wanted = [t for t, needed in zip(leaves, needs, strict=True) if t is not None and needed]
        pairs = [p for p in zip(out[:3], (grad_y, grad_h, grad_c), strict=True) if p[0].requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph,
                                allow_unused=True, materialize_grads=True) if wanted else ()
        )  # fmt: skip
    return tuple(
        next(found) if t is not None and needed else input.new_empty(0) for t, needed in zip(given, needs, strict=True)
    )
