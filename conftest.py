"""Doctests: each module is loaded once; those that import triton only where it is installed."""

import importlib.util

# pytest runs a module that is not loaded yet once more than its package does, and the second copy
# of `backends` would know none of the ops.
import ca3d_kernels  # noqa: F401

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = [
        "ca3d_kernels/*/triton*.py",
        "ca3d_kernels/triton_compile.py",
        "ca3d_kernels/problems.py",
    ]
