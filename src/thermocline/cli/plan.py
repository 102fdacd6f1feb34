"""Verbs that plan and diagnose: bytes, seconds, money, and what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thermocline.cli.app import (
    FAILED,
    INTERRUPTED,
    NO_CACHE,
    NO_ROOM,
    OK,
    TOO_SLOW,
    Figure,
    MistakeError,
    app,
    json_flag,
)

if TYPE_CHECKING:
    from thermocline.clock import Clock
    from thermocline.lens.observe import Ear


@app.command()
@click.option("--url", "urls", multiple=True, metavar="URL", help="A server: vLLM's or ours. May be given again.")
@click.option("--node", "nodes", multiple=True, metavar="PATH", help="A node's socket. May be given again.")
@click.option(
    "--gateway", "gateways", multiple=True, metavar="PATH", help="A gateway's admin socket, and its instances."
)
@click.option(
    "--events", metavar="ENDPOINT", help="Listen for KV events there: tcp://127.0.0.1:5557, or >ENDPOINT to connect."
)
@click.option("--seconds", metavar="N", type=Figure(0, 3600), default=5.0, show_default=True, help="How long to look.")
@click.option("--checklist", is_flag=True, help="Also check what should be true in production, item by item.")
@click.option("--measured", metavar="FILE", help="For the checklist: what `profile` wrote.")
@click.option("--api-key-file", metavar="FILE", help="The servers' key, where they have one.")
@json_flag
def doctor(  # noqa: PLR0913, PLR0917  # click passes every flag by its name
    urls: tuple[str, ...],
    nodes: tuple[str, ...],
    gateways: tuple[str, ...],
    events: str | None,
    seconds: float,
    checklist: bool,
    measured: str | None,
    api_key_file: str | None,
    as_json: bool,
) -> int:
    """Say what is wrong with what runs, by which numbers, and the one thing to do next. Exits 1 if it found anything.

    Without --url, --node and --gateway: this user's nodes and gateways here, and http://127.0.0.1:8000.
    """
    import msgspec

    from thermocline.clock import SystemClock
    from thermocline.costs import measured as profiles
    from thermocline.lens import checklist as production
    from thermocline.lens import diagnosis, observe
    from thermocline.lens.doctor import diagnose
    from thermocline.node import ask, paths

    clock, key = SystemClock(), Path(api_key_file) if api_key_file else None
    profile = profiles.read(Path(measured)) if measured else None
    sources = observe.named(urls, nodes, gateways, key, ask) if (urls or nodes or gateways) else None
    if sources is None:
        sources = observe.found(sorted(paths.runtime_folder().glob("*.sock")), key, ask)
    with contextlib.ExitStack() as stack:
        ear = _listening(stack, events, clock) if events else None
        watched = observe.watch(sources, seconds, clock)
        if ear is not None:
            watched = (*watched, ear.watched(events or ""))
    observe.answered(watched)
    found, items = diagnose(watched), production.check(watched, profile) if checklist else ()
    if as_json:
        click.echo(msgspec.json.encode({"diagnosis": found, "checklist": items}).decode())
    else:
        text = diagnosis.render(found)
        click.echo("\n\n".join((production.render(items), text)) if items else text)
    return FAILED if found.findings else OK


def _listening(stack: contextlib.ExitStack, endpoint: str, clock: Clock) -> Ear:
    from thermocline.lens.observe import Ear
    from thermocline.wire.subscriber import Subscriber

    ear = Ear(clock)
    stack.callback(Subscriber([endpoint], ear.take).close)
    return ear


@app.command()
@click.option(
    "--url", metavar="URL", default="http://127.0.0.1:8000", show_default=True, help="The server that is asked."
)
@click.option("--api-key-file", metavar="FILE", help="The server's key, where it has one.")
@click.option("--context", "contexts", multiple=True, metavar="TOKENS", help="Lengths: 4k,32k. By default up to 7,000.")
@click.option("--reuse", metavar="S,S,...", default="0,0.5,0.9", show_default=True, help="Shares asked before, 0 to 1.")
@click.option("--concurrency", metavar="N,N,...", default="1,4", show_default=True, help="Clients at a time.")
@click.option(
    "--seconds-max",
    metavar="N",
    type=click.IntRange(1, 86_400),
    default=600,
    show_default=True,
    help="Begin no request after so long.",
)
@click.option("--write", metavar="FILE", help="Keep what was measured, for --measured of `size` and `advise`.")
@click.option("--html", metavar="FILE", help="Write a page with charts.")
@json_flag
def profile(  # noqa: PLR0913, PLR0917  # click passes every flag by its name
    url: str,
    api_key_file: str | None,
    contexts: tuple[str, ...],
    reuse: str,
    concurrency: str,
    seconds_max: int,
    write: str | None,
    html: str | None,
    as_json: bool,
) -> int:
    """Measure a live server: time to first token by length, reuse and concurrency, and KV memory by length.

    Sends prompts of random tokens to an OpenAI-compatible server, never more at once than --concurrency says. Ctrl-C
    ends it with what there is. Nothing else should use the server meanwhile.
    """
    import secrets

    import msgspec

    from thermocline.clock import SystemClock
    from thermocline.costs import measured, saved
    from thermocline.lens import figures
    from thermocline.lens import profile as lens
    from thermocline.lens.sweep import Endpoint

    wanted = (
        figures.lengths(contexts),
        lens.numbers("--reuse", reuse),
        lens.numbers("--concurrency", concurrency),
    )
    endpoint = Endpoint(url, Path(api_key_file) if api_key_file else None, SystemClock())
    plan = lens.plan(endpoint.context_tokens, *wanted)
    click.echo(f"asking {plan.requests:,} requests of {plan.prompt_tokens:,} tokens in all", err=True)

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{done:,} of {plan.requests:,}", err=True, nl=done == plan.requests)

    found = lens.profile(endpoint, plan, SystemClock(), seconds_max, progress, secrets.randbits(64))
    click.echo(msgspec.json.encode(found).decode() if as_json else lens.render(found))
    if write:
        measured.write(Path(write), found.measured)
    if html:
        saved.put(Path(html), lens.page(found).encode())
    return INTERRUPTED if found.stopped == lens.BY_HAND else OK


@app.command()
@click.argument("model", required=False)
@click.option("--gpu", metavar="NAME", help="The accelerator, such as h100 or a100-80-sxm.")
@click.option(
    "--tp", metavar="N", type=click.IntRange(1, 1024), default=1, show_default=True, help="Accelerators of an instance."
)
@click.option(
    "--instances",
    metavar="N",
    type=click.IntRange(1, 1024),
    help="Engines side by side. By default those of the gateway that is asked, else 1.",
)
@click.option("--trace", metavar="FILE", help="Read the workload from a trace of requests.")
@click.option("--url", metavar="URL", help="Read it from a running server: its last requests, or what it has counted.")
@click.option("--node", metavar="PATH", help="Read it from a node's last requests, by its socket.")
@click.option("--gateway", metavar="PATH", help="Read it from a gateway's last requests, by its admin socket.")
@click.option("--describe", metavar="FILE", help="Synthesise it from a description.")
@click.option("--use-case", metavar="NAME", help="Compare with what is usual, and without other workload take its own.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="TIER",
    help="NAME[=SIZE][@SPEED][:USD per GB and hour]. May be given again.",
)
@click.option("--kv-dtype", default="", metavar="DTYPE", help="Of the KV cache, where it is not the model's.")
@click.option(
    "--kv-tokens", type=click.IntRange(0, 1 << 40), metavar="N", help="KV memory of an instance, as its log says it."
)
@click.option("--price", type=Figure(0), metavar="USD", help="Per accelerator and hour. By default the table's.")
@click.option("--measured", metavar="FILE", help="Prefill times as `profile` wrote them.")
@click.option("--api-key-file", metavar="FILE", help="The server's key, where it has one.")
@click.option("--config-out", metavar="FILE", help="Write the configuration.")
@click.option("--trace-out", metavar="FILE", help="Keep the requests that were read from what runs, as a trace.")
@json_flag
def advise(  # noqa: PLR0913, PLR0917  # click passes every flag by its name
    model: str | None,
    gpu: str | None,
    tp: int,
    instances: int | None,
    trace: str | None,
    url: str | None,
    node: str | None,
    gateway: str | None,
    describe: str | None,
    use_case: str | None,
    tiers: tuple[str, ...],
    kv_dtype: str,
    kv_tokens: int | None,
    price: float | None,
    measured: str | None,
    api_key_file: str | None,
    config_out: str | None,
    trace_out: str | None,
    as_json: bool,
) -> int:
    """Say which tiers a workload needs, how large, kept how long and routed how, or that it needs none, and why.

    Tiers are host, disk and redis, by default host and one disk, as large as is useful. SPEED is a figure such as
    7GB/s, or a link such as nvme-gen5 or 100gbe.
    """
    import msgspec

    from thermocline.clock import SystemClock
    from thermocline.costs import workload
    from thermocline.lens import advise as lens
    from thermocline.lens import observe
    from thermocline.node import ask

    runs = url or node or gateway
    given = sum(map(bool, (trace, url, node, gateway, describe)))
    if given > 1 or not (given or use_case):
        hint = "give one of --trace, --url, --node, --gateway, --describe, or a --use-case"
        raise MistakeError("one workload, please", hint)
    if trace_out and not runs:
        raise MistakeError("there are no requests to keep", "give --url, --node or --gateway with --trace-out")
    asked = lens.Asked(
        model=model,
        gpu=gpu,
        tp=tp,
        instances=instances or (observe.instances_of(Path(gateway)) if gateway else 1),
        tiers=tiers,
        kv_dtype=kv_dtype,
        kv_tokens=kv_tokens,
        usd_per_hour=price,
        profile=Path(measured) if measured else None,
    )
    advice = None
    if trace:
        advice = lens.of_trace(asked, Path(trace), use_case)
    elif runs:
        key, path = Path(api_key_file) if api_key_file else None, Path(runs)
        source = observe.of_url(runs, key) if url else observe.of_node(path, ask) if node else observe.of_gateway(path)
        advice = lens.of_server(asked, source, SystemClock(), use_case, Path(trace_out) if trace_out else None)
    elif describe:
        advice = lens.of_description(asked, workload.read(Path(describe)))
    answer = lens.beside(advice, use_case, asked)
    click.echo(msgspec.json.encode(answer).decode() if as_json else lens.render(answer))
    if config_out:
        lens.write(Path(config_out), answer.advice)
    return OK


@app.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--gpu", "gpus", multiple=True, required=True, metavar="NAME", help="An accelerator. May be given again.")
@click.option(
    "--tp", metavar="N", type=click.IntRange(1, 1024), default=1, show_default=True, help="Tensor-parallel ranks."
)
@click.option("--pp", metavar="N", type=click.IntRange(1, 1024), default=1, show_default=True, help="Pipeline stages.")
@click.option(
    "--context", "contexts", multiple=True, metavar="TOKENS", help="Lengths: 4k,32k. By default four usual ones."
)
@click.option("--kv-dtype", default="", metavar="NAME", help="Of K and V: bf16, fp8. By default the checkpoint's.")
@click.option(
    "--weights-dtype", default="", metavar="NAME", help="Of the weights: bf16, fp8, fp4. By default as above."
)
@click.option("--parameters", metavar="COUNT", help="Of the model, where not known: 27B; 30B:3B has 3B active.")
@click.option("--utilisation", metavar="SHARE", type=Figure(0.1, 1), help="Of the memory; by default vLLM's.")
@click.option("--block-tokens", metavar="N", type=click.IntRange(1, 1 << 16), help="Of a KV block; by default vLLM's.")
@click.option(
    "--batched-tokens",
    metavar="N",
    type=click.IntRange(1, 1 << 20),
    help="Of a step: --max-num-batched-tokens; by default vLLM's on that GPU.",
)
@click.option("--trace", metavar="FILE", help="Requests as they came: hit rates by tier size follow from them.")
@click.option(
    "--hit",
    metavar="SHARE",
    type=Figure(0, 1),
    help="Share of a prompt that is known; where no trace says it.",
)
@click.option(
    "--arrivals",
    metavar="RATE",
    type=Figure(0, min_open=True),
    help="Requests per second. By default the trace's.",
)
@click.option(
    "--output-tokens", metavar="N", type=click.IntRange(1), help="Of an answer. By default the trace's, else 256."
)
@click.option(
    "--users",
    metavar="N",
    type=click.IntRange(1, 1 << 20),
    multiple=True,
    help="Under load: so many at a time. Again: more.",
)
@click.option(
    "--engine",
    type=click.Choice(("vllm", "sglang", "trtllm")),
    default="vllm",
    show_default=True,
    help="Under load: whose constants are taken.",
)
@click.option(
    "--slo-seconds",
    metavar="SECONDS",
    type=Figure(0, min_open=True),
    help="Nine first tokens in ten within this.",
)
@click.option(
    "--price",
    metavar="USD",
    type=Figure(0),
    help="US dollars per accelerator and hour. By default the table's.",
)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="TIER",
    help="A tier that could be had, as `advise` takes it: NAME[=SIZE][@SPEED][:USD per GB and hour].",
)
@click.option("--measured", metavar="FILE", help="What `profile --write` wrote: prefills as they were measured.")
@click.option("--html", metavar="FILE", help="Write a page with charts.")
@json_flag
def size(  # noqa: PLR0913, PLR0917  # click passes every flag by its name
    models: tuple[str, ...],
    gpus: tuple[str, ...],
    tp: int,
    pp: int,
    contexts: tuple[str, ...],
    kv_dtype: str,
    weights_dtype: str,
    parameters: str | None,
    utilisation: float | None,
    block_tokens: int | None,
    batched_tokens: int | None,
    trace: str | None,
    hit: float | None,
    arrivals: float | None,
    output_tokens: int | None,
    users: tuple[int, ...],
    engine: str,
    slo_seconds: float | None,
    price: float | None,
    tiers: tuple[str, ...],
    measured: str | None,
    html: str | None,
    as_json: bool,
) -> int:
    """Say what a model needs on a GPU: KV bytes, sessions, seconds, tiers that pay, and money, with and without reuse.

    MODEL is a folder with config.json, a model in the hub's cache here, or a name of the table. Several models or GPUs
    are put side by side; the exit code is that of the best of them.
    """
    from thermocline.costs import measured as profiles
    from thermocline.costs import sizing
    from thermocline.costs import trace as traces
    from thermocline.costs.hardware import accelerator
    from thermocline.costs.models import find
    from thermocline.lens import figures
    from thermocline.lens import html as page
    from thermocline.lens import size as lens
    from thermocline.lens.offers import offered

    asked = [
        sizing.Asked(
            geometry=lens.with_parameters(geometry, parameters),
            accelerator=device,
            tp=tp,
            pp=pp,
            contexts=figures.lengths(contexts),
            kv_dtype=kv_dtype,
            weights_dtype=weights_dtype,
            utilisation=utilisation,
            output_tokens=output_tokens,
            usd_per_hour=price,
            arrivals_per_second=arrivals,
            target_seconds=slo_seconds,
            hit=hit,
            users=users,
            engine=engine,
            paging=lens.paging_of(device, block_tokens, batched_tokens),
            offers=offered(tiers, device, tp, price),
        )
        for geometry in map(find, models)
        for device in map(accelerator, gpus)
    ]
    if trace and sys.stderr.isatty():
        click.echo(f"reading {trace}", err=True, nl=False)
    workload = traces.read(Path(trace)) if trace else None
    profile = profiles.read(Path(measured)) if measured else None
    found = []
    for each in asked:
        if sys.stderr.isatty() and workload is not None:
            click.echo(f"\r\x1b[K{each.geometry.name} on {each.accelerator.name}", err=True, nl=False)
        found.append(sizing.size(dataclasses.replace(each, trace=workload, profile=profile)))
    if sys.stderr.isatty() and workload is not None:
        click.echo("\r\x1b[K", err=True, nl=False)
    if html:
        page.write(Path(html), lens.report(found))
    click.echo(lens.as_json(found).decode() if as_json else lens.render(found))
    codes = {sizing.NO_CACHE: NO_CACHE, sizing.TOO_SLOW: TOO_SLOW, sizing.NO_ROOM: NO_ROOM}
    return min((codes.get(each.verdict, OK) for each in found), key=(OK, NO_CACHE, TOO_SLOW, NO_ROOM).index)
