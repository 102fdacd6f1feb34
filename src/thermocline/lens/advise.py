"""`thermocline advise`: from a model, a machine and a workload to the tree of `costs/advice.py`, and back to words.

The workload is a trace, the last requests or the metrics of a running server, a description, or a use case's own one.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from msgspec import Struct

from thermocline.clock import Clock
from thermocline.costs import measured, saved, trace, workload
from thermocline.costs.advice import Advice, Leaf, Line, Number, advise
from thermocline.costs.geometry import Geometry
from thermocline.costs.hardware import Accelerator, Price, accelerator
from thermocline.costs.memory import capacity
from thermocline.costs.models import find
from thermocline.costs.observed import Observed, judge
from thermocline.costs.pages import layer_token_bytes, vllm_on
from thermocline.costs.roofline import Prefill, Setup, prefill_of
from thermocline.costs.study import Machine, Offer
from thermocline.costs.transfer import host_link
from thermocline.errors import SettingsError, ThermoclineError, TraceError, UnreachableError
from thermocline.lens import observe
from thermocline.lens.figures import nbytes
from thermocline.lens.offers import named
from thermocline.lens.spread import spread
from thermocline.lens.summary import summarise
from thermocline.store.receipt import Reason

WIDTH = 100
ROUTED = "routed_cached_tokens_total"
"""What a gateway counts of all its instances, whatever their tiers."""
LOST = {
    Reason.EVICTED,
    Reason.EXPIRED,
    Reason.ELSEWHERE,
    Reason.PENDING,
    Reason.DECLINED,
    Reason.NOT_ADMITTED,
    Reason.LATE,
    Reason.CORRUPT,
    Reason.TIER_DOWN,
}
"""Reasons of tokens that were known once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The machine, as the command line names it. `kv_tokens` and `profile` replace what would be estimated."""

    model: str | None = None
    gpu: str | None = None
    tp: int = 1
    instances: int = 1
    tiers: tuple[str, ...] = ()
    kv_dtype: str = ""
    kv_tokens: int | None = None
    usd_per_hour: float | None = None
    profile: Path | None = None


class Answer(Struct, frozen=True):
    """Advice, and where a use case was named: what is usual there, and whether the numbers confirm it.

    They do where they choose among the usual tiers, or none where none is usual.
    """

    advice: Advice
    use_case: str = ""
    usual_tiers: tuple[str, ...] = ()
    usual_why: str = ""
    habit: str = ""
    confirmed: bool | None = None


# -- the machine -------------------------------------------------------------------------------------------------------


def machine_of(asked: Asked, prompt_tokens: int) -> Machine:
    """The machine that was named, for prompts of this length. Raises SettingsError or ModelError where it lacks."""
    profile = measured.read(asked.profile) if asked.profile else None
    if asked.model is None or (asked.gpu is None and profile is None):
        hint = "such as `thermocline advise meta-llama/Meta-Llama-3.1-8B --gpu h100 --use-case chat`"
        raise SettingsError("bytes and seconds follow from a model and a GPU", hint=hint)
    geometry, device = find(asked.model), accelerator(asked.gpu) if asked.gpu else None
    if geometry.state is not None:
        hint = "leave prefix caching to the engine; it keeps checkpoints of such states"
        raise SettingsError(f"{geometry.name} keeps a state per sequence, which our tiers do not store", hint=hint)
    dtype = asked.kv_dtype or geometry.kv_dtype
    device_tokens, room = _device_tokens(asked, profile, geometry, device, prompt_tokens)
    prefill, speed = _prefill(asked, profile, geometry, device)
    price = device.price if device else None
    usd = asked.usd_per_hour if asked.usd_per_hour is not None else price.typical if price else None
    local = host_link(device) if device and device.host_bytes_per_second else None
    offers = named(asked.tiers or (*(("host",) if local else ()), "disk"), local, asked.tp, usd)
    return Machine(
        prefill=prefill,
        token_bytes=asked.tp
        * sum(each.layers * layer_token_bytes(each, dtype, asked.tp) for each in geometry.attention),
        device_tokens=device_tokens,
        offers=offers,
        instances=asked.instances,
        usd_per_hour=usd * asked.tp if usd is not None else None,
        assumptions=(
            f"{geometry.name}: {geometry.source}",
            room,
            speed,
            _price_note(asked.usd_per_hour, price),
            *(
                ()
                if local or asked.tiers
                else ("host: left out, as its bandwidth is not known; --tier host@SPEED has it",)
            ),
            *(
                f"{each.tier}: {_room(each)}; {each.link.name}, {each.link.evidence}: {each.link.source}"
                for each in offers
            ),
        ),
    )


def _device_tokens(
    asked: Asked, profile: measured.Measured | None, geometry: Geometry, device: Accelerator | None, prompt_tokens: int
) -> tuple[int, str]:
    """KV memory of an instance in tokens, and where that is from."""
    told = profile.conditions if profile else None
    if asked.kv_tokens is not None:
        return asked.kv_tokens, "KV memory: given"
    if told and told.kv_blocks and told.block_tokens:
        return told.kv_blocks * told.block_tokens, "KV memory: as the engine told `profile`"
    if device is None:
        raise SettingsError("KV memory is not known", hint="name the GPU, or give --kv-tokens")
    engine = vllm_on(device.memory_bytes, device.name)
    room = capacity(geometry, device.memory_bytes, tp=asked.tp, kv_dtype=asked.kv_dtype, engine=engine)
    if not room.fits:
        raise SettingsError(f"{geometry.name} leaves no KV memory there", hint="raise --tp, or give --kv-tokens")
    return room.tokens(max(1, prompt_tokens)), f"KV memory: estimated ({'; '.join(room.assumed)})"


def _prefill(
    asked: Asked, profile: measured.Measured | None, geometry: Geometry, device: Accelerator | None
) -> tuple[Prefill, str]:
    if profile is not None:
        return profile.prefill_seconds, profile.note(geometry.name)
    assert device is not None, "one of both was asked for"
    setup = Setup(geometry, device, asked.tp, geometry.weights_dtype, asked.kv_dtype or geometry.kv_dtype)
    return prefill_of(setup), f"prefills: roofline of {asked.tp} x {device.name}, {setup.running.source}"


def _room(offer: Offer) -> str:
    if offer.capacity_bytes is None:
        return f"as large as is useful, --tier {offer.tier}=SIZE bounds it"
    return f"at most {nbytes(offer.capacity_bytes)}"


def _price_note(given: float | None, price: Price | None) -> str:
    if given is not None:
        return f"price of an accelerator: ${given:g} per hour, given"
    if price is None:
        return "price of an accelerator: unknown, so room counts as free; --price gives it"
    return f"price of an accelerator: {price}; room costs what --tier says, and else nothing"


# -- the workload ------------------------------------------------------------------------------------------------------


def of_trace(asked: Asked, path: Path, use_case: str | None = None) -> Advice:
    """Advice for a trace, of a use case that says whether its order matters. Raises TraceError without prefixes."""
    found = trace.read(path)
    if not found.has_blocks:
        hint = "take one with block hashes, or describe the workload with --describe"
        raise TraceError(f"{path} tells lengths and arrivals only: nothing of shared prefixes", hint=hint)
    return advise(found, machine_of(asked, int(found.input_tokens.mean())), spread, reorderable=_reorderable(use_case))


def of_description(asked: Asked, told: workload.Description) -> Advice:
    """Advice for a trace that is synthesised from a description."""
    found = workload.synthesise(told)
    machine = machine_of(asked, int(found.trace.input_tokens.mean()))
    return advise(found.trace, machine, spread, hours=found.hours, reorderable=told.reorderable)


def beside(advice: Advice | None, name: str | None, asked: Asked) -> Answer:
    """Advice, beside what is usual for a use case where one is named. Without advice, of that one's own description."""
    if name is None:
        assert advice is not None, "one of both was asked for"
        return Answer(advice)
    case = _case(name)
    advice = advice or of_description(asked, case.like)
    among = set(advice.tiers) <= set(case.tiers) and bool(advice.tiers) == bool(case.tiers)
    confirmed = None if advice.verdict == "unknown" else among
    return Answer(advice, case.title, case.tiers, case.why, case.habit, confirmed)


def _case(name: str) -> workload.UseCase:
    case = workload.use_cases().get(name)
    if case is None:
        raise SettingsError(f"no use case {name}", hint=f"one of {', '.join(workload.use_cases())}")
    return case


def of_server(
    asked: Asked, source: observe.Source, clock: Clock, use_case: str | None = None, keep: Path | None = None
) -> Advice:
    """Advice from what runs: from its last requests, where it keeps them as a trace, else from what it has counted.

    The trace is kept as a file where one is named. Raises UnreachableError where nothing is told, SettingsError where
    no request has come yet, or there is no trace to keep.
    """
    (watched,) = observe.watch([source], 0, clock)
    if not watched.scrapes:
        why = "; ".join(reason for _, reason in watched.untold)
        of_node = source.kind is observe.Kind.NODE
        hint = "`thermocline ps` prints the sockets of nodes" if of_node else "is it up, and vLLM's server, or ours?"
        raise UnreachableError(f"{source.name} tells no metrics: {why}", hint=hint)
    lines, why_none = _trace_of(source, watched)
    if lines:
        found = trace.parse(io.BytesIO(lines), source.name)
        if keep:
            saved.put(keep, lines)
        return of_requests(asked, found, source, use_case)
    if keep or source.kind is observe.Kind.GATEWAY:
        raise SettingsError(f"{source.name} has no trace of any request", hint=_TRACES[source.kind])
    counted = observed_of(watched)
    if not counted.requests or not counted.prompt_tokens:
        hint = _TRACES[source.kind] if source.kind is observe.Kind.NODE else "ask again when it has, or --describe"
        raise SettingsError(f"{source.name} has answered no request yet", hint=hint)
    advice = judge(counted, machine_of(asked, int(counted.prompt_tokens / counted.requests)))
    return msgspec.structs.replace(
        advice, notes=(f"from counters alone: {why_none}", *_taken_for_all(asked, source), *advice.notes)
    )


_TRACES = {
    observe.Kind.SERVER: "servers of ours keep one from the first request on; of vLLM's a node has it: --node",
    observe.Kind.NODE: "a node knows vLLM's requests once they came; our own engines know theirs: --url, --gateway",
    observe.Kind.GATEWAY: "a gateway keeps one of prompts whose tokens it knows: token ids, or with --tokenizer-path",
}


def _taken_for_all(asked: Asked, source: observe.Source) -> tuple[str, ...]:
    """What several instances do is not told by one of them; the gateway before them sees it all."""
    if asked.instances == 1 or source.kind is observe.Kind.GATEWAY:
        return ()
    return (f"what {source.name} has seen is taken for the work of all {asked.instances:,} instances",)


def _trace_of(source: observe.Source, watched: observe.Watched) -> tuple[bytes, str]:
    """Its last requests, or why there are none."""
    if watched.is_vllm or source.trace is None:
        return b"", "vLLM keeps no trace of its requests"
    if watched.last.value(ROUTED) is not None and source.kind is observe.Kind.SERVER:
        return (
            b"",
            "a gateway tells its last requests at its own socket: give --gateway PATH, as `thermocline ps` prints it",
        )
    try:
        return source.trace(), "no request is remembered"
    except ThermoclineError as error:  # an older one does not know the question
        return b"", error.message


def of_requests(asked: Asked, found: trace.Trace, source: observe.Source, use_case: str | None) -> Advice:
    """Advice for the last requests that a server remembers."""
    note = f"read from the last {len(found):,} requests of {source.name}, which came within {found.seconds:,.0f} s"
    found = replace(found, notes=(note, *_taken_for_all(asked, source), *found.notes))
    return advise(found, machine_of(asked, int(found.input_tokens.mean())), spread, reorderable=_reorderable(use_case))


def _reorderable(use_case: str | None) -> bool:
    return _case(use_case).like.reorderable if use_case else False


def observed_of(watched: observe.Watched) -> Observed:
    """What a server tells: ours by its receipts, where it has some, and else by its metrics."""
    if watched.is_vllm:
        return _of_vllm(watched)
    value, fresh = watched.counted, None
    tiers = watched.counted_by("cached_tokens_total", "tier")
    if routed := value(ROUTED):
        tiers["instances"] = routed
    own, prompts = tiers.pop("device", 0.0), value("prompt_tokens_total")
    if prompts:  # a node counts none
        fresh = prompts - own + value("generated_tokens_total")
    if watched.receipts:
        told = summarise(watched.receipts)
        tiers = {tier: float(tokens) for tier, tokens in told.by_tier.items()}
        lost = {share.reason.name: float(share.tokens) for share in told.by_reason if share.reason in LOST}
        source = f"the last {told.requests:,} receipts of {watched.name}"
        own = tiers.pop("device", 0.0)
        unsure = float(sum(share.tokens for share in told.by_reason if share.reason is Reason.UNKNOWN))
        return Observed(
            source, told.requests, told.prompt_tokens, own, tiers, lost,
            never_full=False, fresh_tokens=fresh, unsure_tokens=unsure,
        )  # fmt: skip
    routes = watched.counted_by("requests_total", "route")
    requests = sum(count for route, count in routes.items() if route.endswith("completions"))
    source = f"what {watched.name} has counted"
    return Observed(source, requests, prompts, own, tiers, None, never_full=False, fresh_tokens=fresh)


def _of_vllm(watched: observe.Watched) -> Observed:
    value = watched.counted
    room = sum(_room_told(dict(labels)) for labels, _ in watched.last.series.get("vllm:cache_config_info", ()))
    prompts, own = value("vllm:prompt_tokens_total"), value("vllm:prefix_cache_hits_total")
    other = value("vllm:external_prefix_cache_hits_total")
    fresh = max(0.0, prompts - own) + value("vllm:generation_tokens_total")
    tiers = {"external": other} if other else {}
    requests, source = value("vllm:request_success_total"), f"what {watched.name} has counted"
    return Observed(source, requests, prompts, own, tiers, None, never_full=fresh <= room, fresh_tokens=fresh)


def _room_told(labels: Mapping[str, str]) -> float:
    """KV memory in tokens, as vLLM tells it. None to speak of where it keeps no prefixes: then no hit says nothing."""
    if labels.get("enable_prefix_caching") == "False":
        return 0.0
    blocks, tokens = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    return float(blocks) * float(tokens) if blocks.isdigit() and tokens.isdigit() else 0.0


# -- in words ----------------------------------------------------------------------------------------------------------


def render(answer: Answer) -> str:
    """The tree, leaf by leaf, each with the numbers that decide; then the configuration."""
    advice = answer.advice
    lines = [f"  {number.name:32} {_value(number.value, number.unit)}" for number in advice.inputs]
    for count, leaf in enumerate(advice.leaves, 1):
        lines += ["", *_leaf_lines(count, leaf)]
    if answer.use_case:
        lines += ["", *_use_case_lines(answer)]
    lines += ["", "assumed", *(line for note in advice.notes for line in _wrapped(note, "- "))]
    if advice.lines:
        lines += ["", "configuration", *(f"  {line}".rstrip() for line in toml(advice).splitlines())]
    return "\n".join([*lines, "", f"so: {advice.so}"])


def _leaf_lines(count: int, leaf: Leaf) -> list[str]:
    lines = [f"{count}. {leaf.question} {leaf.answer}", *_wrapped(leaf.why)]
    lines += [line for number in leaf.numbers for line in _wrapped(f"{number.name}: {_number(number)}", "- ")]
    return [*lines, f"   test it: {leaf.test}"]


def _wrapped(text: str, mark: str = "") -> list[str]:
    first = "   " + mark
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)


def _use_case_lines(answer: Answer) -> list[str]:
    usual = " and ".join(answer.usual_tiers) or "the engine's own memory"
    said = {True: "confirm it", False: "refute it, for this workload on this machine", None: "do not tell"}
    why = f"usually {usual}, as {answer.usual_why}. The numbers {said[answer.confirmed]}."
    return [answer.use_case, *_wrapped(why), *_wrapped(f"Whatever the tiers: {answer.habit}.")]


def _number(number: Number) -> str:
    value = _value(number.value, number.unit)
    if number.flips_at is not None:
        return f"{value}; at {_value(number.flips_at, number.unit)}: {number.flips_to}"
    return f"{value}; no value of it makes it {number.flips_to}" if number.flips_to else value


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "unknown"
    if unit == "B/s":
        return f"{value / 1e9:,.3g} GB/s"
    shown = f"{value:,.1f}" if unit == "%" else f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"  # noqa: PLR2004  # three digits
    return f"{shown} {unit}".rstrip()


def toml(advice: Advice) -> str:
    """A file for --config of `serve`, `node`, `up` and `route`: each line behind its reason."""
    parts = [f"# {advice.so}"]
    for line in advice.lines:
        parts += ["", f"# {line.reason}", f"{line.setting} = {_toml_value(line)}"]
    return "\n".join(parts) + "\n"


def _toml_value(line: Line) -> str:
    return f'"{line.value}"' if isinstance(line.value, str) else f"{line.value:g}"


def write(path: Path, advice: Advice) -> None:
    """Write the configuration. Raises SettingsError where there is none, or the file cannot be written."""
    if not advice.lines:
        raise SettingsError("there is no configuration to write", hint=advice.so)
    try:
        path.write_text(toml(advice))
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}", hint="name a file in a folder of yours") from None
