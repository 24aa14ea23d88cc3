"""Collected only where there is a CUDA device; ``nox -s gpu`` fails where there is none."""

import ctypes
import os

# JAX would take three quarters of the device for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def cuda_devices() -> int:
    """Ask the driver, so that no framework need be imported."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


collect_ignore_glob = [] if cuda_devices() else ["test_*.py"]
