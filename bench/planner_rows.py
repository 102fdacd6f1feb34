"""The measured rows that aiconfigurator's package ships (`silicon_sample.csv`), as what our planner is asked.

Each row is a load test: so many users at a time on one server, prompts and answers of one length, and the typical time
to a first token and between tokens. Three readings of the file are ours, and said wherever its figures are shown:

- Where `tp_size` is the square of `moe_tp_size` = `moe_ep_size` (64 for 8 and 8), it counts each rank twice; the names
  of the rows say "tp8_ep8" (of four rows with 2 and 2 they say otherwise). The same for `attention_dp_size`, and where
  `tp_size` = `attention_dp_size` > 1.
- Users of one server are `batch_size` times `attention_dp_size`: where the named concurrency is a multiple of that, it
  is of several servers.
- KV is taken to be kept in fp8 where weights are fp8 or fp4; no column says it.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thermocline.costs.hardware import accelerator, element_bytes
from thermocline.costs.memory import Taken, capacity, sequence_bytes
from thermocline.costs.models import find
from thermocline.costs.roofline import Setup
from thermocline.costs.served import Load
from thermocline.errors import ThermoclineError

FILE = Path("aiconfigurator_core", "systems", "silicon_sample.csv")
SEED, SAMPLE, ASKED = 20261122, 500, 200
"""So many rows are predicted, and the first of them asked of the peer too. Nothing is fitted to them or their like."""

MODELS = {
    "DeepSeek-R1": "deepseek-ai/DeepSeek-R1",
    "DeepSeek-R1-NVFP4": "deepseek-ai/DeepSeek-R1",
    "DeepSeek-V3": "deepseek-ai/DeepSeek-R1",
    "DeepSeek-V3.1-NVFP4": "deepseek-ai/DeepSeek-R1",
    "GLM-5": "zai-org/GLM-5",
    "Kimi-K2.5": "moonshotai/Kimi-K2.5",
    "Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B",
    "Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
    "MiniMax-M2.5": "MiniMaxAI/MiniMax-M2.5",
    "Qwen3-235B-A22B-FP8": "Qwen/Qwen3-235B-A22B",
    "Qwen3-32B": "Qwen/Qwen3-32B",
    "Qwen3-32B-NVFP4": "Qwen/Qwen3-32B",
    "Qwen3.5-397B-A17B": "Qwen/Qwen3.5-397B-A17B",
    "gpt-oss-120b": "openai/gpt-oss-120b",
}
ACCELERATORS = {
    "b200_sxm": "B200-SXM",
    "b300_sxm": "B300-SXM",
    "gb200": "GB200",
    "gb300": "GB300",
    "h100_sxm": "H100-SXM",
    "h200_sxm": "H200-SXM",
}
RANKS_MAX = {"gb200": 4, "gb300": 4}
"""Accelerators of one machine; beyond, the links between machines count, which are not in our table."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured row. `refused` says why it cannot be predicted; else `setup` and `load` say what is asked."""

    raw: dict[str, str]
    key: str
    engine: str
    first_seconds: float
    between_seconds: float
    setup: Setup | None
    load: Load | None
    refused: str

    @property
    def place(self) -> str:
        """Model, accelerator, engine and dtype."""
        assert self.setup is not None
        return f"{self.setup.geometry.name}|{self.setup.accelerator.name}|{self.engine}|{self.setup.weights_dtype}"


def read(folder: Path) -> list[Row]:
    """All rows of the package that lies in `folder`."""
    with (folder / FILE).open(newline="") as file:
        return [_row(raw) for raw in csv.DictReader(file)]


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The sample, and what may be fitted to: no row there is of a model, machine, lengths and users in the sample.

    Many measurements are in the file more than once, under other names; those would be known answers.
    """
    sample = random.Random(SEED).sample(list(rows), SAMPLE)  # noqa: S311  # a fixed choice, no secret
    known = {row.key for row in sample}
    return sample, [row for row in rows if row.key not in known]


def ranks(raw: dict[str, str]) -> tuple[int, int]:
    """Tensor-parallel ranks and groups of them with their own sequences."""
    tp, dp, moe_tp, ep = (_int(raw, name) for name in ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"))
    if moe_tp == ep > 1 and tp * dp == moe_tp * ep:
        return (moe_tp, 1) if tp > 1 else (1, moe_tp)
    return (1, dp) if tp == dp > 1 else (tp, dp)


def _int(raw: dict[str, str], name: str) -> int:
    return max(1, int(float(raw[name] or 0)))


def _row(raw: dict[str, str]) -> Row:
    model = raw["model_path"].rpartition("/")[2]
    named = MODELS.get(model, model)
    shape = [raw[name] for name in ("system", "backend", "precision", "mode", "isl", "osl")]
    shape += [raw[name] for name in raw if name.startswith(("prefill_", "decode_"))]
    tp, dp = ranks(raw)
    users = _int(raw, "batch_size") * _int(raw, "attention_dp_size")
    key = "|".join([named, *shape, str(users), str(tp * dp)])
    times = (float(raw[name]) / 1e3 for name in ("silicon_ttft_ms", "silicon_tpot_ms"))
    asked = _asked(raw, named)
    refused = asked if isinstance(asked, str) else ""
    setup, load = (None, None) if isinstance(asked, str) else asked
    return Row(raw, key, raw["backend"], *times, setup, load, refused)


def _asked(raw: dict[str, str], model: str) -> tuple[Setup, Load] | str:
    if raw["mode"] != "agg":
        return "prefill and decode on different machines: not modelled"
    tp, dp = ranks(raw)
    if tp * dp > RANKS_MAX.get(raw["system"], 8):
        return "more ranks than one machine has: links between machines are not modelled"
    try:
        geometry = find(model)
    except ThermoclineError as error:
        return error.message
    if geometry.query_heads % tp:
        return "heads cannot be split over so many ranks"
    device, dtype = accelerator(ACCELERATORS[raw["system"]]), raw["precision"] or "bf16"
    kv = "fp8" if dtype in {"fp8", "fp4"} else "bf16"
    setup = Setup(geometry, device, tp, dtype, kv, dp=dp, ep=_int(raw, "moe_ep_size"))
    prompt, output = _int(raw, "isl"), _int(raw, "osl")
    users = _int(raw, "batch_size") * _int(raw, "attention_dp_size")
    room = _room(setup, prompt + output // 2)
    if room < 1:
        return "the weights do not fit on the ranks that are named"
    return setup, Load(users, prompt, output, room)


def _room(setup: Setup, tokens: int) -> float:
    """Sequences that fit, at their mean length."""
    geometry = setup.geometry
    weights = int((geometry.parameters_total or 0) * element_bytes(setup.weights_dtype))
    fits = capacity(
        geometry,
        setup.accelerator.memory_bytes,
        tp=setup.ranks,
        weights=weights,
        kv_dtype=setup.kv_dtype,
        taken=Taken(other_bytes=0),
    )
    return setup.dp * fits.kv_bytes / sequence_bytes(geometry, tokens, setup.kv_dtype, tp=setup.tp)
