"""The user's program names all that is public, and runs; `make check` has mypy and pyright pass over it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import aion_timers
from aion_timers import doctor, libsql, migrate, testing

PROGRAM = Path(__file__).with_name("user_program.py")
CLASSES = (
    *(aion_timers.TimerRepository, aion_timers.AsyncTimerRepository),
    *(aion_timers.Dispatcher, aion_timers.AsyncDispatcher, aion_timers.Delivery, aion_timers.AsyncDelivery),
)


OF_THE_LOOPS = {"claim", "locked", "settled", "taken", "until"}
"""What a dispatcher's loop asks of a delivery, and no user."""


def test_every_public_name_is_used() -> None:
    # an import alone is no use of a name
    used = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    public = {name for module in (aion_timers, migrate, libsql, doctor, testing) for name in module.__all__}
    public |= {name for each in CLASSES for name, _ in inspect.getmembers(each) if not name.startswith("_")}
    assert public - used - OF_THE_LOOPS == set()


def test_the_program_runs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, PROGRAM, tmp_path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "run the transaction again"
