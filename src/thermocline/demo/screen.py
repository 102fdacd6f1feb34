"""What a person sees. On a terminal in colour, elsewhere as plain text; in JSON mode all of it goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

BAR_WIDTH = 40
WIDTH_MAX = 110
WAIT_LINE_SECONDS = 10.0


def milliseconds(seconds: float) -> str:
    """As a cell of a table."""
    return f"{1e3 * seconds:,.0f} ms"


class Screen:
    """Writes chapters, sentences, tables and bars."""

    def __init__(self, *, json_output: bool) -> None:
        from rich.console import Console

        stream = sys.stderr if json_output else sys.stdout
        self._console = Console(file=stream, highlight=False, soft_wrap=False)
        if self._console.width > WIDTH_MAX or not self._console.is_terminal:
            self._console.width = WIDTH_MAX
        self._waited_seconds = 0.0

    def chapter(self, number: int, title: str, promise: str) -> None:
        """Begin a chapter."""
        from rich.text import Text

        self._console.print()
        self._console.print(Text(f"{number}. {title}", style="bold cyan"))
        self._console.print(Text(promise, style="dim"))

    def say(self, text: str, *, style: str = "") -> None:
        """One paragraph."""
        from rich.padding import Padding
        from rich.text import Text

        self._console.print(Padding(Text(text, style=style), (0, 0, 0, 3), expand=False))

    def quote(self, text: str) -> None:
        """What a verb of ours prints."""
        for line in text.splitlines():
            self.say("| " + line, style="dim")

    def verdict(self, text: str, *, ok: bool, shown: bool = True) -> None:
        """What the chapter has shown, or why it has shown nothing."""
        mark, style = ("ok", "bold green") if ok else ("FAILED", "bold red")
        if ok and not shown:
            mark, style = "--", "bold yellow"
        self.say(f"{mark}    {text}", style=style)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Rows under headers; the columns `right` are aligned to the right."""
        from rich import box
        from rich.padding import Padding
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for at, header in enumerate(headers):
            table.add_column(header, justify="right" if at in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print(Padding(table, (0, 0, 0, 3), expand=False))

    def bars(self, rows: Sequence[tuple[str, float, str]]) -> None:
        """A bar for each (label, value, text), in proportion to the largest value."""
        from rich.text import Text

        largest = max((value for _, value, _ in rows), default=0.0) or 1.0
        width = max((len(label) for label, _, _ in rows), default=0)
        for label, value, text in rows:
            bar = "█" * max(1, round(BAR_WIDTH * value / largest))
            self._console.print(Text.assemble(f"   {label:{width}}  ", (bar, "cyan"), f" {text}"))

    def working(self, text: str) -> None:
        """Something that takes seconds is under way: on a terminal, a line on stderr that the next one replaces."""
        if sys.stderr.isatty():
            print(f"\r\x1b[K   ... {text}", end="", file=sys.stderr, flush=True)

    def worked(self) -> None:
        """It is over: clear that line."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def waiting(self, text: str, seconds: float) -> None:
        """`seconds` of waiting so far: shown at once on a terminal, every ten seconds elsewhere."""
        if sys.stderr.isatty():
            self.working(f"{text} ({seconds:.0f} s)")
        elif seconds - self._waited_seconds >= WAIT_LINE_SECONDS:
            self._waited_seconds = seconds
            print(f"   ... {text} ({seconds:.0f} s)", file=sys.stderr, flush=True)
