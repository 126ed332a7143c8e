"""The command line's help, as docs/command-line.md shows it; ``python -m tests.cli.test_help`` writes it there."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from aion_timers.cli.app import run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "command-line.md"
BEGIN, END = "<!-- help: begin -->", "<!-- help: end -->"
PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}


def helped(*command: str) -> str:
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, PLAIN),
        mock.patch.object(sys, "argv", ["aion-timers", *command, "--help"]),
        contextlib.redirect_stdout(out),
    ):
        assert run() == 0
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def commands() -> list[str]:
    return re.findall(r"^  ([a-z]+) ", helped().partition("Commands:")[2], re.MULTILINE)


def written() -> str:
    pages = [helped(), *(helped(command) for command in commands())]
    return "\n\n".join(f"```text\n{page}\n```" for page in pages)


def test_the_page_shows_the_help_as_it_is() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == written(), "run python -m tests.cli.test_help"


def test_every_command_is_there() -> None:
    assert commands() == [
        *("migrate", "check", "schedule", "cancel", "list", "due", "next", "run", "watch", "doctor", "copy", "bench")
    ]


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_extra_that_is_missing_is_named(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import aion_timers.cli as cli; cli.main()"
    program = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (program.returncode, program.stdout, program.stderr) == (
        78,
        "",
        f"aion-timers: the command line needs {missing}, which is not installed; pip install 'aion-timers[cli]'\n",
    )


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{written()}\n{END}{rest.partition(END)[2]}")
