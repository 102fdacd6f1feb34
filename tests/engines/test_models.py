"""Which models are served, which are refused, and what makes their blocks incompatible."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from thermocline.engines import models
from thermocline.engines.models import load_model
from thermocline.engines.transformers import Engine
from thermocline.errors import ModelError

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}


@pytest.fixture
def make(tmp_path: Path, tiny_folder: Path) -> Any:
    """Small models of any kind, with random weights and the built-in tokenizer."""

    def make(kind: str, *, dtype: torch.dtype = torch.float32, **options: object) -> Path:
        folder = tmp_path / kind
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, **options)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        auto.from_config(config).to(dtype).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_folder / name, folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "options", "steady"),
    [
        ("llama", SMALL, True),
        ("qwen2", SMALL, True),
        ("qwen3", {**SMALL, "head_dim": 32}, True),
        ("mistral", {**SMALL, "sliding_window": None}, True),
        ("gpt2", {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, True),
        ("gpt_neox", {**SMALL, "num_key_value_heads": None}, True),
        ("bloom", {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4}, False),
    ],
)
def test_decoders_with_plain_caches_are_served(make: Any, kind: str, options: dict[str, Any], steady: bool) -> None:  # noqa: FBT001  # a column
    """Models of many families answer as transformers' own generate does, whatever their attention."""
    folder = make(kind, **options)
    model = load_model(str(folder), threads=1)
    prompt = [(7 * at) % 290 for at in range(50)]
    with closing(Engine(model)) as engine:
        found = engine.generate(prompt, 10).tokens
        assert engine.generate([5], 1).tokens
    own = AutoModelForCausalLM.from_pretrained(folder)
    expected = own.generate(torch.tensor([prompt]), max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert list(found) == expected[0, 50:].tolist()
    assert ("steady" in model.layout.engine_version) is steady
    assert model.name == kind


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("t5", {"vocab_size": 300, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}, "encoder"),
        ("qwen2", {**SMALL, **WINDOW}, "DynamicSlidingWindowLayer"),
        (
            "mamba",
            {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
            "keeps its state in",
        ),
    ],
)
def test_other_models_are_refused(make: Any, kind: str, options: dict[str, Any], words: str) -> None:
    """Encoders, sliding windows and recurrent states are refused by name, before any weight is read."""
    with pytest.raises(ModelError, match=words) as refused:
        load_model(str(make(kind, **options)), threads=1)
    assert "full attention" in refused.value.hint


def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a model, and a name that was never downloaded, are errors that say what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path), str(tmp_path / "nowhere"), "nobody/nothing", "tinny"):
        with pytest.raises(ModelError, match="cannot load the model") as refused:
            load_model(name, threads=1)
        assert "safetensors" in refused.value.hint


def test_pickled_weights_are_refused(make: Any) -> None:
    """A folder that has its weights in torch's pickle format only is not loaded."""
    folder = make("llama", **SMALL)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder), threads=1)


def test_code_that_comes_with_a_model_is_not_run(make: Any) -> None:
    """A model that wants its own code run is refused."""
    folder = make("llama", **SMALL)
    (folder / "evil.py").write_text("raise SystemExit('was run')\nclass C: ...\nclass M: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load_model(str(folder), threads=1)


def test_a_truncated_file_is_refused(make: Any) -> None:
    """Weights that were cut short are an error with a hint, not a crash."""
    folder = make("llama", **SMALL)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder), threads=1)


def test_missing_weights_are_not_made_up(make: Any) -> None:
    """A file that lacks a weight is refused; no random numbers stand in for it."""
    folder = make("llama", **SMALL)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights, model\.norm\.weight"):
        load_model(str(folder), threads=1)


def test_layouts_differ_where_bytes_would(make: Any) -> None:
    """One changed weight, or another meaning of the same weights, is another layout; a moved folder is not."""
    folder = make("llama", **SMALL)
    first = load_model(str(folder), threads=1).layout
    assert first.id == load_model(str(folder), threads=1).layout.id
    assert first.block_bytes == 2 * 2 * 2 * 32 * 16 * 4
    assert (first.layers, first.kv_heads, first.head_dim, first.dtype) == (2, 2, 16, "float32")
    assert load_model(str(folder), threads=1, tokens_per_block=64).layout.id != first.id

    moved = folder.parent / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    assert load_model(str(moved), threads=1).layout.id == first.id
    config = json.loads((moved / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (moved / "config.json").write_text(json.dumps(config))
    assert load_model(str(moved), threads=1).layout.id != first.id

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(folder), threads=1).layout.id != first.id


def test_attention_that_disagrees_is_not_used(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steady attention is taken only where it gives what the model's own gives; else the model's own is kept."""
    folder = make("llama", **SMALL)
    monkeypatch.setattr(models.attention, "STRETCH", 4)  # its masks are wrong now
    monkeypatch.setattr(models.attention._STAIRCASE, "_steps", {})
    monkeypatch.setattr(models.attention, "_widen", lambda states: states * 0)
    assert "own attention" in load_model(str(folder), threads=1).layout.engine_version
