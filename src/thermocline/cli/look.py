"""Verbs that look at what runs, what lies on a disk, and what was decided."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from thermocline.cli.app import (
    FAILED,
    OK,
    MistakeError,
    VerbWithSettings,
    app,
    json_flag,
    load_settings,
    print_in_colour,
)

LAST_MAX = 999_999


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
@json_flag
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
        if summary:
            raise MistakeError("a gateway adds nothing up", "ask its instances with --url, or a node with --socket")
        record = decision.fetch(Path(gateway), request_id)
        click.echo(record.decode() if as_json else decision.render(decision.read(record)))
        return

    key_file = Path(api_key_file) if api_key_file else None
    node = Path(socket) if socket else None
    if summary:
        _summary(last, url, key_file, Path(file) if file else None, node, as_json=as_json)
        return
    if last is not None or file is not None:
        raise MistakeError("--last and --file add requests up", "write `thermocline why --summary`")
    if excerpt and (as_json or not sys.stdout.isatty()):
        raise MistakeError("text of prompts is shown on a terminal only", "leave out --excerpt")
    if excerpt and node is not None:
        raise MistakeError("a node knows no text", "leave out --excerpt")
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
        print_in_colour(report.render_summary(found, bars=True), report.BAR)
    else:
        click.echo(report.render_summary(found))


@app.command()
@click.option("--socket", metavar="PATH", help="Only the node or gateway at this socket; an error where none answers.")
@json_flag
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
        print_in_colour(shown.render(seen, bars=True), BAR)
    else:
        click.echo(shown.render(seen))


@app.command()
@click.argument("path")
@click.option("--repair", is_flag=True, help="Drop what is damaged, and find blocks again that a damaged log lost.")
@json_flag
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


@app.command(cls=VerbWithSettings)
@json_flag
def config(config_path: str | None, as_json: bool, **flags: str | None) -> None:
    """Print every setting's effective value and where it came from. Takes the flags of `serve`."""
    from thermocline.settings import DECLARED

    settings = load_settings(config_path, flags)
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
