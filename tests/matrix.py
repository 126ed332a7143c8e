"""Run the quick part of the tests on each Python, SQLAlchemy and PostgreSQL that is supported and to be had here.

Run as ``python tests/matrix.py FOLDER``, FOLDER being where environments are kept. What is not to be had is told; what
fails makes the exit code 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
WITHOUT_LIBSQL = {"3.14"}
"""Pythons for which the libSQL driver has no wheels."""
LOWEST = ("sqlalchemy==2.1.0", "alembic==1.20.0")
"""The oldest releases that pyproject.toml allows."""
POSTGRESQLS = ("15", "16", "17")
"""Servers beside the one that the tests bring along, where Debian's packages put them."""
QUICK = [
    *("tests/unit", "tests/typing", "tests/libsql/test_transactions.py"),
    *(f"tests/contract/test_{name}.py" for name in ("timers", "host_queries", "orm")),
    "tests/migrations/test_upgrade.py",
]
Outcomes = dict[str, str]


# -- Pythons ----------------------------------------------------------------------------------------------------------


def interpreter(version: str) -> Path | None:
    """The interpreter of that version: of PATH, or of pyenv, whose shims may be there for what is not."""
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for candidate in filter(None, found):
        told = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if told.returncode == 0 and told.stdout.strip() == version:
            return Path(candidate)
    return None


def environment(python: Path, folder: Path, pins: tuple[str, ...]) -> Path:
    """The interpreter of an environment in which this source is installed with these versions, the others as pinned."""
    inside = folder / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    names = {pin.partition("==")[0] for pin in pins}
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0].lower() not in names
    ]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*lines, *pins]) + "\n")
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraints]
    subprocess.run([*pip, "pip"], check=True, cwd=ROOT)
    subprocess.run([*pip, "--editable", ".[asyncio,postgres]", "--group", "test", *pins], check=True, cwd=ROOT)
    return inside


def tested(python: Path, *options: str, **variables: str) -> str:
    """What became of the quick part of the tests."""
    command = [python, "-m", "pytest", "-q", "-n", "2", *options, *QUICK]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    last = (done.stdout.strip().splitlines() or ["nothing ran"])[-1]
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
    return f"{'passed' if done.returncode == 0 else 'FAILED'}: {last}"


def on_pythons(folder: Path) -> Iterator[tuple[str, str]]:
    """Every Python with the newest releases, and the first and the last of them with the oldest."""
    there = {version: found for version in PYTHONS if (found := interpreter(version)) is not None}
    for version in PYTHONS:
        if version not in there:
            yield f"Python {version}", "not found here"
            continue
        options = ["-k", "not libsql"] if version in WITHOUT_LIBSQL else []
        for name, pins in (("newest", ()), ("lowest", LOWEST)):
            if pins and version not in {min(there, key=PYTHONS.index), max(there, key=PYTHONS.index)}:
                continue
            inside = environment(there[version], folder / f"{version}-{name}", pins)
            yield f"Python {version}, {name} SQLAlchemy", tested(inside, *options)


# -- PostgreSQLs ------------------------------------------------------------------------------------------------------


@contextmanager
def server(binaries: Path) -> Iterator[str]:
    """The URL of a server that is stopped and forgotten at the end."""
    # PostgreSQL refuses to run as root
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="matrix-"))
    if user is not None:
        shutil.chown(folder, user)
    data = folder / "data"
    settings = f"-k {folder} -c listen_addresses= -c fsync=off -c max_prepared_transactions=10"

    def run(program: str, *arguments: str | Path) -> None:
        command = [binaries / program, "-D", data, *arguments]
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        run("initdb", "-U", "postgres", "--auth=trust", "--encoding=utf8")
        run("pg_ctl", "start", "-w", "-l", folder / "log", "-o", settings)
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            run("pg_ctl", "stop", "-m", "fast")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def on_postgresqls() -> Iterator[tuple[str, str]]:
    """Every other server, with this interpreter."""
    for version in POSTGRESQLS:
        binaries = Path(f"/usr/lib/postgresql/{version}/bin")
        if not (binaries / "initdb").exists():
            yield f"PostgreSQL {version}", "not found here"
            continue
        with server(binaries) as url:
            yield (
                f"PostgreSQL {version}",
                tested(Path(sys.executable), "-k", "psycopg or asyncpg", AION_TIMERS_TEST_POSTGRES=url),
            )


def main(folder: Path) -> int:
    """Run all of it, and tell."""
    outcomes: Outcomes = {}
    for found in (on_pythons(folder), on_postgresqls()):
        for what, outcome in found:
            outcomes[what] = outcome
            print(f"{what}: {outcome}", flush=True)
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
