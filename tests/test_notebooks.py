"""Every chapter runs from its first cell to its last, its solutions too, from a folder that holds
nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs(chapter):
    "The run is kept: `make book` does not repeat it."
    run = subprocess.run(
        [sys.executable, ROOT / "book" / "build.py", "--run", chapter],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-5000:]
