"""onnxc makes trained ONNX models smaller and faster, and proves every file that it writes.

    import onnxc
    report = onnxc.quantize("model.onnx", data="calib/", output="model.int8.onnx")

The names below are looked up when first used, so that `import onnxc` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxc.api import QuantizeSettings as QuantizeSettings
    from onnxc.api import analyze as analyze
    from onnxc.api import benchmark as benchmark
    from onnxc.api import calibrate as calibrate
    from onnxc.api import cluster as cluster
    from onnxc.api import compress as compress
    from onnxc.api import factorize as factorize
    from onnxc.api import inspect as inspect
    from onnxc.api import load as load
    from onnxc.api import merge_statistics as merge_statistics
    from onnxc.api import pack as pack
    from onnxc.api import preview as preview
    from onnxc.api import prune as prune
    from onnxc.api import quantize as quantize
    from onnxc.api import run_in_integers as run_in_integers
    from onnxc.api import save as save
    from onnxc.api import sparsify as sparsify
    from onnxc.api import unpack as unpack
    from onnxc.api import validate as validate
    from onnxc.api import write_html as write_html
    from onnxc.errors import ClusterError as ClusterError
    from onnxc.errors import DataError as DataError
    from onnxc.errors import ModelError as ModelError
    from onnxc.errors import OnnxcError as OnnxcError
    from onnxc.errors import OptionError as OptionError

_HOMES = {
    "onnxc.api": (
        *("QuantizeSettings", "analyze", "benchmark", "calibrate", "cluster", "compress"),
        *("factorize", "inspect", "load", "merge_statistics", "pack", "preview", "prune"),
        *("quantize", "run_in_integers", "save", "sparsify", "unpack", "validate", "write_html"),
    ),
    "onnxc.errors": ("ClusterError", "DataError", "ModelError", "OnnxcError", "OptionError"),
}
_EXPORTS = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("onnxc")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'onnxc' has no attribute {name!r}")
    refuse_strangers()
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def refuse_strangers() -> None:
    """Raise ImportError when another package named `passes` or `calib` hides ours."""
    ours = Path(__file__).resolve().parents[1]
    for name in ("passes", "calib"):
        found = _location(name)
        if found is None or not found.is_relative_to(ours / name):
            raise ImportError(
                f"onnxc needs its own package {name!r}, but Python finds {found or 'none'}; "
                f"start from another folder, or use an environment without the other package"
            )


def _location(name: str) -> Path | None:
    spec = find_spec(name)
    if spec is None:
        return None
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return Path(places[0]).resolve() if places else None
