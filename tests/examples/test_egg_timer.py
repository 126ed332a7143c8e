from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from examples import egg_timer
from tests.forkserver import fork_server


def command(file: Path, *arguments: str) -> list[str]:
    return [egg_timer.__file__, "--file", str(file), *arguments]


def run(file: Path, *arguments: str) -> str:
    program = fork_server().start(command(file, *arguments), file.parent, os.environ)
    out, report = program.communicate(60)
    assert (program.returncode, report) == (0, "")
    return out


def test_a_timer_that_is_due_rings_once(tmp_path: Path) -> None:
    file = tmp_path / "eggs.db"
    assert re.fullmatch(r"soft at \d\d:\d\d:\d\d UTC\n", run(file, "set", "soft", "0"))
    run(file, "set", "hard", "3600")
    assert run(file, "ring", "--once") == "soft!\n"
    assert run(file, "ring", "--once") == ""


def test_one_that_waits_hears_of_a_timer_that_another_process_sets_and_ends_when_told(tmp_path: Path) -> None:
    file = tmp_path / "eggs.db"
    run(file, "set", "hard", "3600")
    with subprocess.Popen([sys.executable, *command(file, "ring")], stdout=subprocess.PIPE, text=True) as waiting:
        try:
            assert waiting.stdout is not None
            run(file, "set", "soft", "0.1")
            assert waiting.stdout.readline() == "soft!\n"
            waiting.send_signal(signal.SIGTERM)
            assert waiting.wait(20) == 0
        finally:
            waiting.kill()
