"""`thermocline size`: the answers of `costs/sizing.py` in words, in tables, side by side, and as a page with charts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import msgspec

from thermocline.costs.geometry import Geometry
from thermocline.costs.hardware import Accelerator
from thermocline.costs.money import HOURS_PER_MONTH, NODE_ACCELERATORS, Bill, hours_per_node_month
from thermocline.costs.pages import Engine, vllm_on
from thermocline.costs.served import BEYOND, Loaded
from thermocline.costs.sizing import NO_CACHE, NO_ROOM, TOO_SLOW, Context, Sizing, Tier
from thermocline.errors import SettingsError
from thermocline.lens.chart import Axis, Bar, Series, bar_chart, line_chart
from thermocline.lens.figures import Table, dollars, nbytes, percent, seconds, share, significant, tokens
from thermocline.lens.html import Section, page

UNKNOWN = "unknown"
NEVER = "never"
_PARAMETERS = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kmbtKMBT]?)")
_POWERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FOOT = "thermocline size. GB are 10^9 bytes. Every figure follows from the assumptions listed with it."


def _or_unknown(show: Callable[[float], str], value: float | None) -> str:
    return UNKNOWN if value is None else show(value)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


# -- questions ---------------------------------------------------------------------------------------------------------


_COUNT_HINT = "write --parameters 27B, or 30B:3B where 3B of 30B are active"


def with_parameters(geometry: Geometry, text: str | None) -> Geometry:
    """The model with so many parameters: TOTAL, or TOTAL:ACTIVE as 30B:3B. Raises SettingsError for other words."""
    if text is None:
        return geometry
    parts = [_PARAMETERS.fullmatch(part.strip()) for part in text.split(":")]
    if not 1 <= len(parts) <= 2 or not all(parts):  # noqa: PLR2004  # total and active
        raise SettingsError(f"--parameters {text} is no number", hint=_COUNT_HINT)
    total, *active = (int(float(part[1]) * _POWERS[part[2].upper()]) for part in parts if part)
    if not 0 < (active or [total])[0] <= total:
        raise SettingsError(f"--parameters {text} cannot be", hint=_COUNT_HINT)
    return replace(geometry, parameters_total=total, parameters_active=(active or [total])[0], weights_bytes=None)


def paging_of(device: Accelerator, block_tokens: int | None, batched_tokens: int | None) -> Engine:
    """Memory as vLLM divides it there; with blocks and steps of other sizes where they are named."""
    found = vllm_on(device.memory_bytes, device.name)
    found = replace(found, batched_tokens=batched_tokens or found.batched_tokens)
    return replace(found, block_tokens=block_tokens, latent_block_tokens=block_tokens) if block_tokens else found


# -- sentences ---------------------------------------------------------------------------------------------------------


def so(found: Sizing) -> list[str]:
    """What follows: one sentence on memory, one on tiers, one on reuse, one on money, as far as each is known."""
    said = [_memory(found), _tiers(found), _reuse(found), _money(found), *(f"Unknown: {why}." for why in found.why[:1])]
    return [line for line in said if line]


def _memory(found: Sizing) -> str:
    room = found.room
    if room is None:
        return f"A token takes {found.token.nbytes:,} B; how much memory is left for KV is not known."
    if found.verdict == NO_ROOM:
        more = found.ranks_that_fit
        action = f"it fits on {more}" if more else "no number of ranks up to 32 makes it fit"
        lack = f"{nbytes(-room.kv_bytes)} lack on each" if room.kv_bytes < 0 else "no session of that length fits"
        return f"It does not fit on {found.ranks} x {found.gpu}: {lack}; {action}."
    first, *others = [(f"{each.steady or 0:,}", tokens(each.tokens)) for each in found.contexts]
    longer = "".join(f", or {number} of {length}" for number, length in others)
    left = f"{nbytes(room.kv_bytes)} of each accelerator are left for KV"
    return f"It fits: {left}, room for {first[0]} sessions of {first[1]} tokens at once{longer}."


def _tiers(found: Sizing) -> str:
    if found.token.state_bytes and found.room is not None and found.verdict != NO_ROOM:
        return "No cache beside the engine's is advised: tiers hold blocks, and this model keeps a state per sequence."
    if not found.tiers:
        return ""
    pays = [f"{tier.name} from {tier.from_tokens:,} tokens" for tier in found.tiers if tier.from_tokens is not None]
    never = [tier.name for tier in found.tiers if tier.from_tokens is None]
    lost = f"; {' and '.join(never)} {'does' if len(never) == 1 else 'do'} not" if never else ""
    return (
        f"Loading is quicker than computing over {', '.join(pays)}{lost}."
        if pays
        else (f"No cache is advised: computing is quicker than loading over {', '.join(never)}.")
    )


def _reuse(found: Sizing) -> str:
    work = found.workload
    if work is None:
        return ""
    own, ideal = share(work.device_hit), share(work.ideal)
    kept = f"the engine's own memory has {own} of all prompt tokens, an endless cache {ideal}"
    if found.verdict == NO_CACHE or not work.chosen:
        return f"No cache beside the engine's is advised: {kept}, and no tier gains more than it costs."
    tiers = ", then ".join(
        f"{nbytes(each.nbytes)} of {each.tier}{' for all' * each.shared} ({share(each.hit)})" for each in work.chosen
    )
    room = "less what its room costs" if work.room_is_priced else "if room costs nothing"
    return f"Of {work.name}, {kept}. What gains most per instance, {room}: {tiers}."


def _money(found: Sizing) -> str:
    if not found.bills:
        return ""
    cold = found.bills[0]
    best = min(found.bills, key=lambda each: each.seconds)
    parts = []
    if cold.usd_per_million_prompt_tokens is not None:
        costs = [f"{_or_unknown(dollars, each.usd_per_thousand_requests)} {each.name}" for each in found.bills]
        parts.append(f"1,000 requests cost {', and '.join(costs)}")
    if found.verdict == TOO_SLOW:
        target = seconds(found.target_seconds or 0.0)
        how = best.how or f"the prefill takes {seconds(best.prefill_seconds)}"
        parts.append(f"nine first tokens in ten within {target}: {how}")
    elif best.accelerators is not None:
        keep = "accelerator keeps" if best.accelerators == 1 else "accelerators keep"
        need = f"{best.accelerators:,} {keep} up" + (" with reuse" if best is not cold else "")
        parts.append(need + (f", without it {_needed(cold)}" if best is not cold else ""))
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "." if parts else ""


def _needed(each: Bill) -> str:
    return f"{each.accelerators:,}" if each.accelerators is not None else "no number"


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(found: Sizing) -> Iterator[Table]:
    """All of one answer, in the order of its questions."""
    if found.room is not None:
        yield _room_table(found)
    yield _session_table(found)
    timed = [each for each in found.contexts if each.prefill_seconds is not None]
    if timed:
        yield from (_prompt_table(timed), _decode_table(found, timed))
    if found.loads:
        yield _load_table(found.loads)
    if found.tiers:
        yield _tier_table(found.tiers)
    if found.workload is not None:
        yield from (_workload_table(found), _size_table(found))
    if found.bills:
        yield _bill_table(found)


def _room_table(found: Sizing) -> Table:
    room = found.room
    assert room is not None, "asked for where it is known"
    rows = [
        ("left to the device and the driver", nbytes(room.reserved_bytes)),
        ("weights", nbytes(room.weights_bytes)),
        ("activations, communication, other", nbytes(room.overhead_bytes)),
        ("KV" if room.kv_bytes >= 0 else "lacking", nbytes(abs(room.kv_bytes))),
    ]
    blocks = (
        f"{room.blocks:,} blocks of {room.block_tokens} tokens, {room.kv_tokens:,} tokens as vLLM's log counts them"
    )
    return Table(
        f"memory of one accelerator of {found.ranks}", ("part", f"of {nbytes(room.device_bytes)}"), rows, blocks
    )


def _session_table(found: Sizing) -> Table:
    rows = [
        (
            f"{each.tokens:,}" + ("*" if each.beyond_model else ""),
            nbytes(each.nbytes),
            _or_unknown(share, each.share_of_weights),
            _or_unknown(lambda value: f"{value:,.2f}", each.admitted),
            _or_unknown(_whole, each.steady),
        )
        for each in found.contexts
    ]
    note = f"KV of a token: {found.token.formula}; on each rank {found.token.rank_bytes:,} B."
    if any(each.beyond_model for each in found.contexts):
        note += " * longer than the model was made for: it needs an extension such as YaRN."
    return Table("sessions", ("tokens", "KV of one", "of the weights", "admitted", "held at once"), rows, note)


def _prompt_table(timed: Sequence[Context]) -> Table:
    names = list(timed[0].warm_seconds)
    rows = [
        (
            f"{each.tokens:,}",
            _or_unknown(seconds, each.prefill_seconds),
            *(seconds(each.warm_seconds[name]) for name in names),
        )
        for each in timed
    ]
    head = ("tokens", "computed", *(f"from {name}" for name in names))
    note = "Alone, without waiting. From a tier: loaded, and the last 128 tokens computed."
    return Table("seconds to the first token", head, rows, note)


def _decode_table(found: Sizing, timed: Sequence[Context]) -> Table:
    rows = [
        (
            f"{each.tokens:,}",
            _or_unknown(seconds, each.decode_seconds),
            _or_unknown(seconds, each.decode_bound_seconds),
            each.decode_by,
            _or_unknown(_whole, each.batch),
            _or_unknown(seconds, each.batch_seconds),
            significant(each.batch / each.batch_seconds) if each.batch and each.batch_seconds else "-",
        )
        for each in timed
    ]
    head = ("tokens", "one alone", "at full bandwidth", "limited by", "batch", "its step", "tokens/s")
    ridge = _or_unknown(significant, found.ridge_flops_per_byte)
    return Table(
        "seconds per output token", head, rows, f"Ridge point: {ridge} operations per byte, compute / bandwidth."
    )


def _load_table(loads: Sequence[Loaded]) -> Table:
    rows = [
        (
            f"{each.prompt_tokens:,}",
            f"{each.users:,}",
            _whole(each.running),
            seconds(each.first_token_seconds),
            seconds(each.between_tokens_seconds),
            significant(each.tokens_per_second),
            _KNOWN[each.known],
        )
        for each in loads
    ]
    head = ("tokens", "users", "running", "first token", "between tokens", "tokens/s", "measured on")
    note = f"One instance, answers of {loads[0].output_tokens:,} tokens, nothing reused; each user asks again at once. "
    note += "Fitted to load tests; the tables above have shares of peaks."
    return Table("under load", head, rows, note)


_KNOWN = {"model": "this model", "machine": "other models", "formulas": "nothing: formulas", BEYOND: "shorter prompts"}


def _tier_table(tiers: Sequence[Tier]) -> Table:
    rows = [
        (
            tier.name,
            f"{tier.bytes_per_second / 1e9:g} GB/s",
            _pays(tier),
            tier.evidence,
        )
        for tier in tiers
    ]
    first, last = tiers[0], f"{tiers[0].asked_tokens:,}"
    note = (
        f"Break-even bandwidth: {nbytes(first.breakeven_first)}/s for the first tokens, "
        f"{nbytes(first.breakeven_deep)}/s behind {last}. Never: not up to {last} tokens."
    )
    return Table("loading instead of computing", ("over", "bandwidth", "quicker from", "figure"), rows, note)


def _workload_table(found: Sizing) -> Table:
    work = found.workload
    assert work is not None, "asked for where there is one"
    rows = [
        ("requests", f"{work.requests:,} in {seconds(work.seconds)}"),
        ("per second", f"{significant(work.arrivals_per_second)}, varying by {work.arrival_cv:.2f}"),
        ("tokens", f"{_whole(work.prompt_tokens)} in, {_whole(work.output_tokens)} out"),
        ("hit by an endless cache", share(work.ideal)),
        ("  of it used before in the same session", share(work.within)),
        ("  of it by other sessions only", share(work.across)),
        (f"hit by the engine's memory ({nbytes(work.device_bytes)})", share(work.device_hit)),
        ("KV that will be used again, at most", nbytes(work.live_bytes)),
        *((f"all KV kept for {seconds(w.seconds)}", f"{nbytes(w.mean_bytes)}, {share(w.hit)}") for w in work.windows),
        ("hits come after, median", seconds(work.waits["p50"])),
        ("  nine in ten within", seconds(work.waits["p90"])),
    ]
    return Table(f"workload: {work.name}", ("", f"with {work.instances} instance{'s' * (work.instances > 1)}"), rows)


def _size_table(found: Sizing) -> Table:
    work = found.workload
    assert work is not None, "asked for where there is one"
    rows = [(f"{percent(part)} of what is possible", nbytes(size), share(hit)) for part, size, hit in work.steps]
    rows += [
        (f"advised: {each.tier}, {'for all' if each.shared else 'each instance'}", nbytes(each.nbytes), share(each.hit))
        for each in work.chosen
    ]
    note = (
        "One cache for all requests, least recently used; advised sizes for each instance count what its sessions find."
    )
    return Table("hit rate by tier size", ("", "bytes", "hit rate"), rows, note)


def _bill_table(found: Sizing) -> Table:
    bills = found.bills
    rows: list[tuple[str, ...]] = [
        ("prompt tokens not computed", *(share(each.hit) for each in bills)),
        ("prefill and load, per request", *(seconds(each.prefill_seconds + each.load_seconds) for each in bills)),
        ("decode, its part of a batch", *(seconds(each.decode_seconds) for each in bills)),
        (
            "USD per million prompt tokens",
            *(_or_unknown(dollars, each.usd_per_million_prompt_tokens) for each in bills),
        ),
        (
            "USD per million output tokens",
            *(_or_unknown(dollars, each.usd_per_million_output_tokens) for each in bills),
        ),
        ("USD per 1,000 requests", *(_or_unknown(dollars, each.usd_per_thousand_requests) for each in bills)),
    ]
    if any(each.how for each in bills):
        late = "nine first tokens in ten within"
        rows += [
            ("accelerators needed", *(_needed(each) for each in bills)),
            ("busy", *(_or_unknown(percent, each.utilisation) for each in bills)),
            (late, *(_or_unknown(seconds, each.first_token_late_seconds) for each in bills)),
            ("USD per month", *(_or_unknown(dollars, each.usd_per_month) for each in bills)),
        ]
        if any(each.tiers_usd_per_month for each in bills):
            room = (each.usd_per_month and (each.tiers_usd_per_month or 0.0) for each in bills)
            rows.append(("  of it room in tiers", *(_or_unknown(dollars, each) for each in room)))
    note = ""
    if found.wasted is not None:
        known = "could be" if found.workload is None else "was"
        hours = f"{hours_per_node_month(found.wasted):,.0f} accelerator-hours a month"
        note = (
            f"Without reuse {percent(found.wasted)} of the time computes what {known} known: {hours} of a node of "
            f"{NODE_ACCELERATORS} that is busy all {HOURS_PER_MONTH:g} hours. Output is never cached."
        )
    return Table("money", ("", *(each.name for each in bills)), rows, note)


# -- whole answers -----------------------------------------------------------------------------------------------------


def as_json(answers: Sequence[Sizing]) -> bytes:
    """All of each answer, with the sentences that follow from it."""
    told = [
        msgspec.to_builtins(each)
        | {"wasted_hours_per_node_month": each.wasted and hours_per_node_month(each.wasted), "so": so(each)}
        for each in answers
    ]
    return msgspec.json.encode(told)


def render(answers: Sequence[Sizing]) -> str:
    """One answer in full; several side by side."""
    if len(answers) > 1:
        said = [f"{each.name}: {each.verdict}\n" + "\n".join(f"  so: {line}" for line in so(each)) for each in answers]
        return "\n\n".join([side_by_side(answers).text(), *said])
    (found,) = answers
    head = [f"{found.name}: {found.verdict}", *(f"so: {line}" for line in so(found))]
    notes = ["assumed", *(f"  - {each}" for each in found.assumptions)]
    return "\n\n".join(["\n".join(head), *(table.text() for table in tables(found)), "\n".join(notes)])


def side_by_side(answers: Sequence[Sizing]) -> Table:
    """The figures that decide, a column for each answer."""
    lengths = sorted({each.tokens for found in answers for each in found.contexts})
    rows: list[tuple[str, ...]] = [
        ("on", *(f"{each.ranks} x {each.gpu}" for each in answers)),
        ("verdict", *(each.verdict for each in answers)),
    ]

    def add(name: str, cells: Sequence[str | None]) -> None:
        if any(cells):
            rows.append((name, *(cell or "-" for cell in cells)))

    add("KV of a token", [f"{each.token.nbytes:,} B" for each in answers])
    add("KV memory of each rank", [None if each.room is None else nbytes(each.room.kv_bytes) for each in answers])
    for length in lengths:
        add(f"sessions of {tokens(length)}", [_of(each, length, "steady", _whole) for each in answers])
    for length in lengths:
        add(f"first token of {tokens(length)}", [_of(each, length, "prefill_seconds", seconds) for each in answers])
    first = lengths[0]
    add(f"output token behind {tokens(first)}", [_of(each, first, "decode_seconds", seconds) for each in answers])
    add("break-even", [f"{nbytes(each.tiers[0].breakeven_first)}/s" if each.tiers else None for each in answers])
    for name in dict.fromkeys(tier.name for each in answers for tier in each.tiers):
        told = [next((tier for tier in each.tiers if tier.name == name), None) for each in answers]
        add(f"{name} pays from", [None if tier is None else _pays(tier) for tier in told])
    works = [each.workload for each in answers]
    add("hit, engine's memory", [None if work is None else share(work.device_hit) for work in works])
    add("hit, advised tiers", [share(work.chosen[-1].hit) if work and work.chosen else None for work in works])
    for at, name in enumerate(("", ", with reuse")):
        add(f"USD per 1,000{name}", [_billed(each, at, "usd_per_thousand_requests", dollars) for each in answers])
        add(f"accelerators needed{name}", [_billed(each, at, "accelerators", _whole) for each in answers])
    add("wasted without reuse", [None if each.wasted is None else percent(each.wasted) for each in answers])
    return Table("", ("", *(each.model.rpartition("/")[2] for each in answers)), rows)


def _pays(tier: Tier) -> str:
    return NEVER if tier.from_tokens is None else f"{tier.from_tokens:,} tokens"


def _of(found: Sizing, length: int, name: str, show: Callable[[float], str]) -> str | None:
    value = next((getattr(each, name) for each in found.contexts if each.tokens == length), None)
    return None if value is None else show(value)


def _billed(found: Sizing, at: int, name: str, show: Callable[[float], str]) -> str | None:
    value = getattr(found.bills[at], name) if at < len(found.bills) else None
    return None if value is None else show(value)


def report(answers: Sequence[Sizing]) -> str:
    """A page: what follows, then for each answer its charts, tables and assumptions."""
    compared = [Section("Side by side", tables=[side_by_side(answers)])] if len(answers) > 1 else []
    sections = []
    for each in answers:
        said = so(each) if compared else ()
        sections.append(Section(f"{each.name}: {each.verdict}", said, list(charts(each)), list(tables(each))))
        sections.append(Section("What is assumed", points=each.assumptions))
    title = answers[0].name if len(answers) == 1 else f"{len(answers)} ways to serve"
    return page(
        f"{title}: KV cache in bytes, seconds and money",
        () if compared else so(answers[0]),
        [*compared, *sections],
        FOOT,
    )


def charts(found: Sizing) -> Iterator[str]:
    """Memory by context length, first tokens by length, hit rate by tier size, and where a request's time goes."""
    room = found.room
    if room is not None:
        fixed = (("weights", float(room.weights_bytes)), ("overhead", float(room.overhead_bytes)))
        bars = [
            Bar(f"{tokens(each.tokens)}", (*fixed, ("KV of one session", each.nbytes / found.ranks)))
            for each in found.contexts
        ]
        usable = float(room.device_bytes - room.reserved_bytes)
        yield bar_chart("Memory of one accelerator, one session", bars, Axis("", nbytes), [("usable", usable)])
        held = [Bar(f"{tokens(each.tokens)}", (("sessions", float(each.steady or 0)),)) for each in found.contexts]
        yield bar_chart("Sessions held at once", held, Axis("sessions", _whole))
    if found.bills:
        labels = ("no reuse", "reuse")
        parts = [
            Bar(name, (("prefill and load", each.prefill_seconds + each.load_seconds), ("decode", each.decode_seconds)))
            for name, each in zip(labels, found.bills, strict=False)
        ]
        yield bar_chart("An instance's time for one request", parts, Axis("", seconds))
    timed = [each for each in found.contexts if each.prefill_seconds]
    if len(timed) > 1:
        names = ["computed", *timed[0].warm_seconds]
        points = {name: [(float(each.tokens), _first_token(each, name)) for each in timed] for name in names}
        x = Axis("tokens of the prompt", tokens, log=True, ticks=tuple(float(each.tokens) for each in timed))
        lines = [Series(name, points[name]) for name in names]
        yield line_chart("Seconds to the first token", lines, x, Axis("", seconds, log=True))
    if found.workload is not None:
        work = found.workload
        marks = [("all engines", work.device_bytes * work.instances)]
        many = work.instances
        marks += [(f"all {each.tier}", each.nbytes * (1 if each.shared else many)) for each in work.chosen]
        x, y = Axis("size of one cache for all", nbytes, log=True), Axis("hit rate", percent)
        yield line_chart("Hit rate by tier size", [Series(work.name, work.curve)], x, y, marks)


def _first_token(each: Context, name: str) -> float:
    return each.warm_seconds.get(name, each.prefill_seconds or 0.0)
