"""The machine under a figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from thermocline.costs.saved import cpu_model

PACKAGES = ("thermocline", "numpy", "xxhash", "msgspec", "torch", "transformers", "tokenizers")


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code: processor, cores, memory, kernel, Python, load, versions."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
