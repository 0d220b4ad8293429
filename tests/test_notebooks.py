"Every chapter runs from its first cell to its last, from a folder that holds nothing else."
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHAPTERS = sorted((Path(__file__).resolve().parents[1] / "nbs").glob("*.ipynb"))
# A process for each chapter, so that none inherits another's imports, seeds or figures.
RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb

passed, seconds = test_nb(Path(sys.argv[1]), skip_flags=["slow"])
sys.exit(not passed)
"""


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs(chapter, tmp_path):
    notebook = tmp_path / chapter.name
    shutil.copy(chapter, notebook)
    run = subprocess.run([sys.executable, "-c", RUN, notebook], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
