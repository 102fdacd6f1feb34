"""Chapter: a timestamp at the top of a prompt, the receipt that explains the miss, and the same prompt with it last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen, milliseconds
from thermocline.demo.stage import Stage
from thermocline.demo.texts import documents
from thermocline.engines.generation import Result
from thermocline.engines.transformers import Engine
from thermocline.lens import report
from thermocline.store.receipt import Reason, Receipt

STAMPS = ("2026-11-20 09:00:00", "2026-11-20 09:00:07")
"""Two requests, seven seconds apart."""

SHARE_FIRST_MAX, SHARE_LAST_MIN = 0.05, 0.9


def play(screen: Screen, folder: Path, stage: Stage) -> Chapter:
    """Ask twice with the time at the top, then twice with the time at the end."""
    _, text = documents()[0]
    with stage.engine(folder) as engine:
        screen.say(f'The prompt begins with "It is {STAMPS[0]}." The second time, seven seconds later, it asks again:')
        top = _asked(screen, engine, lambda at: f"It is {at}. Answer from this text.\n\n{text}\nWhat is it?")
        end = _asked(screen, engine, lambda at: f"Answer from this text.\n\n{text}\nIt is {at}. What is it?")
    screen.worked()
    planted, moved = _receipt(top), _receipt(end)
    screen.quote(report.render(planted))
    screen.table(
        ["second request", "prompt", "loaded", "first token"],
        [_row("time at the top", planted, top), _row("time at the end", moved, end)],
        right=(1, 2, 3),
    )
    return _concluded(planted, moved)


def _asked(screen: Screen, engine: Engine, written: Callable[[str], str]) -> Result:
    """Ask at each time; the last result."""
    for stamp in STAMPS:
        screen.working(f"asking at {stamp}")
        result = engine.generate(engine.text.encode(written(stamp)), 2, request_id=stamp)
    return result


def _receipt(result: Result) -> Receipt:
    assert result.receipt is not None
    return result.receipt


def _row(name: str, receipt: Receipt, result: Result) -> list[str]:
    share = receipt.loaded_tokens / receipt.prompt_tokens
    return [name, f"{receipt.prompt_tokens:,}", f"{share:.0%}", milliseconds(result.first_token_seconds)]


def _concluded(planted: Receipt, moved: Receipt) -> Chapter:
    reasons = {missing.reason for missing in planted.missing}
    top, end = (receipt.loaded_tokens / receipt.prompt_tokens for receipt in (planted, moved))
    ok = Reason.DIVERGED in reasons and top <= SHARE_FIRST_MAX and end >= SHARE_LAST_MIN
    figure = f"{end:.0%} with the time last, {top:.0%} with the time first"
    verdict = f"the receipt says DIVERGED; {figure}" if Reason.DIVERGED in reasons else f"reasons: {sorted(reasons)}"
    claim = Claim('"95 % hit rate"', figure, "thermocline why last")
    details = {
        "loaded_share_time_first": top,
        "loaded_share_time_last": end,
        "reasons": sorted(reasons),
        "conclusion": report.conclude(planted),
    }
    return Chapter(ok, verdict, claim, details)
