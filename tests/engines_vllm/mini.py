"""An engine as small as can be that keeps vLLM's promises: it schedules, pages, preempts and computes, for both halves.

"Computing" a block writes bytes that follow from its key, group and rank, so any wrong byte shows: in what is computed
on, and in what is saved.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.node.making import until
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.engines.vllm.guard import guarded
from thermocline.engines.vllm.layout import Engine, LayerMemory, make_layout, spans_of
from thermocline.engines.vllm.orders import NULL_PAGE, Orders, Report
from thermocline.engines.vllm.pages import HostPages
from thermocline.engines.vllm.prompts import prompt_of
from thermocline.engines.vllm.scheduler import Scheduler
from thermocline.engines.vllm.worker import Worker
from thermocline.node.client import NodeClient
from thermocline.node.places import NOWHERE

BLOCK = 16
PAGES = 96
LAYER_BYTES = 256
LAYERS = 2


@dataclass(eq=False)
class Request:
    """What both halves read of vLLM's Request."""

    request_id: str
    prompt: Sequence[int]
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    lora_request: Any = None
    mm_features: Sequence[Any] = ()
    skip_reading_prefix_cache: bool = False
    resumable: bool = False
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    num_computed_tokens: int = 0
    all_token_ids: list[int] = field(default_factory=list)
    pages: list[list[int]] = field(default_factory=list)
    state: str = "waiting"
    placeholders: int = 0  # tokens that steps under way will bring
    under_way: int = 0  # tokens that steps under way compute
    last_step: int = 0
    life: int = 0  # how often it was preempted

    def __post_init__(self) -> None:
        self.all_token_ids = list(self.prompt)

    def text(self, length: int) -> Sequence[int]:
        """Its first tokens, as workers know them: also those that the scheduler is still to be told of."""
        return [*self.all_token_ids, *((at + self.life) % 7 for at in range(self.num_tokens, length))][:length]

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)


def layer(name: str, *, region: int = 0, offset: int = 0, pages: int = PAGES, kind: str = "full") -> LayerMemory:
    """A layer of one head whose pages lie side by side."""
    shape, strides = (pages, 1, 1, BLOCK, LAYER_BYTES // BLOCK), (LAYER_BYTES, 0, 0, LAYER_BYTES // BLOCK, 1)
    return LayerMemory(name, region, offset, shape, strides, 1, kind)


def engine(rank: int = 0, ranks: int = 1, *, weights: bytes = b"weights") -> Engine:
    """One rank of an engine."""
    return Engine("model", weights, "float32", "auto", "0", "any", "LBHNC", tp_rank=rank, tp_size=ranks)


def content(layout: Layout, key: BlockKey) -> np.ndarray:
    """The bytes of a block of one rank and group."""
    name = f"{layout.tp_rank} {layout.kv_group}".encode() + layout.weights_digest + key
    return np.frombuffer(hashlib.shake_128(name).digest(layout.block_bytes), np.uint8)


class Rank:
    """One worker, with memory for every group."""

    def __init__(self, client: NodeClient, rank: int, ranks: int, groups: int) -> None:
        self.memories = [np.zeros(LAYERS * PAGES * LAYER_BYTES, np.uint8) for _ in range(groups)]
        self.pages: list[HostPages] = []
        for group, memory in enumerate(self.memories):
            layers = [layer(f"{group}.{at}", offset=at * PAGES * LAYER_BYTES) for at in range(LAYERS)]
            layout = make_layout(
                engine(rank, ranks), layers, group=group, tokens_per_block=BLOCK, kv_heads=1, head_dim=8
            )
            self.pages.append(HostPages(client, layout, spans_of(layers), [memory]))
            client.ready(layout, 16)
        self.worker = Worker()
        self.worker.register(rank, self.pages)

    def write(self, group: int, page: int, whole: np.ndarray) -> None:
        """Put a block into a page."""
        at = 0
        for piece in self.pages[group].view(page):
            piece[:] = whole[at : at + piece.nbytes]
            at += piece.nbytes

    def read(self, group: int, page: int) -> np.ndarray:
        """The block in a page."""
        return np.concatenate(self.pages[group].view(page))


@dataclass(eq=False)
class Part:
    """What a step computes of one request, which was as it is told here when the step was scheduled."""

    request: Request
    first: int
    count: int
    pages: list[list[int]]
    life: int
    samples: bool


@dataclass(eq=False)
class Step:
    """A step that was scheduled, and of which nothing has happened yet."""

    orders: Orders
    parts: dict[str, Part]


class MiniEngine:
    """One engine on a real node: a scheduler's half, and a worker's half for each rank.

    Group 1, if there is one, has a sliding window of `window` blocks: what has left it is on no page any more.

    `ahead`: workers get to a step when the next one is scheduled already, which is as late as vLLM's queue of two lets
    them. The token that a step brings is a placeholder until then. Pages of a request that ends or is preempted go to
    others when the steps scheduled so far are over; those that left the window, once the steps before are.
    """

    def __init__(
        self,
        clients: Sequence[NodeClient],
        *,
        groups: int = 1,
        window: int = 2,
        at_once: bool = False,
        ahead: bool = False,
    ) -> None:
        assert not (at_once and ahead), "see `may_load_at_once` in connector.py"
        self.client, *workers = clients
        self.groups, self.window, self.ahead = groups, window, ahead
        self.ranks = [Rank(client, rank, len(workers), groups) for rank, client in enumerate(workers)]
        self.scheduler = Scheduler(self.client, tokens_per_block=BLOCK, save_blocks_max=16, may_load_at_once=at_once)
        self.scheduler.attach([[pages.layout for pages in rank.pages] for rank in self.ranks])
        self.requests: dict[str, Request] = {}
        self.receipts: dict[str, Any] = {}
        self.free = [list(range(1, PAGES)) for _ in range(groups)]
        self.steps: deque[Step] = deque()
        self.scheduled = self.over = 0
        self.fenced: deque[tuple[int, list[list[int]]]] = deque()
        self.flying: dict[int, set[BlockKey]] = {}
        self.counted: dict[int, int] = {}
        self.remaining: dict[str, int] = {}
        self.failed: set[str] = set()
        self.ended: list[str] = []
        self.loaded_blocks = self.failed_loads = 0
        self.damage_next_load = False
        self.finishing: set[str] = set()
        self.aborted: list[Request] = []

    # -- what a test does ----------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        """A new request."""
        self.requests[request.request_id] = request
        self.scheduler.arrived(request)

    def step(self, chunk: int) -> None:
        """One step of the engine: every request that can run computes at most `chunk` tokens."""
        self.steps.append(self._schedule(chunk))
        if len(self.steps) > self.ahead:
            self._work(self.steps.popleft())

    def preempt(self, request: Request) -> None:
        """Its pages go to others; it will run again from the start."""
        if request.state == "running":
            self._free(request)
            request.state, request.num_computed_tokens, request.placeholders = "waiting", 0, 0
            request.life += 1  # what steps under way bring is dropped

    def finish(self, request: Request) -> None:
        """It is over, or its client has gone."""
        if self.requests.pop(request.request_id, None) is None:
            return
        self.receipts[request.request_id] = guarded(lambda: None)(self.scheduler.finished)(request.request_id)
        if request.state == "loading":
            self.ended.append(request.request_id)
            self.requests[f"gone {request.request_id}"] = request
            request.state = "gone"
        else:
            self._free(request)

    def abort(self, request: Request) -> None:
        """Its client goes while the next step is computed: it ends before vLLM hears of the result."""
        self.aborted.append(request)

    def drain(self) -> None:
        """End all requests, and step until nothing is under way."""
        for request in list(self.requests.values()):
            if request.state != "gone":
                self.finish(request)

        def idle() -> bool:
            self.step(1)
            return not self.remaining and not self.flying and not self.requests and not self.fenced

        until(idle, "everything under way to be over")
        self.scheduler.check_idle()
        until(lambda: not self.client._held, "all leases to be released")
        assert all(len(free) == PAGES - 1 for free in self.free)

    def close(self) -> None:
        for rank in self.ranks:
            rank.worker.close()

    # -- the scheduler -------------------------------------------------------------------------------------------------

    def _schedule(self, chunk: int) -> Step:
        """First what runs goes on, then what waits begins, also in pages that this has just left."""
        self.scheduled += 1
        running = [request for request in self.requests.values() if request.state == "running"]
        parts = {request.request_id: self._part(request, chunk) for request in running}
        for request in [request for request in self.requests.values() if request.state == "waiting"]:
            if not request.num_computed_tokens:
                self._admit(request)
            if request.state == "running" or (request.state == "waiting" and request.num_computed_tokens):
                parts[request.request_id] = self._part(request, chunk)
        scheduled = {request_id: part.count for request_id, part in parts.items()}
        early = self.scheduled % 2 == 0
        orders = self.scheduler.orders(
            scheduled, lambda request_id: tuple(self.requests[request_id].pages), early=early
        )
        self._check_orders(orders)
        for part in parts.values():
            part.request.num_computed_tokens += part.count
            part.request.under_way += part.count
            part.request.placeholders += part.samples
        return Step(orders, parts)

    def _part(self, request: Request, chunk: int) -> Part:
        first, known = request.num_computed_tokens, request.num_tokens + request.placeholders
        count = min(chunk, known - first)
        request.state, request.last_step = "running", self.scheduled
        self._grow(request, first + count, processed=max(0, first - request.under_way))
        return Part(request, first, count, [list(each) for each in request.pages], request.life, first + count == known)

    def _admit(self, request: Request) -> None:
        matched = guarded(lambda: 0)(self.scheduler.matched)
        tokens = matched(request.request_id, 0)
        again = matched(request.request_id, 0)
        assert tokens is None or again == tokens, "asked again, it says something else"
        if tokens is None:
            return
        assert tokens % BLOCK == 0
        assert tokens < request.num_tokens, "no token is left to compute"
        if not tokens:
            self.scheduler.allocated(request.request_id, (), 0)
            request.state = "running"
            request.pages = [[] for _ in range(self.groups)]
            return
        if min(map(len, self.free)) < PAGES // 2:
            return
        request.pages = [[] for _ in range(self.groups)]
        self._grow(request, tokens, processed=tokens)
        self.scheduler.allocated(request.request_id, tuple(request.pages), tokens)
        assert sum(self.scheduler.sources(request.request_id).values()) == tokens
        at_once = self.scheduler.loads_at_once(request.request_id)
        request.state, request.num_computed_tokens = "running" if at_once else "loading", tokens

    def _grow(self, request: Request, tokens: int, *, processed: int) -> None:
        """Pages for so many tokens. First those go that have left the window of what is computed next, as in vLLM."""
        for group, pages in enumerate(request.pages):
            gone = max(0, processed // BLOCK - self.window) if group else 0
            for at in range(min(gone, len(pages))):
                if pages[at] != NULL_PAGE:
                    self.free[group].append(pages[at])
                    pages[at] = NULL_PAGE
            while len(pages) < -(-tokens // BLOCK):
                pages.append(NULL_PAGE if len(pages) < gone else self.free[group].pop())

    def _free(self, request: Request) -> None:
        """Its pages go to others: at once, or when all steps are over that were scheduled so far."""
        fence = self.scheduled if request.last_step > self.over else 0
        self.fenced.append((fence, request.pages))
        request.pages = []
        self._unfence()

    def _unfence(self) -> None:
        for entry in [entry for entry in self.fenced if entry[0] <= self.over]:
            self.fenced.remove(entry)
            for group, pages in enumerate(entry[1]):
                self.free[group] += [page for page in pages if page != NULL_PAGE]

    def _keys(self, request: Request, blocks: int) -> Sequence[BlockKey]:
        prompt = prompt_of(request, BLOCK)
        assert prompt is not None
        return prompt.grow(request.text(blocks * BLOCK), blocks)[:blocks]

    # -- the workers ---------------------------------------------------------------------------------------------------

    def _work(self, step: Step) -> None:
        """All that the workers do in a step, and what vLLM's scheduler makes of their result."""
        spoilt = self._load_at_once(step)
        for request_id, part in step.parts.items():
            self._compute(part, spoilt=request_id in spoilt)
        report, finished = self._carry_out(step, spoilt)
        for request in self.aborted:
            self.finish(request)
        self.aborted.clear()
        self.over += 1
        self._unfence()
        self._computed(step, spoilt)
        self._reported(report)
        failed = self.failed & set(finished)
        self.failed -= failed
        self.scheduler.loads_over(finished, failed)
        for request_id in finished:
            self._loaded(request_id, failed=request_id in failed)
        self.scheduler.step_over()

    def _load_at_once(self, step: Step) -> dict[str, int]:
        """Start the loads. Which requests of this step compute on bad pages, and how many blocks before are good."""
        orders = step.orders
        self._before_loads(orders)
        bad: set[int] = set()
        for rank in self.ranks:
            rank.worker.begin(orders)
            if not orders.early:  # vLLM may write into new pages now
                self._fill_with_garbage(rank, orders)
            rank.worker.start_loads(orders)
            bad |= rank.worker.take_bad_pages()
        spoilt = {}
        for load in (load for load in orders.loads if load.at_once):
            pages = step.parts[load.request].pages[0]
            if bad.isdisjoint(pages):
                self.loaded_blocks += len(load.pages[0])
            else:
                spoilt[load.request] = next(at for at, page in enumerate(pages) if page in bad)
        return spoilt

    def _compute(self, part: Part, *, spoilt: bool = False) -> None:
        """Check all that is computed on, then write every block that becomes full: garbage, behind bad pages."""
        before, after = part.first // BLOCK, (part.first + part.count) // BLOCK
        keys = self._keys(part.request, after)
        for rank in self.ranks:
            for group, pages in enumerate(part.pages):
                layout = rank.worker._base[group]
                for at in range(before):
                    if pages[at] != NULL_PAGE and not spoilt:
                        there = rank.read(group, pages[at])
                        assert np.array_equal(there, content(layout, keys[at])), "computed on wrong bytes"
                for at in range(before, after):
                    whole = content(layout, keys[at])
                    rank.write(group, pages[at], np.full_like(whole, 0x3F) if spoilt else whole)

    def _check_orders(self, orders: Orders) -> None:
        """No key is on its way twice."""
        for order in orders.saves:
            request = self.requests[order.chain]
            count = len(order.pages[0])
            keys = set(self._keys(request, order.start + count)[order.start :])
            assert len(keys) == count
            for others in self.flying.values():
                assert not keys & others, "a key is on its way twice"
            self.flying[order.number] = keys
            self.counted[order.number] = 0

    def _carry_out(self, step: Step, spoilt: Container[str]) -> tuple[Report, list[str]]:
        """The saves of a step; what workers report, joined as by vLLM, and the loads that are over on all of them."""
        report = Report()
        finished: list[str] = []
        for rank in self.ranks:
            self._check_saves(rank, step, spoilt)
            rank.worker.save(step.orders)
            over, failed = rank.worker.ended_loads(step.orders)
            assert failed <= over
            self.failed |= failed
            finished += [request_id for request_id in over if self._over_on_all(request_id)]
            report = report.joined(rank.worker.report() or Report())
        return report, finished

    def _computed(self, step: Step, spoilt: dict[str, int]) -> None:
        """The tokens of a step are there. VLLM ends requests before it hands on what workers report."""
        for request_id, part in step.parts.items():
            request = part.request
            request.under_way -= part.count
            if self.requests.get(request_id) is not request or part.life != request.life:
                continue
            if request_id in spoilt:
                self.failed_loads += 1
                request.num_computed_tokens = spoilt[request_id] * BLOCK
                request.placeholders = 0
            elif part.samples:
                request.all_token_ids = list(request.text(request.num_tokens + 1))
                request.placeholders -= 1
                if request_id in self.finishing:
                    self.finish(request)

    def _reported(self, report: Report) -> None:
        for saved in report.saved:
            self.counted[saved.number] += saved.ranks
            if self.counted[saved.number] == len(self.ranks):
                del self.flying[saved.number], self.counted[saved.number]
        self.scheduler.reported(report)

    def _over_on_all(self, request_id: str) -> bool:
        self.remaining[request_id] -= 1
        if self.remaining[request_id]:
            return False
        del self.remaining[request_id]
        return True

    def _before_loads(self, orders: Orders) -> None:
        """Garbage lies where blocks are to come, and one of those to be loaded may be damaged."""
        for load in orders.loads:
            if not load.at_once:
                self.remaining[load.request] = len(self.ranks)
        for rank in self.ranks:
            self._fill_with_garbage(rank, orders)
        place = orders.loads[0].places[-1][0] if orders.loads and self.damage_next_load else NOWHERE
        if place.offsets:
            self.damage_next_load = False
            memory = self.ranks[-1].pages[0]._client._memories[place.incarnation]
            memory[place.offsets[len(place.offsets) // 2] + 3] ^= 1

    def _fill_with_garbage(self, rank: Rank, orders: Orders) -> None:
        for load, group in product(orders.loads, range(self.groups)):
            for page in load.pages[group]:
                rank.write(group, page, np.full(LAYERS * LAYER_BYTES, 0x3F, np.uint8))

    def _check_saves(self, rank: Rank, step: Step, spoilt: Container[str]) -> None:
        """What is saved is what belongs under its key. Of what was spoilt nothing is saved: loads would tell."""
        for order in (order for order in step.orders.saves if order.chain not in spoilt):
            keys = self._keys(step.parts[order.chain].request, order.start + len(order.pages[0]))[order.start :]
            for group, pages in enumerate(order.pages):
                layout = rank.worker._base[group]
                for key, page in zip(keys, pages, strict=True):
                    assert np.array_equal(rank.read(group, page), content(layout, key)), "wrong bytes are saved"

    def _loaded(self, request_id: str, *, failed: bool) -> None:
        gone = self.requests.pop(f"gone {request_id}", None)
        if gone is not None:
            self._free(gone)
            return
        request = self.requests[request_id]
        request.state = "waiting"
        if failed:
            self.failed_loads += 1
            self._free(request)
            request.num_computed_tokens = 0
            assert self.scheduler.matched(request_id, 0) == 0, "announced again after a failed load"
        else:
            self.loaded_blocks += request.num_computed_tokens // BLOCK


def lora(name: str, path: str) -> SimpleNamespace:
    """VLLM's LoRARequest."""
    return SimpleNamespace(lora_name=name, lora_path=path)


def image(identifier: str | None, offset: int, length: int) -> SimpleNamespace:
    """VLLM's MultiModalFeatureSpec."""
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(identifier=identifier, modality="image", mm_position=place)
