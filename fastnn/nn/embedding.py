"""Rows of a table by their numbers."""

from torch import Tensor, nn

from .. import functional as F


class Embedding(nn.Embedding):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse,
            backend=self.backend,
        )  # fmt: skip
