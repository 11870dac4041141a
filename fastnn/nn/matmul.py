"""Linear layers."""

from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ._epilogue import Epilogue, apart, may_add


class Linear(Epilogue, nn.Linear):
    backend: str | None = None

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return F.linear(input, self.weight, self.bias, activation=self.activation, backend=self.backend)
        if may_add(residual, input, self.weight, (*input.shape[:-1], self.out_features)):
            more: dict[str, Any] = {"activation": self.activation, "residual": residual}
            return F.linear(input, self.weight, self.bias, **more, backend=self.backend)
        return apart(F.linear(input, self.weight, self.bias, backend=self.backend), residual, self.activation, self.backend)
