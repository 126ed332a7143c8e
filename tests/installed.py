"""The built wheel in an environment of its own, where the source tree cannot be imported."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.forkserver import Program, fork_server

ROOT = Path(__file__).parents[1]

COMMAND = """\
#!{python}
import sys
from {module} import main
sys.exit(main(prog="{name}"))
"""


class Environment:
    """A virtual environment with the wheel; everything else it finds where this interpreter does."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))

    def start(self, *command: str, cwd: Path, **variables: str) -> Program:
        """Start a program of the environment, which finds nothing of this process's own settings."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AION_", "PYTHON"))}
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        program = command[1:] if command[0] == "python" else [str(self.bin / command[0]), *command[1:]]
        return fork_server(self.python).start(program, cwd, inherited | {"PATH": path} | variables)


def made_once(factory: pytest.TempPathFactory) -> Environment:
    """The environment, made by the first process of the test session that asks for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "installed"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = Environment(folder / "environment")
        if not (folder / "ready").exists():
            _make(environment, folder)
            (folder / "ready").touch()
    return environment


def _make(environment: Environment, folder: Path) -> None:
    def run(*command: str | Path, variables: Mapping[str, str] | None = None) -> None:
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **(variables or {})}, stdout=sys.stderr)

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist")
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "environment", symlinks=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", environment.python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # a .pth file is not read in a folder that another one names, so an editable install of the source tree is not found
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (environment.site_packages / "dependencies.pth").write_text("\n".join(paths) + "\n")
    command = environment.bin / "alembic"
    command.write_text(COMMAND.format(python=environment.python, module="alembic.config", name="alembic"))
    command.chmod(0o755)
    where = "import aion_timers, sys; sys.exit(not aion_timers.__file__.startswith(sys.prefix))"
    run(environment.python, "-I", "-c", where)
