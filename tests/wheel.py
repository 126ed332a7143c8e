"""Install the built wheel into a fresh environment, away from the source tree, and use it there.

Run as ``python tests/wheel.py DIST``, DIST being the folder that holds the wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import asyncio, datetime, pathlib, sys, uuid
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
import aion_timers
from aion_timers import AsyncTimerRepository, TimerRepository, migrate

assert aion_timers.__file__.startswith(sys.prefix), aion_timers.__file__
assert pathlib.Path(aion_timers.__file__).with_name("py.typed").exists()
now = datetime.datetime.now(datetime.UTC)
workflow = uuid.uuid4()

engine = sqlalchemy.create_engine("sqlite+libsql:///timers.db")
try:
    migrate.check(engine)
except aion_timers.NotMigratedError as error:
    assert "upgrade" in str(error), error
else:
    raise SystemExit("an empty database passed the check")
migrate.upgrade(engine)
migrate.check(engine)
with engine.begin() as connection:
    assert TimerRepository(connection).schedule(workflow, "wheel", now)
with engine.begin() as connection:
    (taken,) = TimerRepository(connection).take(limit=10)
assert (taken.workflow_id, taken.timer_id.value, taken.fire_at) == (workflow, "wheel", now)
migrate.downgrade(engine)
assert migrate.current(engine) is None
engine.dispose()


async def use_async():
    engine = create_async_engine("sqlite+aiolibsql:///other.db")
    async with engine.begin() as connection:
        await connection.run_sync(migrate.upgrade)
    async with AsyncSession(engine) as session, session.begin():
        await AsyncTimerRepository(session).schedule(workflow, 1, now)
        assert len(await AsyncTimerRepository(session).expired()) == 1
    await engine.dispose()


asyncio.run(use_async())

from aion_timers.testing import FakeClock, run_due

assert "pytest" not in sys.modules
clock = FakeClock(now)
engine = sqlalchemy.create_engine("sqlite+libsql:///testing.db")
migrate.upgrade(engine)
with engine.begin() as connection:
    TimerRepository(connection, clock=clock).schedule(workflow, "later", now + datetime.timedelta(days=3))
dispatcher = aion_timers.Dispatcher(engine, {"later": lambda _: None}, clock=clock)
assert len(run_due(dispatcher, until=now + datetime.timedelta(days=4))) == 1
engine.dispose()
print("the wheel migrates, schedules, takes and fires in", sys.prefix.rsplit("/", 1)[-1])
"""

MISSING = "aion-timers: the command line needs typer, which is not installed; pip install 'aion-timers[cli]'\n"


def main(dist: Path) -> None:
    """Install the newest wheel of ``dist`` with its pinned dependencies; run the program above and the examples."""
    wheel = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime).resolve()
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "fresh-environment"
        venv.create(environment, with_pip=True)
        python = str(environment / "bin" / "python")
        constraints = str(ROOT / "constraints.txt")
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--constraint",
            constraints,
        ]
        subprocess.run([*install, f"{wheel}[asyncio]"], check=True, cwd=folder)
        subprocess.run([python, "-I", "-c", PROGRAM], check=True, cwd=folder)
        for example, revision in (("migrate_at_start", "head"), ("alembic_host", "heads")):
            host = Path(folder) / example
            shutil.copytree(ROOT / "examples" / example, host, ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
            alembic = str(environment / "bin" / "alembic")
            for command in ([alembic, "upgrade", revision], [python, "shop.py"], [alembic, "check"]):
                subprocess.run(command, check=True, cwd=host)
        command = str(environment / "bin" / "aion-timers")
        without = subprocess.run([command, "--version"], check=False, cwd=folder, capture_output=True, text=True)
        assert (without.returncode, without.stdout, without.stderr) == (78, "", MISSING), without
        subprocess.run([*install, f"{wheel}[cli]"], check=True, cwd=folder)
        for arguments in (["migrate"], ["check"], ["doctor"]):
            subprocess.run([command, *arguments, "--url", "sqlite+libsql:///command.db"], check=True, cwd=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
