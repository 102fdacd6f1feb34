"""Where receipts come from: a running server, or the file that it writes."""

from __future__ import annotations

import http.client
from collections import deque
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import SplitResult, quote, urlsplit

import msgspec

from thermocline.errors import SettingsError, UnreachableError
from thermocline.settings import is_loopback, read_key
from thermocline.store.receipt import Receipt
from thermocline.store.receipts_file import LINE_BYTES_MAX, older

TIMEOUT_SECONDS = 5.0
BODY_BYTES_MAX = 16 << 20
_EXCERPT_HINT = "run `thermocline why --excerpt` where the server runs, which must listen on 127.0.0.1"
_RECEIPT_HINT = (
    "ids are in the answers, and `receipts_kept` says how many a server of ours remembers; a gateway has none: ask its "
    "instances; and vLLM neither: ask its node with --socket"
)
_FILE_HINT = "name the file that the server's receipts_path names"


def receipt(url: str, request_id: str, api_key_file: Path | None = None, *, excerpt: bool = False) -> bytes:
    """The receipt of one request as JSON; `last` names the newest. `excerpt` asks this machine's server for text, too.

    Plain HTTP goes to loopback only, because a receipt and the key would cross the network readable. No proxy is
    used and no redirect followed. Raises SettingsError for a URL or key file that cannot be used, UnreachableError
    when there is no such server or it does not have the receipt.
    """
    if excerpt and not is_loopback(_parts(url)[0].hostname or ""):
        raise SettingsError(f"{url} is another machine, and text of prompts stays on its own", hint=_EXCERPT_HINT)
    path = f"/receipts/{quote(request_id, safe='')}{'?excerpt=1' if excerpt else ''}"
    return _get(url, path, api_key_file, f"no receipt of {request_id}")


def receipts(url: str, last: int, api_key_file: Path | None = None) -> bytes:
    """The last receipts as JSON, newest first: at most `last`, and no more than fit in one bounded answer.

    Raises as `receipt`.
    """
    return _get(url, f"/receipts?limit={last}", api_key_file, "no receipts")


def trace(url: str, api_key_file: Path | None = None) -> bytes:
    """The server's last requests as a trace, in lines of JSON. Raises as `receipt`."""
    return _get(url, "/trace", api_key_file, "no trace of its requests")


def metrics(url: str, api_key_file: Path | None = None) -> bytes:
    """What the server counts, in the Prometheus text format. Raises as `receipt`."""
    return _get(url, "/metrics", api_key_file, "no metrics")


class Found(NamedTuple):
    """Receipts of a file, oldest first, and how many lines were something else."""

    receipts: tuple[Receipt, ...]
    skipped: int


def receipts_in(path: Path, last: int) -> Found:
    """The last receipts in a file that `receipts_path` named, and in the one before it.

    Passes over what is no receipt, such as a last line that a crash cut. Raises SettingsError where there is no file.
    """
    kept: deque[Receipt] = deque(maxlen=last)
    skipped, opened = 0, 0
    for generation in (older(path), path):
        try:
            with generation.open("rb") as file:
                opened += 1
                for line in _lines(file):
                    try:
                        kept.append(msgspec.json.decode(line, type=Receipt))
                    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                        skipped += 1
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SettingsError(f"cannot read {generation}: {error.strerror}", hint=_FILE_HINT) from None
    if not opened:
        raise SettingsError(f"there is no file {path}", hint=_FILE_HINT)
    return Found(tuple(kept), skipped)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines; of one that is too long to be a receipt, only its beginning."""
    while line := file.readline(LINE_BYTES_MAX):
        rest = line
        while not rest.endswith(b"\n") and rest:
            rest = file.readline(LINE_BYTES_MAX)
        yield line


def _get(url: str, path: str, api_key_file: Path | None, missing: str) -> bytes:
    connection, prefix = connect(url)
    headers = {"Authorization": f"Bearer {read_key(api_key_file)}"} if api_key_file else {}
    try:
        connection.request("GET", prefix + path, headers=headers)
        response = connection.getresponse()
        body = response.read(BODY_BYTES_MAX + 1)
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(
            f"no server answers at {url}: {error}", hint="start one with `thermocline serve`, or name it with --url"
        ) from None
    finally:
        connection.close()
    _refuse_failure(response.status, url, missing)
    if len(body) > BODY_BYTES_MAX:
        raise UnreachableError(f"{url} answered with more than is read", hint="ask for fewer with --last")
    return body


def connect(
    url: str, *, timeout_seconds: float = TIMEOUT_SECONDS, carried: str = "the receipt"
) -> tuple[http.client.HTTPConnection, str]:
    """A connection that is not open yet, and the path that requests there begin with.

    `carried` names what may not cross the network readable, over plain HTTP; empty where nothing is. Raises
    SettingsError for a URL that is none, or would send it so.
    """
    refuse_password(url)
    parts, port = _parts(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1:
        raise SettingsError(f"{url} is not the address of a server", hint="write it as http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.hostname, port, timeout=timeout_seconds), path
    if carried and not is_loopback(parts.hostname):
        raise SettingsError(
            f"{url} would send {carried} readable over the network",
            hint="use https, or run this on the server's own machine",
        )
    return http.client.HTTPConnection(parts.hostname, port, timeout=timeout_seconds), path


def refuse_password(url: str) -> None:
    """Raise SettingsError for a URL with a user or password: it is shown with all that is told of its server."""
    if "@" in url.partition("//")[2].partition("/")[0]:
        hint = "leave out what is before the @; a key is read from the file that --api-key-file names"
        raise SettingsError("a URL with a user or password in it", hint=hint)


def _refuse_failure(status: int, url: str, missing: str) -> None:
    if status == HTTPStatus.OK:
        return
    if status == HTTPStatus.NOT_FOUND:
        hint = _RECEIPT_HINT if "receipt" in missing else "is it vLLM's server, or ours?"
        raise UnreachableError(f"{url} has {missing}", hint=hint)
    if status == HTTPStatus.UNAUTHORIZED:
        raise UnreachableError(f"{url} wants an API key", hint="name its file with --api-key-file")
    if status == HTTPStatus.FORBIDDEN:
        raise UnreachableError(f"{url} refuses to tell that", hint=_EXCERPT_HINT)
    raise UnreachableError(f"{url} answered with status {status}", hint="is it a thermocline server?")


def _parts(url: str) -> tuple[SplitResult, int | None]:
    """The URL taken apart, and its port. No scheme and -1 where it cannot be taken apart."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # a port that is no number, or half of an IPv6 address
        return urlsplit(""), -1
    return parts, port
