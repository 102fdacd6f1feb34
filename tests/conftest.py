"""What all tests share: how hypothesis runs, and the list of proven promises at the end."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.faults import matrix
from tests.faults.redis_server import RedisServer
from thermocline import cli
from thermocline.settings import DECLARED

HERE = Path(__file__).parent

# A slow machine is no failure, and a failing example prints the line that replays it.
hypothesis.settings.register_profile("thermocline", deadline=None, print_blob=True)
hypothesis.settings.load_profile("thermocline")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command in this process; gives its exit code, stdout and stderr."""
    for setting in DECLARED.values():
        monkeypatch.delenv(setting.variable, raising=False)

    def run(*argv):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        return stopped.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that do it no harm; each empties it first. Skips the test where there is none."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a Unix socket in it."""
    path = Path(tempfile.mkdtemp(prefix="tcl-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Says how many cases a test ran, for its cell of the fault matrix. See tests/faults/matrix.py."""
    return lambda count: request.node.user_properties.append((matrix.CASES, count))


def pytest_configure() -> None:
    """In the background a shell has us ignore Ctrl-C, and every process that a test starts would ignore it, too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that keeps what the fault tests proved."""
    parser.addoption("--keep-matrix", action="store_true", help="write bench/results/faults.json: what this run proved")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Name the cells of the fault matrix that a test is about."""
    matrix.name_cells(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with the promises proven, by room, and with everything that was skipped and why."""
    passed = {report.nodeid.partition("[")[0] for report in terminalreporter.getreports("passed") if _is_call(report)}
    failed = {report.nodeid.partition("[")[0] for report in terminalreporter.getreports("failed")}
    rooms = Counter(_room(nodeid) for nodeid in passed - failed)
    if rooms:
        terminalreporter.section("promises proven")
        for room, count in sorted(rooms.items()):
            terminalreporter.write_line(f"{count:5}  {room}")
        terminalreporter.write_line(f"{rooms.total():5}  in all, each stated in the docstring of its test")
    skipped = terminalreporter.getreports("skipped")
    if skipped:
        terminalreporter.section("skipped, and why")
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            terminalreporter.write_line(f"  {report.nodeid}: {reason.removeprefix('Skipped: ')}")
    if terminalreporter.config.getoption("--keep-matrix"):
        ran = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
        terminalreporter.write_line(f"{matrix.keep(filter(_is_call, ran))} rows of the fault matrix kept")


def _is_call(report: pytest.TestReport) -> bool:
    return report.when == "call"


def _room(nodeid: str) -> str:
    parts = Path(nodeid.partition("::")[0]).parts
    inside = parts[parts.index(HERE.name) + 1 :] if HERE.name in parts else parts
    return inside[0] if len(inside) > 1 else "project"
