"""A live vLLM while its node, the node's tiers, or an engine is killed, frozen, full or corrupting: ten times each.

Every request is answered 200, with the tokens that the same server gives without a cache; nothing wrong stays in vLLM's
own cache or in the store; and what it cost is kept beside the outcome. `--keep-matrix` keeps it for docs/faults.md.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest

from tests.conformance.samples import LENGTH, chain, content
from tests.faults import matrix
from tests.faults.constantly import constantly
from tests.faults.test_full import _fill_up, _small_file_system
from tests.faults.test_live import _flip_file
from tests.vllm.architectures import scaled
from tests.vllm.arms import cold, loaded, saved
from tests.vllm.live import PROMPTS, TOKENS, Live
from tests.vllm.node import MIB, Node
from tests.vllm.prompts import prompt
from tests.vllm.server import CLOCK, EXACT, Server
from thermocline.blocks.layout import Layout
from thermocline.node.client import NodeClient

pytestmark = pytest.mark.vllm_long
RUNS = 10
DISK_ONLY = {"memory_bytes": 20 * MIB, "disk_bytes": 512 * MIB}
"""The prompts are 21 MiB, and slots are lent for saves, so most of what is asked comes from the disk."""


@pytest.fixture
def rng(request):
    """What is random follows from the test's name."""
    return random.Random(request.node.name)  # noqa: S311  # must replay


@pytest.fixture(scope="module")
def live(tiny_model):
    """One server for all faults of the node and its tiers; the node is started again for each."""
    folder = Path(tempfile.mkdtemp(prefix="tcl-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        program = (str(Path(__file__).with_name("troubled_node.py")), str(folder / "eio"))
        node = stack.enter_context(Node(folder, program=program, memory_bytes=512 * MIB))
        live = Live(node, stack.enter_context(Server(folder, tiny_model, *EXACT, node=node.socket)))
        live.folder = folder
        yield live


@pytest.fixture
def note(record_property, cases, capsys):
    """Says how many runs there were and what they cost."""

    def say(live, runs=RUNS):
        cases(runs)
        record_property(matrix.NOTE, live.said())
        with capsys.disabled():
            print(f"\n    {live.said()}; reasons: {sorted(live.reasons)}", end="")  # noqa: T201  # figures of long runs are for people

    return say


def _fault(name):
    return pytest.mark.matrix(name, "vllm")


def _ten_times(live, trouble, note):
    """Ten runs of one fault, each from a full store and back to one."""
    live.begin()
    for _ in range(RUNS):
        live.fill()
        live.usual()
        with trouble():
            live.ask("during the fault", measured=True)
        live.after()
    live.fill()
    note(live)


# -- the node ----------------------------------------------------------------------------------------------------------


@_fault("node killed")
def test_node_killed(live, note):
    """A node that is killed costs nothing but its hits, and the engine finds the next one by itself."""

    @contextmanager
    def trouble():
        live.node.kill()
        yield
        live.node.start()

    _ten_times(live, trouble, note)
    assert live.loaded == 0


@_fault("node frozen")
def test_node_frozen(live, note):
    """A node that hangs costs one deadline, then nothing but its hits."""
    _ten_times(live, live.node.frozen, note)
    assert live.loaded == 0


@_fault("node slow")
def test_node_slow(live, note):
    """A node that gets a tenth of its time is waited for within the deadline, or not at all."""

    def step():
        live.node.thaw()
        CLOCK.sleep(0.002)
        live.node.freeze()

    @contextmanager
    def trouble():
        with constantly(step, 0.018):
            yield
        live.node.thaw()

    _ten_times(live, trouble, note)


@_fault("socket removed")
def test_socket_removed(live, note):
    """A socket that is removed harms nobody who is attached, and a restarted node is found under its name again."""

    @contextmanager
    def trouble():
        live.node.socket.unlink()
        yield
        live.node.restart()

    _ten_times(live, trouble, note)


# -- what the node keeps -----------------------------------------------------------------------------------------------


@contextmanager
def _kept_on_disk(live, folder):
    """The node keeps next to nothing in memory, and all of it in this folder."""
    live.node.restart(**DISK_ONLY, disk_path=folder / "disk")
    try:
        yield folder / "disk"
    finally:
        live.node.close()
        live.node.settings = {"memory_bytes": 512 * MIB}
        live.node.start()


@pytest.fixture
def disk(live, tmp_path):
    """The folder of the node's disk tier, for one test."""
    with _kept_on_disk(live, tmp_path) as path:
        yield path


@_fault("disk full")
def test_disk_full(live, tmp_path, note):
    """A file system without a byte left costs saves, and answers nobody wrongly."""
    with _small_file_system(tmp_path / "small", 640 * MIB) as small, _kept_on_disk(live, small):
        filler = small / "filler"

        @contextmanager
        def trouble():
            _fill_up(filler)
            cold(live.server, live.prompts, 1)  # something new that wants room
            yield
            filler.unlink()

        _ten_times(live, trouble, note)


@_fault("disk I/O errors")
def test_disk_errors(live, disk, note):
    """A disk whose every call fails costs its hits."""
    flag = live.folder / "eio"

    @contextmanager
    def trouble():
        flag.touch()
        yield
        flag.unlink()

    _ten_times(live, trouble, note)


@_fault("frames corrupted")
def test_frames_corrupted(live, disk, note, rng):
    """Bits that flipped in every file of the disk tier are found, and computed again."""

    @contextmanager
    def trouble():
        live.node.restart()  # what is in memory now was good before
        for path in disk.glob("*.segment"):
            _flip_file(path, rng)
        live.attached()
        yield

    _ten_times(live, trouble, note)
    assert "corrupt" in live.reasons


@_fault("slab overwritten")
def test_slab_overwritten(live, note, rng):
    """Bits that flip in the node's memory while engines copy from it never reach an answer."""

    @contextmanager
    def trouble():
        slabs = live.node.slabs()
        assert slabs
        with constantly(lambda: [_flip_file(slab, rng) for slab in slabs]):
            yield

    _ten_times(live, trouble, note)
    assert "corrupt" in live.reasons


@_fault("index damaged")
def test_index_damaged(live, disk, note, rng):
    """A node that starts on a damaged index log gives what it can prove, and nothing else."""

    @contextmanager
    def trouble():
        live.node.stop()
        log = disk / "index.log"
        log.write_bytes(bytes(byte ^ (rng.random() < 0.002) for byte in log.read_bytes()))
        live.node.start()
        live.attached()
        yield

    _ten_times(live, trouble, note)


# -- engines -----------------------------------------------------------------------------------------------------------


@_fault("engine frozen past its lease")
def test_engine_frozen_past_its_lease(start_node, start_vllm, note, rng):
    """An engine that sleeps over its lease computes on no byte that was written over in between."""
    node = start_node(memory_bytes=48 * MIB, lease_seconds=1)
    live = Live(node, start_vllm(*EXACT, node=node.socket))
    live.begin()
    for _ in range(RUNS):
        live.fill()
        live.usual()
        live.server.forget()
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(live.server.ask, PROMPTS[0], TOKENS)
            CLOCK.sleep(rng.uniform(0.005, 0.06))
            live.server.signal(SIGSTOP)
            CLOCK.sleep(1.5)
            _write_over(node)
            live.server.signal(SIGCONT)
            assert asked.result().tokens == live.expected[0].tokens
        live.ask("awake again", measured=True)
        live.after()
    note(live)


def _write_over(node):
    """Fill the node's memory with blocks of somebody else."""
    layout = _layout()
    with contextlib.closing(NodeClient(node.socket, role="filler", wait_seconds=1.0, save_wait_seconds=1.0)) as client:
        assert client.wait_up(10.0)
        for seed in range(1, 50 * MIB // (LENGTH * 100)):
            keys = chain(seed, 100)
            client.save(layout, keys, [[content(layout.id, key)] for key in keys]).wait()


def _layout():
    """One that no engine has."""
    names = {"model": "filler", "weights_digest": bytes(32), "dtype": "none", "kv_dtype": "none", "engine": "none"}
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 1, "tokens_per_block": 16, "block_bytes": LENGTH}
    return Layout(**names, **shape, engine_version="1", isa="any", order="any")


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param("saving", marks=_fault("engine killed while saving")),
        pytest.param("loading", marks=_fault("engine killed while loading")),
    ],
)
def test_engine_killed(start_node, start_vllm, note, rng, verb):
    """An engine that is killed while it saves or loads takes nothing with it: another one answers right, and loads."""
    node = start_node()
    live = Live(node, start_vllm(*EXACT, node=node.socket))
    live.begin()
    for run in range(RUNS):
        fresh = prompt(800 + run, 3000)
        victim = start_vllm(*EXACT, "--max-num-batched-tokens", "256", "--enable-chunked-prefill", node=node.socket)
        expected = cold(live.server, [fresh], TOKENS)
        if verb == "loading":
            saved(live.server, [fresh], expected, TOKENS)
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(_unanswered, victim, fresh)
            CLOCK.sleep(rng.uniform(0.2, 1.5) if verb == "saving" else rng.uniform(0.005, 0.08))
            victim.kill()
            asked.result()
        live.server.forget()
        (answer,) = live.server.ask_all([fresh], TOKENS)
        assert answer.tokens == expected[0].tokens
        loaded(live.server, [fresh], expected, "another engine was killed", TOKENS)
        live.usual()
        live.ask("another engine was killed", measured=True)
        live.after()
    note(live)


def _unanswered(server, tokens):
    with contextlib.suppress(OSError, AssertionError, ValueError):
        server.ask(tokens, TOKENS)


@_fault("wrong layout offered")
def test_wrong_layout_offered(start_node, start_vllm, tiny_model, tmp_path, note):
    """A model of the same shape and name with other weights finds nothing of what the first one kept."""
    prompts = [prompt(900 + run, 700) for run in range(RUNS)]
    node = start_node()
    first = start_vllm(*EXACT, node=node.socket)
    saved(first, prompts, cold(first, prompts, TOKENS), TOKENS)
    first.close()
    live = Live(node, start_vllm(*EXACT, model=scaled(tiny_model, tmp_path / "tiny"), node=node.socket), prompts)
    live.begin()
    live.ask("kept by another model", measured=True)
    assert live.loaded == 0
    live.after()
    note(live)
