"""What a live instance takes, measured: first tokens by length, reuse and concurrency, and its KV memory by length."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

import msgspec

from thermocline.clock import Clock
from thermocline.costs.measured import VERSION, Conditions, Measured, Memory, Row
from thermocline.costs.saved import machine
from thermocline.errors import SettingsError, UnreachableError
from thermocline.lens.sweep import HELD_TOKENS, Endpoint, Plan, Prompts, Sample, Told, sweep

CONTEXTS = (512, 1024, 2048, 4096, 8192)
REQUESTS_MAX, TOKENS_MAX, CLIENTS_MAX = 10_000, 50_000_000, 64
LENGTH_MIN, KINDS_MAX = 16, 64
ALIKE = 16
"""Answers are of one row where their cached tokens differ by less than this part of the prompt."""
BY_HAND = "by Ctrl-C"
_HEADER = ("clients", "prompt", "shared", "cached", "from", "first token", "fastest", "slowest", "per token", "fit")
_FEWER = "ask for fewer --contexts, shares of --reuse, or clients of --concurrency"


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
    """What is asked. Without `contexts`, up to 8,192 tokens, or as many as the model takes.

    One client is always among them, as only what runs alone says what computing takes; and every length is asked
    without reuse. Raises SettingsError for what the model does not take, or what is too much to ask of a server.
    """
    longest = math.inf if context_tokens is None else context_tokens - HELD_TOKENS
    lengths = sorted({*map(int, contexts)}) or (CONTEXTS if longest >= CONTEXTS[-1] else _up_to(int(longest)))
    if lengths[-1] > longest:
        text = f"the model takes {context_tokens:,} tokens, and {HELD_TOKENS} are left for answers"
        raise SettingsError(f"{text}: {lengths[-1]:,} are too many", hint=f"ask for at most {longest} in --contexts")
    found = Plan(tuple(lengths), tuple(sorted({*shares} - {0.0})), tuple(sorted({1, *map(int, concurrency)})))
    for name, values, low, high in (
        ("--contexts", found.contexts, LENGTH_MIN, TOKENS_MAX),
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
    if not any(row.told and row.concurrency == 1 for row in rows):
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
    before = endpoint.told()
    told = endpoint.held(prompts.fresh(length))
    if told is None or told.kv_share is None or before.kv_share is None:
        return Memory(context_tokens=length)
    share = max(0.0, told.kv_share - before.kv_share)
    return Memory(
        context_tokens=length, share=share, blocks=None if told.kv_blocks is None else round(share * told.kv_blocks)
    )


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
    return [row for row in measured.rows if row.concurrency == 1 and row.told]


def _off(measured: Measured, row: Row) -> float:
    return measured.expected_seconds(row) / row.first_token_seconds - 1


# -- in words ----------------------------------------------------------------------------------------------------------


def render(found: Profile) -> str:
    """All of it as tables."""
    measured, conditions = found.measured, found.measured.conditions
    context = f"{conditions.context_tokens:,} tokens" if conditions.context_tokens else "unknown"
    block = f"{conditions.block_tokens} tokens" if conditions.block_tokens else "unknown"
    asked = f"{found.requests:,} requests, {found.failed} of them failed; {found.prompt_tokens:,} prompt tokens"
    lines = [
        f"{conditions.url}: {conditions.model}, {conditions.engine}; context {context}, cached in blocks of {block}",
        f"{asked} in {found.seconds:.0f} s, {conditions.date}, from {conditions.machine}",
    ]
    if found.stopped:
        lines.append(f"stopped {found.stopped}: what is below is what there was until then")
    lines += ["", "time to first token, and what it took for each token after that: medians", *_table(found)]
    lines += ["", *_fitted(found), "", "KV memory while one request of that length runs", *_memory_table(measured)]
    return "\n".join(lines)


def _table(found: Profile) -> list[str]:
    measured = found.measured
    told = [*_alone(measured)]
    rows: list[tuple[str, ...]] = [
        ("clients", "prompt", "shared", "cached", "from", "first token", "fastest", "slowest", "per token", "fit")
    ]
    rows += [
        (
            f"{row.concurrency}",
            f"{row.prompt_tokens:,}",
            f"{row.shared_tokens / row.prompt_tokens:.0%}",
            "unknown" if row.cached_tokens is None else f"{row.cached_tokens:,}",
            row.source or "-",
            *(_time(each) for each in (row.first_token_seconds, row.low_seconds, row.high_seconds)),
            "-" if row.between_tokens_seconds is None else _time(row.between_tokens_seconds),
            f"{_off(measured, row):+.0%}" if row in told else "-",
        )
        for row in measured.rows
    ]
    return _aligned(rows)


def _fitted(found: Profile) -> list[str]:
    """The formula with its numbers, and how well it does."""
    request, token, attended, *loads = found.weights.values()
    terms = [_time(request), f"{_time(token)} x n", f"{_time(attended)} x n x (cached + n / 2)"]
    terms += [f"{_time(load)} x cached, {source}" for load, source in zip(loads, found.measured.sources, strict=True)]
    off = sorted(abs(error) for error in found.fit_errors)
    worst = f"{statistics.median(off):.1%} off at the median, {off[-1]:.1%} at most, of the rows with one client"
    saved = max((row for row in _alone(found.measured)), key=lambda row: (row.cached, row.prompt_tokens))
    lines = [f"first token of n computed tokens = {' + '.join(terms)}", f"that is {worst}"]
    if saved.cached:
        cold = found.measured.prefill_seconds(saved.prompt_tokens)
        lines.append(
            f"reuse: {saved.prompt_tokens:,} tokens take {_time(cold)}, and {_time(saved.first_token_seconds)} with "
            f"{saved.cached:,} of them cached: {cold / saved.first_token_seconds:.1f} times as quick"
        )
    return lines


def _memory_table(measured: Measured) -> list[str]:
    rows = [("context", "blocks", "of all KV memory", "such requests at once")]
    rows += [
        (
            f"{each.context_tokens:,}",
            "unknown" if each.blocks is None else f"{each.blocks:,}",
            "unknown" if each.share is None else f"{each.share:.2%}",
            f"{1 / each.share:,.1f}" if each.share else "unknown",
        )
        for each in measured.memory
    ]
    return _aligned(rows) if measured.memory else ["not looked at"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
