"""A real vLLM server of a test's own: started with thermocline's connector or without it, asked, frozen, killed.

It runs in an environment of its own (`make vllm`), because vLLM wants another transformers than this project. A test
without that environment is skipped, and says so.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from bench.vllm_server import ENVIRONMENT, free_port
from thermocline.clock import SystemClock
from thermocline.engines.vllm.config import vllm_config_json
from thermocline.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-vllm"
READY = VENV / ".vllm-ready"
CLOCK = SystemClock()
READY_SECONDS = 400.0
ANSWER_SECONDS = 120.0
STOP_SECONDS = 40.0
RESET_SECONDS = 20.0
MODEL = "m"
BLOCK_TOKENS = 32
"""Shorter than vLLM's 128 on a CPU, so that short prompts have blocks."""

EXACT = ("--dtype", "float32")
"""Tokens then do not depend on how a prefill is split or batched. In bf16, vLLM's partial hits flip near ties."""

_ARGUMENTS = (
    "--max-model-len",
    "4096",
    "--enforce-eager",
    "--enable-prompt-tokens-details",
    "--no-enable-log-requests",
)


def interpreter() -> Path:
    """The Python that has vLLM. Skips the test where there is none."""
    named = os.environ.get("VLLM_PYTHON")
    if named:
        return Path(named)
    if not READY.exists():
        pytest.skip(f"no vLLM in {VENV.name} (`make vllm` installs it)")
    return VENV / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request brought. `loaded` counts the tokens that thermocline really put in place for it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int
    receipt: dict[str, Any]
    seconds: float

    @property
    def loaded(self) -> int:
        """Tokens that came from the store, as the receipt says; 0 without a receipt."""
        return int(self.receipt.get("loaded_tokens", 0))


class Server:
    """Started with the object and answering once that returns; ended by `close`, whatever state it is in.

    `node` is the socket of one: without it the server runs without a connector. `arguments` are vLLM's own.
    """

    def __init__(
        self, folder: Path, model: Path, *arguments: str, node: Path | None = None, block: int | None = BLOCK_TOKENS
    ) -> None:
        self._log = folder / f"vllm-{os.urandom(4).hex()}.log"
        self.port = free_port()
        argv = [str(interpreter()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        argv += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port), *_ARGUMENTS]
        argv += ["--block-size", str(block)] if block else []
        argv += ["--kv-transfer-config", vllm_config_json(Settings(), node)] if node else []
        started = CLOCK.now()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*argv, *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT / "src")},
                start_new_session=True,
            )
        try:
            self._until_ready(started + READY_SECONDS)
        except BaseException:
            self.close()
            raise
        self.start_seconds = CLOCK.now() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- asking --------------------------------------------------------------------------------------------------------

    def ask(self, prompt: Sequence[int], count: int = 24, **more: object) -> Answer:
        """The greedy continuation of these token ids. Anything but 200 fails the test, with the log's end."""
        body = {"model": MODEL, "prompt": list(prompt), "max_tokens": count, "temperature": 0, "logprobs": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **more}
        started = CLOCK.now()
        status, text = self._call("POST", "/v1/completions", body)
        seconds = CLOCK.now() - started
        assert status == 200, f"HTTP {status}: {text[:500]}\n{self.log_tail()}"
        told = json.loads(text)
        choice = told["choices"][0]
        details = told["usage"].get("prompt_tokens_details") or {}
        receipt = (told.get("kv_transfer_params") or {}).get("thermocline", {})
        return Answer(
            tuple(choice["token_ids"]),
            tuple(choice["logprobs"]["token_logprobs"]),
            int(details.get("cached_tokens") or 0),
            receipt,
            seconds,
        )

    def ask_all(
        self,
        prompts: Sequence[Sequence[int]],
        count: int = 24,
        *,
        at_once: int = 1,
        salt: Callable[[], str] | None = None,
    ) -> list[Answer]:
        """The answers to these prompts, that many of them under way at a time, each under its own salt if asked."""

        def one(prompt: Sequence[int]) -> Answer:
            return self.ask(prompt, count, **({"cache_salt": salt()} if salt else {}))

        with ThreadPoolExecutor(at_once) as threads:
            return list(threads.map(one, prompts))

    def forget(self) -> None:
        """Empty vLLM's own prefix cache, once nothing holds its blocks any more."""
        deadline = CLOCK.now() + RESET_SECONDS
        while True:
            status, text = self._call("POST", "/reset_prefix_cache")
            if status == 200 and json.loads(text or "{}").get("success", True):
                return
            assert CLOCK.now() < deadline, f"the prefix cache is not let go: {status} {text[:200]}\n{self.log_tail()}"
            CLOCK.sleep(0.05)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a Prometheus counter's series that have these labels."""
        _, text = self._call("GET", "/metrics")
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        found = re.findall(rf"^{re.escape(name)}(\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for series, value in found if all(each in series for each in wanted))

    def log_tail(self, lines: int = 40) -> str:
        """The end of what it wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def log_has(self, text: str) -> bool:
        """Whether it wrote that."""
        return text in self._log.read_text(errors="replace")

    # -- what a test does to it ----------------------------------------------------------------------------------------

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it: in good order where it can, within a bound. A second call does nothing."""
        self.signal(signal.SIGCONT)
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self.kill()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _until_ready(self, deadline: float) -> None:
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._call("GET", "/health")[0] == 200:
                    return
            code = self._process.poll()
            if code is not None:
                raise StartError(f"vLLM ended with {code} as it was started", self.log_tail(2000))
            if CLOCK.now() > deadline:
                raise StartError(f"vLLM does not answer after {READY_SECONDS:.0f} s", self.log_tail(2000))
            CLOCK.sleep(0.25)

    def _call(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        ) as http_link:
            data = None if body is None else json.dumps(body)
            http_link.request(method, path, data, {"Content-Type": "application/json"})
            reply = http_link.getresponse()
            return reply.status, reply.read().decode()


class StartError(Exception):
    """vLLM did not start. `log` is the end of what it wrote."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}\n{log}")
        self.log = log
