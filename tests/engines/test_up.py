"""Starting, watching and ending processes: real ones, which do as little as they can."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from thermocline.clock import ManualClock, SystemClock
from thermocline.engines import child as children
from thermocline.engines import launch
from thermocline.engines.child import Child, State, backoff
from thermocline.engines.launch import Launch
from thermocline.engines.telling import Event, Telling
from thermocline.engines.up import Stop, Up, up
from thermocline.errors import LaunchError, SettingsError
from thermocline.settings import Settings

SECONDS_MAX = 30.0
STAY = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); print('up', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + STAY
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); " + STAY


@pytest.fixture
def made(tmp_path):
    """Makes children, and ends what is left of them."""
    all_made = []

    def make(program: str, name: str = "child", clock=None, stop_seconds_max: float = 10.0) -> Child:
        sign = tmp_path / f"{name}.ready"
        words = (sys.executable, "-c", program, str(sign))
        ready = Launch(name, words, sign.exists, f"http://{name}", stop_seconds_max=stop_seconds_max)
        all_made.append(Child(ready, tmp_path / f"{name}.log", clock or SystemClock()))
        return all_made[-1]

    yield make
    for child in all_made:
        child.kill()


def _until(child: Child, *wanted: State) -> None:
    clock = SystemClock()
    deadline = clock.now() + SECONDS_MAX
    for state in wanted:
        while child.look() is not state:
            assert clock.now() < deadline, f"not {state}: {child.state}, {child.tail()}"
            clock.sleep(0.01)


def _is_there(pid: int) -> bool:
    """True for a process that runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _group(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(rest.rpartition(")")[2].split()[2]) == leader:
            found.append(int(pid))
    return found


def test_what_dies_is_started_again(made):
    """A child that was ready and died is started again after a moment, and is ready again."""
    child = made(STAY)
    child.start()
    _until(child, State.READY)
    first = child.pid
    os.kill(first, signal.SIGKILL)
    _until(child, State.WAITING, State.STARTING, State.READY)
    assert child.pid != first
    assert child.death == ("was ended by SIGKILL", children.BACKOFF_SECONDS)


def test_what_never_comes_up_is_told_with_its_log(made, tmp_path):
    """A child that dies before it was ready is not tried again: the error has the end of its log, and where it is."""
    child = made("print('no such flag: \\x1b[31m--speed'); raise SystemExit(3)")
    child.start()
    with pytest.raises(LaunchError, match="child ended with status 3 before it was ready") as raised:
        _until(child, State.READY)
    assert "  | no such flag: [31m--speed" in raised.value.message
    assert str(tmp_path / "child.log") in raised.value.hint
    assert child.state is State.ENDED
    assert child.look() is None


def test_what_keeps_dying_is_given_up(made, tmp_path):
    """After DEATHS_MAX deaths in a row a child is given up; the waits in between double."""
    clock = ManualClock()
    child = made(STAY, clock=clock)
    child.start()
    waits = []
    for _ in range(children.DEATHS_MAX - 1):
        _until(child, State.READY)
        os.kill(child.pid, signal.SIGKILL)
        _until(child, State.WAITING)
        waits.append(child.death.again_seconds)
        assert child.look() is None
        clock.sleep(waits[-1])
        _until(child, State.STARTING)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(LaunchError, match=f"{children.DEATHS_MAX} times in a row"):
        _until(child, State.WAITING)


def test_deaths_are_forgiven(made):
    """A child that was ready for a while begins anew: its earlier deaths count no more."""
    clock = ManualClock()
    child = made(STAY, clock=clock)
    child.start()
    for _ in range(2):
        _until(child, State.READY)
        clock.sleep(children.STEADY_SECONDS)
        assert child.look() is None
        os.kill(child.pid, signal.SIGKILL)
        _until(child, State.WAITING)
        assert child.death.again_seconds == children.BACKOFF_SECONDS
        clock.sleep(children.BACKOFF_SECONDS)
        _until(child, State.STARTING)


def test_backoff_is_bounded():
    """No wait is longer than the bound, and after DEATHS_MAX there is none."""
    waits = [backoff(deaths) for deaths in range(1, children.DEATHS_MAX)]
    assert waits == sorted(waits)
    assert waits[-1] <= children.BACKOFF_SECONDS_MAX
    assert backoff(children.DEATHS_MAX) is None


def test_a_start_that_takes_too_long_is_ended(made):
    """A child that is not ready in time is ended by force, and the error says so."""
    clock = ManualClock()
    child = made("import time; time.sleep(600)", clock=clock)
    child.start()
    pid = child.pid
    assert child.look() is None
    clock.sleep(launch.START_SECONDS_MAX + 1)
    with pytest.raises(LaunchError, match="was not ready after 1800 s"):
        child.look()
    assert not _is_there(pid)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_no_grandchild_is_left(made, how):
    """When a child dies or is stopped, the processes that it started are gone too."""
    child = made(PARENT)
    child.start()
    _until(child, State.READY)
    group = _group(child.pid)
    assert len(group) == 2
    if how == "killed":
        os.kill(child.pid, signal.SIGKILL)
        _until(child, State.WAITING)
    else:
        child.terminate()
        clock = SystemClock()
        while not child.has_ended():
            clock.sleep(0.01)
    clock = SystemClock()
    deadline = clock.now() + SECONDS_MAX
    while any(map(_is_there, group)):
        assert clock.now() < deadline
        clock.sleep(0.01)


def test_a_log_is_bounded(made, tmp_path, monkeypatch):
    """A log that grows beyond its bound becomes the older of two, and the child goes on writing."""
    monkeypatch.setattr(children, "LOG_BYTES_MAX", 1000)
    child = made("import sys; print('x' * 2000, flush=True); input_ = sys.argv; " + STAY)
    child.start()
    _until(child, State.READY)
    clock = SystemClock()
    while not (tmp_path / "child.log.older").exists():
        assert child.look() is None
        clock.sleep(0.01)
    assert child.log.stat().st_size <= 1000
    assert child.log.stat().st_mode & 0o077 == 0


class _Run:
    """`Up` over trivial children, which asks to stop when an event says so."""

    def __init__(self, capsys, **ask_at: str) -> None:
        self.stop, self.events = Stop(), []
        self._capsys, self._ask_at = capsys, ask_at

    def event(self, event) -> None:
        self.events.append(event)
        self.on(event)

    def on(self, event) -> None:
        if event.event == self._ask_at.get("event") and event.name == self._ask_at.get("name", event.name):
            self.stop.please()

    def waiting(self, _children) -> None:
        pass

    def waited(self) -> None:
        pass

    def run(self, node: Child, engines: list[Child], gateway: Child | None = None) -> list[tuple[str, str]]:
        Up(node, engines, self, SystemClock(), self.stop, gateway=gateway).run(model="m", socket=Path("s"))
        return self.names

    @property
    def names(self) -> list[tuple[str, str]]:
        return [(event.event, event.name) for event in self.events]


def test_order(made, capsys):
    """The node is ready before an engine starts, all are up before it is said, and engines end before the node."""
    run = _Run(capsys, event="up")
    names = run.run(made(STAY, "node"), [made(STAY, "a"), made(STAY, "b")])
    assert names[:2] == [("starting", "node"), ("ready", "node")]
    assert names[2:4] == [("starting", "a"), ("starting", "b")]
    assert set(names[4:6]) == {("ready", "a"), ("ready", "b")}
    assert names[6] == ("up", "")
    assert set(names[7:9]) == {("stopped", "a"), ("stopped", "b")}
    assert names[9:] == [("stopped", "node"), ("stopped", "all of it")]
    assert [engine.url for engine in run.events[6].engines] == ["http://a", "http://b"]


def test_an_engine_that_does_not_come_up_ends_all(made, capsys):
    """Where one engine does not come up, the others and the node are stopped, and the error is its own."""
    run = _Run(capsys)
    node = made(STAY, "node")
    with pytest.raises(LaunchError, match="bad ended with status 1"):
        run.run(node, [made("import time; time.sleep(600)", "slow"), made("raise SystemExit(1)", "bad")])
    assert run.names[-2:] == [("stopped", "slow"), ("stopped", "node")]
    assert node.pid == 0


def test_a_node_that_keeps_dying_stops_no_engine(made, capsys, monkeypatch):
    """A node that is given up is told, with a hint, and the engines go on."""
    monkeypatch.setattr(children, "DEATHS_MAX", 1)
    run, node, engine = _Run(capsys), made(STAY, "node"), made(STAY, "a")

    def on(event) -> None:
        if event.event == "up":
            os.kill(event.node.pid, signal.SIGKILL)
        elif event.event == "gave_up":
            assert engine.state is State.READY
            run.stop.please()

    run.on = on
    names = run.run(node, [engine])
    assert ("gave_up", "node") in names
    assert "hint: " in next(event.detail for event in run.events if event.event == "gave_up")
    assert ("stopped", "a") in names


def test_the_last_engine_that_is_given_up_is_an_error(made, capsys, monkeypatch):
    """When no engine is left, all ends with the error of the last."""
    monkeypatch.setattr(children, "DEATHS_MAX", 1)
    run = _Run(capsys)
    run.on = lambda event: event.event == "up" and os.kill(event.engines[0].pid, signal.SIGKILL)
    with pytest.raises(LaunchError, match="a was ended by SIGKILL, 1 times in a row"):
        run.run(made(STAY, "node"), [made(STAY, "a")])
    assert run.names[-1] == ("stopped", "node")


def test_a_gateway_that_is_given_up_is_an_error(made, capsys, monkeypatch):
    """Without its gateway nobody finds the engines: all ends with the error of the gateway."""
    monkeypatch.setattr(children, "DEATHS_MAX", 1)
    run = _Run(capsys)
    run.on = lambda event: event.event == "up" and os.kill(event.gateway.pid, signal.SIGKILL)
    with pytest.raises(LaunchError, match="door was ended by SIGKILL, 1 times in a row"):
        run.run(made(STAY, "node"), [made(STAY, "a")], made(STAY, "door"))
    assert run.names[-2:] == [("stopped", "a"), ("stopped", "node")]


def test_the_deaf_are_ended_by_force(made, capsys):
    """A child that does not listen to SIGTERM is ended by force when its time is over, or at a second signal."""
    run = _Run(capsys, event="up")
    deaf = made(DEAF, "deaf", stop_seconds_max=0.2)
    run.run(made(STAY, "node"), [deaf])
    assert next(event for event in run.events if event.name == "deaf" and event.detail).event == "stopped"
    assert deaf.pid == 0


def test_a_second_signal_ends_at_once(made, capsys):
    """Asked twice to stop, it waits for nobody."""
    run = _Run(capsys)
    run.on = lambda event: event.event == "up" and (run.stop.please(), run.stop.please())
    run.run(made(STAY, "node"), [made(DEAF, "deaf", stop_seconds_max=600.0)])
    assert run.stop.hurry
    assert ("stopped", "deaf") in run.names


def _up_and_down(made, capsys, *, as_json):
    """What is on stdout and stderr when all that comes up is stopped at once."""
    stop, telling = Stop(), Telling(as_json=as_json)
    telling_event = telling.event

    def event(told) -> None:
        telling_event(told)
        if told.event == "up":
            stop.please()

    telling.event = event
    Up(made(STAY, "node"), [made(STAY, "a")], telling, SystemClock(), stop).run(model="m", socket=Path("s"))
    return capsys.readouterr()


def test_events_as_json(made, capsys):
    """With --json every event is one line of JSON on stdout, and nothing is on stderr."""
    out, err = _up_and_down(made, capsys, as_json=True)
    told = [json.loads(line) for line in out.splitlines()]
    up = next(each for each in told if each["event"] == "up")
    assert (up["model"], up["socket"], up["engines"][0]["url"]) == ("m", "s", "http://a")
    assert told[-1] == {"event": "stopped", "name": "all of it"}
    assert err == ""


def test_events_as_text(made, capsys):
    """As text, addresses and a request to copy go to stdout, all else to stderr."""
    out, err = _up_and_down(made, capsys, as_json=False)
    assert "curl -s http://a/v1/completions" in out
    assert r"""-d "{\"model\":\"m\",\"prompt\":\"$(seq -s ' ' 400)\",""" in out
    assert "thermocline why --socket s\n" in out
    assert "node  s         log " in out
    assert "a is ready after " in err


def test_progress_on_a_terminal(made, monkeypatch):
    """On a terminal each process has a line with what it last said, and nothing of that is left when all are ready."""
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:  # noqa: PTH123  # a descriptor
        monkeypatch.setattr(sys, "stderr", terminal)
        telling, child = Telling(as_json=False), made("print('reading weights', flush=True); " + STAY, "engine")
        child.start()
        _until(child, State.READY)
        for _ in range(2):
            telling.waiting([child, made(STAY, "next")])
        telling.event(Event("ready", "engine", 1.0))
        telling.waited()
    shown = b""
    with suppress(OSError):  # the other end is closed, as Linux says it
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    first, _, last = shown.decode().partition("engine is ready after 1 s")
    assert "ready" in first
    assert "up" in first.partition("engine")[2]
    assert last.endswith("\x1b[2K")


def test_free_ports_skip_those_in_use():
    """Engines get consecutive ports, without those that somebody listens on."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first, second = launch.free_ports("127.0.0.1", port, 2)
    assert port < first < second
    assert len(set(launch.free_ports("127.0.0.1", 0, 3))) == 3


def test_settings_become_flags():
    """A child is told every setting that is not at its default, in a form that reads back the same."""
    settings = Settings(memory_bytes=3 << 20, ttl_seconds=90.5, disk_path=Path("a b"), port=9)
    words = settings.flags(without=frozenset({"port"}))
    told = dict(zip(words[::2], words[1::2], strict=True))
    given = {word.removeprefix("--").replace("-", "_"): value for word, value in told.items()}
    assert set(given) == {"memory_bytes", "ttl_seconds", "disk_path"}
    assert Settings(**given, port=9) == settings


def test_no_setting_reaches_a_child_twice(monkeypatch, tmp_path):
    """Settings of our environment are resolved here: a child sees none of them but as flags."""
    monkeypatch.setenv("THERMOCLINE_DISK_PATH", str(tmp_path))
    started = launch.node(Settings.load(), tmp_path / "s", lambda: True)
    assert "THERMOCLINE_DISK_PATH" not in started.environment
    assert started.words[-2:] == ("--disk-path", str(tmp_path))


def test_only_the_gateway_asks_for_keys(monkeypatch, tmp_path):
    """Engines behind a gateway get neither its key nor its tenants, in words or environment; the gateway gets both."""
    pytest.importorskip("uvloop", reason="the gateway runs on uvloop")
    for name in ("VLLM_API_KEY", "THERMOCLINE_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    key, tenants = tmp_path / "key", tmp_path / "tenants.toml"
    key.write_text("secret\n")
    settings = Settings(host="0.0.0.0", model="m", api_key_file=key, tenants_path=tenants)  # noqa: S104  # not listened on
    behind = launch.inside(settings, 8000)
    engines = [
        launch.transformers(behind, tmp_path / "s", 8001),
        launch.vllm(behind, "{}", 8002, instances=2, events=True),
    ]
    for each in (*engines, launch.node(behind, tmp_path / "s", lambda: True)):
        said = (*each.words, *each.environment.values())
        assert not {str(key), str(tenants), "secret"} & set(said)
        assert "VLLM_API_KEY" not in each.environment
    door = launch.gateway(settings, 8000, behind, engines).words
    assert door[door.index("--api-key-file") + 1] == str(key)
    assert door[door.index("--tenants-path") + 1] == str(tenants)


def test_engines_ask_for_the_key_that_their_gateway_sends(monkeypatch, tmp_path):
    """With a key for instances, engines behind a gateway ask for that one, and the gateway is told where it stands."""
    pytest.importorskip("uvloop", reason="the gateway runs on uvloop")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    own, clients = tmp_path / "own", tmp_path / "clients"
    own.write_text("secret\n")
    settings = Settings(model="m", api_key_file=clients, instance_key_file=own)
    behind = launch.inside(settings, 8000)
    ours, theirs = launch.transformers(behind, tmp_path / "s", 8001), launch.vllm(behind, "{}", 8002, instances=1)
    door = launch.gateway(settings, 8000, behind, [ours, theirs]).words
    assert ours.words[ours.words.index("--api-key-file") + 1] == str(own)
    assert theirs.environment["VLLM_API_KEY"] == "secret"
    assert (door[door.index("--api-key-file") + 1], door[door.index("--instance-key-file") + 1]) == (
        str(clients),
        str(own),
    )
    assert not {"secret", "--instance-key-file"} & {*ours.words, *theirs.words, *launch.node(behind, own, bool).words}


def test_a_gateway_knows_where_events_are_told_again():
    """Where each vLLM tells KV events again to who missed them, its own gateway asks for them, under the same name."""
    pytest.importorskip("uvloop", reason="the gateway runs on uvloop")
    from thermocline.gateway.serve import instances_of
    from thermocline.wire.events import read_topic

    settings = Settings(model="m")
    behind = launch.inside(settings, 8000)
    engines = [launch.vllm(behind, "{}", port, instances=2, events=True) for port in (8001, 8002)]
    configs = [json.loads(each.words[each.words.index("--kv-events-config") + 1]) for each in engines]
    door = launch.gateway(settings, 8000, behind, engines).words
    routed = instances_of(door[door.index("--route-to") + 1])
    assert [each.replay for each in routed] == [config["replay_endpoint"] for config in configs]
    assert [each.instance.name for each in routed] == [read_topic(config["topic"]).name for config in configs]
    assert len({each.replay for each in routed}) == len(engines)
    assert {config["endpoint"] for config in configs} == {door[door.index("--events-listen") + 1]}


def test_engines_that_others_reach_need_a_key(tmp_path):
    """Without a gateway, a tenants file is no key: engines on a public address are refused before anything starts."""
    settings = Settings(host="0.0.0.0", tenants_path=tmp_path / "tenants.toml")  # noqa: S104  # not listened on
    with pytest.raises(SettingsError, match="no API key protects it"):
        up(settings, tmp_path / "s", "transformers", 1, ())


def test_vllm_on_a_cpu_shares_cores_and_memory(monkeypatch):
    """Each of several engines on a CPU gets its part of the cores, and what the operator says wins."""
    monkeypatch.setattr(launch, "vllm_computes_on_cpu", lambda: True)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    started = launch.vllm(Settings(model="m"), "{}", 8001, instances=1000, more=("--max-model-len", "4096"))
    assert started.environment["OMP_NUM_THREADS"] == "1"
    assert started.environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert started.words[-5:] == ("--kv-transfer-config", "{}", "--enforce-eager", "--max-model-len", "4096")
    assert started.url == "http://127.0.0.1:8001"


def test_vllm_missing_is_told():
    """Where vLLM is not installed, the error says for which Python, and how to install it."""
    import importlib.util

    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    with pytest.raises(LaunchError, match="vLLM is not installed") as raised:
        launch.check_vllm()
    assert "pip install vllm" in raised.value.hint
