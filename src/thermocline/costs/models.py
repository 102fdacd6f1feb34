"""Models by name: a folder, a `config.json`, the hub's cache on this machine, or the table that is shipped.

The table (`data/models.json`) has 58 models with where each number is from. It is for planning; a checkpoint that lies
on this machine is read instead.
"""

from __future__ import annotations

import difflib
import functools
from importlib import resources
from typing import Any

import msgspec

from thermocline.costs.geometry import Attention, Geometry, State
from thermocline.errors import ModelError

NEAR_NAMES = 3


def find(model: str) -> Geometry:
    """The geometry of a model that is named. Raises ModelError with the nearest names where there is none."""
    named = {name.lower(): name for name in table()}
    named |= {name.partition("/")[2].lower(): name for name in table()}
    name = named.get(model.lower())
    if name is None:
        near = sorted({named[each] for each in difflib.get_close_matches(model.lower(), named, NEAR_NAMES, 0.4)})
        meant = f"; near to it are {', '.join(near)}" if near else ""
        raise ModelError(
            f"no model is called {model}",
            hint=f"give a folder with a config.json, or a name of the table{meant}",
        )
    return _geometry(name, table()[name])


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """The shipped rows by name. A key that is missing does not apply, or is not known."""
    text = resources.files("thermocline.costs").joinpath("data", "models.json").read_bytes()
    rows: dict[str, dict[str, Any]] = msgspec.json.decode(text)["models"]
    return rows


def _geometry(name: str, row: dict[str, Any]) -> Geometry:
    if row["kind"] == "compressed":
        raise ModelError(
            f"{name} compresses old tokens, layer by layer: no figure of bytes per token is right for it",
            hint="measure it: `thermocline profile` asks a running engine",
        )
    attention = _attention(row)
    key, value = row.get("query_head_dim_k", row.get("head_dim_k")), row.get("query_head_dim_v", row.get("head_dim_v"))
    return Geometry(
        name=name,
        model_type=row.get("model_type", ""),
        hidden_size=row["hidden_size"],
        layers=row["layers"],
        query_heads=row["query_heads"],
        query_head_dim=(key + value) // 2,
        attention=attention,
        state=_state(row),
        parameters_total=row.get("parameters_total"),
        parameters_active=row.get("parameters_active"),
        weights_bytes=None,
        context_tokens=row.get("max_position_tokens"),
        kv_dtype="bf16",
        source=f"the table of models: {row['src']}",
    )


def _attention(row: dict[str, Any]) -> tuple[Attention, ...]:
    latent = row.get("mla_latent_elements", 0)
    groups = [
        Attention(
            row["linear_layers"],
            *((0, 0, 0) if latent else (row["kv_heads"], row["head_dim_k"], row["head_dim_v"])),
            latent_elements=latent,
            index_bytes=row.get("index_bytes_per_token_per_layer", 0),
        )
    ]
    if row.get("window_layers"):
        groups.append(
            Attention(
                row["window_layers"],
                row["window_kv_heads"],
                row["window_head_dim_k"],
                row["window_head_dim_v"],
                row["window_tokens"],
                chunked=row["kind"] == "chunked",
            )
        )
    return tuple(groups)


def _state(row: dict[str, Any]) -> State | None:
    layers = row.get("state_layers")
    return State(layers, row["state_elements_per_layer"], row["conv_elements_per_layer"]) if layers else None
