"""What a server and its handlers say to each other: requests, responses, and which handler is for what."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from thermocline.errors import RequestError


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request. Header names are lower case; `rest` is what the `*` of a route stands for."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    rest: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """What a handler returns. The pieces of a generator are sent as they come, each as a chunk."""

    body: bytes | AsyncGenerator[bytes]
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Awaitable[Response]]


class Routes:
    """Handlers by method and path. A path that ends in `/*` takes the rest of the path, which is `Request.rest`."""

    def __init__(self, table: Mapping[tuple[str, str], Handler]) -> None:
        self._methods: dict[str, dict[str, Handler]] = {}
        for (method, path), handler in table.items():
            self._methods.setdefault(path, {})[method] = handler
        self._open = sorted((path for path in self._methods if path.endswith("/*")), key=len, reverse=True)

    def find(self, method: str, path: str) -> tuple[str, str, Handler]:
        """The route's name, the rest of the path, the handler. Raises RequestError with status 404 or 405."""
        name = self._name(path)
        if name is None:
            msg = f"there is nothing at {path}"
            raise RequestError(msg, hint="the documentation lists the routes", status=404, code="not_found")
        methods = self._methods[name]
        if method not in methods:
            msg = f"{path} does not take {method}"
            raise RequestError(msg, hint=f"use {self.allowed(path)}", status=405, code="method_not_allowed")
        return name, path[len(name) - 1 :] if name.endswith("/*") else "", methods[method]

    def allowed(self, path: str) -> str:
        """The methods of a path, as the Allow header of a 405 lists them."""
        return ", ".join(sorted(self._methods.get(self._name(path) or "", ())))

    def _name(self, path: str) -> str | None:
        if path in self._methods:
            return path
        return next((name for name in self._open if path.startswith(name[:-1]) and len(path) >= len(name)), None)
