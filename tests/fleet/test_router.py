import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fleet.simulated import Batched, MultiTurn, Noisy, Request, World, mooncake, seeded
from thermocline.demo import locality
from thermocline.errors import SettingsError
from thermocline.fleet.books import Fleet
from thermocline.fleet.instance import Ask, Instance, Overlaps, Tier, Why
from thermocline.fleet.router import POLICIES, choose, route

SLOW, FAST = (0.05, 1e-3, 1e-7), (0.005, 1e-4, 1e-9)
BEST = "predicted_ttft"


def fleet_of(count: int, *, peers: bool = False, offset: int = 0, nodes: bool = True) -> Fleet:
    fleet = Fleet(peers=peers, offset=offset)
    for at in range(count):
        fleet.join(Instance(f"i{at}", f"http://i{at}", node=f"n{at}" if nodes else ""))
    return fleet


def where(choices) -> int:
    return choices[0].instance


# -- whole workloads


@pytest.mark.parametrize("costs", [SLOW, FAST], ids=["slow", "fast"])
@pytest.mark.parametrize("seed", range(4))
def test_conversations_stay_without_a_session(seed, costs):
    """Multi-turn conversations reach 99 % of the ideal hit rate without a session id, and no instance over 60 %."""
    world = World(2, 192, 128, BEST, costs)
    turns = MultiTurn(world, seed)
    world.run()
    assert len(world.served) == 96
    # the second copy of the shared system prompt, which each instance computes once, is all that is lost
    assert turns.of_ideal >= 0.99
    assert max(world.shares) <= 0.6


@pytest.mark.parametrize("seed", range(4))
def test_conversations_stay_on_instances_that_batch(seed):
    """The same where instances compute several prompts in one step, and lumps of requests come and go together."""
    for costs in (SLOW, FAST):
        world = Batched(2, 192, 128, BEST, costs)
        turns = MultiTurn(world, seed)
        world.run()
        assert len(world.served) == 96
        assert turns.of_ideal >= 0.99
        assert max(world.shares) <= 0.6


@pytest.mark.parametrize("concurrency", [1, 2, 16])
def test_a_shared_system_prompt_does_not_collapse(concurrency):
    """One system prompt under all conversations pulls no instance above 60 %, also when nothing ever queues."""
    for costs in (SLOW, FAST):
        world = World(2, 192, 128, BEST, costs)
        turns = MultiTurn(world, 7, concurrency=concurrency)
        world.run()
        assert max(world.shares) <= 0.6, costs
        assert turns.of_ideal >= 0.95


@pytest.mark.parametrize("gap", [0.02, 0.1, 0.5])
def test_one_hot_prefix_is_shared_out(gap):
    """The 87/0 trap: a prefix that every request begins with ends up on all instances, also where nobody waits."""
    world = World(2, 10_000, 16, BEST, FAST)
    hot = [*range(64)]
    world.run(
        Request(at * gap, 1_024 + 256, [*hot, *range(1_000 * (at + 1), 1_000 * (at + 1) + 16)]) for at in range(300)
    )
    assert max(world.shares) <= 0.6
    assert world.hit_rate > 0.75


def test_prefixes_stay_in_caches_that_hold_an_eighth_each(monkeypatch):
    """Of 1,600 prefixes over eight caches of 200, nearly all that can be found is found, and load is even."""
    monkeypatch.setattr(locality, "REQUESTS", 8_000)
    told = locality.simulate(BEST)
    assert told.hit_rate >= 0.98 * (1 - locality.PREFIXES / 8_000)
    assert told.load_max_over_mean <= 1.1


class Closed(World):
    """`running` requests at a time for as long as there are any."""

    def flood(self, requests, running):
        waiting = list(requests)
        self.after = lambda _: waiting and self.at(self.now, self.arrive, waiting.pop())
        for _ in range(running):
            self.at(0.0, self.arrive, waiting.pop())
        return self.run()


def test_a_long_hot_prefix_is_copied_before_long():
    """A prefix sixty times as long as what follows it is copied once enough was waited for it: no death spiral."""
    world = Closed(2, 10_000, 16, BEST, FAST)
    hot = [*range(375)]
    prompts = [[*hot, *range(1_000 * (at + 1), 1_000 * (at + 1) + 6)] for at in range(400)]
    world.flood([Request(0.0, 16 * len(blocks), blocks, None, 0.01) for blocks in prompts], 8)
    assert max(world.shares) <= 0.6
    assert world.hit_rate >= 0.97


def test_the_first_block_trap():
    """Every prompt begins with the same block, and the work is spread none the less: the best match is not a magnet."""
    random = seeded(3)
    world = World(8, 2_500, 512, BEST)
    at = 0.0
    requests = []
    for number in range(1_500):
        at += random.expovariate(5.0)
        blocks = [0, *range(1_000 * (number + 1), 1_000 * (number + 1) + random.randint(4, 20))]
        requests.append(Request(at, len(blocks) * 512, blocks))
    world.run(requests)
    assert world.imbalance() <= 1.2


def unrelated(seed: int, rate: float, count: int = 1_500) -> list[Request]:
    random = seeded(seed)
    times = itertools.accumulate(random.expovariate(rate) for _ in range(count))
    sizes = (random.randint(1, 24) for _ in range(count))
    rows = zip(times, sizes, strict=True)
    return [Request(at, size * 512, range(100 * n, 100 * n + size)) for n, (at, size) in enumerate(rows)]


@pytest.mark.parametrize("rate", [4.0, 9.0])
def test_nothing_is_lost_where_nothing_is_reused(rate):
    """Where no prompt shares anything, the mean first token is within 3 % of least_loaded's."""
    requests = unrelated(5, rate)
    ours, least = (World(8, 2_500, 512, policy).run(requests).mean_seconds for policy in (BEST, "least_loaded"))
    assert ours <= 1.03 * least


class Believing(World):
    """Knows only where it sent each prefix last, and never hears that it was evicted."""

    def __post_init__(self):
        super().__post_init__()
        self.sent: dict[int, int] = {}

    def choose(self, request: Request):
        held = [0] * self.slots
        if request.blocks[0] in self.sent:
            held[self.sent[request.blocks[0]]] = request.tokens - 1
        booking = choose(Ask(request.tokens, Overlaps(held)), self.fleet, self.policy, self.now)
        self.sent[request.blocks[0]] = booking.choice.instance
        return booking


def test_affinity_that_cannot_pay_gives_way_to_load():
    """A working set far beyond the caches, known from old routing only: balance decides, and the books say so."""
    random = seeded(11)
    prefixes = [(size := random.randint(1, 24), range(100 * n, 100 * n + size)) for n in range(400)]
    requests = []
    at = 0.0
    for _ in range(1_500):
        at += random.expovariate(6.0)
        size, blocks = random.choice(prefixes)
        requests.append(Request(at, size * 512, blocks))
    ours = Believing(8, 12, 512, BEST).run(requests)
    least = Believing(8, 12, 512, "least_loaded").run(requests)
    assert ours.hit_rate < 0.05
    assert not ours.fleet.regime().affinity
    assert ours.mean_seconds <= 1.05 * least.mean_seconds
    assert any(Why.LOAD_REGIME in each.reasons for each in ours.served)


def test_noise_is_no_reason_to_prefer():
    """Of two equal servers with noisy steps, conversations do not gather at the one that happened to be quicker."""
    busier, ideal = [], []
    for seed in range(40):
        world = Noisy(slots=2, cache_blocks=192, block_tokens=128, policy=BEST, costs=(0.02, 3.5e-4, 2e-9))
        world.random = seeded(seed)
        conversations = MultiTurn(world, seed)
        world.run()
        busier.append(max(world.shares))
        ideal.append(conversations.of_ideal)
    assert sum(share > 0.6 for share in busier) <= 2
    assert sum(ideal) / len(ideal) >= 0.97


@pytest.mark.slow
def test_mooncake_conversations():
    """On the public conversation trace the mean first token beats least_loaded and the session hash."""
    requests = mooncake("conversation", 4_000)
    mean = {}
    for policy in (BEST, "least_loaded", "session_hash"):
        world = World(8, 2_500, 512, policy).run(requests)
        mean[policy] = world.mean_seconds
        if policy == BEST:
            assert world.hit_rate >= 0.22
            errors = sorted(abs(each.predicted_seconds - each.seconds) / each.seconds for each in world.served)
            assert errors[len(errors) // 2] <= 0.05
    assert mean[BEST] <= 0.85 * mean["least_loaded"]
    assert mean[BEST] <= 0.5 * mean["session_hash"]


def test_a_slower_instance_gets_less():
    """An instance that turns out three times as slow is sent less, without being told to."""
    world = World(4, 2_500, 512, BEST, slowness=(3.0, 1.0, 1.0, 1.0)).run(unrelated(2, 3.0, 1_200))
    assert world.share(0) < 0.6 * min(world.shares[1:])


# -- single decisions


def test_bursts_do_not_herd():
    """A booking counts at once: of sixteen equal requests in one instant each of eight instances gets two."""
    fleet = fleet_of(8)
    bookings = [choose(Ask(1_000), fleet, BEST, 1.0) for _ in range(16)]
    assert sorted(booking.choice.instance for booking in bookings) == sorted([*range(8)] * 2)


def test_a_burst_for_one_prefix_spills():
    """A burst for a prefix that one instance has stays there only as long as waiting is quicker than computing."""
    fleet = fleet_of(4)
    held = Overlaps([4_000, 0, 0, 0], name=1)
    slots = [choose(Ask(4_100, held), fleet, BEST, 1.0).choice.instance for _ in range(60)]
    assert slots[0] == 0
    assert 0.2 < slots.count(0) / 60 < 0.95
    assert {*slots} == {0, 1, 2, 3}


def test_a_spill_names_the_better_copy():
    """Who is sent elsewhere is told where the copy lies, in the form of kv_transfer_params."""
    fleet = fleet_of(2)
    held = Overlaps([0, 0], [2_048, 0], [2_048, 0])
    for _ in range(40):
        choose(Ask(2_000, Overlaps([1_999, 0])), fleet, BEST, 0.0)
    fleet.base[0] += 100.0
    first = route(Ask(4_096, held), fleet, BEST, 0.0)[0]
    assert first.instance == 1
    assert first.hint.kv_transfer_params() == {
        "thermocline": {"instance": "i0", "node": "n0", "tier": "host", "tokens": 2_048}
    }


def test_a_spill_from_a_device_says_so():
    """The reason of a spill is SPILLED, and the seconds show what it was about."""
    fleet = fleet_of(2)
    fleet.base[0] += 10.0
    first, second = route(Ask(4_096, Overlaps([4_000, 0])), fleet, BEST, 0.0)
    assert first.instance == 1
    assert Why.SPILLED in first.reasons
    assert first.recompute_seconds > second.recompute_seconds
    assert second.interference_seconds == 10.0
    assert first.hint.tier == Tier.DEVICE


@pytest.mark.parametrize(
    ("overlaps", "reason", "tier"),
    [
        (Overlaps(), Why.NOTHING_HELD, Tier.NONE),
        (Overlaps([0, 512]), Why.LONGEST_MATCH, Tier.DEVICE),
        (Overlaps([512, 512]), Why.SHARED_EQUALLY, Tier.DEVICE),
        (Overlaps([0, 0], [0, 960], [0, 960]), Why.LOADED, Tier.HOST),
        (Overlaps([0, 256], [0, 512], [0, 960]), Why.LOADED, Tier.DISK),
    ],
)
def test_every_choice_has_its_reason(overlaps, reason, tier):
    """A choice says why it was made, and from where the known tokens come."""
    first = route(Ask(1_000, overlaps), fleet_of(2), BEST, 0.0)[0]
    assert reason in first.reasons
    assert first.tier == tier


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_no_more_is_held_than_the_prompt_has(tier):
    """Lengths that are guessed from bytes may exceed the prompt: the longest one still wins, and nothing is below 0."""
    held = [800, 3_584]
    overlaps = {
        "device": Overlaps(held),
        "host": Overlaps([400, 400], held),
        "disk": Overlaps([400, 400], [400, 400], held),
    }[tier]
    choices = route(Ask(1_000, overlaps), fleet_of(2), BEST, 0.0)
    assert where(choices) == 1
    assert choices[0].cached_tokens == 999
    assert all(choice.seconds > 0 and choice.score_seconds > 0 for choice in choices)


def test_a_load_that_does_not_pay_is_not_counted_on():
    """Where a tier is slower than computing, the prediction is that of computing."""
    fleet = fleet_of(1)
    fleet.per_loaded[1][0] = 1.0
    first = route(Ask(1_000, Overlaps([0], [0], [960])), fleet, BEST, 0.0)[0]
    assert first.cached_tokens == 0
    assert first.transfer_seconds == 0.0


def test_another_nodes_copy_is_priced_only_where_nodes_fetch():
    """With peers, the idle instance fetches what another node has; without, it computes, and is told of the copy."""
    overlaps = Overlaps([0, 0], [8_000, 0], [8_000, 0])
    for peers in (False, True):
        fleet = fleet_of(2, peers=peers)
        fleet.base[0] += 10.0
        first = route(Ask(8_192, overlaps), fleet, BEST, 0.0)[0]
        assert first.instance == 1
        assert (Why.FETCHED in first.reasons) is peers
        assert first.cached_tokens == (8_000 if peers else 0)
        assert first.hint.node == "n0"


def test_the_session_is_evidence():
    """Before any event, a session's next request goes where the last one went; after a while only events count."""
    fleet = fleet_of(4)
    first = choose(Ask(2_000, session="a"), fleet, BEST, 0.0)
    fleet.first_token(first, 0.1)
    fleet.finished(first, 0.2)
    again = route(Ask(2_400, session="a"), fleet, BEST, 1.0)[0]
    assert again.instance == first.choice.instance
    assert Why.SESSION in again.reasons
    assert route(Ask(2_400, session="a"), fleet, BEST, 60.0)[0].cached_tokens == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_goes_where_it_may_not(policy):
    """What is excluded or not available is in no ranking, and without any instance the ranking is empty."""
    fleet = fleet_of(3)
    fleet.allow(0, available=False)
    choices = route(Ask(100, Overlaps([99, 0, 0]), "s", exclude=frozenset({1})), fleet, policy, 0.0)
    assert [choice.instance for choice in choices] == [2]
    fleet.leave(2, 0.0)
    assert route(Ask(100, exclude=frozenset({1})), fleet, policy, 0.0) == []
    assert choose(Ask(100), Fleet(), policy, 0.0) is None


def test_round_robin_takes_turns():
    """Each instance has its turn, in order, and one that comes back joins in."""
    fleet = fleet_of(3)
    assert [choose(Ask(10), fleet, "round_robin", 0.0).choice.instance for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_least_loaded_looks_at_seconds():
    """A long prompt weighs more than two short ones."""
    fleet = fleet_of(2)
    long = choose(Ask(8_000), fleet, "least_loaded", 0.0).choice.instance
    others = [choose(Ask(1_000), fleet, "least_loaded", 0.0).choice.instance for _ in range(2)]
    assert others == [1 - long] * 2


def test_a_hash_moves_only_what_it_must():
    """When an instance goes, only its sessions move; they come back with it."""
    fleet = fleet_of(5)
    asks = [Ask(100, session=f"s{at}") for at in range(200)]
    before = [where(route(ask, fleet, "session_hash", 0.0)) for ask in asks]
    fleet.allow(3, available=False)
    after = [where(route(ask, fleet, "session_hash", 0.0)) for ask in asks]
    assert all(a == b for a, b in zip(before, after, strict=True) if b != 3 and a != 3)
    assert 3 not in after
    fleet.allow(3, available=True)
    assert [where(route(ask, fleet, "session_hash", 0.0)) for ask in asks] == before
    assert max(before.count(slot) for slot in range(5)) < 80


def test_an_unknown_policy_is_a_mistake():
    """A misspelt policy is refused, and the hint names those there are."""
    with pytest.raises(SettingsError) as caught:
        route(Ask(1), fleet_of(1), "fastest", 0.0)
    assert "predicted_ttft" in caught.value.hint


def test_two_gateways_do_not_herd():
    """Gateways that know nothing of each other and start together keep max over mean within 1.3."""
    requests = [0] * 8
    for offset in (0, 1, 2, 3):
        fleet = fleet_of(8, offset=offset)
        for _ in range(26):
            requests[choose(Ask(1_000), fleet, BEST, 0.0).choice.instance] += 1
    assert max(requests) / (sum(requests) / 8) <= 1.3


def test_an_instance_that_hangs_looks_worse_and_worse():
    """What is late by x is taken to need x more, so requests go elsewhere before anybody calls it down."""
    fleet = fleet_of(2)
    stuck = choose(Ask(1_000), fleet, BEST, 0.0).choice.instance
    waits = [fleet.queue_seconds(stuck, now) for now in (1.0, 5.0, 30.0)]
    assert waits == sorted(waits)
    assert waits[-1] > 25.0
    held = [0, 0]
    held[stuck] = 4_000
    assert route(Ask(4_096, Overlaps(held)), fleet, BEST, 30.0)[0].instance != stuck


tokens_held = st.lists(st.integers(0, 8_000), min_size=5, max_size=5)


@given(tokens_held, tokens_held, tokens_held, st.integers(1, 8_192), st.booleans(), st.sampled_from(POLICIES))
def test_a_decision_is_pure(device, more, most, tokens, peers, policy):
    """Asking twice gives the same, changes nothing, is sorted, and its parts add up, whatever is held where."""
    device = [min(held, tokens - 1) for held in device]
    host = [min(held + extra, tokens - 1) for held, extra in zip(device, more, strict=True)]
    disk = [min(held + extra, tokens - 1) for held, extra in zip(host, most, strict=True)]
    fleet = fleet_of(5, peers=peers)
    for at in range(7):
        choose(Ask(500 * (at + 1)), fleet, BEST, 0.1 * at)
    ask = Ask(tokens, Overlaps(device, host, disk), "s")
    before = fleet.snapshot(1.0)
    choices = route(ask, fleet, policy, 1.0)
    assert choices == route(ask, fleet, policy, 1.0)
    assert fleet.snapshot(1.0) == before
    assert [choice.score_seconds for choice in choices] == sorted(choice.score_seconds for choice in choices)
    for choice in choices:
        parts = choice.queue_seconds + choice.transfer_seconds + choice.recompute_seconds + choice.interference_seconds
        assert choice.seconds == pytest.approx(parts)
        assert 0 <= choice.cached_tokens < tokens
        assert choice.reasons
        assert msgspec.structs.asdict(choice)
