"""What a live instance takes, measured: first tokens by length, reuse and concurrency, and its KV memory by length."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

import msgspec

from thermocline.clock import Clock
from thermocline.costs.measured import UNTOLD, VERSION, Conditions, Measured, Memory, Row
from thermocline.costs.saved import machine
from thermocline.errors import SettingsError, UnreachableError
from thermocline.lens import figures, html
from thermocline.lens.chart import Axis, Series, line_chart
from thermocline.lens.figures import Table
from thermocline.lens.html import Section
from thermocline.lens.sweep import HELD_TOKENS, Endpoint, Plan, Prompts, Sample, Told, sweep

CONTEXTS = (300, 700, 1500, 3100, 7000)
"""No multiples of what kernels and steps like best: prompts are none either, and those would look quicker."""
REQUESTS_MAX, TOKENS_MAX, CLIENTS_MAX = 10_000, 50_000_000, 64
LENGTH_MIN, KINDS_MAX = 16, 64
ALIKE = 16
"""Answers are of one row where their cached tokens differ by less than this part of the prompt."""
BY_HAND = "by Ctrl-C"
_HEADER = ("prompt", "shared", "cached", "from", "clients", "first token", "fastest", "slowest", "per token", "fit")
_FEWER = "ask for fewer --context, shares of --reuse, or clients of --concurrency"


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One sweep. `measured` is what is written; `stopped` says why the sweep ended before all was asked, or nothing."""

    measured: Measured
    requests: int
    failed: int
    prompt_tokens: int
    seconds: float
    stopped: str
    weights: dict[str, float]
    fit_errors: tuple[float, ...]


def numbers(option: str, text: str) -> list[float]:
    """Numbers between commas. Raises SettingsError for something else."""
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [math.nan]
    if not all(math.isfinite(number) for number in found):
        raise SettingsError(f"{option} {text} are not numbers between commas", hint=f"write {option} 1,4")
    return found


def plan(
    context_tokens: int | None, contexts: Sequence[float], shares: Sequence[float], concurrency: Sequence[float]
) -> Plan:
    """What is asked. Without `contexts`, up to 7,000 tokens, or as many as the model takes.

    One client is always among them, as only what runs alone says what computing takes; and every length is asked
    without reuse. Raises SettingsError for what the model does not take, or what is too much to ask of a server.
    """
    longest = math.inf if context_tokens is None else context_tokens - HELD_TOKENS
    lengths = sorted({*map(int, contexts)}) or (CONTEXTS if longest >= CONTEXTS[-1] else _up_to(int(longest)))
    if lengths[-1] > longest:
        text = f"the model takes {context_tokens:,} tokens, and {HELD_TOKENS} are left for answers"
        raise SettingsError(
            f"{text}: {lengths[-1]:,} are too many", hint=f"ask for at most {max(0, int(longest))} in --context"
        )
    found = Plan(tuple(lengths), tuple(sorted({*shares} - {0.0})), tuple(sorted({1, *map(int, concurrency)})))
    for name, values, low, high in (
        ("--context", found.contexts, LENGTH_MIN, TOKENS_MAX),
        ("--reuse", found.shares, 0, 1),
        ("--concurrency", found.concurrency, 1, CLIENTS_MAX),
    ):
        if len(values) > KINDS_MAX or not all(low <= value <= high for value in values):
            raise SettingsError(f"{name} is not at most {KINDS_MAX} numbers from {low:,} to {high:,}", hint=_FEWER)
    if found.requests > REQUESTS_MAX or found.prompt_tokens > TOKENS_MAX:
        text = f"these are {found.requests:,} requests of {found.prompt_tokens:,} tokens"
        raise SettingsError(f"{text}, and {REQUESTS_MAX:,} of {TOKENS_MAX:,} are the most", hint=_FEWER)
    return found


def profile(
    endpoint: Endpoint, asked: Plan, clock: Clock, seconds_max: float, progress: Callable[[int], None], seed: int
) -> Profile:
    """Ask all of it, and say what came of it. What Ctrl-C or the time cuts off is left out, and said.

    No request begins after `seconds_max`. Raises UnreachableError where nothing was measured at all.
    """
    samples: list[Sample] = []
    memory: list[Memory] = []
    stopped, started = "", clock.now()
    prompts = Prompts(seed)
    try:
        for sample in sweep(endpoint, asked, prompts, seed):
            samples.append(sample)
            progress(len(samples))
            if clock.now() - started > seconds_max:
                stopped = f"after {seconds_max:.0f} s, as --seconds-max says"
                break
        else:
            memory.extend(_memory(endpoint, prompts, length) for length in asked.contexts)
    except KeyboardInterrupt:
        endpoint.abort()
        stopped = BY_HAND
    except UnreachableError as error:
        stopped = error.message
    rows = _rows(samples)
    if not any(row.alone for row in rows):
        raise UnreachableError(
            f"nothing was measured: {stopped}", hint="give it more time, or see what the server says"
        )
    told = Told()
    with contextlib.suppress(UnreachableError):
        told = endpoint.told()
    conditions = Conditions(
        date=datetime.fromtimestamp(clock.wall(), UTC).isoformat(timespec="seconds"),
        url=endpoint.url,
        model=endpoint.model,
        engine=endpoint.engine,
        machine=machine(),
        context_tokens=endpoint.context_tokens,
        block_tokens=told.block_tokens or math.gcd(*(row.cached for row in rows)) or None,
        kv_blocks=told.kv_blocks,
    )
    measured = Measured(version=VERSION, conditions=conditions, rows=rows, memory=tuple(memory))
    return Profile(
        measured=measured,
        requests=len(samples),
        failed=sum(1 for sample in samples if sample.answer.trouble),
        prompt_tokens=sum(sample.prompt_tokens for sample in samples),
        seconds=clock.now() - started,
        stopped=stopped,
        weights=dict(measured.weights()),
        fit_errors=tuple(_off(measured, row) for row in _alone(measured)),
    )


def _up_to(longest: int) -> tuple[int, ...]:
    return tuple(max(1, longest >> at) for at in (4, 3, 2, 1, 0))


def _memory(endpoint: Endpoint, prompts: Prompts, length: int) -> Memory:
    """KV memory in use while one prompt of this length runs, beside what was in use before."""
    before = endpoint.told().kv_share
    told = endpoint.held(prompts.fresh(length))
    if told.kv_share is None or before is None:
        return Memory(context_tokens=length)
    share = max(0.0, told.kv_share - before)
    blocks = None if told.kv_blocks is None else round(share * told.kv_blocks)
    return Memory(context_tokens=length, share=share, blocks=blocks)


def _rows(samples: Iterable[Sample]) -> tuple[Row, ...]:
    """Answers of one kind become one row. Where some were cached and some not, they are of two kinds."""
    kinds: dict[tuple[int, int, float, str, int], list[Sample]] = {}
    for sample in samples:
        if not sample.answer.trouble:
            alike = (sample.answer.cached_tokens or 0) * ALIKE // sample.length
            kind = (sample.concurrency, sample.length, sample.share, sample.source, alike)
            kinds.setdefault(kind, []).append(sample)
    return tuple(_row(kinds[kind]) for kind in sorted(kinds))


def _row(kind: Sequence[Sample]) -> Row:
    answers = [sample.answer for sample in kind]
    seconds = [answer.seconds for answer in answers]
    between = [answer.between_seconds for answer in answers if answer.between_seconds is not None]
    cached = [answer.cached_tokens for answer in answers if answer.cached_tokens is not None]
    prompt_tokens = statistics.median_low(sample.prompt_tokens for sample in kind)
    return Row(
        prompt_tokens=prompt_tokens,
        shared_tokens=int(kind[0].share * prompt_tokens),
        cached_tokens=statistics.median_low(cached) if cached else None,
        source=kind[0].source,
        concurrency=kind[0].concurrency,
        requests=len(kind),
        first_token_seconds=statistics.median(seconds),
        low_seconds=min(seconds),
        high_seconds=max(seconds),
        between_tokens_seconds=statistics.median(between) if between else None,
    )


def _alone(measured: Measured) -> list[Row]:
    return [row for row in measured.rows if row.alone]


def _off(measured: Measured, row: Row) -> float:
    return measured.expected_seconds(row) / row.first_token_seconds - 1


# -- in words ----------------------------------------------------------------------------------------------------------


def render(found: Profile) -> str:
    """All of it as text."""
    tables = (_first_tokens(found), _memories(found.measured))
    return "\n\n".join(["\n".join(_asked(found)), *(table.text() for table in tables), "\n".join(_concluded(found))])


def page(found: Profile) -> str:
    """All of it as a page, with charts."""
    conditions = found.measured.conditions
    curves = Section(
        "Time to first token",
        paragraphs=_concluded(found)[:2],
        charts=[
            _chart("One request at a time", _curves(found.measured)),
            _chart("By clients, nothing shared", _clients(found.measured, lambda row: row.first_token_seconds)),
            _chart("Per token after it", _clients(found.measured, lambda row: row.between_tokens_seconds)),
        ],
        tables=[_first_tokens(found)],
    )
    memory = Section("KV memory", tables=[_memories(found.measured)])
    title = f"What {conditions.model} takes at {conditions.url}"
    return html.page(title, _concluded(found)[2:], [curves, memory, Section("How", paragraphs=_asked(found))])


def _chart(name: str, lines: Sequence[Series]) -> str:
    return line_chart(name, lines, Axis("prompt tokens", figures.count), Axis("median", figures.seconds))


def _curves(measured: Measured) -> list[Series]:
    """A line for each share: what was measured."""
    by_share: dict[float, list[tuple[float, float]]] = {}
    for row in measured.rows:
        if row.concurrency == 1:
            share = round(row.shared_tokens / row.prompt_tokens, 2)
            by_share.setdefault(share, []).append((row.prompt_tokens, row.first_token_seconds))
    return [Series(f"{share:.0%} asked before", sorted(points)) for share, points in sorted(by_share.items())]


def _clients(measured: Measured, value: Callable[[Row], float | None]) -> list[Series]:
    """A line for each number of clients."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for row in measured.rows:
        taken = value(row)
        if taken is not None and not row.shared_tokens:
            lines.setdefault(row.concurrency, []).append((row.prompt_tokens, taken))
    return [Series(f"{clients} at once", sorted(points)) for clients, points in sorted(lines.items())]


def _asked(found: Profile) -> list[str]:
    """What was asked of whom, when."""
    conditions = found.measured.conditions
    context = f"{conditions.context_tokens:,} tokens" if conditions.context_tokens else UNTOLD
    block = f"{conditions.block_tokens} tokens" if conditions.block_tokens else UNTOLD
    asked = f"{found.requests:,} requests, {found.failed} of them failed; {found.prompt_tokens:,} prompt tokens"
    lines = [
        f"{conditions.url}: {conditions.model}, {conditions.engine}; context {context}, cached in blocks of {block}",
        f"{asked} in {found.seconds:.0f} s, {conditions.date}, from {conditions.machine}",
    ]
    return [*lines, f"stopped {found.stopped}: this is what there was until then"] if found.stopped else lines


def _first_tokens(found: Profile) -> Table:
    measured = found.measured
    rows = [
        (
            f"{row.prompt_tokens:,}",
            f"{row.shared_tokens / row.prompt_tokens:.0%}",
            UNTOLD if row.cached_tokens is None else f"{row.cached_tokens:,}",
            row.source or "-",
            f"{row.concurrency}",
            *(figures.seconds(each) for each in (row.first_token_seconds, row.low_seconds, row.high_seconds)),
            "-" if row.between_tokens_seconds is None else figures.seconds(row.between_tokens_seconds),
            f"{_off(measured, row):+.0%}" if row in _alone(measured) else "-",
        )
        for row in measured.rows
    ]
    note = (
        "Medians. shared: the part that was asked before; cached: what the engine says it did not compute; per token: "
        "each one after the first; fit: by how much the formula is off."
    )
    return Table("Time to first token", _HEADER, rows, note)


def _memories(measured: Measured) -> Table:
    rows = [
        (
            f"{each.context_tokens:,}",
            UNTOLD if each.blocks is None else f"{each.blocks:,}",
            UNTOLD if each.share is None else f"{each.share:.2%}",
            f"{int(1 / each.share):,}" if each.share else UNTOLD,
        )
        for each in measured.memory
    ]
    told = any(each.share is not None for each in measured.memory)
    note = "" if told else "The engine's metrics do not tell it." if rows else "Not looked at."
    return Table("KV memory while one request runs", ("context", "blocks", "of all", "so many at once"), rows, note)


def _concluded(found: Profile) -> list[str]:
    """The formula with its numbers, how well it does, and what reuse gave."""
    request, token, attended, *loads = map(figures.seconds, found.weights.values())
    terms = [request, f"{token} x n", f"{attended} x n x (cached + n / 2)"]
    terms += [f"{load} x cached, {source}" for load, source in zip(loads, found.measured.sources, strict=True)]
    off = sorted(map(abs, found.fit_errors))
    lines = [
        f"first token of n computed tokens = {' + '.join(terms)}",
        f"  {statistics.median(off):.1%} off at the median, {off[-1]:.1%} at most, where one client asked",
    ]
    most = max(_alone(found.measured), key=lambda row: (row.cached, row.prompt_tokens))
    if most.cached:
        whole = (
            each for each in _alone(found.measured) if each.prompt_tokens == most.prompt_tokens and not each.cached
        )
        cold = next((each.first_token_seconds for each in whole), found.measured.prefill_seconds(most.prompt_tokens))
        text = f"so: {most.prompt_tokens:,} tokens take {figures.seconds(cold)} to the first token, and"
        quicker = f"with {most.cached:,} of them cached, {cold / most.first_token_seconds:.1f} times as quick"
        lines.append(f"{text} {figures.seconds(most.first_token_seconds)} {quicker}")
    return lines
