"""Chapter: a gateway that routes by turns; the doctor names it, what it says is done, and it finds nothing any more."""

from __future__ import annotations

import contextlib
from pathlib import Path

from thermocline.clock import SystemClock, until
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.fleet import NAMES, WAIT_SECONDS, Talk, gateway, light
from thermocline.demo.screen import Screen
from thermocline.engines.launch import GATEWAY_INSTALL, gateway_lacks
from thermocline.lens import observe, ps
from thermocline.lens.diagnosis import Condition, Diagnosis, render
from thermocline.lens.doctor import diagnose
from thermocline.node import ask

CLAIM = '"the hit rate is low, so buy more GPUs"'
SECONDS = 1.0
CONVERSATIONS = 15
"""An odd number, so that each turn of a conversation goes where the one before did not."""


def play(screen: Screen, folder: Path) -> Chapter:
    """Conversations over two instances, first with the fault, then as the doctor says."""
    if gateway_lacks():
        claim = Claim(CLAIM, f"not shown: {gateway_lacks()} is not installed", GATEWAY_INSTALL)
        return Chapter(ok=True, verdict=claim.figure, claim=claim, details={"shown": False})
    screen.say(
        "Two light instances behind a gateway that was told to send requests by turns. `thermocline doctor` looks:"
    )
    sick = _looked_at(screen, folder, "--policy", "round_robin")
    screen.quote(render(sick))
    screen.say("Without --policy, as it says, and the same conversations again:")
    well = _looked_at(screen, folder)
    screen.quote(render(well))
    return _concluded(sick, well)


def _looked_at(screen: Screen, folder: Path, *flags: str) -> Diagnosis:
    """The diagnosis of a new fleet after some turns of conversations."""
    events, admin = f"ipc://{folder / 'events'}", folder / "admin.sock"
    with contextlib.ExitStack() as stack:
        screen.working("starting two instances and a gateway")
        urls = {name: stack.enter_context(light(name, events))[1] for name in NAMES}
        talk = Talk(stack.enter_context(gateway(folder, events, urls, *flags)), CONVERSATIONS)

        def is_heard() -> bool:
            talk.new()
            found = ps.gateway(admin)
            return found is not None and all(each.blocks.device for each in found.instances)

        until(is_heard, WAIT_SECONDS, pause_seconds=0.05)
        talk.turns(screen, "conversations")
        screen.working(f"the doctor looks for {SECONDS:.0f} s")
        watched = observe.watch(observe.named([], [], [str(admin)], None, ask), SECONDS, SystemClock())
    screen.worked()
    return diagnose([each for each in watched if each.kind is observe.Kind.GATEWAY])


def _concluded(sick: Diagnosis, well: Diagnosis) -> Chapter:
    named, left = ([each.condition for each in found.findings] for found in (sick, well))
    rates = [
        sum(tokens for _, tokens in found.hits[0].by_source) / found.hits[0].prompt_tokens for found in (sick, well)
    ]
    figure = f"the cause is named; {rates[0]:.0%} of prompt tokens reused, {rates[1]:.0%} after the one change"
    ok = named == [Condition.ROUTED_AWAY] and not left and rates[1] > rates[0]
    verdict = figure if ok else f"found {[*named]}, then {[*left]}"
    details = {"shown": True, "found": named, "found_after": left, "hit_rates": rates}
    return Chapter(ok, verdict, Claim(CLAIM, figure, "thermocline doctor"), details)
