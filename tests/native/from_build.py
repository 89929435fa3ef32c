"""A plugin of pytest: kernels of another build, in the folder PENSTOCK_NATIVE_BUILD, in place of the installed ones."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

(_path,) = Path(os.environ["PENSTOCK_NATIVE_BUILD"]).glob("_native.*.so")
_spec = importlib.util.spec_from_file_location("penstock.kernels._native", _path)
assert _spec is not None and _spec.loader is not None
sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_spec.name])


def pytest_report_header() -> str:
    return f"native kernels: {_path}, {', '.join(sys.modules[_spec.name].usable())}"
