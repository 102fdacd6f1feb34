"""The command line: exit codes, hints, JSON, and manners."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import thermocline
from thermocline import cli
from thermocline.metrics import Metrics
from thermocline.settings import DECLARED
from thermocline.store.receipt import Missing, Reason, Receipt
from thermocline.store.receipts_file import ReceiptsFile

ROOT = Path(__file__).parents[1]


def test_version(run):
    """`--version` prints the package's version."""
    assert run("--version") == (0, f"thermocline {thermocline.__version__}\n", "")


def test_help_lists_every_verb(run):
    """`--help` and `-h` list every verb and every exit code."""
    code, out, _ = run("--help")
    assert code == 0
    assert run("-h")[1] == out
    assert set(re.findall(r"^  ([\w-]+)  +[A-Z]", out, re.MULTILINE)) == set(cli.app.commands)
    assert all(re.search(rf"\b{code} {meaning.split()[0]}", out) for code, meaning in cli.EXIT_CODES.items())


def _verbs(group):
    for verb in group.commands.values():
        yield from _verbs(verb) if isinstance(verb, click.Group) else [verb]


@pytest.mark.parametrize("command", list(_verbs(cli.app)), ids=lambda command: command.name)
def test_every_verb_speaks_json(command):
    """Every verb has `--json`, and an explanation."""
    params = command.get_params(click.Context(command))
    assert "--json" in {option for param in params for option in param.opts}
    assert command.help
    assert all(param.help for param in params if isinstance(param, click.Option))


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["srve"], "hint: did you mean `thermocline serve`?"),
        (["xyzzy"], "hint: `thermocline --help` lists the verbs"),
        (["serve", "--prot", "1"], "hint: `thermocline serve --help` shows what it takes"),
        (["check"], "hint: `thermocline check --help` shows what it takes"),
        (["config", "--port", "99999"], "hint: The port to listen on"),
        (["config", "--config", "missing.toml"], "hint: name a readable TOML file with --config"),
        (["config", "--host", "0.0.0.0"], "hint: set api_key_file, or listen on 127.0.0.1"),  # noqa: S104  # is refused
        (["why", "--url", "ftp://127.0.0.1"], "hint: write it as http://127.0.0.1:8000"),
        (["why", "--url", "http://192.0.2.1"], "hint: use https"),
        (["why", "--excerpt"], "hint: leave out --excerpt"),
        (["why", "--last", "3"], "hint: write `thermocline why --summary`"),
        (["why", "--summary", "--file", "missing.jsonl"], "hint: name the file that the server's receipts_path names"),
        (["why", "--summary", "--gateway", "missing.sock"], "hint: ask its instances with --url"),
        (["why", "--summary", "--last", "0"], "hint: `thermocline why --help` shows what it takes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(run, argv, hint):
    """A mistake in the command line or the settings exits 2, says nothing on stdout, and hints at the next action."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert hint in err
    assert err.count("\n") == 2


def test_config(run, monkeypatch, tmp_path):
    """`config` prints every setting, its effective value and where it came from, as text and as JSON."""
    path = tmp_path / "thermocline.toml"
    path.write_text('memory_bytes = "2GiB"\nport = 1')
    monkeypatch.setenv("THERMOCLINE_THREADS", "2")
    argv = ("config", "--config", str(path), "--port", "9")
    code, out, err = run(*argv)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert (code, err, list(rows)) == (0, "", list(DECLARED))
    assert rows["port"] == ["9", "--port"]
    assert rows["threads"] == ["2", "THERMOCLINE_THREADS"]
    assert rows["memory_bytes"] == ["2GiB", str(path)]
    assert rows["model"] == ["tiny", "default"]
    rows = json.loads(run(*argv, "--json")[1])
    assert rows["memory_bytes"] == {"value": 2 << 30, "from": str(path)}
    assert rows["disk_path"] == {"value": None, "from": "default"}


def test_summary_of_a_file(run, tmp_path):
    """`why --summary --file` adds up the receipts of a file, the last ones only if asked, as text and as JSON."""
    path = tmp_path / "receipts.jsonl"
    file = ReceiptsFile(path, 1 << 20, metrics=Metrics())
    for number in range(5):
        missing = (Missing(number % 2, 2, Reason.EVICTED), Missing(2, 3, Reason.TAIL))
        loaded = 32 * (number % 2)
        row = {"request": f"r{number}", "prompt_tokens": 70, "tokens_per_block": 32, "missing": missing}
        row |= {"loaded_tokens": loaded, "computed_tokens": 70 - loaded, "by_tier": {"disk": loaded} if loaded else {}}
        file.append(Receipt(**(dict.fromkeys(Receipt.__struct_fields__, 0.0) | row)))
    file.close()
    code, out, err = run("why", "--summary", "--file", str(path))
    assert (code, err) == (0, "")
    assert out.startswith("5 requests\n")
    assert out.endswith("raise memory_bytes or disk_bytes, or set disk_path.\n")
    found = json.loads(run("why", "--summary", "--file", str(path), "--last", "2", "--json")[1])
    assert (found["requests"], found["prompt_tokens"], found["loaded_tokens"]) == (2, 140, 32)
    assert found["by_reason"][0] == {"reason": "evicted", "tokens": 96, "requests": 2, "detail": "", "alike": 2}


def test_bench_outside_a_checkout(run, monkeypatch, tmp_path):
    """Without a source checkout `bench` says what to do instead of failing to import."""
    monkeypatch.setattr(thermocline, "__file__", str(tmp_path / "lib" / "python" / "thermocline" / "__init__.py"))
    code, _, err = run("bench", "list")
    assert code == 1
    assert "hint: clone the repository" in err


def test_no_server(run):
    """Asking a server that is not there exits 1 with a hint that names the command to start one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, out, err = run("why", "--url", f"http://127.0.0.1:{port}")
    assert (code, out) == (1, "")
    assert "no server answers" in err
    assert "thermocline serve" in err


def test_interrupt():
    """Ctrl-C exits 130 and prints nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        # whoever started the tests may ignore the signal, and children would too
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{heard}; from thermocline import cli; cli.main(['why', '--url', {url!r}])"
        argv = [sys.executable, "-c", code]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            connection, _ = silent.accept()
            with connection:  # which stays unanswered
                child.send_signal(signal.SIGINT)
                out, err = child.communicate(timeout=30)
    assert (out, err.strip()) == (b"", b"")
    assert child.returncode == cli.INTERRUPTED


def test_closed_pipe():
    """A reader that goes away early causes no traceback."""
    command = f"{sys.executable} -m thermocline config | true"
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_script():
    """The installed `thermocline` is this command."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"thermocline": "thermocline.cli:main"}
