"""The one door to torchvision, for every built-in workload that needs it.

A CPU build of torch may stand beside a CUDA build of torchvision: that is what pip picks on some
machines. Torchvision's compiled extension then does not load, its operators do not exist, and
`import torchvision` fails with "operator torchvision::nms does not exist", because the package
attaches shape functions to two of them. Declaring those two operators, without code behind them,
lets the import through. Models, transforms and data sets work; box operators do not.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from importlib.machinery import PathFinder
from types import ModuleType

import torch

__all__ = ["import_vision"]

_DECLARATIONS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_lock = threading.Lock()
# torch withdraws the declarations when their Library is collected.
_declared: torch.library.Library | None = None


def import_vision(submodule: str) -> ModuleType:
    """Imports `torchvision.<submodule>`, such as "transforms.v2", also without its extension.

    Raises:
        ImportError: torchvision is not installed or does not fit this torch.
    """
    with _lock:
        if "torchvision" not in sys.modules:
            _forget_failed_import()
            if not _load_extension():
                _declare_operators()
        return importlib.import_module(f"torchvision.{submodule}")


def _forget_failed_import() -> None:
    # Python drops a package whose import failed but keeps its submodules; imported again, the
    # package would lack them as attributes.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]


def _load_extension() -> bool:
    # Finding the package does not run it, so the outcome is known before its import is tried.
    package = importlib.util.find_spec("torchvision")
    if package is None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True


def _declare_operators() -> None:
    global _declared
    missing = [name for name in _DECLARATIONS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _declared.define(_DECLARATIONS[name])
