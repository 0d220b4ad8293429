"""Every chapter runs from its first cell to its last, its solutions too, from a folder that holds
nothing else."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from test_wheel import dist, once  # noqa: F401  (fixtures)

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


# ---------------------------------------------------------------- as on Colab

RUN = """
import sys, nbformat
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(nb, timeout=600).execute()
print(nb.cells[-1].outputs[0].text)
"""


@pytest.fixture
def colab(tmp_path):
    """The Python of a machine that has everything but `terd_nb`, and is called Colab.

    What the library needs lies in this environment and is lent, as Colab has most of it; a path
    file does not lend this checkout's editable install."""
    home = tmp_path / "colab"
    venv.create(home, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").touch()
    return home / "bin" / "python"


@pytest.mark.parametrize("chapter", ["03_images", "04_triggers"])
def test_chapter_runs_as_on_colab(colab, dist, tmp_path, chapter):  # noqa: F811
    """From nothing but the notebook, which installs the wheel itself.

    The index is replaced by the folder of the wheel; what is lent looks to pip as if it held
    `terd_nb`, so pip must be told not to mind."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FORCE_REINSTALL": "1"}
    env |= {"PIP_FIND_LINKS": str(dist), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}

    empty = tmp_path / "empty"
    empty.mkdir()

    def python(*arguments):
        command = [colab, *arguments]
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)

    run = python("-c", RUN, ROOT / "nbs" / f"{chapter}.ipynb")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "This chapter took" in run.stdout
    where = python("-c", "import terd_nb, google.colab; print(terd_nb.__file__)").stdout
    assert where.startswith(str(colab.parents[1]))
