"""A model's chat template: messages to the text that the model was trained on.

A template is a program that comes with a model's files. It runs in jinja2's immutable sandbox, for a bounded time, and
with the names and filters that transformers gives it, so that the text is the same to the last character.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from thermocline.clock import Clock
from thermocline.errors import RequestError
from thermocline.tokens.tokenizer import TEXT_CHARACTERS_MAX, read_json, special_names

SECONDS_MAX = 1.0
TEMPLATE_FILE = "chat_template.jinja"
PROCESSOR_FILE = "chat_template.json"
_TICK = "thermocline_tick"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

Message = Mapping[str, Any]


class Template:
    """A compiled template. Safe to use from several threads.

    `source` is one template, or several by name, of which "tool_use" is taken where there are tools and "default"
    elsewhere. `names` are the special tokens it may mention, such as `bos_token`. Raises RequestError for a source
    that is no template.
    """

    def __init__(self, source: str | Mapping[str, str], names: Mapping[str, str], *, clock: Clock) -> None:
        sources = {"default": source} if isinstance(source, str) else source
        environment = _environment(clock)
        self._names = dict(names)
        self._clock = clock
        self._compiled: dict[str, jinja2.Template] = {}
        self.in_parts = False
        """True where the template walks through the parts of a message; it is then given parts, else plain text."""
        try:
            for name, text in sources.items():
                tree = environment.parse(text)
                self.in_parts |= _walks_parts(tree)
                self._compiled[name] = _ticking(environment, tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise RequestError(f"the model's chat template is none: {error}", hint="use /v1/completions") from None
        self.knows_developer = any(f"{quote}developer{quote}" in text for text in sources.values() for quote in "'\"")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, by default up to where the answer begins.

        Raises RequestError where the template refuses, takes longer than SECONDS_MAX, or says more than
        TEXT_CHARACTERS_MAX characters.
        """
        template = (tools is not None and self._compiled.get("tool_use")) or self._compiled.get("default")
        if template is None:
            raise RequestError("this model has several chat templates and no default", hint="use /v1/completions")
        given = {
            **self._names,
            **(variables or {}),
            "messages": [_without_nulls(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._bounded(template, given)
        except _REFUSALS as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}",
                hint="check the roles and their order",
                param="messages",
            ) from None

    def _bounded(self, template: jinja2.Template, given: dict[str, Any]) -> str:
        deadline = self._clock.now() + SECONDS_MAX
        now = self._clock.now

        def tick() -> str:
            if now() > deadline:
                raise _too_much(f"takes longer than {SECONDS_MAX:g} s")
            return ""

        pieces: list[str] = []
        characters = 0
        for piece in template.generate({**given, _TICK: tick}):
            pieces.append(piece)
            characters += len(piece)
            if characters > TEXT_CHARACTERS_MAX:
                raise _too_much(f"says more than {TEXT_CHARACTERS_MAX} characters")
        return "".join(pieces)


def load_template(folder: Path, config: Mapping[str, Any], *, clock: Clock) -> Template | None:
    """The template in a model's folder: a file of its own, or in the tokenizer's configuration; None without one.

    Raises ModelError for a file that cannot be read, RequestError for one that is no template.
    """
    file = folder / TEMPLATE_FILE
    found = file.read_text("utf-8") if file.is_file() else read_json(folder / PROCESSOR_FILE).get("chat_template")
    source = template_source(found or config.get("chat_template"))
    return Template(source, special_names(config), clock=clock) if source else None


def template_source(found: object) -> str | dict[str, str] | None:
    """One template or several by name, however a configuration writes them; None where it has none."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        return {str(name): text for name, text in found.items() if isinstance(text, str)} or None
    return found if isinstance(found, str) and found else None


def _without_nulls(message: Message) -> dict[str, Any]:
    """As transformers gives it: without fields that are null, and with reasoning under every name it goes by."""
    kept = {name: value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _too_much(what: str) -> RequestError:
    return RequestError(f"the model's chat template {what}", hint="send fewer messages", param="messages")


def _environment(clock: Clock) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.fromtimestamp(clock.wall()).strftime(form)  # noqa: DTZ006  # local time, as transformers
    return environment


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  # templates give it by either way
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002  # as above
) -> str:
    """Jinja's own filter escapes what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(ext.Extension):
    """`{% generation %}` marks what the model itself says, for training. Here it is only what is in it."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)


def _ticking(environment: ImmutableSandboxedEnvironment, tree: nodes.Template) -> jinja2.Template:
    """The template with a look at the clock in every turn of every loop."""
    for loop in tree.find_all(nodes.For):
        call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
    tree.set_environment(environment)
    code: Any = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _walks_parts(tree: nodes.Template) -> bool:
    """True where a loop goes over something called content, as vLLM tells what form of messages a template wants."""
    return any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Filter | nodes.Test) and node.node is not None:
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        named = isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return named or (isinstance(node.arg, nodes.Slice) and _is_content(node.node))
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name == "content"
