"""From a model, an accelerator and a workload to bytes, sessions, seconds, tiers and money: for `thermocline size`.

Everything is a function of values; every figure has its formula or its source among `assumptions`. What is not known is
None, never a guess.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
import numpy as np

from thermocline.costs.geometry import Attention, Geometry
from thermocline.costs.hardware import Accelerator, element_bytes
from thermocline.costs.measured import Measured
from thermocline.costs.memory import (
    Capacity,
    Taken,
    capacity,
    sequence_bytes,
    state_bytes,
    token_bytes,
    token_formula,
    weights_bytes,
)
from thermocline.costs.money import Arrivals, Bill, Demand, Floats, Price, bill, wasted_share, with_room
from thermocline.costs.pages import Engine, layer_token_bytes, vllm_on
from thermocline.costs.reuse import Reuse, analyse
from thermocline.costs.roofline import Estimate, Prefill, Setup, decode_step_seconds, prefill_of, weights_read
from thermocline.costs.served import Load, Loaded, loaded, measurements
from thermocline.costs.study import Machine, Offer, Sized, Study
from thermocline.costs.trace import Trace
from thermocline.costs.transfer import LINKS, TAIL_TOKENS, Link, breakeven_bytes_per_second, host_link, pays_from
from thermocline.errors import ModelError, SettingsError

CONTEXTS = (2048, 8192, 32768, 131072)
OUTPUT_TOKENS, BATCH_MAX = 256, 256
RANKS = (1, 2, 4, 8, 16, 32)
CURVE_POINTS = 48
STEPS = (0.5, 0.8, 0.9, 0.95, 0.99)
SHOWN_LINKS = ("nvme-gen4", "100gbe", "redis")
Known = TypeVar("Known")
FITS, NO_ROOM, TOO_SLOW, NO_CACHE = "fits", "does not fit", "fits, and is too slow", "fits, and no cache is advised"
UNTOLD = "not known whether it fits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question. What is None or empty has a default, and the answer says which."""

    geometry: Geometry
    accelerator: Accelerator
    tp: int = 1
    pp: int = 1
    contexts: tuple[int, ...] = ()
    kv_dtype: str = ""
    weights_dtype: str = ""
    utilisation: float | None = None
    output_tokens: int | None = None
    usd_per_hour: float | None = None
    arrivals_per_second: float | None = None
    target_seconds: float | None = None
    hit: float | None = None
    users: tuple[int, ...] = ()
    engine: str = "vllm"
    paging: Engine | None = None
    offers: tuple[Offer, ...] = ()
    trace: Trace | None = None
    profile: Measured | None = None


class Token(msgspec.Struct, frozen=True):
    """KV of one more token of a long sequence: of the model, and on each rank. `formula` is filled in."""

    nbytes: int
    rank_bytes: int
    formula: str
    state_bytes: int = 0


class Room(msgspec.Struct, frozen=True):
    """One accelerator's memory, in bytes; `kv_bytes` is what is left, and negative by what lacks."""

    device_bytes: int
    reserved_bytes: int
    weights_bytes: int
    overhead_bytes: int
    kv_bytes: int
    blocks: int
    block_tokens: int
    kv_tokens: int


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions of one length. Bytes are of all ranks. `admitted` is as vLLM logs it, `steady` what is held at once."""

    tokens: int
    nbytes: int
    share_of_weights: float | None = None
    admitted: float | None = None
    steady: int | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    decode_bound_seconds: float | None = None
    decode_by: str = ""
    batch: int | None = None
    batch_seconds: float | None = None
    warm_seconds: dict[str, float] = {}
    beyond_model: bool = False


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """Whether loading over a link beats computing: above which bandwidth, and from which prefix (None: from none)."""

    name: str
    medium: str
    bytes_per_second: float
    evidence: str
    source: str
    breakeven_first: float
    breakeven_deep: float
    from_tokens: int | None
    asked_tokens: int


class Chosen(msgspec.Struct, frozen=True):
    """A tier of an advised size (each instance has one, or all share it), and what is hit with it and those before."""

    tier: str
    nbytes: float
    hit: float
    shared: bool = False


class Window(msgspec.Struct, frozen=True):
    """What it takes to keep all KV for so long after its last use, on average and at most; and the share then hit."""

    seconds: float
    mean_bytes: float
    max_bytes: float
    hit: float


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace says. Shares are of prompt tokens; the curve is (bytes, share hit) under least recently used.

    `steps` are (share of the ideal, bytes, share hit) of one cache for all requests; `chosen` are the tiers that gain
    most: less what their room costs where that `room_is_priced`, else as if it cost nothing.
    """

    name: str
    requests: int
    seconds: float
    arrivals_per_second: float
    arrival_cv: float
    prompt_tokens: float
    output_tokens: float
    instances: int
    ideal: float
    within: float
    across: float
    device_hit: float
    device_bytes: float
    live_bytes: float
    curve: tuple[tuple[float, float], ...]
    steps: tuple[tuple[float, float, float], ...]
    windows: tuple[Window, ...]
    waits: dict[str, float]
    chosen: tuple[Chosen, ...]
    room_is_priced: bool


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. `bills` are without reuse and with it; `why` says of what is missing why it is not known."""

    name: str
    model: str
    gpu: str
    ranks: int
    verdict: str
    token: Token
    contexts: tuple[Context, ...]
    room: Room | None = None
    ranks_that_fit: int | None = None
    ridge_flops_per_byte: float | None = None
    tiers: tuple[Tier, ...] = ()
    loads: tuple[Loaded, ...] = ()
    workload: Workload | None = None
    bills: tuple[Bill, ...] = ()
    price: Price | None = None
    target_seconds: float | None = None
    wasted: float | None = None
    assumptions: tuple[str, ...] = ()
    why: tuple[str, ...] = ()


def size(asked: Asked) -> Sizing:
    """Answer one question. Raises SettingsError for what cannot be (a dtype, a number of stages)."""
    return _Answer(asked).told()


class _Answer:
    """One question while it is answered: what follows from it, each part once."""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.geometry, self.device = asked, asked.geometry, asked.accelerator
        self.ranks = asked.tp * asked.pp
        self.kv_dtype = asked.kv_dtype or self.geometry.kv_dtype
        self.weights_dtype = asked.weights_dtype or self.geometry.weights_dtype
        limit = self.geometry.context_tokens or max(CONTEXTS)
        usual = tuple(tokens for tokens in CONTEXTS if tokens <= limit)
        self.contexts = tuple(sorted(set(asked.contexts))) or usual or (limit,)
        self.why: list[str] = []
        self.notes = [f"{self.geometry.name}: {self.geometry.source}"]
        self.room = self._known(lambda: self._capacity(asked.tp))
        self.prefill = self._known(self._prefill)
        price = asked.usd_per_hour
        self.price = None if self.device.price is None else Price(self.device.price.typical, f"{self.device.price}")
        self.price = self.price if price is None else Price(price, "as given")

    def _known(self, told: Callable[[], Known]) -> Known | None:
        """What it says, or None and the reason where it is not known."""
        try:
            return told()
        except ModelError as error:
            reason = f"{error.message}: {error.hint}"
            self.why += [reason] if reason not in self.why else []
            return None

    def told(self) -> Sizing:
        """All of it."""
        room = self.room
        fits = room is None or (room.fits and room.sessions(self.contexts[0]).steady > 0)
        running = fits and self.prefill is not None and room is not None
        contexts = tuple(self._context(tokens, with_times=running) for tokens in self.contexts)
        tiers = tuple(self._tiers()) if running and self.geometry.state is None else ()
        workload, bills = self._served(room) if running and room else (None, ())
        advised = workload.chosen if workload else [tier for tier in tiers if tier.from_tokens is not None]
        late = self._late(bills)
        verdict = NO_ROOM if not fits else TOO_SLOW if late else FITS if advised or not running else NO_CACHE
        verdict = UNTOLD if room is None else verdict
        token = Token(
            token_bytes(self.geometry, self.kv_dtype),
            sum(each.layers * layer_token_bytes(each, self.kv_dtype, self.asked.tp) for each in self._unbounded()),
            token_formula(self.geometry, self.kv_dtype),
            state_bytes(self.geometry),
        )
        return Sizing(
            name=f"{self.geometry.name} on {self.ranks} x {self.device.name}",
            model=self.geometry.name,
            gpu=self.device.name,
            ranks=self.ranks,
            verdict=verdict,
            token=token,
            contexts=contexts,
            room=None if room is None else self._room(room),
            ranks_that_fit=self.ranks if fits else self._ranks_that_fit(),
            ridge_flops_per_byte=self.device.ridge_flops_per_byte,
            tiers=tiers,
            loads=tuple(self._loads(room)) if running and room else (),
            workload=workload,
            bills=bills,
            price=self.price,
            target_seconds=self.asked.target_seconds,
            wasted=wasted_share(*bills) if len(bills) == 2 else None,  # noqa: PLR2004  # without and with
            assumptions=tuple(dict.fromkeys(self.notes)),
            why=tuple(self.why),
        )

    # -- memory --------------------------------------------------------------------------------------------------------

    def _unbounded(self) -> list[Attention]:
        return [each for each in self.geometry.attention if each.window_tokens is None]

    def _capacity(self, tp: int) -> Capacity:
        asked = self.asked
        weights = weights_bytes(self.geometry, asked.weights_dtype)
        taken = Taken(utilisation=asked.utilisation)
        memory, dtype = self.device.memory_bytes, self.kv_dtype
        engine = asked.paging or vllm_on(memory, self.device.name)
        found = capacity(
            self.geometry, memory, tp=tp, pp=asked.pp, kv_dtype=dtype, weights=weights, taken=taken, engine=engine
        )
        self.notes += [f"{self.device.name}: {self.device.evidence}, {self.device.source}", *found.assumed]
        return found

    def _ranks_that_fit(self) -> int | None:
        """The fewest accelerators on which one sequence of the shortest length fits, by tensor parallelism."""
        for tp in RANKS:
            room = self._known(functools.partial(self._capacity, tp)) if tp > self.asked.tp else None
            if room is not None and room.fits and room.sessions(self.contexts[0]).steady > 0:
                return tp * self.asked.pp
        return None

    def _room(self, room: Capacity) -> Room:
        return Room(
            device_bytes=room.device_bytes,
            reserved_bytes=room.device_bytes - int(room.device_bytes * room.utilisation),
            weights_bytes=room.weights_bytes,
            overhead_bytes=room.activation_bytes + room.communication_bytes + room.other_bytes,
            kv_bytes=room.kv_bytes,
            blocks=room.blocks,
            block_tokens=room.paging.block_tokens,
            kv_tokens=room.tokens(self.contexts[0]),
        )

    def _read_share(self) -> float:
        """Of the weights, what one token reads: of a mixture of experts, not those that it does not choose."""
        return weights_read(self.geometry, 1) / (self.geometry.parameters_total or 1)

    def bytes_of(self, tokens: int) -> int:
        """KV of a sequence, on all ranks together."""
        return sequence_bytes(self.geometry, tokens, self.kv_dtype, tp=self.asked.tp) * self.asked.tp

    def _context(self, tokens: int, *, with_times: bool) -> Context:
        limit, room = self.geometry.context_tokens, self.room
        found = Context(tokens=tokens, nbytes=self.bytes_of(tokens), beyond_model=limit is not None and tokens > limit)
        if room is None:
            return found
        held = room.sessions(tokens)
        weights = room.weights_bytes * self.ranks
        found = msgspec.structs.replace(
            found, share_of_weights=found.nbytes / weights, admitted=held.admitted, steady=held.steady
        )
        if not with_times or self.prefill is None:
            return found
        alone, batch = self._decode(1, tokens), min(held.steady, BATCH_MAX)
        peak = self.device.memory_bytes_per_second * self.asked.tp
        warm = {link.name: link.latency_seconds + found.nbytes / link.bytes_per_second for link in self.links}
        rest = self.prefill(TAIL_TOKENS, max(0, tokens - TAIL_TOKENS))
        return msgspec.structs.replace(
            found,
            prefill_seconds=self.prefill(tokens, 0),
            decode_seconds=alone.seconds,
            decode_bound_seconds=(weights * self._read_share() + found.nbytes) / peak,
            decode_by=max(alone.parts, key=lambda part: part.seconds).name,
            batch=batch or None,
            batch_seconds=self._decode(batch, tokens).seconds if batch else None,
            warm_seconds={
                "device": rest,
                **({name: rest + load for name, load in warm.items()} if self.stored else {}),
            },
        )

    # -- time ----------------------------------------------------------------------------------------------------------

    @property
    def stored(self) -> bool:
        """False for a model with recurrent states: its prefixes are no blocks that can be put together."""
        return self.geometry.state is None

    def _prefill(self) -> Prefill:
        element_bytes(self.weights_dtype)
        self._decode(1, 1)  # decoding is never measured for all batches: it needs the parameters in any case
        if self.asked.profile is not None:
            self.notes.append(self.asked.profile.note(self.geometry.name))
            return functools.cache(self.asked.profile.prefill_seconds)
        setup = Setup(self.geometry, self.device, self.asked.tp, self.weights_dtype, self.kv_dtype)
        self.notes.append(f"times: roofline; shares of the peaks: {setup.running.source}")
        if self.asked.pp > 1:
            self.notes.append("pipeline stages add room and prompts at once: one prompt runs through them in turn")
        return functools.cache(prefill_of(setup))

    def _decode(self, batch: int, tokens: int) -> Estimate:
        tp, weights, kv = self.asked.tp, self.weights_dtype, self.kv_dtype
        return decode_step_seconds(self.geometry, self.device, batch, tokens, tp=tp, weights_dtype=weights, kv_dtype=kv)

    @functools.cached_property
    def links(self) -> list[Link]:
        """Ways to the tiers that are offered, or to usual ones. Every accelerator has its own to the host."""
        if self.asked.tp > 1:
            self.notes.append("every accelerator loads over its own link; the host's memory is taken to be as quick")
            if any(each.latent_elements for each in self.geometry.attention):
                self.notes.append(f"latent vectors are kept, stored and loaded by each of {self.asked.tp} ranks")
        if self.asked.offers:
            return [each.link for each in self.asked.offers]
        try:
            host = host_link(self.device)
            ways = [replace(host, bytes_per_second=host.bytes_per_second * self.asked.tp)]
        except SettingsError:
            ways = []
        return [*ways, *(LINKS[name] for name in SHOWN_LINKS)]

    def _loads(self, room: Capacity) -> Iterator[Loaded]:
        """An instance under as many users at a time as were asked about, for prompts of each length, nothing known."""
        if not self.asked.users or self.asked.pp > 1:
            self.notes += ["pipeline stages: how users load them was not measured"] if self.asked.users else []
            return
        setup = Setup(self.geometry, self.device, self.asked.tp, self.weights_dtype, self.kv_dtype)
        output = max(1, int(self._output_tokens()))
        self.notes += [
            f"under load: constants of {self.asked.engine}, fitted to {measurements().source}",
            "under load: as many run at once as memory holds, where the engine's own limit (max_num_seqs) is no lower",
        ]
        for tokens in self.contexts:
            held = room.sessions(tokens + output).steady
            if not held:
                self.notes.append(f"under load: no room for a prompt of {tokens:,} tokens and its answer of {output:,}")
            for users in self.asked.users if held else ():
                yield loaded(setup, self.asked.engine, Load(users, tokens, output, float(held)))

    def _tiers(self) -> Sequence[Tier]:
        assert self.prefill is not None, "asked for only where times are known"
        longest = max(*self.contexts, TAIL_TOKENS)
        bytes_of, prefill = functools.cache(self.bytes_of), self.prefill
        deep = breakeven_bytes_per_second(bytes_of, prefill, longest)
        found = []
        for link in self.links:
            pays = pays_from(link, bytes_of, prefill, longest)
            found.append(
                Tier(
                    name=link.name,
                    medium=link.medium,
                    bytes_per_second=link.bytes_per_second,
                    evidence=link.evidence,
                    source=link.source,
                    breakeven_first=breakeven_bytes_per_second(bytes_of, prefill, 0),
                    breakeven_deep=deep,
                    from_tokens=pays.from_tokens,
                    asked_tokens=longest,
                )
            )
        return found

    # -- workload and money --------------------------------------------------------------------------------------------

    def _output_tokens(self) -> float:
        trace = self.asked.trace
        if self.asked.output_tokens is not None:
            return float(self.asked.output_tokens)
        if trace is not None and (told := trace.output_tokens[trace.output_tokens > 0]).size:  # 0: not known
            return float(told.mean())
        self.notes.append(f"answers of {OUTPUT_TOKENS} tokens: assumed, see --output-tokens")
        return float(OUTPUT_TOKENS)

    def _served(self, room: Capacity) -> tuple[Workload | None, tuple[Bill, ...]]:
        trace, output = self.asked.trace, self._output_tokens()
        prompt = float(trace.input_tokens.mean()) if trace is not None else float(self.contexts[0])
        context = int(prompt + output / 2)
        batch = max(1, min(room.sessions(max(1, context)).steady, BATCH_MAX))
        demand = Demand(
            prompt_tokens=prompt,
            output_tokens=output,
            decode_seconds=output * self._decode(batch, context).seconds / batch,
            accelerators=self.ranks,
            stages=self.asked.pp,
            price=self.price,
            arrivals=self._arrivals(trace),
            target_seconds=self.asked.target_seconds,
        )
        self.notes += [
            f"decoding: {batch} sequences of {context:,} tokens at once, as many as fit and at most {BATCH_MAX}",
            "an instance computes nothing else while it prefills or loads; requests go to whichever is free",
        ]
        self.notes.append("price: unknown; give --price" if self.price is None else f"price: {self.price.source}")
        self.notes += [] if trace is None else trace.notes
        limit = self.geometry.context_tokens
        if trace is not None and limit is not None and (longer := int((trace.input_tokens > limit).sum())):
            self.notes.append(f"{longer:,} prompts of the trace are longer than the {limit:,} tokens of the model")
        if trace is not None and trace.has_blocks and self.stored:
            return self._with_trace(trace, demand, room)
        return None, self._without_trace(demand, trace)

    def _arrivals(self, trace: Trace | None) -> Arrivals | None:
        """The trace's own, at another rate where one is given; else Poisson arrivals at that rate, or none."""
        given = self.asked.arrivals_per_second
        if trace is not None and trace.arrivals_per_second:
            rate = given or trace.arrivals_per_second
            other = "" if given is None else "; hit rates and the table of the workload are at the trace's own rate"
            self.notes.append(f"waiting: the requests of the trace are replayed, at {rate:,.3g} per second{other}")
            return Arrivals(rate, trace.arrival_seconds * (trace.arrivals_per_second / rate))
        if given is not None:
            self.notes.append("waiting: arrivals are taken for Poisson; bursts wait longer, and a trace has them")
        return None if given is None else Arrivals(given)

    def _without_trace(self, demand: Demand, trace: Trace | None) -> tuple[Bill, ...]:
        """Prompts of one length, or of the trace's; as many tokens known as was said, or as many as can be."""
        assert self.prefill is not None, "asked for only where times are known"
        lengths = np.unique(trace.input_tokens) if trace is not None else np.array([self.contexts[0]])
        counts = np.searchsorted(lengths, trace.input_tokens) if trace is not None else np.array([0])
        colds = np.array([self.prefill(max(1, tokens), 0) for tokens in lengths.tolist()])[counts]
        cold = bill("without reuse", demand, colds, np.zeros(len(colds)), 0.0)
        if not self.stored:
            return (cold,)
        most = np.maximum(0, lengths - TAIL_TOKENS)
        known = most if self.asked.hit is None else np.minimum(most, self.asked.hit * lengths).astype(np.int64)
        link = max(self.links, key=lambda each: each.bytes_per_second)
        loads = np.array([self.bytes_of(held) / link.bytes_per_second if held else 0.0 for held in known.tolist()])
        rests = np.array([self.prefill(n - k, k) for n, k in zip(lengths.tolist(), known.tolist(), strict=True)])
        told = "all but the last 128" if self.asked.hit is None else f"{100 * self.asked.hit:g} %"
        name = f"with {told} known, from {link.name}"
        share = float(known[counts].sum() / max(1, lengths[counts].sum()))
        return cold, bill(name, demand, rests[counts], loads[counts], share)

    def _with_trace(self, trace: Trace, demand: Demand, room: Capacity) -> tuple[Workload, tuple[Bill, ...]]:
        """Twice: as many instances as it takes without reuse have more memory than those that it takes with it."""
        reuse = analyse(trace)
        offers = self.asked.offers or tuple(self._offers())
        instances, found = 1, None
        for _ in range(2):
            study = self._study(trace, room, offers, instances)
            chosen = study.best(offers)
            cold = bill("without reuse", demand, study.cold, np.zeros(len(trace)), 0.0)
            warm = self._warm(study, chosen, demand)
            found = self._workload(trace, reuse, study, chosen, demand.output_tokens), (cold, warm)
            if instances == (warm.instances or 1):
                break
            instances = warm.instances or 1
        assert found is not None, "the loop runs"
        if not found[0].room_is_priced:
            lacks = "a price per GB and hour" if self.price is not None else "one, and --price that of an accelerator"
            self.notes.append(f"room in tiers counts as free; --tier NAME:USD gives {lacks}")
        self.notes += [
            "hit rates: least recently used, sessions stay on their instance, no output cached",
        ]
        return found

    def _offers(self) -> list[Offer]:
        names = {"host": "host", "nvme-gen4": "disk"}
        return [Offer(names[link.name], link) for link in self.links if link.name in names]

    def _study(self, trace: Trace, room: Capacity, offers: tuple[Offer, ...], instances: int) -> Study:
        assert self.prefill is not None, "asked for only where times are known"
        mean = max(1, int(trace.input_tokens.mean()))
        price = None if self.price is None else self.price.usd_per_hour * self.ranks
        machine = Machine(self.prefill, self.stored_token_bytes, room.tokens(mean), offers, instances, price)
        return Study(trace, machine)

    @property
    def stored_token_bytes(self) -> int:
        """Of a token in a tier: all its layers on all ranks, those with a window as well."""
        layers = self.geometry.attention
        return self.asked.tp * sum(
            each.layers * layer_token_bytes(each, self.kv_dtype, self.asked.tp) for each in layers
        )

    def _warm(self, study: Study, chosen: Sequence[Sized], demand: Demand) -> Bill:
        used = study.use(chosen)
        held = study.held(max([study.device_blocks, *(blocks for _, blocks in chosen)]))
        seconds: Floats = np.maximum(0.0, study.cold - study.worth_seconds(held))
        mean = float(study.cold.mean()) - used.saved_seconds * study.hours / len(study.cold)
        seconds *= mean / max(1e-12, float(seconds.mean()))  # loads are in the mean; the spread is that of the prefills
        tiers = " and ".join(offer.tier for offer, _ in chosen) or "the engine's own memory"
        found = bill(f"with reuse, from {tiers}", demand, seconds, np.zeros(len(seconds)), used.hit)
        return with_room(found, functools.partial(study.room_usd_per_hour, chosen))

    def _workload(
        self, trace: Trace, reuse: Reuse, study: Study, chosen: Sequence[Sized], output_tokens: float
    ) -> Workload:
        each = trace.tokens_per_block * self.stored_token_bytes
        sizes = np.unique(np.geomspace(1, max(1, reuse.distinct_blocks), CURVE_POINTS).astype(np.int64)).tolist()
        steps = [(part, reuse.blocks_for(part)) for part in STEPS]
        ordered = sorted(chosen, key=lambda sized: sized[1])
        hits = [study.use(ordered[: at + 1]).hit for at in range(len(ordered))]
        return Workload(
            name=trace.name,
            requests=len(trace),
            seconds=trace.seconds,
            arrivals_per_second=trace.arrivals_per_second,
            arrival_cv=trace.arrival_cv,
            prompt_tokens=float(trace.input_tokens.mean()),
            output_tokens=output_tokens,
            instances=study.machine.instances,
            ideal=reuse.ideal,
            within=reuse.within,
            across=reuse.across,
            device_hit=study.use(()).hit,
            device_bytes=study.tier_bytes(study.device_blocks),
            live_bytes=float(reuse.live_blocks * each),
            curve=tuple((float(blocks * each), reuse.hit(blocks)) for blocks in sizes),
            steps=tuple((part, float(n * each), reuse.hit(n)) for part, n in steps),
            windows=tuple(
                Window(w.seconds, w.mean_blocks * each, float(w.max_blocks * each), reuse.hit_within(w.seconds))
                for w in reuse.working_sets
            ),
            waits={f"p{share}": reuse.wait(share / 100) for share in (50, 90, 99)},
            chosen=tuple(
                Chosen(offer.tier, study.tier_bytes(blocks), hit, offer.shared)
                for (offer, blocks), hit in zip(ordered, hits, strict=True)
            ),
            room_is_priced=self.price is not None and any(each.usd_per_gb_hour for each in study.machine.offers),
        )

    def _late(self, bills: Sequence[Bill]) -> bool:
        """True where a target was given that the best way to serve misses."""
        target = self.asked.target_seconds
        if target is None or not bills:
            return False
        best = min(bills, key=lambda each: each.seconds)
        if best.how:
            return best.instances is None
        return math.fsum((best.prefill_seconds, best.load_seconds)) > target
