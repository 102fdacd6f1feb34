"""vLLM's out-of-tree KV connector: `kv_connector_module_path` names this package, and `kv_connector` its one class.

Read from `connector.py`: vLLM's hooks, each a line that calls one of two halves. `scheduler.py` decides, in the process
of vLLM's scheduler, what to load and save; `worker.py` moves the bytes, in the process of each rank. Only `connector`
and `stats` import vLLM, and they are imported when vLLM asks for the class: the command line reads `config` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thermocline.engines.vllm.connector import Thermocline

__all__ = ["Thermocline"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # what a module's attribute is, only its name tells
    if name in __all__:
        from thermocline.engines.vllm import connector

        return getattr(connector, name)
    raise AttributeError(f"{__name__} has no {name}")
