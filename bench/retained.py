"""The limit for a first token: plain transformers with a cache that never left the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from bench.harness import CLOCK
from thermocline.engines import tiny


class Retained:
    """A model of its own, with transformers' own attention, and one kept cache per prompt."""

    def __init__(self, source: str) -> None:
        self._module = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True).eval()
        self._kept: list[tuple[torch.Tensor, DynamicCache]] = []

    @classmethod
    @contextlib.contextmanager
    def of(cls, model: str) -> Iterator[Retained]:
        """One for the model of this name; in its context nothing records gradients."""
        with torch.inference_mode():
            yield cls(str(tiny.ensure()) if model == tiny.NAME else model)

    def keep(self, prompt: np.ndarray, known: int) -> None:
        """Compute the first `known` tokens and keep their cache, as the next number."""
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        cache = DynamicCache(config=self._module.config)
        self._forward(ids[:, :known], cache)
        self._kept.append((ids[:, known:], cache))

    def ask(self, number: int) -> dict[str, Any]:
        """Compute what is new of a prompt, choose the most likely token; then forget it again, off the clock."""
        new, cache = self._kept[number]
        started = CLOCK.now()
        token = int(self._forward(new, cache).argmax())
        seconds = CLOCK.now() - started
        cache.crop(-new.shape[1])
        return {"seconds": seconds, "token": token}

    def _forward(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        output = self._module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits
