"""Verbs that start something and keep it running."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from thermocline.cli.app import MistakeError, Verbs, VerbWithSettings, app, json_flag, load_settings, settings_flags

INSTANCES_MAX = 64
_ENGINE = "vLLM's server, which must be installed, or our own."


class _NearVerb(click.Command):
    """A verb with a flag per setting of `near serve`, by its short name: --port for `near_port`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        import copy

        wanted = [flag for flag in settings_flags() if (flag.name or "").startswith(("near_", "config_"))]
        flags = [copy.copy(flag) for flag in wanted]
        for flag in flags:
            flag.opts = [flag.opts[0].replace("--near-", "--")]
        return [*flags, *super().get_params(ctx)]


@app.command(cls=VerbWithSettings)
@json_flag
def serve(config_path: str | None, as_json: bool, **flags: str | None) -> None:
    """Serve a model over OpenAI's HTTP API, with its KV cache in tiers.

    Listens until Ctrl-C or SIGTERM, then makes what is in flight durable. --json announces the address as JSON.
    """
    settings = load_settings(config_path, flags)  # first: a mistake there is told before torch is loaded
    from thermocline.engines import api

    api.serve(settings, as_json=as_json)


@app.command(cls=VerbWithSettings)
@click.option("--socket", metavar="PATH", help="Where to listen; by default node.sock in this user's runtime folder.")
@click.option(
    "--idle-exit", metavar="SECONDS", type=click.FloatRange(0), help="End when nobody was connected for so long."
)
@json_flag
def node(
    config_path: str | None, socket: str | None, idle_exit: float | None, as_json: bool, **flags: str | None
) -> None:
    """Own memory, disk and Redis tiers for all engines of this host, with the settings of `serve` about tiers.

    Runs until Ctrl-C or SIGTERM, then makes what is in memory durable. --json announces the socket as JSON.
    """
    settings = load_settings(config_path, flags)
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


@app.command(cls=VerbWithSettings)
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
    settings = load_settings(config_path, flags)
    from thermocline.engines.up import up
    from thermocline.node import paths

    path = Path(socket) if socket else settings.node_socket or paths.socket_path()
    front = instances > 1 if gateway is None else gateway
    up(settings, path, engine, instances, more, gateway=front, as_json=as_json)


@app.command(cls=VerbWithSettings)
@click.option("--shared", is_flag=True, hidden=True, help="Others listen at this address too.")
@json_flag
def route(config_path: str | None, shared: bool, as_json: bool, **flags: str | None) -> None:
    """Stand in front of instances, and send each request where its first token comes soonest.

    Passes OpenAI's HTTP API through to what --route-to names. Listens until Ctrl-C or SIGTERM, then lets requests in
    flight finish. --json announces the address as JSON.
    """
    settings = load_settings(config_path, flags)
    from thermocline.gateway.processes import serve_many
    from thermocline.gateway.serve import serve
    from thermocline.node import paths

    admin = settings.admin_socket or paths.socket_path(f"gateway-{settings.port}")
    if settings.gateway_processes > 1:
        serve_many(settings, admin, shared=shared, as_json=as_json)
    else:
        serve(settings, admin, shared=shared, as_json=as_json)


@app.command("vllm-config", cls=VerbWithSettings)
@click.option("--socket", metavar="PATH", help="The node's; by default node.sock, if a node answers there now.")
@json_flag
def vllm_config(config_path: str | None, socket: str | None, as_json: bool, **flags: str | None) -> None:  # noqa: ARG001  # it is JSON either way
    """Print what vLLM's --kv-transfer-config takes: vllm serve MODEL --kv-transfer-config "$(thermocline vllm-config)".

    With a node, all engines of the host share its tiers. Without one, the first vLLM starts a private node with the
    settings given here, for all with the same settings; it ends a minute after the last of them left. What is chosen is
    said on stderr.
    """
    settings = load_settings(config_path, flags)
    from thermocline.engines.up import running_node
    from thermocline.engines.vllm.config import vllm_config_json

    path = Path(socket) if socket else settings.node_socket or running_node()
    click.echo(f"the node is {path}" if path else "no node: the engine starts a private one", err=True)
    click.echo(vllm_config_json(settings, path))


@app.group(cls=Verbs)
def near() -> None:
    """Small hot values in memory."""


@near.command("serve", cls=_NearVerb)
@json_flag
def near_serve(config_path: str | None, as_json: bool, **flags: str | None) -> None:
    """Keep values in memory behind the Redis protocol, for any client of Redis.

    Nothing is kept when it ends: durable state belongs in Redis or Valkey. Listens until Ctrl-C or SIGTERM. --json
    announces the address as JSON.
    """
    settings = load_settings(config_path, flags)
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


@near.command("profile")
@click.argument("file")
@click.option("--url", help="Ask this server the same again: redis://host:6379/0, plainly and with the near cache.")
@click.option("--password-file", metavar="FILE", help="The server's password.")
@click.option(
    "--keys", is_flag=True, help="FILE has a lookup a line, such as GET session:7; empty lines part requests."
)
@click.option(
    "--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="How often to ask all of it."
)
@click.option("--warm", is_flag=True, help="Fill the memory before, instead of emptying it before each round.")
@json_flag
def near_profile(
    file: str, url: str | None, password_file: str | None, keys: bool, rounds: int, warm: bool, as_json: bool
) -> None:
    """Say what an application's lookups cost before the first token, and what the near cache saves of it.

    FILE is what a client with Options(profile=FILE) noted: keys, times and sizes, no values. Nothing is written to the
    server. Without --url, what was noted is added up.
    """
    import msgspec

    from thermocline.lens import tax
    from thermocline.near import profile
    from thermocline.settings import read_key

    if keys and url is None:
        raise MistakeError("a list of keys has no times of its own", "name the server with --url")
    lookups = profile.read(Path(file), keys=keys)
    password = read_key(Path(password_file), what="password") if password_file else None
    ask = url and (lambda: profile.replay(url, lookups, rounds=rounds, warm=warm, password=password))
    found = ask() if ask else profile.tax(lookups)
    click.echo(msgspec.json.encode(found).decode() if as_json else tax.render(found))
