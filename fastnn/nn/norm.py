"""Batch, group, instance, layer and root-mean-square normalisation."""

from typing import Any

from torch import Tensor, nn

from .. import functional as F


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


class LayerNorm(nn.LayerNorm):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, backend=self.backend)
        return out


class RMSNorm(nn.RMSNorm):
    backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.rms_norm(x, self.normalized_shape, self.weight, self.eps, backend=self.backend)
        return out
