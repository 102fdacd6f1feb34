"""Plain counters. The data path adds a number to a dict; a scrape turns the dict into text.

Every metric is declared once, in the table below; counting an undeclared one is a mistake and raises KeyError.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

Labels = tuple[tuple[str, str], ...]
"""Label names and values, in the declared order. Values come from small closed sets: never a key, prompt or user."""

PREFIX = "thermocline_"
BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Of the histograms. One more bucket holds what is longer."""
SERIES_MAX = 4096
"""More series than this are not made: what would start another one is counted in `series_refused_total`."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One declaration: `name` without the prefix, as `count`, `gauge` and `observe` take it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
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
    Metric("tier_idle_seconds", "gauge", "Since the last use of the block that would leave next.", ("tier",)),
    Metric("reuse_gap_max_seconds", "gauge", "The longest time after which held blocks were used again."),
    Metric("ttl_seconds", "gauge", "Blocks not used for so long expire; not shown where none do."),
    Metric("leases", "gauge", "Plans that protect their blocks now."),
    Metric("leases_expired_total", "counter", "Plans that nobody released until their time was up."),
    Metric("event_batches_total", "counter", "Batches of KV events for routers, by outcome.", ("outcome",)),
    Metric("receipts_dropped_total", "counter", "Receipts that could not be written to `receipts_path`."),
    Metric("routed_total", "counter", "Requests that an instance answered.", ("instance",)),
    Metric("tries_failed_total", "counter", "Tries that came to nothing.", ("instance", "trouble")),
    Metric("retries_total", "counter", "Requests that were tried elsewhere."),
    Metric("decisions_missed_total", "counter", "Requests routed without a decision, as none was made in time."),
    Metric("decisions_by_bytes_total", "counter", "Prompts not tokenised, as that was too much or late.", ("why",)),
    Metric("learning_failed_total", "counter", "Decisions after which the index did not learn what was sent."),
    Metric("first_byte_seconds", "histogram", "Seconds from choosing an instance to its answer's first byte."),
    Metric("answer_seconds", "histogram", "Seconds from a whole request to a whole answer."),
    Metric("routed_cached_tokens_total", "counter", "Prompt tokens that instances say they did not compute."),
    Metric("predicted_cached_tokens_total", "counter", "Of the same requests: what was predicted."),
    Metric("instance_up", "gauge", "1 while an instance may be asked.", ("instance",)),
    Metric("instance_in_flight", "gauge", "Requests that an instance is answering.", ("instance",)),
    Metric("instance_wired", "gauge", "0 while what an instance's events say does not fit.", ("instance",)),
    Metric("events_listening", "gauge", "1 while KV events are listened for."),
    Metric("events_heard_total", "counter", "Batches of KV events, by where and how they fared.", ("stage", "outcome")),
    Metric("index_blocks", "gauge", "Blocks that a gateway remembers, each once."),
    Metric("index_bytes", "gauge", "About what the memory of these takes."),
    Metric("index_evicted_blocks_total", "counter", "Blocks that a gateway forgot for room."),
    Metric("client_connections", "gauge", "Connections of clients."),
    Metric("held_body_bytes", "gauge", "Bytes of request bodies held."),
    Metric("series_refused_total", "counter", "Counts not shown because there are too many series."),
)
DECLARED = {metric.name: metric for metric in _TABLE}
"""Every metric by its name without the prefix."""


class Metrics:
    """The counters of one store or server. Any thread may count; none waits for a scrape."""

    __slots__ = ("_histograms", "_lock", "_series")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._histograms: dict[str, list[float]] = {}
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

    def observe(self, name: str, value: float) -> None:
        """Add one value to a histogram. Histograms have no labels."""
        with self._lock:
            buckets = self._histograms.get(name)
            if buckets is None:
                assert DECLARED[name].kind == "histogram"
                buckets = self._histograms[name] = [0.0] * (len(BOUNDS_SECONDS) + 2)
            buckets[bisect_left(BOUNDS_SECONDS, value)] += 1
            buckets[-1] += value

    def value(self, name: str, labels: Labels = ()) -> float:
        """What was counted so far; 0.0 for what never was."""
        return self._series.get((name, labels), 0.0)

    def text(self) -> str:
        """Everything counted so far, in the Prometheus text format."""
        with self._lock:
            series = sorted(self._series.items())
            histograms = {name: tuple(buckets) for name, buckets in sorted(self._histograms.items())}
        lines: list[str] = []
        shown = ""
        for (name, labels), value in series:
            if name != shown:
                shown = name
                metric = DECLARED[name]
                lines += [f"# HELP {PREFIX}{name} {metric.doc}", f"# TYPE {PREFIX}{name} {metric.kind}"]
            lines.append(f"{PREFIX}{name}{_braces(labels)} {value:.17g}")
        for name, buckets in histograms.items():
            lines += _histogram(DECLARED[name], buckets)
        return "\n".join(lines) + "\n" if lines else ""

    def _find(self, name: str, labels: Labels) -> tuple[str, Labels]:
        series = (name, labels)
        if series in self._series:
            return series
        metric = DECLARED[name]
        if tuple(label for label, _ in labels) != metric.labels:
            raise KeyError(f"{name} has the labels {metric.labels}, not {labels}")
        return series if len(self._series) < SERIES_MAX else ("series_refused_total", ())


def _histogram(metric: Metric, buckets: tuple[float, ...]) -> list[str]:
    name, below = PREFIX + metric.name, 0.0
    lines = [f"# HELP {name} {metric.doc}", f"# TYPE {name} {metric.kind}"]
    for bound, count in zip([*map(str, BOUNDS_SECONDS), "+Inf"], buckets, strict=False):
        below += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {below:.17g}')
    return [*lines, f"{name}_sum {buckets[-1]:.17g}", f"{name}_count {below:.17g}"]


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{label}="{_escape(value)}"' for label, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
