"""What may be asked of the gateway. Whatever is not in the table does not exist."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import thermocline


class Kind(enum.Enum):
    """Who answers."""

    PASS = "pass"  # noqa: S105  # an instance does, untouched
    HEALTH = "health"
    METRICS = "metrics"
    OPENAPI = "openapi"


@dataclass(frozen=True, slots=True)
class Route:
    """One path and what it takes."""

    path: str
    method: str
    kind: Kind
    says: str


TABLE = (
    Route("/v1/chat/completions", "POST", Kind.PASS, "Chat, whole or as a stream."),
    Route("/v1/completions", "POST", Kind.PASS, "Completions of texts or token ids, whole or as a stream."),
    Route("/v1/responses", "POST", Kind.PASS, "Responses, whole or as a stream."),
    Route("/v1/embeddings", "POST", Kind.PASS, "Embeddings."),
    Route("/v1/models", "GET", Kind.PASS, "The models of one instance."),
    Route("/health", "GET", Kind.HEALTH, "200 while at least one instance takes requests, else 503."),
    Route("/metrics", "GET", Kind.METRICS, "Counters in the Prometheus text format."),
    Route("/openapi.json", "GET", Kind.OPENAPI, "This document."),
)
ROUTES = {route.path.encode(): route for route in TABLE}

_ERRORS = {
    "400": "The body is not a JSON object, or the request is not HTTP/1.1.",
    "401": "The API key is missing or wrong.",
    "403": "Not for this key, or a foreign host name on loopback.",
    "413": "The body is too large.",
    "415": "The body is not plain JSON.",
    "429": "Too many requests are in flight; Retry-After says when to come again.",
    "502": "No instance answered.",
    "503": "No instance takes requests.",
    "504": "No instance answered in time.",
}


def openapi() -> dict[str, Any]:
    """The gateway's own part of the API. What instances answer is theirs to describe."""
    failure = {"$ref": "#/components/schemas/Failure"}
    refusals = {
        status: {"description": says, "content": {"application/json": {"schema": failure}}}
        for status, says in _ERRORS.items()
    }
    paths = {route.path: {route.method.lower(): _operation(route, refusals)} for route in TABLE}
    text = {"type": "string"}
    error = {"message": text, "type": text, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
    wrapped = {"error": {"type": "object", "required": sorted(error), "properties": error}}
    schemas = {"Failure": {"type": "object", "required": ["error"], "properties": wrapped}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "thermocline gateway", "version": thermocline.__version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(route: Route, refusals: dict[str, Any]) -> dict[str, Any]:
    kind = "text/plain" if route.kind is Kind.METRICS else "application/json"
    content: dict[str, Any] = {kind: {}}
    if route.method == "POST":
        content["text/event-stream"] = {}
    operation: dict[str, Any] = {
        "summary": route.says,
        "responses": {"200": {"description": route.says, "content": content}, **refusals},
    }
    if route.kind is Kind.HEALTH:
        operation["responses"]["503"] = {"description": route.says, "content": {"application/json": {}}}
    elif route.kind is not Kind.OPENAPI:
        operation["security"] = [{}, {"key": []}]
    if route.method == "POST":
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    return operation
