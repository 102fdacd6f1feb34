"""The built-in model: made on the spot, the same on every machine, and meaningless.

Its weights are random numbers, so its text is gibberish. What it is good for: everything that a cache must get right
(same shapes, same cost profile, same dependence of every token on all earlier ones) without a download.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME = "tiny"
VERSION = 1
"""Raise it when anything below changes what is built."""

SEED = 0
VOCABULARY = 4096
BEGIN, END = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
QUERY_KEY_GAIN = 2.0
"""Makes attention pick few tokens instead of averaging all, so that a single wrong block changes the answer."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def folder() -> Path:
    """Where the model lies once it was made: one folder per version in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "thermocline" / f"{NAME}-{VERSION}"


def ensure(path: Path | None = None) -> Path:
    """Make the model unless it is there already. The folder appears whole or not at all; some 60 MB, a few seconds."""
    path = path or folder()
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write(work)
        work.rename(path)
    except OSError:
        if not path.is_dir():  # otherwise another process was quicker, and made the same
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _write(path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    weights = {
        name: torch.from_numpy(_weights(name, shape, at)).to(torch.bfloat16)
        for at, (name, shape) in enumerate(sorted(shapes.items()))
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(path)
    _write_tokenizer(path)
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))


def _weights(name: str, shape: tuple[int, ...], at: int) -> NDArray[np.float32]:
    """Roughly normal numbers from raw random bits and exact arithmetic: no library's sampler has a say in them."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    bits = np.random.PCG64([SEED, at]).random_raw(math.prod(shape))
    sums = np.asarray(bits).view(np.uint16).reshape(*shape, 4).sum(axis=-1, dtype=np.int64)
    gain = QUERY_KEY_GAIN if "q_proj" in name or "k_proj" in name else 1.0
    fan_in = 1 if "embed" in name else shape[1]
    deviation_of_sum = 2.0**16 * math.sqrt(4 / 12)
    numbers: NDArray[np.float32] = ((sums - 2 * 0xFFFF) * (gain / (deviation_of_sum * math.sqrt(fan_in)))).astype("f4")
    return numbers


def texts() -> list[str]:
    """The texts that ship with the package, in the order of their names."""
    found = (entry for entry in (resources.files(__package__) / "texts").iterdir() if entry.name.endswith(".txt"))
    return [entry.read_text(encoding="utf-8") for entry in sorted(found, key=lambda entry: entry.name)]


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, chat_template=CHAT_TEMPLATE
    )  # type: ignore[no-untyped-call]  # transformers types some of its classes only
    fast.save_pretrained(path)
