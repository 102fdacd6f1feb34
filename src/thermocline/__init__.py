"""The KV-cache state layer for LLM serving: keep what a model has computed, find it again, load it exactly.

Five nouns: a `Layout` says what bytes are, keys (`block_keys`) name blocks of tokens, a `Store` keeps blocks in tiers,
a `Plan` says which of them to load, a `Receipt` says what became of one request.

Names load on first use: `import thermocline` itself imports nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which takes longer to import than all of this
if TYPE_CHECKING:
    from thermocline.blocks.key import BlockKey, block_keys, root_key
    from thermocline.blocks.layout import Layout
    from thermocline.build import store_from
    from thermocline.errors import ThermoclineError
    from thermocline.settings import Settings
    from thermocline.store.plan import Plan
    from thermocline.store.receipt import Reason, Receipt
    from thermocline.store.store import Store

__version__ = "0.1.0"

_HOMES = {
    "BlockKey": "thermocline.blocks.key",
    "Layout": "thermocline.blocks.layout",
    "Plan": "thermocline.store.plan",
    "Reason": "thermocline.store.receipt",
    "Receipt": "thermocline.store.receipt",
    "Settings": "thermocline.settings",
    "Store": "thermocline.store.store",
    "ThermoclineError": "thermocline.errors",
    "block_keys": "thermocline.blocks.key",
    "root_key": "thermocline.blocks.key",
    "store_from": "thermocline.build",
}

__all__ = [
    "BlockKey",
    "Layout",
    "Plan",
    "Reason",
    "Receipt",
    "Settings",
    "Store",
    "ThermoclineError",
    "__version__",
    "block_keys",
    "root_key",
    "store_from",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
