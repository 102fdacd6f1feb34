"""Weights' digests: trained anew they have another one, told from a bounded number of bytes."""

from __future__ import annotations

import numpy as np
import pytest

from thermocline.engines.vllm import weights
from thermocline.engines.vllm.weights import digest_of_dummies, digest_of_files
from thermocline.errors import ModelError


@pytest.fixture
def model(tmp_path):
    """A model's folder: two files of weights, and others."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.json").write_text("{}")
    for at in range(2):
        (folder / f"model-{at}.safetensors").write_bytes(np.random.default_rng(at).bytes(700_000))
    return folder


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_same_files_have_the_same_digest(model, tmp_path):
    """A copy in another folder is the same model; what is not of the weights does not matter."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README.md").write_text("other")
    (copy / "tokenizer.json").write_text("other")
    assert digest_of_files(str(copy), None) == digest_of_files(str(model), None)


@pytest.mark.parametrize("name", ["config.json", "model-0.safetensors", "model-1.safetensors"])
@pytest.mark.parametrize("where", [0.0, 0.37, 0.9999])
def test_any_flipped_bit_of_a_small_model_shows(model, name, where):
    """Files of up to a GiB are read whole."""
    before = digest_of_files(str(model), None)
    flip(model / name, int(where * (model / name).stat().st_size))
    assert digest_of_files(str(model), None) != before


def test_of_large_files_samples_are_read(model, monkeypatch):
    """Beyond the bound samples are read: numbers that change all over a file, or at its ends, show all the same."""
    monkeypatch.setattr(weights, "READ_BYTES_MAX", 1 << 17)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1 << 10)
    before = digest_of_files(str(model), None)
    path = model / "model-1.safetensors"
    data = path.read_bytes()
    path.write_bytes(bytes(byte ^ 1 if at % 97 == 0 else byte for at, byte in enumerate(data)))
    trained = digest_of_files(str(model), None)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert len({before, trained, digest_of_files(str(model), None)}) == 3


def test_how_weights_are_used_matters():
    """Texts beside the weights, as of overrides, and the seed of made-up weights make other digests."""
    assert len({digest_of_dummies(0), digest_of_dummies(1), digest_of_dummies(0, "a"), digest_of_dummies(0, "b")}) == 4


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_without_files_there_is_no_digest(tmp_path, name, monkeypatch):
    """A model whose files are not here is refused: its weights could be any."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(weights, "_downloaded", lambda *_: None)
    with pytest.raises(ModelError) as caught:
        digest_of_files(str(tmp_path / name), None)
    assert caught.value.hint
