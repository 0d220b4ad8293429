"The wheel and the source archive: what is in them, and that they work far from the checkout."

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from terd_nb import __version__

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd):
    "Run a command in a folder outside the checkout, as a user would who has never seen it."
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    "A function that lets the first of pytest's workers fill a folder, and gives it to the others."
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name, fill):
        path = shared / name
        with FileLock(f"{path}.lock"):
            if not (path / ".filled").exists():
                path.mkdir(exist_ok=True)
                fill(path)
                (path / ".filled").touch()
        return path

    return folder


@pytest.fixture(scope="session")
def dist(once):
    """The source archive, and the wheel built from it: what is missing in the first is missing in
    the second."""

    def build(out):
        built = run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]

    return once("dist", build)


@pytest.fixture(scope="session")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel, once):
    """The folder of the programs of a fresh environment that holds the wheel.

    The packages that the library needs are not downloaded again: a path file leads to those of this
    environment.
    Path files lie in the environment's own folder only, so this checkout's editable install stays
    out of sight.
    """

    def install(home):
        venv.create(home, symlinks=True)
        python = home / "bin" / "python"
        done = run(
            sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=home
        )
        assert done.returncode == 0, done.stderr
        site = next(home.glob("lib/python*/site-packages"))
        (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    return once("venv", install) / "bin"


def test_wheel_holds_the_library_and_its_data_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    sets = ("hard", "families", "sizes", "held-out", "later")
    left_out = [":!data/**/*.py", *(f":!data/{name}/**" for name in sets)]
    listing = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "terd_nb",
        "data",
        *left_out,
    ]
    expected = set(run(*listing, cwd=ROOT).stdout.splitlines())
    assert {name.replace("terd_nb/data/", "data/") for name in names} == expected
    assert any(name.endswith(".safetensors") for name in names)
    assert wheel.stat().st_size < 60e6


def test_wheel_describes_itself(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(
        name for name in archive.namelist() if name.endswith(".dist-info/METADATA")
    ).removesuffix("METADATA")
    described = email.message_from_string(archive.read(info + "METADATA").decode("utf-8"))
    assert (
        described.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    )
    assert described["License-Expression"] == "Apache-2.0"
    assert info + "licenses/LICENSE" in archive.namelist()
    # No Jupyter for a user of the library.
    plain = [value for value in described.get_all("Requires-Dist") if "extra ==" not in value]
    assert not [
        value
        for value in plain
        if value.startswith(("nbdev", "jupyter", "ipywidgets", "ipython", "nb"))
    ]


def test_source_archive_is_the_project_without_the_models_that_only_the_evidence_needs(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "settings.ini",
        "hatch_build.py",
        "requirements.lock",
        "Makefile",
        "LICENSE",
        "nbs/01_diffusion.ipynb",
        "book/_toc.yml",
        "tests/test_wheel.py",
        "terd_nb/diffusion.py",
        "data/detectors/published.json",
        "data/zoo/benign-a/unet/diffusion_pytorch_model.safetensors",
    }
    assert wanted <= names
    left_out = (".venv", "_build", ".git/", "data/hard", "data/families", "data/sizes",
                "data/held-out", "data/later")
    assert not [name for name in names if name.startswith(left_out)]
    assert path.stat().st_size <= 25e6


def test_installed_wheel_is_what_runs(installed, tmp_path):
    found = run(installed / "python", "-c", "import terd_nb; print(terd_nb.__file__)", cwd=tmp_path)
    assert Path(found.stdout.strip()).is_relative_to(installed.parent), found.stderr
    said = run(installed / "terd", "--version", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert __version__ in said.stdout


@pytest.mark.slow
def test_a_model_of_the_demo_is_judged_from_another_folder(installed, tmp_path):
    done = run(installed / "terd", "scan", "zoo:villan-psi05", cwd=tmp_path)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["backdoored"]


@pytest.mark.slow
@pytest.mark.parametrize("chapter", ["07b_zoo", "14_directions", "18c_blind"])
def test_a_chapter_that_looks_at_models_runs_from_the_wheel(chapter, installed, tmp_path):
    "The last two show more where the repository's other sets are."
    notebook = tmp_path / f"{chapter}.ipynb"
    notebook.write_bytes((ROOT / "nbs" / notebook.name).read_bytes())
    code = (
        "import sys; from pathlib import Path; from nbdev.test import test_nb; "
        "sys.exit(not test_nb(Path(sys.argv[1]), skip_flags=['slow'])[0])"
    )
    done = run(installed / "python", "-c", code, notebook, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
