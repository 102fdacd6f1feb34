"""Models by name: a folder, a `config.json`, the hub's cache on this machine, or the table that is shipped.

The table (`data/models.json`) has 58 models with where each number is from. It is for planning; a checkpoint that lies
on this machine is read instead. Nothing is fetched.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec

from thermocline.costs.geometry import Attention, Geometry, State, geometry_of
from thermocline.errors import ModelError

NEAR_NAMES = 3
CONFIG_BYTES_MAX = 16 << 20
HEADER_BYTES_MAX = 100 << 20
"""Of a safetensors file, as its own library bounds it."""

WEIGHTS_FILES_MAX = 4096
UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What fields raise that are not what their names say; msgspec's errors are of the second kind."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


class _Metadata(msgspec.Struct, frozen=True):
    total_size: Annotated[float, msgspec.Meta(gt=0, le=1 << 60)] | None = None


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]
    metadata: _Metadata = _Metadata()


WHOLE = {"F64", "F32", "F16", "BF16"}
"""Types with one parameter per element. Where there are others, elements may hold several, and are not counted."""


def find(model: str) -> Geometry:
    """The geometry of a model: a path to a folder or `config.json`, a model in the hub's cache, or a name of the table.

    Raises ModelError with the nearest names where there is none, for an architecture that is not known, and for files
    that cannot be read.
    """
    path = _on_disk(model)
    if path is not None:
        return _of_folder(path.parent if path.is_file() else path, path if path.is_file() else None)
    cached = _in_hub_cache(model)
    if cached is not None:
        return replace(_of_folder(cached, None), name=model)
    named = {name.lower(): name for name in table()}
    named |= {name.partition("/")[2].lower(): name for name in table()}
    name = named.get(model.lower())
    if name is None:
        near = dict.fromkeys(named[each] for each in difflib.get_close_matches(model.lower(), named, NEAR_NAMES, 0.4))
        meant = f"; near to it are {', '.join(near)}" if near else ""
        raise ModelError(
            f"no model is called {model}: it is no path, not in the hub's cache and not in the table",
            hint=f"give a folder with its config.json, or a name of the table{meant}",
        )
    return _of_row(name, table()[name])


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """The shipped rows by name. A key that is missing does not apply, or is not known."""
    text = resources.files("thermocline.costs").joinpath("data", "models.json").read_bytes()
    rows: dict[str, dict[str, Any]] = msgspec.json.decode(text)["models"]
    return rows


# -- files -------------------------------------------------------------------------------------------------------------


def _on_disk(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, or the home of nobody
        return None


def _in_hub_cache(model: str) -> Path | None:
    """The folder of this model's last fetched revision, where the hub's own library keeps it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    folder = cache / f"models--{model.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    found = folder / "snapshots" / revision
    return found if (found / "config.json").is_file() else None


def _of_folder(folder: Path, config: Path | None) -> Geometry:
    path = config or folder / "config.json"
    fields = _json(path)
    if not isinstance(fields, Mapping):
        raise ModelError(f"{path} is no configuration of a model", hint="give a checkpoint's folder or its config.json")
    beside = folder / "hf_quant_config.json"  # where ModelOpt writes what others put into the config.json
    if "quantization_config" not in fields and beside.is_file():
        told = _json(beside)
        fields = {**fields, "quantization_config": told.get("quantization") if isinstance(told, Mapping) else None}
    found = geometry_of(fields, path.resolve().parent.name)
    weights, total, experts = _weights(folder)
    try:
        chosen, routed = (_first(fields, names) for names in (EXPERTS_CHOSEN, EXPERTS))
    except UNREADABLE as error:
        raise ModelError(
            f"{path} has a number of experts that cannot be read: {error}", hint="give the checkpoint's own config.json"
        ) from None
    idle = int(experts * (1 - chosen / routed)) if experts and chosen and routed else 0
    return replace(
        found,
        source=f"{path}",
        weights_bytes=weights,
        parameters_total=total,
        parameters_active=None if total is None or (experts and not idle) else total - idle,
    )


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k")


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    inner = [each for each in fields.values() if isinstance(each, Mapping)]
    return next((int(each[name]) for each in (fields, *inner) for name in names if each.get(name)), None)


def _json(path: Path) -> Any:  # noqa: ANN401  # whatever JSON holds
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(CONFIG_BYTES_MAX))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", hint="give a folder with config.json, or its path"
        ) from None


def _weights(folder: Path) -> tuple[int | None, int | None, int]:
    """Bytes and parameters of the checkpoint in this folder, and how many of those are in routed experts.

    From the headers of its safetensors files; the index alone has the bytes, where the files are not there. None is
    not known.
    """
    try:
        index = msgspec.convert(_json(folder / "model.safetensors.index.json"), _Index)
        named, said = set(index.weight_map.values()), index.metadata.total_size
    except (ModelError, msgspec.ValidationError):
        named, said = {path.name for path in folder.glob("model*.safetensors")}, None
    total = parameters = experts = 0
    whole = True
    for name in sorted(named)[:WEIGHTS_FILES_MAX] if named else ():
        tensors = _header(folder / Path(name).name)
        if tensors is None:
            return (int(said) if said else None), None, 0
        for tensor, (dtype, elements, size) in tensors.items():
            total += size
            parameters += elements
            whole &= dtype in WHOLE
            experts += elements if ".experts." in tensor else 0
    return (total or None), (parameters if whole and parameters else None), experts


def _header(path: Path) -> dict[str, tuple[str, int, int]] | None:
    """Type, elements and bytes of each tensor of a safetensors file; None where it is not there, or is damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_BYTES_MAX, path.stat().st_size):
                return None
            told = msgspec.json.decode(file.read(length), type=dict[str, Any])
        told.pop("__metadata__", None)
        tensors = msgspec.convert(told, dict[str, _Tensor])
        if any(each.data_offsets[1] < each.data_offsets[0] for each in tensors.values()):
            return None
        return {
            name: (each.dtype, math.prod(each.shape), each.data_offsets[1] - each.data_offsets[0])
            for name, each in tensors.items()
        }
    except (OSError, ValueError, RecursionError):
        return None


# -- the table ---------------------------------------------------------------------------------------------------------


def _of_row(name: str, row: dict[str, Any]) -> Geometry:
    if row["kind"] == "compressed":
        raise ModelError(
            f"{name} compresses old tokens, layer by layer: no figure of bytes per token is right for it",
            hint="measure it: `thermocline profile` asks a running engine",
        )
    key, value = (row.get(f"query_head_dim_{side}", row.get(f"head_dim_{side}", 0)) for side in "kv")
    layers = row.get("state_layers")
    return Geometry(
        name=name,
        model_type=row.get("model_type", ""),
        hidden_size=row["hidden_size"],
        layers=row["layers"],
        query_heads=row["query_heads"],
        query_head_dim=(key + value) // 2,
        attention=_attention(row),
        state=State(layers, row["state_elements_per_layer"], row["conv_elements_per_layer"]) if layers else None,
        parameters_total=row.get("parameters_total"),
        parameters_active=row.get("parameters_active"),
        weights_bytes=None,
        context_tokens=row.get("max_position_tokens"),
        kv_dtype="bf16",
        source=f"the table of models ({row['src']})",
        weights_dtype=row.get("weights_dtype", "bf16"),
    )


def _attention(row: dict[str, Any]) -> tuple[Attention, ...]:
    if "mla_latent_elements" in row:
        index = row.get("index_bytes_per_token_per_layer", 0)
        latent = row["mla_latent_elements"]
        return (Attention(row["linear_layers"], 0, 0, 0, latent_elements=latent, index_bytes=index),)
    full = Attention(row["linear_layers"], row["kv_heads"], row["head_dim_k"], row["head_dim_v"])
    if "window_layers" not in row:
        return (full,)
    sizes = row["window_kv_heads"], row["window_head_dim_k"], row["window_head_dim_v"]
    return full, Attention(row["window_layers"], *sizes, row["window_tokens"], chunked=row["kind"] == "chunked")
