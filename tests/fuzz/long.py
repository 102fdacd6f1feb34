"""The long form: one target for so many seconds, with atheris where it is installed. `make fuzz` runs this.

    python tests/fuzz/long.py events 600

What a run finds stays in the folder that it names; `python tests/fuzz/long.py events FILE` feeds it again.
"""

from __future__ import annotations

import importlib.util
import resource
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES_MAX = 2 << 30
HANG_SECONDS = 10


def main(name: str, word: str, *more: str) -> None:
    """Run a target. Ends with another code than 0 where it finds something. `more` are atheris' own flags."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    if not word.isdecimal():
        _target(name).feed(Path(word).read_bytes())
    elif importlib.util.find_spec("atheris"):
        _with_atheris(name, int(word), more)
    else:
        _plainly(name, int(word))


def _with_atheris(name: str, seconds: int, more: Sequence[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["thermocline", "tests"]):
        target = _target(name)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    (folder / "corpus").mkdir()
    for number, seed in enumerate(target.seeds):
        (folder / "corpus" / str(number)).write_bytes(seed)
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_BYTES_MAX >> 20}", f"-timeout={HANG_SECONDS}"]
    if target.words:
        words = folder / "words"
        words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
        limits.append(f"-dict={words}")
    sys.stdout.write(f"{name}: {seconds} s of atheris in {folder}\n")
    sys.stdout.flush()
    argv = [sys.argv[0], *limits, "-verbosity=0", "-print_final_stats=1", f"-artifact_prefix={folder}/", *more]
    atheris.Setup([*argv, str(folder / "corpus")], target.feed)
    atheris.Fuzz()


def _plainly(name: str, seconds: int) -> None:
    """Without coverage to follow: changed seeds, each from a number that is told where something is found."""
    from tests.fuzz.mutate import mutants
    from thermocline.clock import SystemClock

    target, clock = _target(name), SystemClock()
    number, count, deadline = secrets.randbits(32), 0, clock.now() + seconds
    for payload in mutants(target.seeds, number):
        try:
            target.feed(payload)
        except BaseException:
            sys.stdout.write(f"{name}: input {count} of number {number}: {payload.hex()}\n")
            raise
        count += 1
        if clock.now() > deadline:
            break
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    sys.stdout.write(f"{name}: {count} inputs of number {number} in {seconds} s, {used >> 20} MiB at most\n")
    assert used < MEMORY_BYTES_MAX


def _target(name: str):
    from tests.fuzz.targets import TARGETS

    return TARGETS[name]


if __name__ == "__main__":
    main(*sys.argv[1:])
