"""Activations and dropout."""

from torch import Tensor, nn

from .. import functional as F


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


class Dropout(nn.Dropout):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace, backend=self.backend)
