"""The house rules: metadata kept once, floors between chapters, a library without Jupyter, what the
repository may hold."""

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

from terd_nb import style

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
import minutes  # noqa: E402

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(path for path in (ROOT / "terd_nb").rglob("*.py") if not path.name.startswith("_"))
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
    names = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


# ---------------------------------------------------------------- metadata, once


def test_version_and_name_come_from_settings(settings):
    import terd_nb

    installed = metadata("terd_nb")
    assert terd_nb.__version__ == installed["Version"] == settings["version"]
    assert settings["lib_name"] == settings["repo"] == installed["Name"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (str(citation["version"]), citation["license"]) == (
        settings["version"],
        settings["license"],
    )
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
    in_toc += [
        (part["caption"], entry["file"])
        for part in toc["parts"]
        for entry in part["chapters"]
        if entry["file"] in names
    ]
    in_quarto = []
    for entry in quarto["sidebar"]["contents"]:
        section, files = (
            ("", [entry]) if isinstance(entry, str) else (entry["section"], entry["contents"])
        )
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
    ranges = "\n".join(
        settings[key]
        for key in settings
        if key.endswith("requirements")
    )
    for wanted in map(Requirement, ranges.split()):
        assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)]), wanted


# ---------------------------------------------------------------- the library


def module_of(path):
    "The dotted name of a module inside the package."
    return ".".join(path.relative_to(ROOT / "terd_nb").with_suffix("").parts)


def imported_from_the_package(path, anywhere=True):
    """The modules of this package that a module imports, anywhere in it or only when it is imported
    itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["terd_nb", *path.relative_to(ROOT / "terd_nb").parts[:-1]]
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        names = {name.removeprefix("terd_nb.") for name in found if name.startswith("terd_nb.")}
        yield from names & set(GRAPH_NAMES)


GRAPH_NAMES = [module_of(path) for path in MODULES]
GRAPH = {module_of(path): set(imported_from_the_package(path)) for path in MODULES}


def below(module, seen=()):
    "All modules that a module rests on; a circle is an error."
    assert module not in seen, f"a circle of imports: {' -> '.join([*seen, module])}"
    return GRAPH[module].union(*(below(other, (*seen, module)) for other in GRAPH[module]))


def chapter_of(module):
    "The notebook that a module is exported from."
    path = ROOT / "terd_nb" / f"{module.replace('.', '/')}.py"
    return re.search(r"File to edit: (?:\.\./)+nbs/(\w+)\.ipynb", path.read_text(encoding="utf-8"))[
        1
    ]


def numbered_chapters():
    "The chapters before the Workshop, in the order of the book."
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    return [
        entry["file"]
        for part in toc["parts"]
        for entry in part["chapters"]
        if re.match(r"\d", entry["file"])
    ]


@pytest.mark.parametrize("module", GRAPH_NAMES)
def test_arrows_only_go_down(module):
    """No circle; and what a chapter's module imports comes from an earlier chapter, or from the
    Workshop."""
    below(module)
    order = numbered_chapters()
    if (chapter := chapter_of(module)) in order:
        later = order[order.index(chapter) + 1 :]
        assert [other for other in GRAPH[module] if chapter_of(other) in later] == []


@pytest.mark.parametrize("path", NOTEBOOKS, **by_stem)
def test_a_chapter_and_its_module_have_one_name(path):
    """So that a reader guesses every file from the list of chapters: b_checkpoints is
    loading.checkpoints."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    exports = [cell.split()[2] for cell in cells if cell.startswith("#| default_exp")]
    name = re.sub(r"^(\d+[bc]?|[a-z]\d?)_", "", path.stem)
    name = {"one_number": "toy"}.get(name, name)  # the module says what it is, the chapter why
    assert exports in ([], [name]) or exports[0].split(".")[-1] == name


def test_chapters_stand_in_the_order_of_their_numbers():
    order = numbered_chapters()
    assert order == sorted(order)


DEFENCE = [
    "denoiser",
    "reversed_loss",
    "two_stages",
    "directions",
    "path_fit",
    "search",
    "input_detection",
    "model_detection",
    "rivals",
    "report",
    "scanning",
    "guard",
]


@pytest.mark.parametrize("module", DEFENCE)
def test_the_defence_does_not_know_the_attacks(module):
    """A defender does not know what was planted, nor how, nor in which kind of model the search is
    at work."""
    attacker = {"attacks", "planting", "training", "ideal_model", "success", "zoo"}
    assert {
        other for other in below(module) if other in attacker or other.startswith("lab.")
    } == set()


def test_a_repair_trains_and_does_not_know_the_attacks():
    attacker = {"attacks", "planting", "ideal_model", "success", "zoo"}
    assert not {name for name in below("removal") if name in attacker or name.startswith("lab.")}


@pytest.mark.parametrize("module", [name for name in GRAPH_NAMES if not name.startswith("lab.")])
def test_the_library_does_not_need_the_evidence(module):
    "`terd_nb.lab` made this book's evidence; a command imports it when it needs it."
    path = ROOT / "terd_nb" / f"{module.replace('.', '/')}.py"
    at_once = set(imported_from_the_package(path, anywhere=False))
    assert {other for other in at_once if other.startswith("lab.")} == set()


def test_no_public_name_means_two_things():
    places = {}
    for path in MODULES:
        found = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.S | re.M)
        for name in ast.literal_eval(found[1]) if found else []:
            places.setdefault(name, []).append(module_of(path))
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_the_library_needs_no_jupyter():
    """A user of the library does not get the packages of the extra `book`, so importing it must not
    ask for them."""
    extra = "IPython execnb fastcore ipykernel ipywidgets jupyter_client jupyterlab nbclient "
    extra += "nbconvert nbdev nbformat"
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in extra.split())
    modules = ", ".join(f"terd_nb.{name}" for name in GRAPH_NAMES)
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


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[0].isdigit()], **by_stem)
def test_each_figure_says_what_to_see(path):
    "An alt text tells what is there to those who cannot see it; a caption, what to look for."
    for cell in nbformat.read(path, as_version=4).cells:
        if re.search(r"^#\| fig-alt", cell.source, re.M):
            assert re.search(r"^#\| fig-cap: \"\S.*\.\"$", cell.source, re.M), cell.source


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[0].isdigit()], **by_stem)
def test_each_chapter_has_one_control(path):
    "For whoever has a kernel; that it changes something is tried where the chapter is run."
    cells = nbformat.read(path, as_version=4).cells
    live = [cell for cell in cells if re.search(r"^#\| live$", cell.source, re.M)]
    assert len(live) == 1 and re.search(r"\binteract\(", live[0].source)
    assert re.search(r"^# \S", live[0].source, re.M), "it does not say what to try"
    assert not live[0].outputs, "a widget stands still where its cell is only read"


WIDE = 88  # characters of a line that a page shows
LONG_CELL, LONG_FUNCTION = 30, 25  # lines

# What is longer, and why. What is not longer any more must go from here: the tests ask for
# equality.
A_CLASS = "one class, of short methods"
A_TABLE = "one row for each argument of diffusers' class"
OPTIONS = "a commented signature; its body is short"
LONGER_CELLS = {
    "01_diffusion: NoiseSchedule": A_CLASS,
    "01_diffusion: Prediction": A_CLASS,
    "02_denoiser: Denoiser": A_CLASS,
    "08_ideal_model: IdealModel": A_CLASS,
    "11_input_detection: InputDetector": A_CLASS,
    "12_model_detection: ModelDetector": A_CLASS,
    "18_scanning: ScanReport": A_CLASS,
    "18b_guard: Guard": A_CLASS,
    "18_scanning: ScanResult": A_TABLE,
    "d2_explorer: Explorer": A_CLASS,
    "b1_contracts: UNetConfig": A_TABLE,
    "15_path_fit: Paths": A_CLASS,
    "15_path_fit: Descent": A_CLASS,
    "16_search: fast": OPTIONS,
    "e_training: fit": OPTIONS,
    "a3_ledger: Ledger": A_CLASS,
    "a_cli: scan_zoo": OPTIONS,
    "a_cli: scan_models": OPTIONS,
    "a_cli: flag_inputs": OPTIONS,
    "a5_repair: repair_model": OPTIONS,
    "18_scanning: scan": OPTIONS,
    "j_cli: plant_backdoor": OPTIONS,
    "j_cli: fetch_data": OPTIONS,
    "j_cli: build_models": OPTIONS,
    "j_cli: run_bench": OPTIONS,
}
LONGER_FUNCTIONS = {
    "cli.run_fleet": OPTIONS,
    "cli.scan_zoo": OPTIONS,
    "cli.scan_models": OPTIONS,
    "cli.flag_inputs": OPTIONS,
    "cli.convert_pickles": OPTIONS,
    "fleet.work_off": OPTIONS,
    "lab.cli.plant_backdoor": OPTIONS,
    "lab.cli.fetch_data": OPTIONS,
    "lab.cli.build_models": OPTIONS,
    "lab.cli.verify_zoo": OPTIONS,
    "lab.cli.run_bench": OPTIONS,
    "lab.datasets.load_dataset": OPTIONS,
    "lab.model_sets.build_model": OPTIONS,
    "planting.plant": OPTIONS,
    "repair.repair_model": OPTIONS,
    "removal.remove_backdoor": OPTIONS,
    "rivals.elijah": OPTIONS,
    "scanning.scan": OPTIONS,
    "search.fast": OPTIONS,
    "search.reverse_trigger": OPTIONS,
    "training.fit": OPTIONS,
    "two_stages.descend": OPTIONS,
}


def code_cells():
    """Each code cell: its chapter, the public name that it defines last, and its lines but for
    directives."""
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
                names = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", cell.source, re.M)
                yield path.stem, (names or ["no name"])[-1], lines


def test_code_fits_on_a_page():
    assert [
        (chapter, len(line), line[:60])
        for chapter, _, lines in code_cells()
        for line in lines
        if len(line) > WIDE
    ] == []


def test_a_cell_says_one_thing():
    found = {
        f"{chapter}: {name}" for chapter, name, lines in code_cells() if len(lines) > LONG_CELL
    }
    assert found == LONGER_CELLS.keys()


def functions(path):
    """Each function and method of a module by its dotted name: its lines, and those of its body
    alone."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}"
                if isinstance(child, ast.FunctionDef):
                    body = child.body[1:] if ast.get_docstring(child) else child.body
                    first = body[0].lineno if body else child.end_lineno
                    yield name, child.end_lineno - child.lineno + 1, child.end_lineno - first + 1
                yield from walk(child, name)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), module_of(path))


def test_a_function_fits_into_a_glance():
    found = [function for path in MODULES for function in functions(path)]
    assert {name for name, lines, _ in found if lines > LONG_FUNCTION} == LONGER_FUNCTIONS.keys()
    assert [name for name, _, body in found if body > LONG_FUNCTION] == []


# ---------------------------------------------------------------- the repository


def test_models_are_safetensors(tracked):
    pickles = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npz"}
    assert [path.name for path in tracked if path.suffix in pickles] == []


def test_the_repository_is_small(tracked):
    assert sum(path.stat().st_size for path in tracked) <= 120e6


# Written in pieces, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(
    "|".join(["/" + folder + "/" for folder in ("work", "root", "home")] + ["/" + "tmp/[a-z]"])
)
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


# ---------------------------------------------------------------- one colour, one meaning

MEANT = [
    style.DOUBT,
    *style.KIND_COLOURS.values(),
    *style.METHOD_COLOURS.values(),
    *style.ATTACK_COLOURS.values(),
    *style.CYCLE,
]
# The defaults of matplotlib and of seaborn: by number, by their place in the cycle, or by name.
NOT_OURS = ["sns.set_theme", "seaborn.set_theme", "color_palette("]
BY_CHANCE = re.compile(r"[\"']C\d[\"']|#4c72b0|#dd8452|#c44e52|color=[\"']orange[\"']")


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != "m_style"], **by_stem)
def test_a_chapter_asks_the_style_for_its_colours(path):
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert [one for one in NOT_OURS if one in code] == []
    assert BY_CHANCE.findall(code) == []
    assert {one for one in MEANT if one in code.lower()} == set()


def test_a_colour_of_a_meaning_stands_in_one_place():
    paths = [path for path in (ROOT / "terd_nb").rglob("*.py") if path.stem != "style"]
    paths += (ROOT / "book").glob("*.py")
    found = {path.name: [one for one in MEANT if one in path.read_text().lower()] for path in paths}
    assert {name: colours for name, colours in found.items() if colours} == {}


def colours_of(text, prefix):
    "The values of a sheet's variables with a prefix, by what comes behind it, in their order."
    found = {}
    for name, value in re.findall(rf"--{prefix}(\w+):\s*(#[0-9a-f]{{6}})", text):
        found.setdefault(name, []).append(value)
    return found


def test_the_page_has_the_colours_of_the_figures():
    "A browser cannot ask Python, so the style sheet and two pieces repeat the numbers."
    assets = ROOT / "book" / "assets"
    sheet, one_number, live = (
        (assets / name).read_text() for name in ("custom.css", "one_number.js", "live_model.js")
    )
    clean, triggered, weight = style.CLEAN, style.TRIGGERED, style.WEIGHT
    wanted = {
        "clean": [clean, style.BY_NIGHT[clean]],
        "triggered": [triggered, style.BY_NIGHT[triggered]],
        "weight": [weight, style.BY_NIGHT[weight]],
    }
    assert colours_of(one_number, "") == wanted
    piece = colours_of(sheet, "piece-")
    line = piece.pop("line")
    assert piece == {name: wanted[name] for name in ("clean", "triggered")}
    assert line[0] == style.CYCLE[0] and style.contrast(line[1], style.NIGHT) >= 3
    assert re.findall(r'strokeStyle = "(#[0-9a-f]{6})"', live) == [triggered]
    repeat = {"one_number.js", "live_model.js"}
    others = [path for path in assets.glob("*.js") if path.name not in repeat]
    assert [path.name for path in others for one in MEANT if one in path.read_text()] == []


# ---------------------------------------------------------------- a chapter fits into a sitting

@pytest.mark.parametrize("chapter", [path for path in NOTEBOOKS if re.match(r"\d", path.stem)])
def test_a_chapter_is_no_book(chapter):
    load = minutes.load_of(chapter)
    assert load.words <= 2000 and load.reading <= 45
    assert load.lines <= 120
