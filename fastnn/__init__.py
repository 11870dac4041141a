"""Hand-written neural network kernels that drop into PyTorch models.

``fastnn.replace(model)`` switches a model's layers to fastnn's, ``fastnn.fuse(model)`` folds away what inference does not
need; ``fastnn.functional`` and ``fastnn.nn`` are torch.nn.functional and torch.nn served by fastnn; ``with fastnn.use():``
serves torch's own calls. ``fastnn.trace()`` shows what served each call and why; ``fastnn.backend(name)`` chooses it.
"""

from . import functional, nn
from ._version import __version__
from .backends import backend, set_float32_precision, trace
from .fuse import fuse
from .kv_cache import KVCache
from .replace import replace, restore, use

__all__ = [
    "KVCache",
    "__version__",
    "backend",
    "functional",
    "fuse",
    "nn",
    "replace",
    "restore",
    "set_float32_precision",
    "trace",
    "use",
]
