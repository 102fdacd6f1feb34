"""The verb `advise`: what it reads, what it says, and the file that it writes."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.gateway.fleet import Light, Route, free_port
from tests.lens.recordings import FOLDER, recorded
from tests.node.making import Host, until
from tests.store.making import BLOCK_BYTES, make_layout
from thermocline.blocks.key import BlockKey, root_key
from thermocline.cli.app import NO_CACHE
from thermocline.clock import ManualClock, SystemClock
from thermocline.costs import measured, workload
from thermocline.costs.measured import Conditions, Measured, Row
from thermocline.costs.study import Study, oracle_hit
from thermocline.costs.trace import read
from thermocline.errors import ModelError, NodeError, SettingsError, TraceError, UnreachableError
from thermocline.lens import advise, decision, observe
from thermocline.lens.advise import LOST, Asked, machine_of
from thermocline.settings import Settings
from thermocline.store.receipt import Missing, Reason, Receipt
from thermocline.store.store import Store
from thermocline.tiers.memory import MemoryTier

MODEL = "meta-llama/Meta-Llama-3.1-8B"
H100 = Asked(model=MODEL, gpu="h100")
TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
published = pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not beside this checkout")


# -- the machine -------------------------------------------------------------------------------------------------------


def test_a_machine_follows_from_its_names():
    """Bytes, KV memory, prices and links are those of the tables, and each is said with its source."""
    found = machine_of(Asked(model=MODEL, gpu="h100", tp=2, instances=3), 4000)
    assert found.token_bytes == 131_072
    assert found.instances == 3
    assert found.usd_per_hour == pytest.approx(2 * 2.95)
    assert [each.tier for each in found.offers] == ["host", "disk"]
    one = machine_of(H100, 4000)
    assert found.offers[0].link.bytes_per_second == 2 * one.offers[0].link.bytes_per_second
    assert found.offers[1].link == one.offers[1].link
    for word in ("KV memory", "prefills", "price", "host", "disk"):
        assert any(note.startswith(word) for note in found.assumptions)


@pytest.mark.parametrize(
    ("text", "speed", "size", "price", "evidence"),
    [
        ("host", 64e9, None, 0.0, "config_read"),
        ("host=512GiB", 64e9, 512 << 30, 0.0, "config_read"),
        ("disk=4TB@14GB/s:0.0001", 14e9, 4 * 10**12, 0.0001, "given"),
        ("disk@nvme-gen5", 14e9, None, 0.0, "unverified"),
        ("redis=64GiB@100gbe", 12.5e9, 64 << 30, 0.0, "unverified"),
        ("redis:2e-3", 1e9, None, 0.002, "measured"),
    ],
)
def test_tiers_are_named_in_words(text, speed, size, price, evidence):
    """A tier has a size, a bandwidth or a known link, and a price, where they are given; else its usual link."""
    (found,) = machine_of(Asked(model=MODEL, gpu="h100", tiers=(text,)), 4000).offers
    assert found.link.bytes_per_second == pytest.approx(speed)
    assert (found.capacity_bytes, found.usd_per_gb_hour, found.link.evidence) == (size, price, evidence)
    assert found.shared == text.startswith("redis")


@pytest.mark.parametrize(
    ("changes", "error", "hint"),
    [
        ({"model": None}, SettingsError, "--gpu"),
        ({"gpu": None}, SettingsError, "--gpu"),
        ({"model": "meta-llama/Meta-Llama-3.1-9B"}, ModelError, "Meta-Llama-3.1-8B"),
        ({"gpu": "h1000"}, SettingsError, "H100"),
        ({"model": "Qwen/Qwen3.5-27B"}, SettingsError, "engine"),
        ({"model": "meta-llama/Meta-Llama-3.1-70B"}, SettingsError, "--tp"),
        ({"tiers": ("tape",)}, SettingsError, "host, disk, redis"),
        ({"tiers": ("disk@quick",)}, SettingsError, "host, disk, redis"),
        ({"tiers": ("disk=4TB:cheap",)}, SettingsError, "host, disk, redis"),
        ({"tiers": ("disk:1.2.3",)}, SettingsError, "host, disk, redis"),
        ({"tiers": ("disk", "disk=4TB")}, SettingsError, "once"),
    ],
)
def test_what_cannot_be_is_refused_with_a_hint(changes, error, hint):
    """A model, GPU or tier that is not known, has no room or cannot be stored is refused, with what would do."""
    fields = {"model": MODEL, "gpu": "h100"} | changes
    with pytest.raises(error) as refused:
        machine_of(Asked(**fields), 4000)
    assert hint in refused.value.hint


def test_a_profile_stands_in_for_the_gpu(tmp_path):
    """With measured prefills and KV memory no GPU need be named; host memory is left out where no speed is known."""
    conditions = Conditions(
        date="2026-11-22", url="u", model="m", engine="e", machine="m", block_tokens=16, kv_blocks=1000
    )
    rows = (row(1000, 1.0), row(2000, 2.0))
    measured.write(tmp_path / "p.json", Measured(version=measured.VERSION, conditions=conditions, rows=rows))
    found = machine_of(Asked(model=MODEL, profile=tmp_path / "p.json"), 4000)
    assert found.device_tokens == 16_000
    assert found.prefill(1500, 0) == pytest.approx(1.5, rel=0.1)
    assert [each.tier for each in found.offers] == ["disk"]
    assert any("host@SPEED" in note for note in found.assumptions)
    with pytest.raises(SettingsError):
        machine_of(Asked(model=MODEL, profile=tmp_path / "p.json", tiers=("host",)), 4000)


def row(tokens, seconds):
    return Row(
        prompt_tokens=tokens,
        shared_tokens=0,
        cached_tokens=0,
        source="device",
        concurrency=1,
        requests=3,
        first_token_seconds=seconds,
        low_seconds=seconds,
        high_seconds=seconds,
    )


# -- the workload ------------------------------------------------------------------------------------------------------


def mooncake(path, requests):
    """(milliseconds, blocks of 512 tokens) of each request, as a trace of Mooncake's format."""
    lines = (
        {"timestamp": at, "input_length": 512 * len(ids), "output_length": 10, "hash_ids": ids} for at, ids in requests
    )
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_trace_is_read(tmp_path):
    """Of ten requests that share one block of two, nine find it: 45 % of all tokens, which the engine holds itself."""
    path = mooncake(tmp_path / "shared.jsonl", [(1000 * at, [0, 1 + at]) for at in range(10)])
    found = advise.of_trace(H100, path)
    told = {number.name: number.value for number in found.inputs}
    assert found.verdict == "engine"
    assert told["reused from other sessions"] + told["reused in the same session"] == pytest.approx(45.0)


def test_the_order_of_a_batch_may_change(tmp_path):
    """Two documents in turns, in memory for one: a batch is sorted, which anything else may not be."""
    path = mooncake(tmp_path / "turns.jsonl", [(0, [at % 2 * 10 + block for block in range(4)]) for at in range(20)])
    asked = Asked(model=MODEL, gpu="h100", kv_tokens=4 * 512, tiers=("redis",))
    assert advise.of_trace(asked, path).verdict != "sort"
    assert advise.of_trace(asked, path, "batch").verdict == "sort"


def test_lengths_alone_are_no_workload(tmp_path):
    """A trace that tells nothing of shared prefixes is refused: reuse is not guessed."""
    path = tmp_path / "lengths.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    with pytest.raises(TraceError) as refused:
        advise.of_trace(H100, path)
    assert "--describe" in refused.value.hint


@published
def test_the_oracle_of_a_public_trace_is_the_published_one():
    """On Mooncake's synthetic trace, 4,392 blocks hit 26.7 % of the tokens by recency and 51.6 % by an oracle."""
    trace = read(TRACES / "mooncake_synthetic.jsonl.xz")
    study = Study(trace, machine_of(H100, 4000))
    assert 100 * study.held(4392).sum() / trace.input_tokens.sum() == pytest.approx(26.7, abs=0.1)
    assert 100 * oracle_hit(study, 4392) == pytest.approx(51.6, abs=0.1)


@pytest.mark.parametrize("name", workload.use_cases())
def test_a_use_case_is_confirmed_or_refuted(name):
    """What is usual for a use case stands beside what the numbers say of its own workload, whichever that is."""
    found = advise.beside(None, name, H100)
    both = bool(found.usual_tiers) == bool(found.advice.tiers)
    assert found.confirmed == (both and set(found.advice.tiers) <= set(found.usual_tiers))
    assert found.habit
    assert found.habit in " ".join(advise.render(found).split())


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "never_full"), [("healthy", True), ("evicted", False), ("no_prefix_cache", False), ("tiers", True)]
)
def test_vllm_tells_by_its_metrics(name, never_full):
    """Of a recorded vLLM: prompts, hits, and whether all that it ever computed fits its memory.

    One whose prefix cache is off hits nothing whatever comes, so its counters are no sign that nothing repeats.
    """
    (server, *_) = recorded(name)
    found = advise.observed_of(server)
    assert found.requests > 0
    assert 0 <= found.engine_tokens < found.prompt_tokens
    assert found.never_full == never_full
    assert (found.ideal is not None) == never_full


def test_a_gateway_counts_what_its_instances_hit():
    """Asked like a server, a gateway tells the hits of all its instances, and the flag that has its last requests."""
    text = (
        "thermocline_prompt_tokens_total 1000\nthermocline_routed_cached_tokens_total 740\n"
        'thermocline_requests_total{route="/v1/completions",status="200"} 4\n'
    )
    watched = observe.Watched(kind=observe.Kind.SERVER, name="a", scrapes=(observe.parse(text),))
    found = advise.observed_of(watched)
    assert (found.hit_tokens, found.prompt_tokens, found.requests) == (740, 1000, 4)
    source = observe.Source(observe.Kind.SERVER, "a", lambda: text, trace=lambda: b"")
    told = advise.of_server(H100, source, ManualClock(0.0))
    assert any("--gateway" in note for note in told.notes)


def test_receipts_do_not_bound_what_is_of_use():
    """What was computed since the start is told by counters: the last receipts may have loaded all that they used."""
    receipt = Receipt(
        request="a", prompt_tokens=1000, tokens_per_block=16, loaded_tokens=992, computed_tokens=8,
        by_tier={"memory": 992}, missing=(Missing(62, 63, Reason.TAIL),), match_seconds=0.0, load_seconds=0.1,
        prefill_seconds=0.1, planned_load_seconds=0.1, planned_recompute_seconds=0.5, planned_cold_seconds=0.6,
    )  # fmt: skip
    series = (
        "thermocline_prompt_tokens_total 90000",
        "thermocline_generated_tokens_total 10000",
        'thermocline_cached_tokens_total{tier="memory"} 60000',
    )
    for lines, fresh in ((series, 100_000), ((), None)):
        scrapes = (observe.parse("\n".join(lines)),)
        watched = observe.Watched(kind=observe.Kind.SERVER, name="a", scrapes=scrapes, receipts=(receipt,))
        found = advise.observed_of(watched)
        assert found.tier_tokens == {"memory": 992}
        assert found.fresh_tokens == fresh


def test_a_running_vllm_is_asked():
    """The metrics that a server answers with are its workload. One that is silent is refused, with a hint."""
    pages = {"/metrics": (FOLDER / "healthy" / "3.txt").read_bytes()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        asked = partial(advise.of_server, H100, observe.of_url(url), SystemClock())
        assert asked().leaves[0].answer == "yes"
        pages["/metrics"] = b"vllm:num_requests_running 0"
        with pytest.raises(SettingsError):
            asked()
        pages.clear()
        with pytest.raises(UnreachableError):
            asked()
        server.shutdown()


def test_an_instance_of_ours_is_asked(folder):
    """Ten prompts of which nine are known: the counters of a running instance say so. It does not say what it lost."""
    with Light(folder, "a", "tcp://127.0.0.1:9", 1000) as light:
        for number in range(10):
            link = http.client.HTTPConnection("127.0.0.1", light.port, timeout=10)
            prompt = [*range(640), 1000 + number]
            link.request("POST", "/v1/completions", json.dumps({"model": "light", "prompt": prompt, "max_tokens": 1}))
            assert link.getresponse().read()
            link.close()
        found = advise.of_server(H100, observe.of_url(light.url), SystemClock())
    hit = next(number for number in found.leaves[0].numbers if number.name == "hit rate now")
    assert hit.value == pytest.approx(100 * 9 * 640 / (10 * 641))
    assert found.verdict == "unknown"


def test_reasons_are_known_once_or_never():
    """Each reason of a missing block is counted as known once, or is one of those that say it was not."""
    assert set(Reason) - LOST == {
        Reason.NEVER_SEEN,
        Reason.UNKNOWN,
        Reason.DIVERGED,
        Reason.OTHER_LAYOUT,
        Reason.TAIL,
    }


# -- the store ---------------------------------------------------------------------------------------------------------


def replayed(trace, blocks):
    """Leading blocks that each request of a trace finds in a real store with memory for so many."""
    clock, size = ManualClock(), trace.tokens_per_block
    memory = MemoryTier(blocks * BLOCK_BYTES, clock=clock)
    memory.wait_ready()
    layout, store, found = make_layout(tokens_per_block=size), Store(memory, (), clock=clock), []
    names = [BlockKey(hashlib.sha256(str(block).encode()).digest()) for block in range(trace.distinct_blocks)]
    content = np.zeros(BLOCK_BYTES, np.uint8)
    for request in range(len(trace)):
        clock.sleep(1.0)
        keys = [names[block] for block in trace.path(request).tolist()]
        plan = store.match([layout], keys, prompt_tokens=len(keys) * size + 1)
        store.release(plan.lease)
        found.append(plan.blocks)
        store.save(layout, keys, [[content]] * (len(keys) - plan.blocks), start=plan.blocks).wait(10)
    store.close(5.0)
    return found


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_real_store_has_the_hits_that_were_promised(share):
    """Replayed through the store, requests find what was promised: at the advised size all of it, below within 1 %."""
    told = workload.Description(
        sessions=40,
        sessions_per_hour=3600,
        turns=4,
        think_seconds=20,
        think_seconds_p90=90,
        system_tokens=64,
        prompt_tokens=48,
        growth_tokens=80,
        tokens_per_block=16,
    )
    trace = workload.synthesise(told).trace
    slow = replace(machine_of(H100, 300), device_tokens=0, prefill=lambda tokens, _: 1e-3 * tokens)
    study = Study(trace, slow)
    ((_, advised),) = study.best(slow.offers[:1])
    blocks = int(share * advised)
    promised = study.held(blocks) // trace.tokens_per_block
    found = replayed(trace, blocks)
    assert sum(found) == pytest.approx(promised.sum(), rel=0 if share == 1.0 else 0.01)
    assert all(hits <= most for hits, most in zip(found, promised.tolist(), strict=True))


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_configuration_is_written(run, tmp_path):
    """`--config-out` writes a file that every verb takes with `--config`, and `config` shows where values came from."""
    described, path = tmp_path / "w.toml", tmp_path / "thermocline.toml"
    described.write_text(
        "sessions = 200\nsessions_per_hour = 3600\nturns = 6\nthink_seconds = 600\ngrowth_tokens = 4000\n"
    )
    words = ("advise", MODEL, "--gpu", "h100", "--describe", str(described), "--config-out", str(path))
    code, out, _ = run(*words)
    assert code == 0
    assert out.rstrip().endswith("so: Keep KV in host.")
    assert Settings.load(path, environ={}).memory_bytes > 1 << 30
    code, out, _ = run("config", "--config", str(path), "--json")
    assert code == 0
    assert str(path) in out


def test_json_has_all_of_it(run):
    """`--json` has the leaves with their numbers, the lines with their reasons, and what is usual."""
    code, out, _ = run("advise", MODEL, "--gpu", "h100", "--use-case", "structured", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["confirmed"] is True
    assert found["advice"]["verdict"] == "engine"
    assert {"question", "answer", "why", "numbers", "test"} <= set(found["advice"]["leaves"][0])


@pytest.mark.parametrize("words", [(), ("--trace", "a", "--url", "b"), ("--use-case", "talk")])
def test_one_workload_is_named(run, words):
    """No workload, two of them, or a use case that there is not: a mistake, with a hint."""
    code, _, err = run("advise", MODEL, "--gpu", "h100", *words)
    assert code == 2
    assert "hint:" in err


@pytest.mark.parametrize("text", ["host=0", "disk@0", "redis@0GB/s", "host=99999999999999999TB"])
def test_tiers_that_cannot_be(text):
    """A tier of no size or speed, or of an endless one, is an error with a hint."""
    with pytest.raises(SettingsError) as refused:
        machine_of(replace(H100, tiers=(text,)), 100)
    assert refused.value.hint


def test_free_time_buys_no_tier():
    """Where an hour costs nothing, no tier that costs something can pay: the question is refused."""
    with pytest.raises(SettingsError, match="costs none"):
        machine_of(replace(H100, tiers=("host:0.1",), usd_per_hour=0.0), 100)


def test_no_configuration_from_what_is_unknown(run, tmp_path):
    """Where counters do not tell whether tiers pay, there is no file to write; the text says what would tell."""
    found = advise.judge(advise.observed_of(recorded("evicted")[0]), machine_of(H100, 100))
    assert found.lines == ()
    with pytest.raises(SettingsError):
        advise.write(tmp_path / "none.toml", found)
    assert "--trace" in advise.render(advise.Answer(found))


def leave_receipts(client, prompts, clock):
    """Have a node keep the receipts of these prompts, a second apart."""
    for number, tokens in enumerate(prompts):
        receipt = Receipt(
            request=str(number), prompt_tokens=len(tokens), tokens_per_block=16, loaded_tokens=0,
            computed_tokens=len(tokens), by_tier={}, missing=(), match_seconds=0.0, load_seconds=0.0,
            prefill_seconds=0.1, planned_load_seconds=0.0, planned_recompute_seconds=0.0, planned_cold_seconds=0.1,
        )  # fmt: skip
        client.record(receipt, np.asarray(tokens, np.uint32), root_key())
        clock.sleep(1.0)


def test_nothing_answers(run, folder):
    """What does not answer is said with the next step: for a node it is to look for its socket."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    for flag, where, step in (("--node", str(folder / "a.sock"), "thermocline ps"), ("--url", nowhere, "is it up")):
        code, _, err = run("advise", MODEL, "--gpu", "h100", flag, where)
        assert code == 1
        assert where in err
        assert step in err.partition("hint:")[2]


def test_a_node_without_requests(run, folder):
    """A node that knows of no request says whose it would know, and where else those of our engines are."""
    with Host(folder, clock=ManualClock(0.0)) as host:
        for more in ((), ("--trace-out", str(folder / "kept.jsonl"))):
            code, _, err = run("advise", MODEL, "--gpu", "h100", "--node", str(host.socket), *more)
            assert code == 2
            assert "--gateway" in err.partition("hint:")[2]


def test_a_node_is_asked_for_its_requests(run, folder):
    """A node's last requests are a trace: it is answered as that one is, with sizes, and can be kept for `size`."""
    clock = ManualClock(0.0)
    rng = np.random.default_rng(1)
    sessions = [rng.integers(0, 30_000, 6000) for _ in range(40)]
    with Host(folder, clock=clock) as host:
        client = host.client()
        leave_receipts(client, [tokens[: 2000 * turn] for turn in (1, 2, 3) for tokens in sessions], clock)
        until(lambda: host.store.receipts.recent.lines().count(b"\n") == 120, "all receipts")
        kept, path = folder / "kept.jsonl", folder / "thermocline.toml"
        words = ("advise", MODEL, "--gpu", "h100", "--kv-tokens", "16000")
        told = (*words, "--node", str(host.socket), "--trace-out", str(kept), "--config-out", str(path), "--json")
        code, out, err = run(*told)
        assert code == 0, err
        code, again, _ = run(*words, "--trace", str(kept), "--json")
    found, again = json.loads(out)["advice"], json.loads(again)["advice"]
    assert found["verdict"] == "tiers"
    assert found["leaves"] == again["leaves"]
    assert found["lines"] == again["lines"]
    assert Settings.load(path, environ={}).memory_bytes == int(str(found["lines"][0]["value"])[:-3]) << 20
    assert any("120 requests" in note for note in found["notes"])
    code, out, err = run("size", MODEL, "--gpu", "h100", "--trace", str(kept), "--json")
    assert code in {0, NO_CACHE}, err
    assert json.loads(out)[0]["workload"]["requests"] == 120


def test_what_is_told_of_requests_is_checked(folder):
    """A trace that cannot be read is refused and not kept. A node that has none is advised for by its counters."""
    kept = folder / "kept.jsonl"
    page = 'thermocline_prompt_tokens_total 1000\nthermocline_requests_total{route="/v1/completions"} 10'

    def no_node() -> bytes:
        raise NodeError("the node could not answer", hint="its log says why")

    def source(told) -> observe.Source:
        return observe.Source(observe.Kind.NODE, "a", lambda: page, None, told)

    for text in (b"[" * 100_000, b"\0" * 1000, b'{"hash_ids": 1}\n', bytes(range(256))):
        with pytest.raises(TraceError):
            advise.of_server(H100, source(lambda text=text: text), SystemClock(), keep=kept)
        assert not kept.exists()
    found = advise.of_server(replace(H100, instances=3), source(no_node), SystemClock())
    assert "the node could not answer" in found.notes[0]
    assert "all 3 instances" in found.notes[1]


@pytest.mark.parametrize("url", ["http://me:s3cret@127.0.0.1:9", "http://s3cret@[::1", "https://:s3cret@a/v1"])
@pytest.mark.parametrize("verb", [("doctor",), ("advise", MODEL, "--gpu", "h100"), ("profile",), ("why",)])
def test_a_url_with_a_password_is_not_shown(run, verb, url):
    """It is refused where it is given, by words that do not repeat it."""
    code, out, err = run(*verb, "--url", url)
    assert code == 2
    assert "--api-key-file" in err
    assert "s3cret" not in out + err


def test_a_gateway_is_asked_for_all_requests(run, folder):
    """A gateway has seen the work of all instances: each request once, and how long its answer was."""
    kept = folder / "kept.jsonl"
    with contextlib.ExitStack() as started:
        lights = [started.enter_context(Light(folder, name, "tcp://127.0.0.1:9", 1000)) for name in "ab"]
        route = started.enter_context(Route(folder, lights))
        words = ("advise", MODEL, "--gpu", "h100", "--gateway", str(folder / "route.sock"))
        code, _, err = run(*words)
        assert code == 2
        assert "--tokenizer-path" in err
        for number in range(10):
            prompt = [*range(640), 1000 + number]
            body = json.dumps({"model": "light", "prompt": prompt, "max_tokens": 3})
            link = http.client.HTTPConnection("127.0.0.1", route.port, timeout=10)
            link.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            assert link.getresponse().read()
            link.close()
        until(lambda: decision.trace(folder / "route.sock").count(b"\n") == 10, "the last answer's end")
        code, out, err = run(*words, "--trace-out", str(kept), "--json")
        assert code == 0, err
    told = {each["name"]: each["value"] for each in json.loads(out)["advice"]["inputs"]}
    assert (told["requests"], told["instances"]) == (10, 2)
    assert told["distinct prefixes"] == pytest.approx(20 * 64)
    assert read(kept).output_tokens.tolist() == [3] * 10


def test_a_server_without_requests_has_no_trace(run, folder):
    """A node that nobody asked yet has nothing to advise from, and nothing to keep: both are errors with a hint."""
    with Host(folder) as host:
        host.client()
        words = ("advise", MODEL, "--gpu", "h100", "--node", str(host.socket))
        for more in ((), ("--trace-out", str(folder / "kept.jsonl"))):
            code, _, err = run(*words, *more)
            assert code == 2
            assert "hint:" in err
    code, _, err = run("advise", MODEL, "--gpu", "h100", "--use-case", "chat", "--trace-out", "kept")
    assert code == 2
    assert "--gateway with --trace-out" in err
    code, _, err = run("advise", MODEL, "--gpu", "h100", "--gateway", str(folder / "nobody.sock"))
    assert code == 1
    assert "no gateway answers" in err
    assert "thermocline ps" in err
