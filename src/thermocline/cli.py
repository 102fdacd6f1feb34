"""The `thermocline` command. One verb is one function, and imports what it needs inside: `--help` loads no torch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

import thermocline
from thermocline.errors import BenchError, ThermoclineError

if TYPE_CHECKING:
    from thermocline.settings import Settings

LAST_MAX, INSTANCES_MAX = 999_999, 64
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = {
    OK: "done, and what was checked holds",
    FAILED: "an error, damage found by `check`, or a budget missed by `bench`",
    USAGE: "a mistake in the command line or the settings",
    INTERRUPTED: "stopped by Ctrl-C",
}

_json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

_ENGINE_READY = (
    "Wait for this file before the chapters with a model: it appears when torch is installed. FILE.failed appears "
    "instead when that went wrong, and names the log."
)


_ENGINE = "vLLM's server, which must be installed, or our own."


class _Verbs(click.Group):
    """A group that offers the nearest verb for a mistyped one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"did you mean `thermocline {near[0]}`?" if near else "`thermocline --help` lists the verbs"
            raise _MistakeError(f"no verb {args[0]}", hint)
        return super().resolve_command(ctx, args)


class _MistakeError(click.UsageError):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class _VerbWithSettings(click.Command):
    """A verb with one flag per setting; it takes them as `flags`, attribute to text. Made when asked for them only."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*_settings_flags(), *super().get_params(ctx)]


class _NearVerb(click.Command):
    """A verb with a flag per setting of `near serve`, by its short name: --port for `near_port`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        import copy

        wanted = [flag for flag in _settings_flags() if (flag.name or "").startswith(("near_", "config_"))]
        flags = [copy.copy(flag) for flag in wanted]
        for flag in flags:
            flag.opts = [flag.opts[0].replace("--near-", "--")]
        return [*flags, *super().get_params(ctx)]


@functools.cache
def _settings_flags() -> list[click.Option]:
    from thermocline.settings import CONFIG_VARIABLE, DECLARED

    text = f"A TOML file of settings; environment and flags win over it. [env: {CONFIG_VARIABLE}]"
    flags = [click.Option(["--config", "config_path"], metavar="FILE", help=text)]
    for setting in DECLARED.values():
        text = f"{setting.doc} [default: {setting.show(setting.default)}; env: {setting.variable}]"
        flags.append(click.Option([setting.flag, setting.name], metavar=setting.kind, help=text))
    return flags


def _load_settings(config_path: str | None, flags: Mapping[str, str | None]) -> Settings:
    from thermocline.settings import Settings

    return Settings.load(Path(config_path) if config_path else None, flags=flags)


def _epilog() -> str:
    return "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."


@click.group(
    cls=_Verbs, epilog=_epilog(), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(thermocline.__version__, "-V", "--version", message="thermocline %(version)s")
def app() -> None:
    """Keep what a language model has computed, find it again, load it exactly.

    Every verb takes --json; results go to stdout, everything else to stderr.
    """


@app.command(cls=_VerbWithSettings)
@_json_flag
def serve(config_path: str | None, as_json: bool, **flags: str | None) -> None:
    """Serve a model over OpenAI's HTTP API, with its KV cache in tiers.

    Listens until Ctrl-C or SIGTERM, then makes what is in flight durable. --json announces the address as JSON.
    """
    settings = _load_settings(config_path, flags)  # first: a mistake there is told before torch is loaded
    from thermocline.engines import api

    api.serve(settings, as_json=as_json)


@app.command(cls=_VerbWithSettings)
@click.option("--socket", metavar="PATH", help="Where to listen; by default node.sock in this user's runtime folder.")
@click.option(
    "--idle-exit", metavar="SECONDS", type=click.FloatRange(0), help="End when nobody was connected for so long."
)
@_json_flag
def node(
    config_path: str | None, socket: str | None, idle_exit: float | None, as_json: bool, **flags: str | None
) -> None:
    """Own memory, disk and Redis tiers for all engines of this host, with the settings of `serve` about tiers.

    Runs until Ctrl-C or SIGTERM, then makes what is in memory durable. --json announces the socket as JSON.
    """
    settings = _load_settings(config_path, flags)
    from thermocline.build import store_from
    from thermocline.node import daemon, paths
    from thermocline.node.announce import open_announcer

    daemon.run(
        lambda: store_from(settings),
        Path(socket) if socket else settings.node_socket or paths.socket_path(),
        settings.lease_seconds,
        idle_exit_seconds=idle_exit,
        as_json=as_json,
        announce=lambda store: open_announcer(settings, store),
    )


@app.command(cls=_VerbWithSettings)
@click.argument("more", nargs=-1, metavar="[-- ARGUMENT...]")
@click.option("--engine", type=click.Choice(["vllm", "transformers"]), default="vllm", show_default=True, help=_ENGINE)
@click.option(
    "--instances", type=click.IntRange(1, INSTANCES_MAX), default=1, show_default=True, help="How many engines."
)
@click.option("--socket", metavar="PATH", help="The node's; by default node.sock in this user's runtime folder.")
@click.option(
    "--gateway/--no-gateway", default=None, help="One address for all of them; by default with several instances."
)
@click.option("--json", "as_json", is_flag=True, help="Print each event as a line of JSON instead of text.")
def up(
    more: tuple[str, ...],
    config_path: str | None,
    engine: str,
    instances: int,
    socket: str | None,
    gateway: bool | None,
    as_json: bool,
    **flags: str | None,
) -> None:
    """Start a node and engines that share it, on consecutive free ports from --port on, and keep them running.

    Several of them get a gateway, which has the first of the ports: see `thermocline route`. What follows `--` goes to
    each engine as it is. What dies is started again; Ctrl-C stops the gateway, the engines, then the node.
    """
    settings = _load_settings(config_path, flags)
    from thermocline.engines.up import up
    from thermocline.node import paths

    path = Path(socket) if socket else settings.node_socket or paths.socket_path()
    front = instances > 1 if gateway is None else gateway
    up(settings, path, engine, instances, more, gateway=front, as_json=as_json)


@app.command(cls=_VerbWithSettings)
@click.option("--shared", is_flag=True, hidden=True, help="Others listen at this address too.")
@_json_flag
def route(config_path: str | None, shared: bool, as_json: bool, **flags: str | None) -> None:
    """Stand in front of instances, and send each request where its first token comes soonest.

    Passes OpenAI's HTTP API through to what --route-to names. Listens until Ctrl-C or SIGTERM, then lets requests in
    flight finish. --json announces the address as JSON.
    """
    settings = _load_settings(config_path, flags)
    from thermocline.gateway.processes import serve_many
    from thermocline.gateway.serve import serve
    from thermocline.node import paths

    admin = settings.admin_socket or paths.socket_path(f"gateway-{settings.port}")
    if settings.gateway_processes > 1:
        serve_many(settings, admin, shared=shared, as_json=as_json)
    else:
        serve(settings, admin, shared=shared, as_json=as_json)


@app.command("vllm-config", cls=_VerbWithSettings)
@click.option("--socket", metavar="PATH", help="The node's; by default node.sock, if a node answers there now.")
@_json_flag
def vllm_config(config_path: str | None, socket: str | None, as_json: bool, **flags: str | None) -> None:  # noqa: ARG001  # it is JSON either way
    """Print what vLLM's --kv-transfer-config takes: vllm serve MODEL --kv-transfer-config "$(thermocline vllm-config)".

    With a node, all engines of the host share its tiers. Without one, the first vLLM starts a private node with the
    settings given here, for all with the same settings; it ends a minute after the last of them left. What is chosen is
    said on stderr.
    """
    settings = _load_settings(config_path, flags)
    from thermocline.engines.up import running_node
    from thermocline.engines.vllm.config import vllm_config_json

    path = Path(socket) if socket else settings.node_socket or running_node()
    click.echo(f"the node is {path}" if path else "no node: the engine starts a private one", err=True)
    click.echo(vllm_config_json(settings, path))


@app.group(cls=_Verbs)
def near() -> None:
    """Small hot values in memory."""


@near.command("serve", cls=_NearVerb)
@_json_flag
def near_serve(config_path: str | None, as_json: bool, **flags: str | None) -> None:
    """Keep values in memory behind the Redis protocol, for any client of Redis.

    Nothing is kept when it ends: durable state belongs in Redis or Valkey. Listens until Ctrl-C or SIGTERM. --json
    announces the address as JSON.
    """
    settings = _load_settings(config_path, flags)
    from thermocline.near.engine import Engine
    from thermocline.wire import resp_server

    def ready(url: str) -> None:
        import json

        click.echo(json.dumps({"url": url}) if as_json else f"serving values at {url}")
        sys.stdout.flush()

    engine = Engine(settings.near_memory_bytes, password=settings.near_password())
    limits = resp_server.RespLimits.of(settings.near_memory_bytes, settings.near_connections_max)
    path = settings.near_unix_socket
    resp_server.serve(engine, limits, host=settings.near_host, port=settings.near_port, path=path, ready=ready)


@app.command()
@_json_flag
@click.option("--engine-ready", metavar="FILE", help=_ENGINE_READY)
def demo(as_json: bool, engine_ready: str | None) -> int:
    """Show all of it on this machine: damage refused, a crash recovered, answers identical and sooner."""
    from thermocline.demo.story import play

    return play(json_output=as_json, engine_ready=Path(engine_ready) if engine_ready else None)


@app.command()
@click.argument("name")
@click.option("--save", is_flag=True, help="Keep the result under bench/results/, where the tables come from.")
@_json_flag
def bench(name: str, save: bool, as_json: bool) -> int:
    """Measure one budget against its raw limit in the same run. `bench list` names them with their cost."""
    checkout = Path(thermocline.__file__).resolve().parents[2]
    if not (checkout / "bench" / "__init__.py").is_file():
        raise BenchError(
            "the benches are part of the source checkout, not of the installed package",
            hint="clone the repository and run `make bench` there",
        )
    import importlib

    sys.path.insert(0, str(checkout))
    status: int = importlib.import_module("bench").main(name, json_output=as_json, save=save)
    return status


@app.command()
@click.argument("request_id", metavar="REQUEST", default="last")
@click.option("--summary", is_flag=True, help="Add up the last requests instead: why is the hit rate what it is?")
@click.option(
    "--last", metavar="COUNT", type=click.IntRange(1, LAST_MAX), help="With --summary, only the last so many."
)
@click.option("--file", metavar="FILE", help="With --summary, read the file of `receipts_path`, and ask no server.")
@click.option("--excerpt", is_flag=True, help="Show the text where a prompt parts from another: on a terminal only.")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server that answered it.")
@click.option("--api-key-file", metavar="FILE", help="The server's key, where it has one.")
@click.option("--socket", metavar="PATH", help="Ask the node that listens there, as for vLLM, instead of a server.")
@click.option("--gateway", metavar="PATH", help="Ask the gateway that is administered there: why this instance?")
@_json_flag
def why(  # noqa: PLR0913, PLR0917  # click passes every flag by its name
    request_id: str,
    summary: bool,
    last: int | None,
    file: str | None,
    excerpt: bool,
    url: str,
    api_key_file: str | None,
    socket: str | None,
    gateway: str | None,
    as_json: bool,
) -> None:
    """Say what a request loaded, what it computed, and why. REQUEST is a completion's id, or `last`.

    With --gateway: where it was sent, what was predicted of each instance, and what came of it.
    """
    from thermocline.lens import decision, fetch, report

    if gateway is not None:
        record = decision.fetch(Path(gateway), request_id)
        click.echo(record.decode() if as_json else decision.render(decision.read(record)))
        return

    key_file = Path(api_key_file) if api_key_file else None
    node = Path(socket) if socket else None
    if summary:
        _summary(last, url, key_file, Path(file) if file else None, node, as_json=as_json)
        return
    if last is not None or file is not None:
        raise _MistakeError("--last and --file add requests up", "write `thermocline why --summary`")
    if excerpt and (as_json or not sys.stdout.isatty()):
        raise _MistakeError("text of prompts is shown on a terminal only", "leave out --excerpt")
    if excerpt and node is not None:
        raise _MistakeError("a node knows no text", "leave out --excerpt")
    body = _receipt_of_node(node, request_id) if node else fetch.receipt(url, request_id, key_file, excerpt=excerpt)
    click.echo(body.decode() if as_json else report.render(report.read(body)))


def _receipt_of_node(node: Path, request_id: str) -> bytes:
    import msgspec

    from thermocline.errors import RequestError
    from thermocline.node import ask

    found = msgspec.json.decode(ask.receipts(node, request_id), type=list[msgspec.Raw])
    if not found:
        raise RequestError(
            f"the node has no receipt of {request_id}",
            hint="vLLM's ids are in its answers; old receipts are dropped; `last` is the latest",
            status=404,
        )
    return bytes(found[0])


def _summary(
    last: int | None, url: str, key_file: Path | None, file: Path | None, node: Path | None, *, as_json: bool
) -> None:
    import msgspec

    from thermocline.lens import fetch, report
    from thermocline.lens.summary import summarise

    count = last or LAST_MAX
    if node is not None:
        from thermocline.node import ask
        from thermocline.store.receipt import Receipt

        found = summarise(msgspec.json.decode(ask.receipts(node, "", count), type=tuple[Receipt, ...]))
    elif file is None:
        listed = report.read_list(fetch.receipts(url, count, key_file))
        found = summarise(listed.data)
    else:
        read = fetch.receipts_in(file, count)
        found = summarise(read.receipts, skipped=read.skipped)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    elif sys.stdout.isatty():
        _print_in_colour(report.render_summary(found, bars=True), report.BAR)
    else:
        click.echo(report.render_summary(found))


def _print_in_colour(text: str, bar: str) -> None:
    from rich.console import Console
    from rich.text import Text

    shown = Text(text)
    shown.highlight_regex(bar + "+", "cyan")
    shown.highlight_regex("^so: .*", "bold")
    Console(highlight=False).print(shown)


@app.command()
@click.option("--socket", metavar="PATH", help="Only the node or gateway at this socket; an error where none answers.")
@_json_flag
def ps(socket: str | None, as_json: bool) -> None:
    """Show the nodes of this user, their tiers, who is connected, and how much of what was asked for they had.

    Of each gateway, its instances: their state, and the blocks that they hold as far as their events tell.
    """
    import msgspec

    from thermocline.lens import ps as shown
    from thermocline.lens.report import BAR
    from thermocline.node import ask, paths

    sockets = [Path(socket)] if socket else sorted(paths.runtime_folder().glob("*.sock"))
    seen = shown.look(sockets, ask.status, must_answer=socket is not None)
    if as_json:
        click.echo(msgspec.json.encode(seen).decode())
    elif sys.stdout.isatty():
        _print_in_colour(shown.render(seen, bars=True), BAR)
    else:
        click.echo(shown.render(seen))


@app.command()
@click.argument("path")
@click.option("--repair", is_flag=True, help="Drop what is damaged, and find blocks again that a damaged log lost.")
@_json_flag
def check(path: str, repair: bool, as_json: bool) -> int:
    """Read every block of a disk tier and verify it. Exits 1 when something is damaged.

    Changes nothing without --repair; with it, a second run finds nothing to do. No server may have the path open.
    """
    import msgspec

    from thermocline.tiers.check import check_path
    from thermocline.tiers.repair import repair_path

    found = (repair_path if repair else check_path)(Path(path), progress=_show_progress)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        from thermocline.lens import report

        click.echo(report.render_check(found))
    return OK if found.ok else FAILED


def _show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{done:,} of {of:,} blocks", err=True, nl=done == of)


@app.command(cls=_VerbWithSettings)
@_json_flag
def config(config_path: str | None, as_json: bool, **flags: str | None) -> None:
    """Print every setting's effective value and where it came from. Takes the flags of `serve`."""
    from thermocline.settings import DECLARED

    settings = _load_settings(config_path, flags)
    values = {name: getattr(settings, name) for name in DECLARED}
    if as_json:
        import json

        rows = {name: {"value": value, "from": settings.where_from(name)} for name, value in values.items()}
        click.echo(json.dumps(rows, default=str))
        return
    shown = {name: DECLARED[name].show(value) for name, value in values.items()}
    wide, width = max(map(len, shown)), max(map(len, shown.values()))
    for name, value in shown.items():
        click.echo(f"{name:{wide}} {value:{width}}  {settings.where_from(name)}")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit with its code. Errors go to stderr as `error:` and `hint:` lines."""
    sys.exit(_run(argv))


def _run(argv: Sequence[str] | None) -> int:
    try:
        status = app.main(argv, prog_name="thermocline", standalone_mode=False)
    except ThermoclineError as error:
        return _complain(error.message, error.hint, error.exit_code)
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "thermocline"
        return _complain(error.format_message(), getattr(error, "hint", f"`{verb} --help` shows what it takes"), USAGE)
    except click.ClickException as error:
        return _complain(error.format_message(), "", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    return status if isinstance(status, int) else OK


def _complain(message: str, hint: str, exit_code: int) -> int:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    return exit_code
