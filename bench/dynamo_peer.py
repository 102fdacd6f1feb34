"""NVIDIA Dynamo's own router core as a peer: its SelectionService in a process of its own virtual environment.

`make bench-dynamo-env` installs it there. As a program (`python bench/dynamo_peer.py INSTANCES`) this file is that
process: it reads an order per line and answers with a line. What both sides are asked about is made here too, so
nothing of thermocline may be imported.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash
import zmq

MODEL = "m"
BLOCK, EVENT_BLOCKS = 16, 32
CONVERSATIONS, BLOCKS, GROUPS, SHARED_BLOCKS = 4600, 256, 100, 64
"""Each conversation is 256 blocks on one instance, and begins with the 64 of its group."""
LONG, LONG_BLOCKS = 40, 2048
PROMPTS = 40
VOCABULARY = 150_000
QUIET_SECONDS, QUIET_CPU_SECONDS = 0.1, 0.002
KINDS = {
    "4k tokens, all cached": (4096, "cached"),
    "4k tokens, 1k shared prefix cached": (4096, "shared"),
    "4k tokens, nothing cached": (4096, "nothing"),
    "32k tokens, all cached": (32_768, "long"),
    "32k tokens, first 4k cached": (32_768, "cached"),
    "32k tokens, 1k shared prefix cached": (32_768, "shared"),
    "32k tokens, nothing cached": (32_768, "nothing"),
}
"""What a decision is asked about: how long prompts are, and what is held of them."""
FORMS = ("list", "buffer")

# -- texts and events --------------------------------------------------------------------------------------------------


def conversation(number: int) -> np.ndarray:
    """Token ids of one conversation; those from CONVERSATIONS on are long, and share nothing."""
    if number >= CONVERSATIONS:
        return _ids(3, number, LONG_BLOCKS)
    return np.concatenate([_ids(1, number % GROUPS, SHARED_BLOCKS), _ids(2, number, BLOCKS - SHARED_BLOCKS)])


def prompts(kind: str, form: str) -> list[Any]:
    """Prompts of a kind, as a list of ints or as u32 in a buffer."""
    tokens, held = KINDS[kind]
    found = []
    for at in range(PROMPTS):
        known = {
            "cached": lambda at=at: conversation(97 * at % CONVERSATIONS),
            "long": lambda at=at: conversation(CONVERSATIONS + at),
            "shared": lambda at=at: _ids(1, at, SHARED_BLOCKS),
            "nothing": lambda: np.empty(0, np.uint32),
        }[held]()
        ids = np.concatenate([known, _ids(4, at, (tokens - len(known)) // BLOCK)])
        found.append(ids.tolist() if form == "list" else array("I", ids.tobytes()))
    return found


def placed(instances: int) -> list[int]:
    """The instance of each conversation."""
    chance = random.Random(5)  # noqa: S311  # the same places on both sides
    return [chance.randrange(instances) for _ in range(CONVERSATIONS + LONG)]


def payloads(number: int) -> list[bytes]:
    """A conversation's events in vLLM's form on the wire, 32 blocks in each."""
    ids = conversation(number)
    raw, name = ids.tobytes(), 7
    names = [name := xxhash.xxh3_64_intdigest(raw[at : at + 4 * BLOCK], name) for at in range(0, len(raw), 4 * BLOCK)]
    return [
        msgspec.msgpack.encode(
            [
                float(number),
                [
                    {
                        "type": "BlockStored",
                        "block_hashes": names[at : at + EVENT_BLOCKS],
                        "parent_block_hash": names[at - 1] if at else None,
                        "token_ids": ids[at * BLOCK : (at + EVENT_BLOCKS) * BLOCK].tolist(),
                        "block_size": BLOCK,
                        "lora_id": None,
                        "medium": "GPU",
                    }
                ],
                0,
            ]
        )
        for at in range(0, len(names), EVENT_BLOCKS)
    ]


def blocks_of(number: int) -> int:
    """How many blocks a conversation has."""
    return LONG_BLOCKS if number >= CONVERSATIONS else BLOCKS


def resident_bytes() -> int:
    """Memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _ids(kind: int, number: int, blocks: int) -> np.ndarray:
    return np.random.default_rng([kind, number]).integers(0, VOCABULARY, blocks * BLOCK, np.uint32)


class Senders:
    """An engine's PUB socket for each instance. Each side's events are sent by the other side's process."""

    def __init__(self, instances: int) -> None:
        self._context = zmq.Context()
        self._sequences = [0] * instances
        self._sockets = [self._context.socket(zmq.PUB) for _ in range(instances)]
        for socket in self._sockets:
            socket.set_hwm(0)
            socket.bind("tcp://127.0.0.1:*")

    @property
    def endpoints(self) -> list[str]:
        """Where to connect to hear each instance."""
        return [socket.get_string(zmq.LAST_ENDPOINT) for socket in self._sockets]

    def send(self, instance: int, batches: list[bytes]) -> None:
        """Batches of an instance, in vLLM's three frames."""
        for payload in batches:
            sequence = self._sequences[instance]
            self._sequences[instance] += 1
            self._sockets[instance].send_multipart([b"kv", sequence.to_bytes(8, "big"), payload])

    def close(self) -> None:
        """Send no more."""
        self._context.destroy(0)


# -- the parent's side -------------------------------------------------------------------------------------------------


class Dynamo:
    """The peer's process. It makes its events while this constructor returns; `ready` waits for that."""

    def __init__(self, python: Path, instances: int) -> None:
        self._process = subprocess.Popen(
            [str(python), __file__, str(instances)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"DYN_LOG": "error"},
        )

    def ask(self, *order: Any) -> Any:  # noqa: ANN401  # whatever the order answers with
        """One order, and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


# -- the peer's side ---------------------------------------------------------------------------------------------------


class _Peer:
    def __init__(self, instances: int) -> None:
        from dynamo.llm import SelectionService

        self._places = placed(instances)
        self._payloads = [payloads(number) for number in range(CONVERSATIONS + LONG)]
        self._memory = resident_bytes()
        self._senders = Senders(instances)
        self._service = SelectionService(indexer_threads=2)
        self._prompts: dict[tuple[str, str], list[Any]] = {}
        self._cpu = 0.0

    async def connect(self, *endpoints: str) -> list[str]:
        """Hear these instances, and say where to hear ours."""
        for instance, endpoint in enumerate(endpoints):
            await self._service.upsert_worker(
                {
                    "worker_id": instance,
                    "model_name": MODEL,
                    "endpoint": f"http://127.0.0.1:{10_000 + instance}",
                    "block_size": BLOCK,
                    "data_parallel_start_rank": 0,
                    "data_parallel_size": 1,
                    "kv_events_endpoints": {0: endpoint},
                }
            )
        return self._senders.endpoints

    async def send(self, first: int, stop: int) -> int:
        """Send these conversations' events to the other side. Returns how many batches they are."""
        for number in range(first, stop):
            self._senders.send(self._places[number], self._payloads[number])
        return sum(map(len, self._payloads[first:stop]))

    async def begin(self) -> None:
        """From here on CPU time is counted."""
        self._cpu = time.process_time()

    async def end(self) -> float:
        """CPU seconds since `begin`, once this process is quiet: being asked whether all is in would cost time too."""
        spent = 0.0
        while (now := time.process_time() - self._cpu) - spent > QUIET_CPU_SECONDS:
            spent = now
            await asyncio.sleep(QUIET_SECONDS)
        return now

    async def memory(self) -> int:
        return resident_bytes() - self._memory

    async def decide(self, kind: str, form: str) -> tuple[float, float]:
        """CPU and wall seconds per decision."""
        asked = self._prompts.get((kind, form))
        if asked is None:
            asked = self._prompts[kind, form] = prompts(kind, form)
        cpu, wall = time.process_time(), time.perf_counter()
        for tokens in asked:
            await self._service.select({"model_name": MODEL, "token_ids": tokens})
        return (time.process_time() - cpu) / len(asked), (time.perf_counter() - wall) / len(asked)

    async def found(self, kind: str) -> list[tuple[int, int]]:
        """For each prompt: the chosen instance, and the longest match in tokens."""
        told = [await self._service.select({"model_name": MODEL, "token_ids": ids}) for ids in prompts(kind, "list")]
        return [(each["worker_id"], each["overlap"]["longest_matched"]) for each in told]


async def _serve(instances: int) -> None:
    peer = _Peer(instances)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(await getattr(peer, verb)(*arguments)), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
