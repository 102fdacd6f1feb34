"""Records what the tests of the doctor read: metrics, KV events and receipts of a real vLLM under planted conditions.

    VLLM_PYTHON=... PYTHONPATH=src:. python tests/lens/record.py [NAME...]

Writes tests/lens/recorded/NAME/: scrapes 0.txt, 1.txt, ... in the order in which they were made (the first before the
load, the last behind it), and events.jsonl where events were heard. What the doctor does not read is left out:
comments, Python's own metrics, buckets of most histograms, the token ids of events.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

import msgspec

from bench.vllm_server import Server, connector, free_port, prompt, vllm_python
from tests.vllm.node import Node
from thermocline.clock import SystemClock
from thermocline.engines import tiny
from thermocline.wire.events import Batch, BlockStored, Topic, read_batch, write_batch, write_topic
from thermocline.wire.subscriber import Subscriber

RECORDED = Path(__file__).with_name("recorded")
CLOCK = SystemClock()
KEPT_BUCKETS = "vllm:kv_block_"
RESIDENCY = ("--kv-cache-metrics", "--kv-cache-metrics-sample", "1.0")


class Recording:
    """One condition's folder. `server` is asked for its metrics whenever the load says so."""

    def __init__(self, name: str) -> None:
        self.folder = RECORDED / name
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            old.unlink()
        self._count = 0
        self._lock = threading.Lock()

    def scrape(self, server: Server, seconds: float = 0.0) -> None:
        """Keep what the metrics say, `seconds` from now."""
        CLOCK.sleep(seconds)
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        link.request("GET", "/metrics")
        lines = link.getresponse().read().decode().splitlines()
        link.close()
        kept = [line for line in lines if line.startswith("vllm:") and _is_kept(line)]
        (self.folder / f"{self._count}.txt").write_text("\n".join([f"# at {CLOCK.now():.3f}", *kept, ""]))
        self._count += 1

    def hear(self, source: str, sequence: int, payload: bytes) -> None:
        """Keep a batch of events, without its tokens."""
        batch = read_batch(payload)
        events = tuple(
            msgspec.structs.replace(event, tokens=array("I")) if isinstance(event, BlockStored) else event
            for event in batch.events
        )
        line = {"source": source, "sequence": sequence, "heard": CLOCK.wall(), "batch": _told(batch, events)}
        with self._lock, (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def _told(batch: Batch, events: Sequence[object]) -> str:
    return write_batch(msgspec.structs.replace(batch, events=events)).hex()


def _is_kept(line: str) -> bool:
    name = line.partition("{")[0]
    return not name.endswith("_created") and (not name.endswith("_bucket") or name.startswith(KEPT_BUCKETS))


def together(server: Server, prompts: Sequence[list[int]], count: int) -> None:
    """Ask for all of them at once."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        for answer in threads.map(lambda each: server.ask(each, count), prompts):
            assert not answer.trouble, answer


def in_turn(server: Server, prompts: Sequence[list[int]], count: int = 2) -> None:
    """Ask for one after the other."""
    for each in prompts:
        assert not server.ask(each, count).trouble


def healthy(record: Recording, server: Server) -> None:
    """Twenty conversations that go on while they are held."""
    record.scrape(server)
    for turn in range(4):
        in_turn(server, [prompt(1024, 1, at)[: 256 * (turn + 1)] for at in range(20)])
        record.scrape(server)


def memory(record: Recording, server: Server) -> None:
    """Ten at once that grow beyond what the blocks hold."""
    record.scrape(server)
    asking = threading.Thread(target=together, args=(server, [prompt(200, 2, at) for at in range(10)], 200))
    asking.start()
    while asking.is_alive():
        record.scrape(server, 2.0)
    asking.join()


def no_prefix_cache(record: Recording, server: Server) -> None:
    """The same prompt again and again, on a server that reuses nothing."""
    record.scrape(server)
    in_turn(server, [prompt(1024, 3)] * 20)
    record.scrape(server)


def evicted(record: Recording, server: Server) -> None:
    """Twelve conversations in turn, and blocks for half of them."""
    record.scrape(server)
    for _ in range(5):
        in_turn(server, [prompt(700, 4, at) for at in range(12)])
    record.scrape(server)


def idle(record: Recording, server: Server) -> None:
    """Quick returns to a few prompts that nobody asks for later: they leave long after their last use. Twice."""
    record.scrape(server)
    for turn in range(3):
        for at in range(7):
            in_turn(server, [prompt(700, 5, turn, at)] * 4)
        CLOCK.sleep(25.0 if turn < 2 else 0.0)
    record.scrape(server)


def overload(record: Recording, server: Server) -> None:
    """Forty at once, where two are computed at a time."""
    record.scrape(server)
    asking = threading.Thread(target=together, args=(server, [prompt(512, 8, at) for at in range(40)], 4))
    asking.start()
    while asking.is_alive():
        record.scrape(server, 2.0)
    asking.join()


def salted(record: Recording, server: Server) -> None:
    """One prompt, seventy times, each time with another salt."""
    record.scrape(server)
    for at in range(70):
        body = {"model": "m", "prompt": prompt(300, 10), "max_tokens": 1, "cache_salt": f"salt {at}"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as link:
            link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            assert link.getresponse().status == HTTPStatus.OK
    record.scrape(server)


def tiers(record: Recording, server: Server) -> None:
    """Prompts that vLLM's own cache forgot and a node holds."""
    prompts = [prompt(1025, 9, at) for at in range(6)]
    in_turn(server, prompts)
    server.forget()
    record.scrape(server)
    for _ in range(3):
        in_turn(server, prompts)
        server.forget()
    record.scrape(server)


PLANS: dict[str, tuple[Callable[[Recording, Server], None], tuple[str, ...]]] = {
    "healthy": (healthy, ()),
    "memory": (memory, ("--num-gpu-blocks-override", "16", "--max-model-len", "1024")),
    "no_prefix_cache": (no_prefix_cache, ("--no-enable-prefix-caching",)),
    "evicted": (evicted, ("--num-gpu-blocks-override", "40", "--max-model-len", "2048", *RESIDENCY)),
    "idle": (idle, ("--num-gpu-blocks-override", "40", "--max-model-len", "2048", *RESIDENCY)),
    "overload": (overload, ("--max-num-seqs", "2")),
    "salted": (salted, ()),
    "tiers": (tiers, ()),
}


def main(names: Sequence[str]) -> None:
    """Record these, or all."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model = tiny.ensure(folder / "tiny")
        for name in names or PLANS:
            load, arguments = PLANS[name]
            record = Recording(name)
            with ExitStack() as stack:
                port = free_port()
                topic = write_topic(Topic("vllm-0", "m"))
                events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{port}"}
                heard = Subscriber([f"tcp://127.0.0.1:{port}"], record.hear)
                stack.callback(heard.close)
                transfer = None
                if name == "tiers":
                    transfer = connector(stack.enter_context(Node(folder, memory_bytes=256 << 20)).socket)
                told = json.dumps(events | {"topic": topic})
                more = () if name == "no_prefix_cache" else ("--kv-events-config", told)
                server = Server(vllm_python(), model, folder, transfer=transfer, arguments=(*arguments, *more))
                load(record, stack.enter_context(server).wait())
                CLOCK.sleep(1.0)


if __name__ == "__main__":
    main(sys.argv[1:])
