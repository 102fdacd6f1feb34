"""The built-in model is the same everywhere, and made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from thermocline.engines import tiny
from thermocline.engines.models import Model, weights_digest

DIGEST = "232f4940ac4ddc8b5b3d3a2461f089df"


def test_weights_are_the_same_on_every_machine(model: Model) -> None:
    """The digest over all weights is the recorded one: no library's random numbers have a part in them."""
    assert weights_digest(model.module, with_config=False).hex() == DIGEST


def test_the_tokenizer_has_all_entries_and_loses_nothing(tiny_folder: Path) -> None:
    """Its 4,096 entries come from texts that ship with the package, and any text survives the way there and back."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert len(tokenizer) == tiny.VOCABULARY
    assert sum(map(len, tiny.texts())) > 20_000
    for text in (*tiny.texts(), "Grüße, 世界! 🌊\t\x00\r\n  two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_is_made_once(tiny_folder: Path) -> None:
    """A second start finds the files and touches nothing."""
    before = {path: path.stat().st_mtime_ns for path in tiny_folder.iterdir()}
    assert tiny.ensure() == tiny_folder == tiny.folder()
    assert {path: path.stat().st_mtime_ns for path in tiny_folder.iterdir()} == before
    assert not any("pickle" in path.suffix or path.suffix in {".bin", ".pt"} for path in before)


def test_a_broken_attempt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When making it fails half-way, no folder appears, and nothing is left beside it."""

    def fail(path: Path) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr(tiny, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.ensure(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_two_at_a_time_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process was quicker, its files are used, and ours vanish."""

    def overtaken(path: Path) -> None:
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "config.json").write_text("theirs")
        (path / "config.json").write_text("ours")

    monkeypatch.setattr(tiny, "_write", overtaken)
    assert tiny.ensure(tmp_path / "tiny").joinpath("config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
