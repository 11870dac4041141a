"""Linear layers."""

from torch import Tensor, nn

from .. import functional as F


class Linear(nn.Linear):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias, backend=self.backend)
