"""Small hot values in this process, alone or in front of Redis, whose client is loaded only when asked for."""

from __future__ import annotations

import importlib
from typing import Any

from thermocline.near.cache import Cache, CacheStats, Entry

__all__ = ["Cache", "CacheStats", "Entry"]

_FILES = {
    "embeddings": "Answer Answers Chunks Embeddings Found Results Scope Similar SimilarStats",
    "options": "Options Under",
    "question": "Change Question Space",
    "redis": "Redis",
    "redis_async": "AsyncRedis",
    "routes": "Routes Table",
    "sessions": "Sessions Turn",
    "state": "AsyncState LocalState Prefetched State StateStats",
}
_LATER = {name: file for file, names in _FILES.items() for name in names.split()}
"""Names that need more than the standard library, and the file that each comes from."""


def __getattr__(name: str) -> Any:  # noqa: ANN401  # the attribute of a module
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
