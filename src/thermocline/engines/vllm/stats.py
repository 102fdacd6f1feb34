"""The connector's counters: from the scheduler's half, through vLLM, to its Prometheus page and its log."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

PREFIX = "vllm:thermocline_"
METRICS = {
    "loaded_tokens": ("tier", "Prompt tokens that were loaded, verified and used instead of computed."),
    "failed_loads": ("reason", "Loads of which a block was not intact or in time: their prompts were computed."),
    "asked_blocks": ("", "Blocks of prompts that the node was asked for."),
    "saved_blocks": ("", "Blocks that the node took in, on all ranks."),
    "dropped_blocks": ("reason", "Blocks that were offered and not taken in; they may have been offered again."),
    "hints_refused": ("", "Requests whose kv_transfer_params were malformed."),
}
"""Every counter with its label, if it has one."""


class TransferStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What was counted in an interval: `data` maps "name" or "name/label" to a number."""

    @classmethod
    def counted(cls, counts: dict[tuple[str, str], int]) -> TransferStats:
        """From the scheduler's counts."""
        return cls({f"{name}/{label}" if label else name: count for (name, label), count in counts.items()})

    def reset(self) -> None:
        """Begin another interval."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another interval."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the log shows."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """True where nothing was counted."""
        return not self.data


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # as above
    """The counters on vLLM's Prometheus page."""

    def __init__(self, *config: Any) -> None:  # noqa: ANN401  # vLLM's four, unread here
        super().__init__(*config)
        self._counters: dict[str, Any] = {
            name: self._counter_cls(
                name=PREFIX + name, documentation=doc, labelnames=[*self._labelnames, *([label] if label else [])]
            )
            for name, (label, doc) in METRICS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval of one engine."""
        for key, count in transfer_stats_data.items():
            name, _, label = key.partition("/")
            values = [*self.per_engine_labelvalues[engine_idx], *([label] if METRICS[name][0] else [])]
            self._counters[name].labels(*values).inc(count)
