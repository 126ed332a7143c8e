"""The code blocks of README and docs run, page by page: Python ones, and those marked ``shell``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_shell(example: Example) -> None:
    """Run a block of commands as one who has activated the environment; a failing command fails the block."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["/bin/sh", "-euc", example.parsed], check=True, env={**os.environ, "PATH": path})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("alembic.ini", "migrations"):  # a reader works in a checkout
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AION_TIMERS_URL", raising=False)
    document = Document.parse(str(page), PythonCodeBlockParser(), CodeBlockParser("shell", run_shell))
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
