"""Every chapter runs from its first cell to its last, its solutions too, from a folder that holds
nothing else."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from contextlib import ExitStack
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from test_book import load_module
from test_wheel import dist, installed, once, wheel  # noqa: F401  (fixtures)

from terd_nb import __version__

ROOT = Path(__file__).resolve().parents[1]
build, first_cells = load_module("build"), load_module("first_cells")
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))


# All others run from the wheel, as on a machine of a reader's own.
NUMBERED = [name for name in CHAPTERS if name[0].isdigit()]
FROM_WHEEL = [name for name in NUMBERED if not first_cells.needs_checkout(name)]


@pytest.fixture(scope="session")
def warm():
    "A function: where kernels of a Python come from that have imported what chapters import."
    with TemporaryDirectory() as folder, ExitStack() as servers:

        @cache
        def served(python, path):
            address = f"{folder}/{hash((python, path))}"
            command = [python, "-P", ROOT / "book/warm.py", "serve", address]
            env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": build.INLINE}
            env = {key: value for key, value in env.items() if key != "PYTHONPATH"}
            env |= {"PYTHONPATH": path} if path else {}
            servers.callback(subprocess.Popen(command, env=env).kill)
            return address

        yield served


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs(chapter, request, warm):
    "The run is kept: `make book` does not repeat it."
    python, env = sys.executable, os.environ | {"OMP_NUM_THREADS": "1"}
    if chapter in FROM_WHEEL:
        python = request.getfixturevalue("installed") / "python"
        env = {key: value for key, value in env.items() if key != "PYTHONPATH"}
    env[build.WARM] = warm(python, env.get("PYTHONPATH"))
    run = subprocess.run(
        [python, ROOT / "book" / "build.py", "--run", chapter],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-5000:]


# ---------------------------------------------------------------- as on Colab


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_first_cell_is_the_same_in_every_chapter(chapter):
    "It installs the version that the notebook belongs to; `python book/first_cells.py` writes it."
    cells = json.loads((ROOT / "nbs" / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    first = next(source for source in sources if not source.startswith("#| default_exp"))
    minutes = re.search(r"welcome\(minutes=(\d+)\)", first)
    assert (minutes is None) == (chapter == "index")
    assert first == first_cells.first_cell(chapter, minutes and int(minutes[1]))


RUN = """
import sys, nbformat
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(nb, timeout=600).execute()
for cell in nb.cells:
    if cell.source.startswith("#| colab") or cell is nb.cells[-1]:
        print("".join(output.text for output in cell.outputs))
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


def released(folder):
    "Git's settings for a machine where the repository's address is this checkout, with its tag."
    settings = build.read_settings()
    bare = folder / "released.git"
    for command in (["clone", "-q", "--bare", "--depth", "1", ROOT.as_uri(), bare],
                    ["-C", bare, "tag", f"v{settings['version']}"]):
        subprocess.run(["git", *command], check=True)
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{bare.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": settings["git_url"]}


@pytest.mark.parametrize("chapter", ["03_images", "23_full_size"])
def test_chapter_runs_as_on_colab(colab, dist, tmp_path, chapter):  # noqa: F811
    """From nothing but the notebook, which installs the wheel itself, and clones the repository if
    it needs it.

    The index is replaced by the folder of the wheel; what is lent looks to pip as if it held
    `terd_nb`, so pip must be told not to mind."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FORCE_REINSTALL": "1"}
    env |= {"PIP_FIND_LINKS": str(dist), "MPLBACKEND": build.INLINE}
    env |= released(tmp_path)

    empty = tmp_path / "empty"
    empty.mkdir()

    def python(*arguments):
        command = [colab, *arguments]
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)

    run = python("-c", RUN, ROOT / "nbs" / f"{chapter}.ipynb")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "This chapter took" in run.stdout
    assert (empty / "terd-book").is_dir() == first_cells.needs_checkout(chapter)
    versions = f"terd_nb {__version__}, torch {version('torch')}, Python "  # torch stays
    assert versions in run.stdout and "GPU: " in run.stdout
    assert re.search(r"takes about \d+ minutes? on", run.stdout)
    assert "An edit here stays here" in run.stdout
    where = python("-c", "import terd_nb, google.colab; print(terd_nb.__file__)").stdout
    assert where.startswith(str(colab.parents[1]))
