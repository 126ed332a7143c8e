"""The code blocks of README and docs run, page by page: Python ones, and those marked ``shell``.

What is marked ``ini`` or ``py`` is a part of an example, to the letter, and the example is run by its test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from tests.installed import Environment, made_once

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Where a reader has installed the library."""
    return made_once(tmp_path_factory)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_block_of_a_page_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: Environment,
    request: pytest.FixtureRequest,
) -> None:
    if "PRIMARY_URL" in page.read_text():
        url = request.getfixturevalue("sqld").url
        monkeypatch.setenv("PRIMARY_URL", f"http://{url.host}:{url.port}")
        monkeypatch.setenv("SERVER_URL", url.render_as_string())
    for name in ("alembic.ini", "migrations"):  # a reader works in a checkout
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
    monkeypatch.chdir(tmp_path)
    for name in ("AION_TIMERS_URL", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)

    def run_shell(example: Example) -> None:
        """Run a block of commands as one who has activated the environment; a failing command fails the block."""
        path = f"{environment.bin}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["/bin/sh", "-euc", example.parsed], check=True, env={**os.environ, "PATH": path})

    document = Document.parse(str(page), PythonCodeBlockParser(), CodeBlockParser("shell", run_shell))
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_of_an_example_stands_there(page: Path) -> None:
    files = [path.read_text() for suffix in ("py", "ini") for path in (ROOT / "examples").rglob(f"*.{suffix}")]
    for block in re.findall(r"```(?:ini|py)\n(.*?)```", page.read_text(), re.DOTALL):
        assert any(block in text for text in files), block


def test_a_page_links_to_what_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
