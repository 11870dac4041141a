"""Softmax and losses."""

from torch import Tensor, nn

from .. import functional as F


class Softmax(nn.Softmax):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5, backend=self.backend)


class LogSoftmax(nn.LogSoftmax):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5, backend=self.backend)


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


if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13

    class LinearCrossEntropyLoss(nn.LinearCrossEntropyLoss):
        """torch's, never holding all logits; ``options`` mean nothing here."""

        backend: str | None = None

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            classes, bias = (self.num_classes, *self.out_features), self.linear.bias
            return F.linear_cross_entropy(
                input,
                self.linear.weight.reshape(*classes, self.linear.in_features),
                target,
                linear_bias=None if bias is None else bias.reshape(classes),
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
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
