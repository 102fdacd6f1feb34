"""A node and engines as one command: started in order, kept running, stopped in order.

up   settings to running processes, until a signal
Up   the same for processes that are given, with the time and the end as inputs
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from thermocline.clock import Clock, SystemClock
from thermocline.engines import launch
from thermocline.engines.child import Child, State
from thermocline.engines.telling import Address, Event, Telling
from thermocline.engines.vllm.config import vllm_config_json
from thermocline.errors import LaunchError, ThermoclineError
from thermocline.node import ask, paths
from thermocline.settings import Settings

LOOK_SECONDS = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(
    settings: Settings,
    socket: Path,
    kind: str,
    instances: int,
    more: Sequence[str],
    *,
    gateway: bool = False,
    as_json: bool = False,
) -> None:
    """Start a node at `socket` and `instances` engines of one kind, and keep them running until a signal.

    With a gateway that one listens at the settings' address, and engines on loopback behind it. `more` are arguments of
    the engine's own. Raises LaunchError where something does not come up or stay up, NodeError where the runtime
    folder, in which the logs lie, is not ours, and SettingsError where others would reach engines without a key.
    """
    if not gateway:
        settings.require_key()
    if _answers(socket):
        text = f"a node is there already, at {socket}"
        raise LaunchError(text, hint="stop it (`thermocline ps` shows its process), or name another --socket")
    front = launch.free_ports(settings.host, settings.port, 1) if gateway else []
    inside = launch.inside(settings, front[0]) if gateway else settings
    ports = launch.free_ports(inside.host, inside.port, instances)
    launches = _engines(kind, inside, socket, ports, more, events=gateway)
    clock, stop = SystemClock(), Stop()

    def child(each: launch.Launch, name: str = "") -> Child:
        return Child(each, log_folder() / f"{name or each.name}.log", clock)

    door = child(launch.gateway(settings, front[0], inside, launches)) if gateway else None
    node = child(launch.node(inside, socket, lambda: _answers(socket)), socket.stem)
    with signals_ask(stop):
        run = Up(node, [child(each) for each in launches], Telling(as_json=as_json), clock, stop, gateway=door)
        run.run(model=settings.model, socket=socket)


def _engines(
    kind: str, settings: Settings, socket: Path, ports: Sequence[int], more: Sequence[str], *, events: bool
) -> list[launch.Launch]:
    """`events`: each tells the settings' endpoint what it holds."""
    if kind == "transformers":
        return [launch.transformers(settings, socket, port, more=more) for port in ports]
    launch.check_vllm()
    config = vllm_config_json(settings, socket)
    return [launch.vllm(settings, config, port, instances=len(ports), more=more, events=events) for port in ports]


def running_node() -> Path | None:
    """The socket of this user's node, if one answers now."""
    socket = paths.socket_path()
    return socket if socket.exists() and _answers(socket) else None


def log_folder() -> Path:
    """Where the logs lie, one for each name: they are begun anew by the next process of that name."""
    folder = paths.runtime_folder() / "logs"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _answers(socket: Path) -> bool:
    try:
        ask.status(socket)
    except ThermoclineError:
        return False
    return True


class Stop:
    """Set by a signal: once to stop in order, twice to stop at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.hurry = False

    def please(self) -> None:
        """Stop; asked again, stop at once."""
        self.hurry = self._asked.is_set()
        self._asked.set()

    @property
    def asked(self) -> bool:
        """True once it was asked."""
        return self._asked.is_set()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until it is asked."""
        self._asked.wait(seconds)


class Up:
    """The node, the engines and the gateway of one command: in this order they start, and in the other they end."""

    def __init__(
        self,
        node: Child,
        engines: Sequence[Child],
        telling: Telling,
        clock: Clock,
        stop: Stop,
        *,
        gateway: Child | None = None,
    ) -> None:
        self._node, self._engines = node, list(engines)
        self._doors = [gateway] if gateway is not None else []
        self._telling, self._clock, self._stop = telling, clock, stop

    def run(self, *, model: str, socket: Path) -> None:
        """Start all, keep them running until `stop` is asked, and stop all, whatever happens.

        Raises LaunchError where something does not come up, or when no engine is left, or not the gateway: nobody would
        find the engines. A node that keeps dying is told and left out: engines answer without it.
        """
        try:
            if all(map(self._started, ([self._node], self._engines, self._doors))):
                self._telling.event(self._all(model, socket))
                self._keep()
        finally:
            self._telling.waited()
            self._end(self._doors)
            self._end(self._engines)
            self._end([self._node])
        self._telling.event(Event("stopped", "all of it"))

    def _started(self, children: Sequence[Child]) -> bool:
        """Start these and wait until all are ready. False where `stop` was asked meanwhile."""
        for child in children:
            self._start(child)
        while not self._stop.asked and any(child.state is not State.READY for child in children):
            for child in (self._node, *self._engines, *self._doors):
                self._look(child)
            self._telling.waiting(children)
            self._stop.wait(LOOK_SECONDS)
        self._telling.waited()
        return not self._stop.asked

    def _keep(self) -> None:
        """Start again what dies, until `stop` is asked, or no engine or no gateway is left that there was."""
        while not self._stop.asked:
            for child in (self._node, *self._engines, *self._doors):
                try:
                    self._look(child)
                except LaunchError as error:
                    if child in self._doors or all(engine.state is State.ENDED for engine in self._engines):
                        raise
                    self._tell("gave_up", child, detail=f"gave up: {error.message}\nhint: {error.hint}")
            self._stop.wait(LOOK_SECONDS)

    def _start(self, child: Child) -> None:
        child.start()
        self._tell("starting", child)

    def _look(self, child: Child) -> None:
        seconds = child.seconds
        entered = child.look()
        if entered is State.STARTING:
            self._tell("starting", child)
        elif entered is State.READY:
            self._tell("ready", child, seconds)
        elif entered is State.WAITING and child.death is not None:
            self._tell("died", child, child.death.again_seconds, child.death.words)

    def _tell(self, event: str, child: Child, seconds: float = 0.0, detail: str = "") -> None:
        self._telling.event(Event(event, child.launch.name, round(seconds, 1), detail, str(child.log), child.pid))

    def _end(self, children: Sequence[Child]) -> None:
        """Ask these to end, wait, and end by force those that take too long, or all where a second signal says so."""
        running = [child for child in children if child.pid]
        for child in children:
            child.terminate()
        since = self._clock.now()
        while running:
            waited = self._clock.now() - since
            for child in list(running):
                if child.has_ended():
                    self._tell("stopped", child, waited)
                elif self._stop.hurry or waited > child.launch.stop_seconds_max:
                    child.kill()
                    self._tell("stopped", child, waited, f"by force, after {waited:.0f} s")
                else:
                    continue
                running.remove(child)
            if running:
                self._clock.sleep(LOOK_SECONDS)

    def _all(self, model: str, socket: Path) -> Event:
        def addresses(children: Sequence[Child]) -> tuple[Address, ...]:
            return tuple(Address(each.launch.name, each.pid, str(each.log), each.launch.url) for each in children)

        (node,), engines, doors = map(addresses, ([self._node], self._engines, self._doors))
        gateway = doors[0] if doors else None
        return Event("up", model=model, socket=str(socket), node=node, engines=engines, gateway=gateway)


@contextlib.contextmanager
def signals_ask(stop: Stop) -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM ask to stop. In the main thread only."""

    def heard(_number: int, _frame: FrameType | None) -> None:
        stop.please()

    # what is ignored already, as SIGHUP is under nohup, stays so
    wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, heard) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
