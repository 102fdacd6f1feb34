"""vLLM's connector class: every hook of vLLM 0.32 that matters to a cache, each handed to one of two halves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from thermocline.blocks.layout import Layout
from thermocline.engines.vllm import facts
from thermocline.engines.vllm.config import node_choice
from thermocline.engines.vllm.device import DevicePages, Registered, cuda_register
from thermocline.engines.vllm.guard import guarded
from thermocline.engines.vllm.layout import Span, make_layout, spans_of
from thermocline.engines.vllm.orders import Orders, Report
from thermocline.engines.vllm.pages import GroupPages, HostPages
from thermocline.engines.vllm.private import PrivateNode
from thermocline.engines.vllm.scheduler import Scheduler
from thermocline.engines.vllm.stats import PromMetrics, TransferStats
from thermocline.engines.vllm.worker import Worker
from thermocline.errors import LayoutError, ThermoclineError
from thermocline.node.client import NodeClient

LOG = logging.getLogger("thermocline.vllm")
ROOM_WAIT_SECONDS = 0.05
"""What leaves a sliding window cannot be saved later: a save of it may wait so long for room. Others never wait."""
FOUND_SECONDS, STARTED_SECONDS = 0.5, 15.0
"""How long the start waits for a private node that runs already, and for one that was just started."""
_SOURCES = {"memory": CacheHitSource.HOST, "disk": CacheHitSource.DISK}

Anything = Any
"""Objects of vLLM's: it is not installed where types are checked."""


@dataclass(frozen=True, slots=True)
class StepOrders(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """From the scheduler to all workers, with every step."""

    orders: Orders


@dataclass(frozen=True, slots=True)
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]  # as above
    """From a worker to the scheduler, with a step's result."""

    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Those of two workers as one."""
        return StepReport(self.report.joined(other.report))


@dataclass(frozen=True, slots=True)
class RankLayouts(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # as above
    """From a worker to the scheduler, once: its layouts, one per KV group, as msgpack."""

    layouts: bytes


class Thermocline(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # as above
    """Finds the beginnings of prompts in a node's tiers, and keeps there what vLLM computed.

    vLLM makes one in the scheduler's process and one in each worker's. What it cannot serve exactly it refuses here, at
    the start; once it runs, no failure of the cache reaches a request.
    """

    def __init__(self, vllm_config: Anything, role: KVConnectorRole, kv_cache_config: Anything) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._node: PrivateNode | None = None
        self._client: NodeClient | None = None
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._layouts: list[Layout] = []
        try:
            self._start()
        except ThermoclineError as error:
            LOG.error("%s; hint: %s", error.message, error.hint)  # noqa: TRY400  # vLLM shows where
            raise

    def _start(self) -> None:
        config = self._vllm_config
        facts.check(config, self._kv_cache_config)
        transfer = config.kv_transfer_config
        choice = node_choice(transfer.kv_connector_extra_config)
        if not facts.is_of_use(config):
            return
        tokens = facts.tokens_per_block(self._kv_cache_config)
        self._save_blocks_max = -(-config.scheduler_config.max_num_batched_tokens // tokens) + 1
        if self.role is KVConnectorRole.WORKER:
            wait = ROOM_WAIT_SECONDS if facts.has_windows(self._kv_cache_config) else 0.0
            self._client = NodeClient(choice.socket, role="vllm worker", save_wait_seconds=wait)
            self._worker = Worker()
            return
        client = self._client = NodeClient(choice.socket, role="vllm scheduler")
        if choice.settings is not None:
            client.wait_up(FOUND_SECONDS)
            self._node = PrivateNode(choice, lambda: client.up)
            client.wait_up(STARTED_SECONDS)
        self._scheduler = Scheduler(
            self._client,
            tokens_per_block=tokens,
            save_blocks_max=self._save_blocks_max,
            may_load_at_once=not config.scheduler_config.async_scheduling,
        )

    # -- what vLLM asks of the class -----------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what was not saved is computed again."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferStats:
        """See vLLM: in the process of the API server."""
        return TransferStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Anything,
        metric_types: Anything,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """See vLLM: in the process of the API server."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- the worker's half ---------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, Anything]) -> None:
        """The tensors are there: find out where blocks lie, and what makes their bytes what they are."""
        if self._worker is None or self._client is None:
            return
        config, tensors = self._vllm_config, self._kv_cache_config
        parallel = config.parallel_config
        tp_rank, pp_rank = get_tp_group().rank_in_group, get_pp_group().rank_in_group
        engine = facts.engine_of(config, tensors, version=vllm.__version__, tp_rank=tp_rank, pp_rank=pp_rank)
        modules, regions, registered = facts.layers_of(config), facts.Regions(), Registered(cuda_register)
        pages: list[GroupPages] = []
        for number, group in enumerate(tensors.kv_cache_groups):
            specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
            layers = [
                facts.layer_memory(
                    name,
                    kv_caches[name],
                    specs.get(name, group.kv_cache_spec),
                    modules.get(name),
                    regions,
                    tensors.num_blocks,
                )
                for name in group.layer_names
            ]
            spec = facts.specs_of(group)[0]
            layout = make_layout(
                engine,
                layers,
                group=number,
                tokens_per_block=group.kv_cache_spec.block_size,
                kv_heads=spec.num_kv_heads,
                head_dim=spec.head_size,
            )
            pages.append(_pages(self._client, layout, spans_of(layers), regions, registered))
            self._client.ready(layout, -(-self._save_blocks_max // len(tensors.kv_cache_groups)))
        self._layouts = [each.layout for each in pages]
        self._worker.register(pp_rank * parallel.tensor_parallel_size + tp_rank, pages)

    def get_handshake_metadata(self) -> RankLayouts | None:
        """The layouts of this rank, once its tensors are registered."""
        return RankLayouts(msgspec.msgpack.encode(self._layouts)) if self._layouts else None

    @guarded(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: StepOrders) -> None:
        """A step begins, before anything of it is computed or overwritten."""
        if self._worker is not None:
            self._worker.begin(kv_connector_metadata.orders)

    def start_load_kv(self, forward_context: Anything, **_: Anything) -> None:  # noqa: ARG002  # vLLM's signature
        """Do the loads that this step computes on, and start the others."""
        if self._worker is not None:
            self._worker.begin(self._orders)
            self._worker.start_loads(self._orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: what a step computes on was loaded before it began."""

    def save_kv_layer(self, layer_name: str, kv_layer: Anything, attn_metadata: Anything, **_: Anything) -> None:
        """Nothing: whole blocks are saved at the end of a step."""

    def wait_for_save(self) -> None:
        """Copy what this step computed."""
        if self._worker is not None:
            self._worker.save(self._orders)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that this step computed on and that were not loaded: vLLM computes them, and all behind them, again."""
        return self._worker.take_bad_pages() if self._worker is not None else set()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002  # as above
        """Which loads are over. Saves hold no request up."""
        if self._worker is None:
            return KVConnectorTransferResults()
        finished, failed = self._worker.ended_loads(self._orders)
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    @guarded(lambda: None)
    def build_connector_worker_meta(self) -> StepReport | None:
        """What the scheduler's half should know."""
        report = self._worker.report() if self._worker is not None else None
        return StepReport(report) if report is not None else None

    @property
    def _orders(self) -> Orders:
        orders: Orders = self._get_connector_metadata().orders
        return orders

    # -- the scheduler's half ------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], RankLayouts]) -> None:
        """The layouts of all workers, by (pipeline rank, tensor rank)."""
        if self._scheduler is not None:
            ranks = [metadata[rank].layouts for rank in sorted(metadata)]
            self._scheduler.attach([msgspec.msgpack.decode(each, type=list[Layout]) for each in ranks])

    @guarded(lambda: None)
    def on_new_request(self, request: Anything) -> None:
        """See `Scheduler.arrived`."""
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Anything, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See `Scheduler.matched`, and `Scheduler.loads_at_once`; what is not is loaded asynchronously."""
        if self._scheduler is None:
            return 0, False
        tokens = self._scheduler.matched(request.request_id, num_computed_tokens)
        return tokens, bool(tokens) and not self._scheduler.loads_at_once(request.request_id)

    def update_state_after_alloc(self, request: Anything, blocks: Anything, num_external_tokens: int) -> None:
        """See `Scheduler.allocated`."""
        if self._scheduler is not None:
            pages = blocks.get_block_ids() if num_external_tokens else ()
            self._scheduler.allocated(request.request_id, pages, num_external_tokens)

    @guarded(dict)
    def get_external_cache_hit_sources(
        self,
        request: Anything,
        num_external_tokens: int,  # noqa: ARG002  # as above
    ) -> dict[CacheHitSource, int]:
        """The tiers of the load that was just ordered."""
        found: dict[CacheHitSource, int] = {}
        if self._scheduler is not None:
            for tier, tokens in self._scheduler.sources(request.request_id).items():
                source = _SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
                found[source] = found.get(source, 0) + tokens
        return found

    def build_connector_meta(self, scheduler_output: Anything) -> StepOrders:
        """All orders of this step."""
        if self._scheduler is None:
            return StepOrders(Orders())
        state = scheduler_output.kv_connector_block_state
        early = not (scheduler_output.new_block_ids_to_zero or scheduler_output.kv_cache_block_copies)
        return StepOrders(
            self._scheduler.orders(scheduler_output.num_scheduled_tokens, state.get_block_ids, early=early)
        )

    @guarded(lambda: None)
    def update_connector_output(self, connector_output: Anything) -> None:
        """What the workers did in a step."""
        if self._scheduler is not None:
            report = connector_output.kv_connector_worker_meta
            if report is not None:
                self._scheduler.reported(report.report)
            self._scheduler.loads_over(connector_output.finished_recving or (), connector_output.failed_recving)

    @guarded(lambda: None)
    def get_kv_connector_stats(self) -> TransferStats | None:
        """What was counted since the last step. VLLM asks the scheduler's half once for every step that is over."""
        if self._scheduler is None:
            return None
        self._scheduler.step_over()
        return TransferStats.counted(self._scheduler.take_counts())

    def request_finished(self, request: Anything, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished_all_groups`."""
        return self.request_finished_all_groups(request, (block_ids,))

    @guarded(lambda: (False, None))
    def request_finished_all_groups(
        self,
        request: Anything,
        block_ids: tuple[list[int], ...],  # noqa: ARG002  # as above
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its pages may go at once: what was saved was copied. Its receipt goes into the answer."""
        receipt = self._scheduler.finished(request.request_id) if self._scheduler is not None else None
        return False, None if receipt is None else {"thermocline": receipt}

    def reset_cache(self) -> bool:
        """See `Scheduler.reset`; the workers learn of it with the next step."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    def shutdown(self) -> None:
        """VLLM ends: loads and saves under way end, then the client leaves. A private node stays for a while."""
        for part in (self._scheduler, self._worker, self._client, self._node):
            if part is not None:
                part.close()


def _pages(
    client: NodeClient, layout: Layout, spans: Sequence[Span], regions: facts.Regions, registered: Registered
) -> GroupPages:
    """How the pages of a group are copied: that depends on whose memory they are in. Raises LayoutError."""
    kinds = {tensor.device.type for tensor in regions.tensors}
    if kinds == {"cpu"}:
        return HostPages(client, layout, spans, regions.in_host_memory())
    if kinds == {"cuda"}:
        return DevicePages(client, layout, spans, regions.tensors, registered)
    raise LayoutError(
        f"pages in memory of the kind {', '.join(sorted(kinds))} cannot be copied", hint="use vLLM on CPUs or on CUDA"
    )
