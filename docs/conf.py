"""The site, by Sphinx: `make docs`. The reference of keys and commands is made from the code."""

import inspect
import re
from argparse import Action, ArgumentParser, _HelpAction, _SubParsersAction
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from f2c_plugin import __version__
from f2c_plugin.cli import COMMANDS
from f2c_plugin.config import DEFAULTS, PREFIX, REQUIRED, F2CConfig, valid_values

SOURCE = "https://github.com/f2c-plugin/f2c-plugin/blob/main/"

project, copyright, release = "f2c-plugin", "the f2c-plugin authors, MIT licence", __version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"f2c-plugin {__version__}"
html_copy_source = False
html_theme_options = {"source_repository": "https://github.com/f2c-plugin/f2c-plugin/", "source_branch": "main",
                      "source_directory": "docs/"}


def setup(app: Any) -> None:
    app.connect("builder-inited", lambda app: write_reference(Path(app.srcdir)))
    app.connect("source-read", lambda app, name, source: source.__setitem__(0, linked(source[0])))


def linked(markdown: str) -> str:
    """Links to files of the repository lead to it, where they stand outside the site. Pictures come along."""
    return re.sub(r"(?<!!)(\[[^\]]*\]\()\.\./", rf"\1{SOURCE}", markdown)


def write_reference(folder: Path) -> None:
    for name, content in ("commands.md", commands()), ("keys.md", keys()):
        if not (folder / name).is_file() or (folder / name).read_text() != content:
            (folder / name).write_text(content)


def commands() -> str:
    """The help of every command."""
    parts = ["# Commands", "`f2c-plugin --version` shows the version. Every command explains itself with `--help`."]
    for name, (run, arguments) in sorted(COMMANDS.items()):
        parser = ArgumentParser(f"f2c-plugin {name}", add_help=False)
        for add_to in arguments:
            add_to(parser)
        parts += [f"## {name}", inspect.getdoc(run) or "", *usage(parser)]
    return "\n\n".join(parts) + "\n"


def usage(parser: ArgumentParser) -> Iterator[str]:
    """How a command is called, and a table of its arguments; or both of each of its actions."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for each in action.choices.values():
                yield from usage(each)
            return
    yield "    " + " ".join(parser.format_usage().removeprefix("usage: ").replace("[-h] ", "").split())
    rows = [f"| `{', '.join(action.option_strings) or action.metavar or action.dest}` | {meaning(parser, action)} |"
            for action in parser._actions if not isinstance(action, _HelpAction)]
    yield "\n".join(["| argument | meaning |", "|---|---|", *rows])


def meaning(parser: ArgumentParser, action: Action) -> str:
    return ((action.help or "") % {"default": action.default, "prog": parser.prog}).replace("|", r"\|")


def keys() -> str:
    """Every key of a config: its default, what it must be, and, of F²C's, what it means."""
    means = attributes(inspect.getdoc(F2CConfig) or "")
    ours = [f"| `{PREFIX}{each.name}` | `{each.default!r}` | {valid_values()[PREFIX + each.name]} | {means[each.name]} |"
            for each in fields(F2CConfig)]
    theirs = [f"| `{key}` | {'' if key in REQUIRED else f'`{DEFAULTS[key]!r}`'} | {valid_values().get(key, '')} |"
              for key in (*REQUIRED, *DEFAULTS)]
    return "\n".join([
        "# Keys", "", "What each key trades is on the page [Configuration](config.md).", "",
        "## F²C's", "", "| key | default | must be | meaning |", "|---|---|---|---|", *ours, "",
        "## arcface_torch's that the built-in trainer reads, and its own", "",
        "`rec`, `num_classes` and `num_image` must be set.", "", "| key | default | must be |", "|---|---|---|", *theirs, ""])


def attributes(docstring: str) -> dict[str, str]:
    """The section "Attributes" of a docstring, by name."""
    found = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", docstring.partition("Attributes:\n")[2], re.M)
    return {name: " ".join(text.split()).replace("``", "`") for name, text in found}
