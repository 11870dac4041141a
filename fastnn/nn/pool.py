"""Pooling."""

from typing import Any

from torch import Tensor, nn

from .. import functional as F


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
