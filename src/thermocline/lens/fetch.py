"""Ask a running server for a receipt."""

from __future__ import annotations

import http.client
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote, urlsplit

from thermocline.errors import SettingsError, UnreachableError
from thermocline.settings import is_loopback, read_key

TIMEOUT_SECONDS = 5.0
BODY_BYTES_MAX = 16 << 20


def receipt(url: str, request_id: str, api_key_file: Path | None = None) -> bytes:
    """The receipt of one request as JSON; `last` names the newest.

    Plain HTTP goes to loopback only, because a receipt and the key would cross the network readable. No proxy is
    used and no redirect followed. Raises SettingsError for a URL or key file that cannot be used, UnreachableError
    when there is no such server or it does not have the receipt.
    """
    connection, prefix = _connect(url)
    headers = {"Authorization": f"Bearer {read_key(api_key_file)}"} if api_key_file else {}
    try:
        connection.request("GET", f"{prefix}/receipts/{quote(request_id, safe='')}", headers=headers)
        response = connection.getresponse()
        body = response.read(BODY_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(
            f"no server answers at {url}: {error}", hint="start one with `thermocline serve`, or name it with --url"
        ) from None
    finally:
        connection.close()
    _refuse_failure(response.status, url, request_id)
    return body


def _connect(url: str) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1:
        raise SettingsError(f"{url} is not the address of a server", hint="write it as http://127.0.0.1:8000")
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.hostname, port, timeout=TIMEOUT_SECONDS), parts.path.rstrip("/")
    if not is_loopback(parts.hostname):
        raise SettingsError(
            f"{url} would send the receipt readable over the network",
            hint="use https, or run `thermocline why` on the server's own machine",
        )
    return http.client.HTTPConnection(parts.hostname, port, timeout=TIMEOUT_SECONDS), parts.path.rstrip("/")


def _refuse_failure(status: int, url: str, request_id: str) -> None:
    if status == HTTPStatus.OK:
        return
    if status == HTTPStatus.NOT_FOUND:
        raise UnreachableError(
            f"{url} has no receipt of {request_id}",
            hint="ids are in the answers; `receipts_kept` says how many it remembers",
        )
    if status == HTTPStatus.UNAUTHORIZED:
        raise UnreachableError(f"{url} wants an API key", hint="name its file with --api-key-file")
    raise UnreachableError(f"{url} answered with status {status}", hint="is it a thermocline server?")
