"""Which weights an engine computes with: a digest of a model's files that reads a bounded number of bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from thermocline.errors import ModelError

READ_BYTES_MAX = 1 << 30
CHUNK_BYTES = 64 << 10
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt")


def digest_of_files(model: str, revision: str | None, *more: str) -> bytes:
    """16 bytes over names, sizes and contents of a model's files, and over `more` texts that say how they are used.

    Up to a GiB is read whole. Of more, 64 KiB at equal distances are read, a GiB in sum, with the beginning and the end
    of every file: training a model anew, or tuning one of its large matrices, changes numbers all over a file. What
    changes less than one such distance of a file of the same size can be missed. Raises ModelError where the files are
    not on this machine.
    """
    files = model_files(model, revision)
    sizes = [path.stat().st_size for path in files]
    distance = max(1, -(-sum(sizes) // READ_BYTES_MAX)) * CHUNK_BYTES
    digest = hashlib.sha256()
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for at in _offsets(size, distance):
                file.seek(at)
                digest.update(file.read(CHUNK_BYTES))
    return _with(digest.digest(), *more)


def digest_of_dummies(seed: int, *more: str) -> bytes:
    """16 bytes for weights that vLLM makes up by itself (`--load-format dummy`): it makes the same ones each time."""
    return _with(hashlib.sha256(f"dummy {seed}".encode()).digest(), *more)


def model_files(model: str, revision: str | None = None) -> list[Path]:
    """The files of a model's weights, and of how they are used, by name. Raises ModelError where there are none."""
    path = Path(model)
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else _downloaded(model, revision)
    found = [each for each in sorted(folder.rglob("*")) if _matters(each)] if folder else []
    if not any(each.suffix in _WEIGHTS for each in found):
        raise ModelError(
            f"the files of {model} are not on this machine, so its weights cannot be told from others",
            hint="give --model a folder, or a hub model that vLLM has downloaded",
        )
    return found


def _matters(path: Path) -> bool:
    name = path.name
    return path.is_file() and (path.suffix in _WEIGHTS or name == "config.json" or "quant" in name)


def _downloaded(model: str, revision: str | None) -> Path | None:
    """Where the hub's client keeps a model that was downloaded."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(os.fspath(found)).parent if isinstance(found, str) else None


def _offsets(size: int, distance: int) -> Sequence[int]:
    steps = list(range(0, size, distance))
    last = max(0, size - CHUNK_BYTES)
    return [*steps, last] if steps and distance > CHUNK_BYTES else steps


def _with(digest: bytes, *more: str) -> bytes:
    for text in more:
        digest = hashlib.sha256(digest + text.encode()).digest()
    return digest[:16]
