"""Write docs/reference from the declarations, and docs/faults.md from what tests proved. `make generate` runs it."""

from __future__ import annotations

from pathlib import Path

import click
from faults_page import faults_page

from thermocline import cli, metrics, settings
from thermocline.cli.app import VerbWithSettings
from thermocline.lens import diagnosis

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py from the declarations. Change those, then run `make generate`. -->\n"


def pages() -> dict[Path, str]:
    """Every generated page: where it lies, and what it should say."""
    reference = HERE / "reference"
    return {
        reference / "settings.md": settings_page(),
        reference / "cli.md": cli_page(),
        reference / "metrics.md": metrics_page(),
        reference / "conditions.md": conditions_page(),
        HERE / "faults.md": faults_page(),
    }


def conditions_page() -> str:
    """One row per condition that the doctor can find."""
    lines = ["# Conditions", NOTE, "Everything that `thermocline doctor` can find, the gravest first.", ""]
    lines += ["| condition | what it is | what to do | not so, if |", "|---|---|---|---|"]
    lines += [f"| {each} | {' | '.join(diagnosis.ADVICE[each])} |" for each in diagnosis.Condition]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """One section per setting."""
    lines = [
        "# Settings",
        NOTE,
        "Each setting is an attribute and TOML key, an environment variable, and a flag of `thermocline serve`.",
        "A flag wins over the environment, the environment over the TOML file, the file over the default. The file is",
        f"named by `--config` or `{settings.CONFIG_VARIABLE}`. `thermocline config` prints the effective values.",
        "",
        "Sizes are `512MiB` (1024 based), `2GB` (1000 based) or a number of bytes. Durations are `500ms`, `90s`,",
        "`15m`, `24h`, `7d` or a number of seconds.",
        "",
        "| setting | default | what |",
        "|---|---|---|",
    ]
    for setting in settings.DECLARED.values():
        names = f"`{setting.name}`<br>`{setting.variable}`<br>`{setting.flag} {setting.kind}`"
        lines.append(f"| {names} | `{setting.show(setting.default)}` | {setting.doc}{_bounds(setting)} |")
    return "\n".join(lines) + "\n"


def _bounds(setting: settings.Setting) -> str:
    if setting.most == float("inf"):
        return ""
    step = f", a multiple of {setting.multiple_of}" if setting.multiple_of > 1 else ""
    return f" From {setting.show_bound(setting.least)} to {setting.show_bound(setting.most)}{step}."


def cli_page() -> str:
    """One section per verb."""
    lines = ["# Command line", NOTE, "| exit code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in cli.EXIT_CODES.items()]
    lines += ["", "Errors go to stderr, as an `error:` line and a `hint:` line that names the next action.", ""]
    for name, verb in sorted(_verbs(cli.app.commands).items()):
        arguments = "".join(f" {param.metavar or param.name.upper()}" for param in _params(verb, click.Argument))
        lines += [
            f"## thermocline {name}",
            "",
            f"`thermocline {name}{arguments} [OPTIONS]`",
            "",
            _unwrapped(verb.help),
            "",
        ]
        takes_settings = isinstance(verb, VerbWithSettings)
        hidden = settings.DECLARED if takes_settings else {}
        options = [param for param in _params(verb, click.Option) if param.name not in hidden]
        lines += [
            "| option | what |",
            "|---|---|",
            *(f"| `{_spelling(option)}` | {option.help} |" for option in options),
        ]
        if takes_settings:
            lines.append("| `--SETTING VALUE` | One flag for each of the [settings](settings.md). |")
        lines.append("")
    return "\n".join(lines)


def _verbs(commands: dict[str, click.Command], before: str = "") -> dict[str, click.Command]:
    """By what a person types; of a group, those in it."""
    found = {}
    for name, verb in commands.items():
        found |= _verbs(verb.commands, f"{before}{name} ") if isinstance(verb, click.Group) else {before + name: verb}
    return found


def _params(verb: click.Command, kind: type[click.Parameter]) -> list:
    params = verb.get_params(click.Context(verb, help_option_names=[]))
    return [param for param in params if isinstance(param, kind)]


def _spelling(option: click.Option) -> str:
    return option.opts[0] if option.is_flag else f"{option.opts[0]} {option.metavar or option.type.name.upper()}"


def _unwrapped(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def metrics_page() -> str:
    """One row per metric."""
    lines = [
        "# Metrics",
        NOTE,
        "`GET /metrics` answers with these, in the Prometheus text format. What was never counted is not shown.",
        "",
        "| metric | type | labels | what |",
        "|---|---|---|---|",
    ]
    for metric in metrics.DECLARED.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metrics.PREFIX}{metric.name}` | {metric.kind} | {labels} | {metric.doc} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
