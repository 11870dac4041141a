"""The kernels. Their files are in the top-level folder ``kernels/``, which has no ``__init__.py`` because a top-level
package of that name exists on PyPI. An installed wheel holds them here; in a checkout this package also looks there.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if _checkout.is_dir() and (_checkout.parent / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
