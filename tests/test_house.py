"The house rules: metadata kept once, floors between chapters, a library without Jupyter, what the repository may hold."
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(path for path in (ROOT / "terd_nb").glob("*.py") if not path.name.startswith("_"))
by_stem = {"ids": lambda path: path.stem}


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser()
    parser.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def tracked():
    "The files that git tracks, or would if all were added now."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


# ---------------------------------------------------------------- metadata, once

def test_version_and_name_come_from_settings(settings):
    import terd_nb

    installed = metadata("terd_nb")
    assert terd_nb.__version__ == installed["Version"] == settings["version"]
    assert settings["lib_name"] == settings["repo"] == installed["Name"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (str(citation["version"]), citation["license"]) == (settings["version"], settings["license"])
    assert citation["repository-code"] == settings["git_url"]
    assert f"## [{settings['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_quarto_repeats_settings_and_the_books_chapters(settings):
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert quarto["title"] == settings["title"]
    assert quarto["description"] == settings["description"]
    assert quarto["site-url"] == settings["doc_host"] + settings["doc_baseurl"]
    assert quarto["repo-url"] == settings["git_url"]
    assert quarto["repo-branch"] == settings["branch"]

    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    names = {path.stem for path in NOTEBOOKS}
    in_toc = [("", toc["root"])]
    in_toc += [(part["caption"], entry["file"]) for part in toc["parts"] for entry in part["chapters"]
               if entry["file"] in names]
    in_quarto = []
    for entry in quarto["sidebar"]["contents"]:
        section, files = ("", [entry]) if isinstance(entry, str) else (entry["section"], entry["contents"])
        in_quarto += [(section, Path(file).stem) for file in files]
    assert in_quarto == in_toc
    assert sorted(name for _, name in in_quarto) == sorted(names)


def test_lock_fits_the_ranges(settings):
    lock = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (spec,) = pin.specifier
            assert spec.operator == "==" and "+" not in spec.version and not pin.url, line
            lock[canonicalize_name(pin.name)] = spec.version
    ranges = "\n".join(settings[key] for key in ("requirements", "book_requirements", "dev_requirements",
                                               "ray_requirements"))
    for wanted in map(Requirement, ranges.split()):
        assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)]), wanted


# ---------------------------------------------------------------- the library

def imported_from_the_package(path):
    "The names of this package's modules that a module imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level or parts[0] == "terd_nb":
                inner = parts if node.level else parts[1:]
                yield from inner[:1] if inner and inner[0] else (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("terd_nb."))


def chapter_of(path):
    "The notebook that a module is exported from."
    return re.search(r"File to edit: \.\./nbs/(\w+)\.ipynb", path.read_text(encoding="utf-8"))[1]


def floor(module):
    "Where a chapter stands: its number; workshop B, which opens files, lies below them all, the command line above."
    chapter = chapter_of(ROOT / "terd_nb" / f"{module}.py")
    return {"b_checkpoints": "", "c_schedulers": "0", "a_cli": "zz"}.get(chapter, chapter.split("_")[0])


@pytest.mark.parametrize("path", MODULES, **by_stem)
def test_a_module_imports_only_from_lower_floors(path):
    modules = {p.stem for p in MODULES}
    for other in set(imported_from_the_package(path)) & modules:
        same_chapter = chapter_of(path) == chapter_of(ROOT / "terd_nb" / f"{other}.py")
        assert same_chapter or floor(other) < floor(path.stem), f"{path.stem} imports {other} from a higher floor"


@pytest.mark.parametrize("path", [p for p in MODULES if "07" <= floor(p.stem)[:2] <= "11"], **by_stem)
def test_the_defence_does_not_know_the_attacks(path):
    """Chapter 06, the oracle, stands on both sides; from 07 on nothing is known of an attack, not even through it.

    Nor of a family of models: the search is the same for all."""
    unknown = {"attacks", "planting", "zoo", "hard_set", "ideal", "any_path", "families"}
    assert not set(imported_from_the_package(path)) & unknown


def test_the_library_needs_no_jupyter():
    "A user of the library does not get the packages of the extra `book`, so importing it must not ask for them."
    extra = "IPython execnb fastcore ipykernel ipywidgets jupyter_client jupyterlab nbclient nbconvert nbdev nbformat"
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in extra.split())
    modules = ", ".join(f"terd_nb.{path.stem}" for path in MODULES)
    command = [sys.executable, "-c", f"import sys; {block}; import {modules}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


# ---------------------------------------------------------------- the notebooks

@pytest.mark.parametrize("path", NOTEBOOKS, **by_stem)
def test_notebook_keeps_the_grain(path):
    nb = nbformat.read(path, as_version=4)
    assert len(nb.cells) <= 80, "longer is two chapters"
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"an error is saved under:\n{cell.source}"
            for kind, data in output.get("data", {}).items():
                size = len(data if isinstance(data, str) else json.dumps(data)) * 3 // 4  # base64
                too_big = kind.startswith("image/") and size > 100_000
                assert not too_big, f"{size:,} bytes of {kind} under:\n{cell.source}"


# ---------------------------------------------------------------- the repository

def test_models_are_safetensors(tracked):
    pickles = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npz"}
    assert [path.name for path in tracked if path.suffix in pickles] == []


def test_the_repository_is_small(tracked):
    assert sum(path.stat().st_size for path in tracked) <= 120e6


# Written in pieces, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile("|".join(["/" + folder + "/" for folder in ("work", "root", "home")] + ["/" + "tmp/[a-z]"]))
HOSTS = [r"pypi", r"files\.python" + "hosted", r"registry\.npm" + "js", r"download\.py" + "torch"]
REGISTRY = re.compile(r"(?<![\w.-])(" + "|".join(HOSTS) + r")\.(org|com)\b")
UNFINISHED = re.compile(r"\b(TO" + "DO|FIX" + r"ME)\b|NotImplemented" + "Error")


def test_text_names_no_machine_no_registry_and_no_unfinished_work(tracked):
    found = []
    for path in tracked:
        if "vendor" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in [MACHINE_PATH, REGISTRY] + [UNFINISHED] * (path.suffix == ".py"):
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []
