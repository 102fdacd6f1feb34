"""The documents say what the code does: generated pages, links, commands, settings, names and versions."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import click
import pytest

import bench
import thermocline
from thermocline import cli
from thermocline.settings import CONFIG_VARIABLE, DECLARED, Settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402  # the script lies beside the documents

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)")
WORDS = r"((?:THERMOCLINE_\w+=\S+ )*(?:thermocline|make) [^`\n#|&]*)"
IN_CODE, IN_TEXT = re.compile(rf"^(?:\$ )?{WORDS}", re.MULTILINE), re.compile(f"`{WORDS}")
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _page(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _fences(path: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(path.read_text()) if found == language]


@pytest.mark.parametrize("path", generate.pages(), ids=_page)
def test_reference_is_generated(path):
    """The reference pages are what the declarations say; `make generate` writes them again."""
    assert path.read_text() == generate.pages()[path]


@pytest.mark.parametrize("path", PAGES, ids=_page)
def test_links(path):
    """Every relative link leads to a file of the repository."""
    for target in LINK.findall(FENCE.sub("", path.read_text())):
        assert "://" in target or (path.parent / target).exists(), f"{target} does not exist"


@pytest.mark.parametrize("path", PAGES, ids=_page)
def test_commands(path):
    """Every documented command names a verb with the options it has, or a target of the Makefile."""
    text = path.read_text().replace("\\\n", " ")
    code = "\n".join(body for language, body in FENCE.findall(text) if language != "python")
    for command in IN_CODE.findall(code) + IN_TEXT.findall(FENCE.sub("", text)):
        words = shlex.split(command.strip())
        while "=" in words[0]:
            words.pop(0)
        if words[0] == "make":
            assert words[1] in MAKE_TARGETS, command
        elif not words[1].startswith("-"):
            _check_verb(words[1:], command)


def _check_verb(words: list[str], command: str) -> None:
    assert words[0] in cli.app.commands, command
    verb = cli.app.commands[words[0]]
    if isinstance(verb, click.Group) and words[1:]:
        assert words[1] in verb.commands, command
        verb = verb.commands[words[1]]
    words = words[: words.index("--")] if "--" in words else words  # what follows is another program's
    options = {opt for param in verb.get_params(click.Context(verb)) for opt in param.opts}
    used = {word.partition("=")[0] for word in words if word.startswith("-")} - {"--help", "--SETTING"}
    assert used <= options, command
    if words[0] == "bench" and words[1:]:
        assert words[1] in {"NAME", "list", *bench.BENCHES}, command


@pytest.mark.parametrize("path", PAGES, ids=_page)
def test_settings_in_documents(path):
    """Every documented variable exists, and every TOML example loads."""
    known = {setting.variable for setting in DECLARED.values()} | {CONFIG_VARIABLE}
    assert set(re.findall(r"THERMOCLINE_[A-Z_]+\b(?!\*)", path.read_text())) - {"THERMOCLINE_"} <= known
    for text in _fences(path, "toml"):
        assert Settings.load(environ={}, flags=tomllib.loads(text))


@pytest.mark.parametrize("path", PAGES, ids=_page)
def test_python_in_documents(path):
    """Every Python example compiles, and what it imports from thermocline is public."""
    for text in _fences(path, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "thermocline":
                assert {alias.name for alias in node.names} <= set(thermocline.__all__)


def test_doors():
    """The seventeen doors of reading-the-source exist: each file, and each function in it."""
    rows = re.findall(
        r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|",
        (ROOT / "docs/internals/reading-the-source.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 17
    for file, name in rows:
        scope: ast.AST = ast.parse((ROOT / "src" / "thermocline" / file).read_text())
        for part in name.split("."):
            named = {getattr(node, "name", None): node for node in ast.iter_child_nodes(scope)}
            assert part in named, f"{file} has no {name}"
            scope = named[part]


def test_reasons_are_documented():
    """The page of words lists exactly the reasons that a receipt can give."""
    text = (ROOT / "docs/concepts/words.md").read_text().partition("## The reasons")[2]
    assert re.findall(r"^\| ([A-Z_]+) \|", text, re.MULTILINE) == [reason.name for reason in thermocline.Reason]


def test_version():
    """The newest release of the changelog is the version of the package."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == thermocline.__version__


def test_every_page_is_in_the_navigation():
    """Every page of the documentation can be reached from its menu."""
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r": (\S+\.md)$", menu, re.MULTILINE))
