"""Build the sdist and the wheel, build them again from the unpacked sdist, and compare; then check their metadata.

Run as ``python tests/packaging.py DIST``. What is built stays in DIST. Equal files show that a build depends on neither
the place nor the time of a checkout, and that the sdist holds all that is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONG_AGO = 1_580_601_600  # seconds since 1970, where no commit tells; a zip file knows no year before 1980


def epoch() -> str:
    """The instant that the files of the archives are given: that of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    git = shutil.which("git")
    if git is not None:
        told = subprocess.run([git, "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout.strip():
            return told.stdout.strip()
    return str(LONG_AGO)


def built(source: Path, dist: Path, when: str) -> dict[str, str]:
    """The names and hashes of what is built."""
    shutil.rmtree(dist, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--quiet", "--no-isolation", "--sdist", "--wheel", "--outdir", dist]
    subprocess.run(command, cwd=source, env={**os.environ, "SOURCE_DATE_EPOCH": when}, check=True)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(dist.iterdir())}


def main(dist: Path) -> None:
    """Build twice and compare.

    Raises:
        SystemExit: the two builds differ, or the metadata would be refused.
    """
    when = epoch()
    first = built(ROOT, dist, when)
    (sdist,) = dist.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        for path in source.rglob("*"):
            path.touch()
        second = built(source, Path(folder) / "dist", when)
    for name, digest in first.items():
        print(digest[:16], name)
    if first != second:
        sys.exit(f"two builds differ: {first} and {second}")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
