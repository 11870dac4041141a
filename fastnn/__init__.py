"""Hand-written neural network kernels that drop into PyTorch models."""

from ._version import __version__

__all__ = ["__version__"]
