"""The command itself: its group of verbs, the flags that verbs share, and how mistakes are told."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import thermocline
from thermocline.errors import ThermoclineError

if TYPE_CHECKING:
    from thermocline.settings import Settings

OK, FAILED, USAGE, NO_ROOM, TOO_SLOW, NO_CACHE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
EXIT_CODES = {
    OK: "done, and what was checked holds",
    FAILED: "an error, damage found by `check`, a finding of `doctor`, or a budget missed by `bench`",
    USAGE: "a mistake in the command line or the settings",
    NO_ROOM: "the model does not fit, says `size`",
    TOO_SLOW: "it fits, and misses the target for first tokens",
    NO_CACHE: "it fits, and no cache is advised",
    INTERRUPTED: "stopped by Ctrl-C",
}

json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


class Verbs(click.Group):
    """A group that offers the nearest verb for a mistyped one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a verb that does not exist is a mistake whose hint names the nearest one."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"did you mean `thermocline {near[0]}`?" if near else "`thermocline --help` lists the verbs"
            raise MistakeError(f"no verb {args[0]}", hint)
        return super().resolve_command(ctx, args)


class MistakeError(click.UsageError):
    """A mistake in the command line, and what to write instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Figure(click.FloatRange):
    """A number within bounds. What is no number, or endless, is within none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401  # click's
        """The number, or click's error."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return found


class VerbWithSettings(click.Command):
    """A verb with one flag per setting; it takes them as `flags`, attribute to text. Made when asked for them only."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The flags of all settings, then the verb's own."""
        return [*settings_flags(), *super().get_params(ctx)]


@functools.cache
def settings_flags() -> list[click.Option]:
    """A flag for the file of settings, and one per setting. They are the same objects each time: copy, then change."""
    from thermocline.settings import CONFIG_VARIABLE, DECLARED

    text = f"A TOML file of settings; environment and flags win over it. [env: {CONFIG_VARIABLE}]"
    flags = [click.Option(["--config", "config_path"], metavar="FILE", help=text)]
    for setting in DECLARED.values():
        text = f"{setting.doc} [default: {setting.show(setting.default)}; env: {setting.variable}]"
        flags.append(click.Option([setting.flag, setting.name], metavar=setting.kind, help=text))
    return flags


def load_settings(config_path: str | None, flags: Mapping[str, str | None]) -> Settings:
    """Settings from the file, the environment and `flags`, the last winning. Raises SettingsError."""
    from thermocline.settings import Settings

    return Settings.load(Path(config_path) if config_path else None, flags=flags)


def _epilog() -> str:
    return "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."


@click.group(
    cls=Verbs, epilog=_epilog(), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(thermocline.__version__, "-V", "--version", message="thermocline %(version)s")
def app() -> None:
    """Keep what a language model has computed, find it again, load it exactly.

    Every verb takes --json; results go to stdout, everything else to stderr.
    """


def print_in_colour(text: str, bar: str) -> None:
    """Print to a terminal: runs of `bar` in cyan, the line that begins with `so: ` in bold."""
    from rich.console import Console
    from rich.text import Text

    shown = Text(text)
    shown.highlight_regex(bar + "+", "cyan")
    shown.highlight_regex("^so: .*", "bold")
    Console(highlight=False).print(shown)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit with its code. Errors go to stderr as `error:` and `hint:` lines."""
    sys.exit(_run(argv))


def _run(argv: Sequence[str] | None) -> int:
    try:
        status = app.main(argv, prog_name="thermocline", standalone_mode=False)
    except ThermoclineError as error:
        return _complain(error.message, error.hint, error.exit_code)
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "thermocline"
        return _complain(error.format_message(), getattr(error, "hint", f"`{verb} --help` shows what it takes"), USAGE)
    except click.ClickException as error:
        return _complain(error.format_message(), "", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    return status if isinstance(status, int) else OK


def _complain(message: str, hint: str, exit_code: int) -> int:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    return exit_code
