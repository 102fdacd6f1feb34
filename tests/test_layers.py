"""The house rules that a program can check: who may import whom, what may appear nowhere, how long things may get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "thermocline"
FLOORS = {
    7: "cli demo",
    6: "engines gateway sim",
    5: "build node lens",
    4: "store fleet",
    3: "tiers costs knowledge",
    2: "blocks near tokens wire",
    1: "settings metrics errors clock",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
NEIGHBOURS_ALLOWED = {
    ("cli", "demo"): "the command line joins rooms that may not know each other",
    ("settings", "errors"): "the ground floor is single files, and errors is the lowest of them",
}
ONLY_IN = {
    "torch": "engines/",
    "transformers": "engines/",
    "vllm": "engines/",
    "time": "clock.py",
    "asyncio": "wire/ gateway/ node/ near/ engines/api engines/light fleet/membership.py",
    "redis": "tiers/redis.py near/",
    "zmq": "wire/",
    "uvloop": "gateway/ wire/ engines/api engines/light",
    "httptools": "gateway/ wire/",
}
NOWHERE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS_NOWHERE = {"eval", "exec", "torch.load", "np.load", "numpy.load"}
FILE_LINES_MAX, FUNCTION_LINES_MAX = 600, 80

FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the room in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(name: str) -> str | None:
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == "thermocline" and len(parts) > 1 and parts[1] in FLOOR else None


def _name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_go_down(path):
    """A room imports only rooms on lower floors, and every file lies in a room of the plan."""
    room = _room(f"thermocline/{_name(path)}")
    if room is None:
        assert _name(path) in {"__init__.py", "__main__.py"}
        return
    for name in _imports(ast.parse(path.read_text())):
        target = _room(name)
        if target not in {None, room} and (room, target) not in NEIGHBOURS_ALLOWED:
            assert FLOOR[target] < FLOOR[room], f"{room} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[target]})"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_keep_to_their_place(path):
    """Engines alone import torch, clock.py alone time; asyncio stays at servers; nothing unpickles or evaluates."""
    tree = ast.parse(path.read_text())
    for name in _imports(tree):
        package = name.partition(".")[0]
        assert package not in NOWHERE, f"{package} may not be imported anywhere"
        places = ONLY_IN.get(package)
        assert places is None or any(_name(path).startswith(place) for place in places.split()), f"{package}: {places}"
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & CALLS_NOWHERE


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_lengths(path):
    """No file is over 600 lines and no function over 80."""
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES_MAX, f"{node.name} is too long"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_tests_state_their_promise(path):
    """Every test says in its docstring what it promises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert ast.get_docstring(node), f"{node.name} promises nothing"
