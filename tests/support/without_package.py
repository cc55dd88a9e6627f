"""Programs that are given away with a network, run as where this package is not installed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest


def run_without_package(path: Path) -> dict[str, Any]:
    """Runs a file of Python in this process, where every import of the package fails.

    Returns:
        The names that it has defined.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        for name in ["gbp_ray", *sys.modules]:
            if name == "gbp_ray" or name.startswith("gbp_ray."):
                patch.setitem(sys.modules, name, None)
        return runpy.run_path(str(path))
