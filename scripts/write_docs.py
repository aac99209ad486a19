"""Write the generated parts of the documents: the command line reference, the page of systems, the table in the README.

python scripts/write_docs.py            writes them
python scripts/write_docs.py --check    exit status 1 when one is stale
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer.main

from memwall.cli import app
from memwall.systems import ROOMS, STATES, System, all_systems

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- systems:begin, written by scripts/write_docs.py -->"
END = "<!-- systems:end -->"


def command_line() -> str:
    """docs/cli.md, from the same objects that print `--help`."""
    verbs = all_verbs(typer.main.get_command(app))
    lines = [
        "# Command line",
        "",
        "<!-- written by scripts/write_docs.py from the commands themselves -->",
        "",
        "Results go to standard output, progress and summaries to standard error. Every verb takes `--help`. "
        + app.info.epilog,
        "`memwall --install-completion` sets up completion for your shell: models, formats, policies, slugs.",
        "",
        "| verb | what it does |",
        "|---|---|",
        *(
            f"| [`{name}`](#memwall-{name.replace(' ', '-')}) | {first_sentence(verb)} |"
            for name, verb in verbs.items()
        ),
        "",
    ]
    for name, verb in verbs.items():
        lines += describe_verb(name, verb)
    return "\n".join(lines).rstrip() + "\n"


def all_verbs(group: Any) -> dict[str, Any]:
    """Verbs by name; those of a group, such as `study kv`, under both names."""
    found = {}
    for name, verb in group.commands.items():
        inner = all_verbs(verb) if hasattr(verb, "commands") else {"": verb}
        found |= {f"{name} {own}".rstrip(): each for own, each in inner.items()}
    return found


def first_sentence(verb: Any) -> str:
    return verb.help.strip().split("\n\n")[0].replace("\n", " ")


def describe_verb(name: str, verb: Any) -> list[str]:
    arguments = [parameter for parameter in verb.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in verb.params if parameter.param_type_name == "option"]
    usage = " ".join(a.metavar if a.required else f"[{a.metavar}]" for a in arguments)
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", verb.help.strip())
    lines = [f"## memwall {name}", "", "```", f"memwall {name} [OPTIONS] {usage}".rstrip(), "```", "", text, ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| `{argument.metavar}` | {cell(argument.help)} |" for argument in arguments]
    for option in options:
        names = ", ".join(f"`{text}`" for text in option.opts)
        takes = "" if option.is_flag else f" `{option.metavar or option.name.upper()}`"
        default = option.default if not option.is_flag and option.default not in (None, [], ()) else None
        shown = f" Default: `{default}`." if default is not None else ""
        lines.append(f"| {names}{takes} | {cell(option.help)}{shown} |")
    return [*lines, ""]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def systems_page() -> str:
    """docs/systems.md: every system with its paper and claims."""
    counts = Counter(system.state for system in all_systems())
    lines = [
        "# Systems",
        "",
        "<!-- written by scripts/write_docs.py from src/memwall/systems.toml -->",
        "",
        f"{len(all_systems())} published systems: " + ", ".join(f"{counts[state]} {state}" for state in STATES) + ".",
        "For a system that is missing, the claims are what its evidence will have to show.",
        "",
    ]
    for room in ROOMS:
        members = [system for system in all_systems() if system.room == room]
        if members:
            lines += [f"## {room}", ""]
        for system in members:
            module = f", `{system.module}`" if system.module else ""
            paper = f"*{system.title}*, {system.year}, {link(system)}"
            lines += [
                f"### {system.slug}",
                "",
                f"{system.name}: {system.family}, **{system.state}**{module}. {paper}.",
                "",
                *(f"- {claim}" for claim in system.claims),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def link(system: System) -> str:
    match = re.fullmatch(r"arXiv (\S+)", system.source)
    return f"[{system.source}](https://arxiv.org/abs/{match[1]})" if match else system.source


def systems_table() -> str:
    """The README's table: one row per room."""
    marks = {"works": "**{}**", "partial": "*{}*", "missing": "{}"}
    lines = ["| room | systems |", "|---|---|"]
    for room in ROOMS:
        members = [system for system in all_systems() if system.room == room]
        if members:
            names = ", ".join(
                f"[{marks[system.state].format(system.name)}](docs/systems.md#{system.slug})" for system in members
            )
            lines.append(f"| {room} | {names} |")
    counts = Counter(system.state for system in all_systems())
    return "\n".join([*lines, "", "So far: " + ", ".join(f"{counts[state]} {state}" for state in STATES) + "."])


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{systems_table()}\n{END}{rest.split(END)[1]}"


GENERATED: dict[str, Callable[[], str]] = {
    "docs/cli.md": command_line,
    "docs/systems.md": systems_page,
    "README.md": readme,
}


def main() -> None:
    stale = [
        name for name, make in GENERATED.items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != make()
    ]
    if "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run python scripts/write_docs.py" if stale else 0)
    for name in stale:
        (ROOT / name).write_text(GENERATED[name]())
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
