"""A vLLM server for a bench: asked one request at a time, its first token timed, its processor time counted."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench.harness import CLOCK, ROOT
from thermocline.engines.vllm.config import vllm_config_json
from thermocline.errors import BenchError
from thermocline.settings import Settings

BLOCK_TOKENS = 128
"""vLLM's own choice on a CPU."""
MODEL_NAME = "m"
READY_SECONDS = 400.0
STOP_SECONDS = 40.0
RESET_SECONDS = 30.0
ANSWER_SECONDS = 120.0
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # it brings /reset_prefix_cache
}
_ARGUMENTS = (
    *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--max-model-len", "8192", "--enforce-eager"),
    *("--enable-prompt-tokens-details", "--no-enable-log-requests", "--uvicorn-log-level", "warning"),
)


def python_of(variable: str, folder: str, target: str) -> Path:
    """The Python of an environment with vLLM: named by an environment variable, or what a make target installed.

    Raises BenchError where there is none.
    """
    path = Path(os.environ.get(variable) or ROOT / folder / "bin" / "python")
    if not path.exists():
        raise BenchError(f"this bench runs {path}, which does not exist", hint=f"run `make {target}` first")
    return path


def vllm_python() -> Path:
    """The Python that has vLLM, and nothing that a peer needs."""
    return python_of("VLLM_PYTHON", ".venv-vllm", "vllm")


def connector(node: Path) -> dict[str, Any]:
    """What --kv-transfer-config says for a server on the node that listens at this socket."""
    transfer: dict[str, Any] = json.loads(vllm_config_json(Settings(), node))
    return transfer


def prompt(length: int, *number: int) -> list[int]:
    """Random token ids that depend on nothing but these numbers."""
    return np.random.default_rng([7, length, *number]).integers(10, 4000, length).tolist()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request brought: seconds to its first token, the tokens, and how many of the prompt vLLM counts as cached.

    `why` names the reasons in thermocline's receipt, where there is one. `trouble` says what came instead of an answer:
    an HTTP status, or silence. It is empty where all was well.
    """

    seconds: float
    tokens: tuple[int, ...] = ()
    cached_tokens: int = 0
    why: str = ""
    trouble: str = ""


class Server:
    """Started with the object; answers once `wait` has returned; ended by `close`, whatever state it is in."""

    def __init__(
        self,
        python: Path,
        model: Path,
        folder: Path,
        *,
        transfer: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        """`arguments` are vLLM's own, and win over those that every server here gets."""
        self.port = free_port()
        self._log = folder / f"vllm-{self.port}.log"
        argv = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *_ARGUMENTS]
        argv += ["--port", str(self.port)]
        argv += ["--kv-transfer-config", json.dumps(transfer)] if transfer else []
        argv += arguments
        paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        every = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths, **(environment or {})}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env=every, start_new_session=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> Self:
        """Until it answers. Raises BenchError with the end of its log where it does not start."""
        deadline = CLOCK.now() + READY_SECONDS
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._call("GET", "/health") == 200:
                    return self
            if self._process.poll() is not None or CLOCK.now() > deadline:
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
                raise BenchError(f"vLLM does not start:\n{tail}", hint="its log is above; is the environment whole?")
            CLOCK.sleep(0.25)

    def ask(self, tokens: Sequence[int], count: int = 1, *, wait_seconds: float = ANSWER_SECONDS) -> Answer:
        """The greedy continuation, streamed where it has several tokens. Waits so long for each part of the answer."""
        body = {"model": MODEL_NAME, "prompt": list(tokens), "max_tokens": count, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}} if count > 1 else {}
        text = json.dumps(body)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=wait_seconds)) as link:
            link.connect()
            started = CLOCK.now()
            try:
                link.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
                reply = link.getresponse()
                return _streamed(reply, started) if count > 1 else _whole(reply, started)
            except TimeoutError:
                return Answer(CLOCK.now() - started, trouble=f"no answer within {wait_seconds:.0f} s")
            except (OSError, http.client.HTTPException) as error:
                return Answer(CLOCK.now() - started, trouble=type(error).__name__)

    def forget(self) -> None:
        """Empty vLLM's own prefix cache, as soon as nothing holds its blocks. Raises BenchError after a while."""
        deadline = CLOCK.now() + RESET_SECONDS
        while self._call("POST", "/reset_prefix_cache") != 200:
            if CLOCK.now() > deadline:
                raise BenchError("vLLM does not let go of its prefix cache", hint="a request may still be under way")
            CLOCK.sleep(0.02)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        """Its Prometheus counters, added up over their labels."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=RESET_SECONDS)) as link:
            link.request("GET", "/metrics")
            text = link.getresponse().read().decode()
        found: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name = series.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def cpu_seconds(self) -> float:
        """Processor time used so far by all processes of this server, to the nanosecond."""
        return sum(_cpu_seconds(each) for each in _session(self._process.pid))

    def close(self) -> None:
        """End it; nothing of it is left after that. A second call does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        for each in _session(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self._process.wait()

    def _call(self, method: str, path: str) -> int:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=RESET_SECONDS)) as link:
            link.request(method, path)
            reply = link.getresponse()
            text = reply.read()
        refused = reply.status == 200 and b'"success":false' in text.replace(b" ", b"")
        return 503 if refused else reply.status


def _whole(reply: http.client.HTTPResponse, started: float) -> Answer:
    """An answer of one token, which comes with its receipt."""
    text = reply.read()
    seconds = CLOCK.now() - started
    if reply.status != 200:
        return Answer(seconds, trouble=f"HTTP {reply.status}")
    told = json.loads(text)
    tokens = tuple(told["choices"][0]["token_ids"])
    receipt = (told.get("kv_transfer_params") or {}).get("thermocline") or {}
    why = ", ".join(f"{gap['reason']} {gap['detail']}".strip() for gap in receipt.get("missing", ()))
    return Answer(seconds, tokens, _cached(told), why)


def _cached(told: Mapping[str, Any]) -> int:
    return int(((told.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def _streamed(reply: http.client.HTTPResponse, started: float) -> Answer:
    """Read a stream of events to its end."""
    if reply.status != 200:
        reply.read()
        return Answer(CLOCK.now() - started, trouble=f"HTTP {reply.status}")
    first, cached, tokens = 0.0, 0, []
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        first = first or CLOCK.now() - started
        event = json.loads(line[6:])
        if "error" in event:
            return Answer(first, trouble=f"error {event['error'].get('code', '')}".strip())
        tokens += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
        cached = _cached(event) or cached
    return Answer(first, tuple(tokens), cached)


# -- processes ---------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process_cpu_seconds(pid: int) -> float:
    """Processor time used so far by all threads of a process."""
    return _cpu_seconds(pid)


def _session(leader: int) -> list[int]:
    """Every process of a session."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (each / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    found.append(int(each.name))
    return found


def _cpu_seconds(pid: int) -> float:
    """The scheduler's own count, in nanoseconds: clock ticks are a hundredth of a second."""
    total = 0
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9
