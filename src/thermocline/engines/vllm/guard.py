"""The second law at vLLM's hooks: whatever goes wrong in one of them is told, and the request goes on without us."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

LOG = logging.getLogger("thermocline.vllm")
P = ParamSpec("P")
T = TypeVar("T")


def guarded(fallback: Callable[[], Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A hook that answers with what `fallback` gives where it would have raised: an engine would end by that."""

    def guard(hook: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(hook)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return hook(*args, **kwargs)
            except Exception:
                LOG.exception("thermocline failed in %s; requests go on without it", hook.__name__)
                instead: T = fallback()
                return instead

        return call

    return guard
