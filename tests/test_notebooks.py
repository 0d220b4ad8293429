"""Every chapter runs from its first cell to its last, its solutions too, from a folder that holds
nothing else."""

import json
import os
import re
import subprocess
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from test_book import load_module
from test_wheel import dist, once  # noqa: F401  (fixtures)

from terd_nb import __version__

ROOT = Path(__file__).resolve().parents[1]
build, first_cells = load_module("build"), load_module("first_cells")
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="session")
def colab(dist, tmp_path_factory):  # noqa: F811
    """A Python that has everything but `terd_nb` and is called Colab, and its environment.

    What the library needs lies in this environment and is lent, as Colab has most of it; a path
    file does not lend this checkout's editable install. The index is replaced by the folder of the
    wheel; what is lent looks to pip as if it held `terd_nb`, so pip must be told not to mind."""
    home = tmp_path_factory.mktemp("colab")
    venv.create(home, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").touch()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FORCE_REINSTALL": "1"}
    env |= {"PIP_NO_COMPILE": "0"}    # which is pip's way to say yes
    env |= {"PIP_FIND_LINKS": str(dist), "MPLBACKEND": build.INLINE, "OMP_NUM_THREADS": "1"}
    return home / "bin" / "python", env | released(home)


def released(folder):
    "Git's settings for a machine where the repository's address is this checkout, with its tag."
    settings = build.read_settings()
    bare = folder / "released.git"

    def git(*command):
        subprocess.run(["git", *map(str, command)], check=True)

    git("clone", "-q", "--bare", "--shared", ROOT, bare)
    here = ["-c", "core.bare=false", f"--git-dir={bare}", f"--work-tree={ROOT}"]
    author = ["-c", "user.name=terd_nb", "-c", "user.email=terd_nb"]
    git(*here, "add", "-A")
    git(*here, *author, "commit", "-q", "--allow-empty", "-m", "as it lies here")
    git(f"--git-dir={bare}", "tag", f"v{settings['version']}")
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{bare}.insteadOf",
            "GIT_CONFIG_VALUE_0": settings["git_url"]}


@pytest.fixture(scope="session")
def warm(colab):
    "Where kernels of that Python come from that have imported what chapters import."
    python, env = colab
    with build.warm_kernels(python, env) as address:
        yield address


@pytest.fixture(scope="session")
def library():
    return build.library_hash("terd_nb")


def last_run(chapter):
    "What the cells printed that speak on Colab: the first, and the last, which tells the time."
    (kept,) = build.EXECUTED.glob(f"{chapter}.*.ipynb")
    cells = nbformat.read(kept, as_version=4).cells
    first = next(cell for cell in cells if cell.source.startswith("#| colab"))
    return build.printed_by(first), build.printed_by(cells[-1])


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs_as_on_colab(chapter, colab, warm, library, tmp_path, monkeypatch):
    """From nothing but the notebook, which installs the wheel itself, and clones the repository if
    it needs it. The run is kept: `make book` does not repeat it."""
    _, env = colab
    env = env | {"PYTHONPATH": str(tmp_path), "PIP_TARGET": str(tmp_path), build.WARM: warm}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    build.execute(ROOT / "nbs" / f"{chapter}.ipynb", build.kept_run(chapter, library))
    assert (tmp_path / "terd_nb").is_dir()
    if chapter == "index":
        return
    said, took = last_run(chapter)
    versions = f"terd_nb {__version__}, torch {version('torch')}, Python "  # torch stays
    assert versions in said and "GPU: " in said
    assert re.search(r"takes about \d+ minutes? on", said)
    assert "An edit here stays here" in said
    assert re.search(r"This \w+ took \d+ s", took)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_first_cell_is_the_same_in_every_chapter(chapter):
    "It installs the version that the notebook belongs to; `python book/first_cells.py` writes it."
    cells = json.loads((ROOT / "nbs" / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    first = next(source for source in sources if not source.startswith("#| default_exp"))
    minutes = re.search(r"welcome\(minutes=(\d+)\)", first)
    assert (minutes is None) == (chapter == "index")
    assert first == first_cells.first_cell(chapter, minutes and int(minutes[1]))
