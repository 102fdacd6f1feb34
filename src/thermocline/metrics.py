"""Plain counters. The data path adds a number to a dict; a scrape turns the dict into text.

Every metric is declared once, in the table below; counting an undeclared one is a mistake and raises KeyError.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

Labels = tuple[tuple[str, str], ...]
"""Label names and values, in the declared order. Values come from small closed sets: never a key, prompt or user."""

PREFIX = "thermocline_"
SERIES_MAX = 4096
"""More series than this are not made: what would start another one is counted in `series_refused_total`."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One declaration: `name` without the prefix, as `count` and `gauge` take it."""

    name: str
    kind: Literal["counter", "gauge"]
    doc: str
    labels: tuple[str, ...] = ()


_TABLE = (
    Metric("requests_total", "counter", "Requests answered, by HTTP status.", ("route", "status")),
    Metric("requests_in_flight", "gauge", "Requests being answered now."),
    Metric("prompt_tokens_total", "counter", "Tokens of all prompts."),
    Metric("cached_tokens_total", "counter", "Prompt tokens that were loaded instead of computed, by tier.", ("tier",)),
    Metric("generated_tokens_total", "counter", "Tokens generated."),
    Metric("prefill_seconds_total", "counter", "Seconds the engine spent computing prompts."),
    Metric("first_token_seconds_total", "counter", "Seconds from a request's arrival to its first token, summed."),
    Metric("matches_total", "counter", "Questions for the longest held prefix."),
    Metric("match_seconds_total", "counter", "Seconds spent matching and planning."),
    Metric("missing_blocks_total", "counter", "Blocks of prompts that were not loaded, by reason.", ("reason",)),
    Metric("asked_blocks_total", "counter", "Full blocks of the prompts that a node was asked for."),
    Metric("staged_blocks_total", "counter", "Blocks that a node found and put in memory, by tier.", ("tier",)),
    Metric("load_blocks_total", "counter", "Blocks asked of a tier, by outcome.", ("tier", "outcome")),
    Metric("load_bytes_total", "counter", "Bytes loaded and verified.", ("tier",)),
    Metric("load_seconds_total", "counter", "Seconds spent loading.", ("tier",)),
    Metric("save_blocks_total", "counter", "Blocks offered to a tier, by outcome.", ("tier", "outcome")),
    Metric("save_bytes_total", "counter", "Bytes stored.", ("tier",)),
    Metric("evicted_blocks_total", "counter", "Blocks dropped for room or for their age.", ("tier", "reason")),
    Metric("promoted_blocks_total", "counter", "Blocks copied to a warmer tier.", ("tier",)),
    Metric("demoted_blocks_total", "counter", "Blocks copied to a colder tier.", ("tier",)),
    Metric("corrupt_blocks_total", "counter", "Blocks whose bytes did not verify, and were dropped.", ("tier",)),
    Metric("tier_failures_total", "counter", "Operations that a tier failed, beyond single blocks.", ("tier",)),
    Metric("breaker_opened_total", "counter", "Times a tier was set aside after failures.", ("tier",)),
    Metric("breaker_open", "gauge", "1 while a tier is set aside.", ("tier",)),
    Metric("tier_blocks", "gauge", "Blocks held.", ("tier",)),
    Metric("tier_used_bytes", "gauge", "Bytes used, headers and logs included.", ("tier",)),
    Metric("tier_capacity_bytes", "gauge", "The tier's hard limit.", ("tier",)),
    Metric("leases", "gauge", "Plans that protect their blocks now."),
    Metric("receipts_dropped_total", "counter", "Receipts that could not be written to `receipts_path`."),
    Metric("series_refused_total", "counter", "Counts not shown because there are too many series."),
)
DECLARED = {metric.name: metric for metric in _TABLE}
"""Every metric by its name without the prefix."""


class Metrics:
    """The counters of one store or server. Any thread may count; none waits for a scrape."""

    __slots__ = ("_lock", "_series")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[tuple[str, Labels], float] = {}

    def count(self, name: str, value: float = 1.0, labels: Labels = ()) -> None:
        """Add `value` to a counter (or to a gauge that goes up and down)."""
        with self._lock:
            series = self._find(name, labels)
            self._series[series] = self._series.get(series, 0.0) + value

    def gauge(self, name: str, value: float, labels: Labels = ()) -> None:
        """Set a gauge."""
        with self._lock:
            self._series[self._find(name, labels)] = value

    def value(self, name: str, labels: Labels = ()) -> float:
        """What was counted so far; 0.0 for what never was."""
        return self._series.get((name, labels), 0.0)

    def text(self) -> str:
        """Everything counted so far, in the Prometheus text format."""
        with self._lock:
            series = sorted(self._series.items())
        lines: list[str] = []
        shown = ""
        for (name, labels), value in series:
            if name != shown:
                shown = name
                metric = DECLARED[name]
                lines += [f"# HELP {PREFIX}{name} {metric.doc}", f"# TYPE {PREFIX}{name} {metric.kind}"]
            lines.append(f"{PREFIX}{name}{_braces(labels)} {value:.17g}")
        return "\n".join(lines) + "\n" if lines else ""

    def _find(self, name: str, labels: Labels) -> tuple[str, Labels]:
        series = (name, labels)
        if series in self._series:
            return series
        metric = DECLARED[name]
        if tuple(label for label, _ in labels) != metric.labels:
            raise KeyError(f"{name} has the labels {metric.labels}, not {labels}")
        return series if len(self._series) < SERIES_MAX else ("series_refused_total", ())


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{label}="{_escape(value)}"' for label, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
