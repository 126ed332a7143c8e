from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIGURES = {
    "libsql": [
        *[f"drain, batch {batch}" for batch in (100, 500, 1000)],
        "transaction()",
        "lag p50",
        "lag p99",
        "wake-up p50",
        "wake-up p95",
        "idle: statements",
        "idle: looks at data_version",
        "idle: processor time",
    ],
    "postgresql": [
        *[f"drain, batch {batch}" for batch in (100, 500, 1000)],
        "drain, 2 processes",
        "transaction()",
        "lag p50",
        "lag p99",
        "wake-up p50",
        "wake-up p95",
        "idle: statements",
        "idle: server's transactions",
        "idle: processor time",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("database", FIGURES)
def test_every_figure_is_measured_and_nothing_is_left_behind(database: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "COLOR" not in name and "TTY" not in name}
    # not pytest's own directory: the path of a server's socket has to be short
    with tempfile.TemporaryDirectory(prefix="aion-") as directory:
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "dispatch.py", "--quick", "--database", database, "--directory", directory],
            env=environment | {"PYTHONUTF8": "1"},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        left = list(Path(directory).iterdir())

    assert (done.returncode, done.stderr, left) == (0, "", [])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    names = [row[0] for row in rows]
    assert len(names) == len(FIGURES[database])
    assert all(name.startswith(figure) for name, figure in zip(names, FIGURES[database], strict=True))
    assert all(float(low) <= float(middle) <= float(high) for _, _, _, low, middle, high, *_ in rows)
    assert {row[-1] for row in rows} <= {"met", "missed", ""}
