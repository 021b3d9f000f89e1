"""Doctests of the modules that import triton are left out where it is not installed."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = [
        "ca3d_kernels/*/triton*.py",
        "ca3d_kernels/triton_compile.py",
        "ca3d_kernels/problems.py",
    ]
