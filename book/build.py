"""Builds the book: nbs/*.ipynb and book/ become _build/html.

Sphinx wants all sources in one folder, and it knows nothing of nbdev. So each chapter is

1. run from its first cell to its last in an empty folder, which shows that it needs nothing but
   the installed package
   (a run is kept in _build/executed until the notebook, the library or the zoo changes);
   its folded solutions are run after it, each followed by its exercise's check cell, so that they
   cannot rot;
2. translated, after the run because hidden cells hold imports: hidden cells go, `#|` directives
   become MyST-NB's tags,
   `show_doc` becomes a heading, links between the repository's folders become links between pages;
3. checked: an image without an alt text stops the build;
4. staged in _build/stage with the pages of book/, and built with warnings as errors;
5. put beside its page as it is in nbs/, byte for byte: what a reader downloads runs;
6. made lighter by the scripts that its page does not use.

A page has no Python behind it, so nothing on it is a widget of Python's: a cell marked `#| live`
holds one for readers with a kernel and is left out here, after it has been run, and a piece of
book/assets takes its place.

Title, author, repository and branch come from settings.ini, where they stand once.
"""

import argparse
import hashlib
import importlib
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat.v4 import new_code_cell, new_markdown_cell

sys.path.insert(0, str(Path(__file__).parent))  # the tests load this file from elsewhere
import apparatus  # noqa: E402
import minutes  # noqa: E402
from apparatus import BookError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NBS, BOOK, BUILD = ROOT / "nbs", ROOT / "book", ROOT / "_build"
STAGE, EXECUTED = BUILD / "stage", BUILD / "executed"
# Seconds. Now and then a kernel's answer is lost, and would be waited for in vain: the first time
# that a cell takes longer, the chapter begins anew.
CELL_TIMEOUT, PATIENCE = 90, 300
INLINE = "module://matplotlib_inline.backend_inline"
WARM = "TERD_WARM_KERNELS"  # where warm.py serves, if it does

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PROGRESS_BAR = re.compile(r"\[\d[\d:]*(<[^\]]*)?, [^\]]*(it/s|s/it)\]")
PLACEHOLDER = "<!-- made by build.py -->"
HIDDEN = {"hide", "default_exp"}  # from readers of a page and of README.md alike
LIVE = "live"  # a cell that needs a kernel
WATCH_CONTROLS = f"__import__('runpy').run_path({str(BOOK / 'controls.py')!r})['watch']()"
MOVE_CONTROLS = "__import__('ipywidgets').interact.try_all()"
COLAB = "colab"  # the first cell, see first_cells.py
TAGS = {
    ("echo", "false"): "remove-input",
    ("hide_input", ""): "remove-input",
    ("output", "false"): "remove-output",
    ("code-fold", "true"): "hide-input",
}
NOT_FOR_READERS = re.compile(
    r"^%{1,2}\w.*\n?|^.*#\s*\|\s*hide_line\s*$\n?", re.M
)  # magics; hidden lines
# The theme brings its icons twice, as a font and as 1.5 MB of script; and it loads the index of all
# words on every page, though only the search page looks into it.
ICONS, SEARCH = (
    re.compile(rf'\s*<script[^>]*\ssrc="[^"]*(?:{names})\.js[^"]*"[^>]*></script>')
    for names in ("fontawesome", "searchtools|language_data|searchindex")
)
MATHJAX = re.compile(
    r"\s*<script>window\.MathJax = .*?</script>|\s*<script[^>]*/mathjax/[^>]*></script>"
)
SOLUTION = re.compile(r"<details[^>]*>\s*<summary[^>]*>\s*Solution.*?</details>", re.S)
PYTHON_FENCE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


# ---------------------------------------------------------------- reading


def read_settings():
    parser = ConfigParser()
    parser.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
    return parser["DEFAULT"]


def toc_names(node):
    "The file names in the table of contents, in order."
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("root", "file"):
                yield value
            else:
                yield from toc_names(value)
    elif isinstance(node, list):
        for item in node:
            yield from toc_names(item)


def read_toc():
    return yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))


def chapters_of_toc():
    "The toc's notebooks; every entry must exist, and every notebook must have one."
    names = list(toc_names(read_toc()))
    notebooks = {path.stem for path in NBS.glob("*.ipynb")}
    for name in names:
        if name not in notebooks and not (BOOK / f"{name}.md").exists():
            raise BookError(
                f"book/_toc.yml lists {name}, "
                f"but there is neither nbs/{name}.ipynb nor book/{name}.md"
            )
    if missing := sorted(notebooks - set(names)):
        raise BookError(
            f"not in book/_toc.yml: {', '.join(missing)}; add it there or remove it from nbs/"
        )
    return [name for name in names if name in notebooks]


def directives(cell):
    "The `#|` lines at the head of a code cell, as a dictionary, and the code below them."
    found, lines = {}, cell.source.splitlines()
    while lines and (match := re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)", lines[0])):
        value = match[2].strip()
        found[match[1]] = value[1:-1] if re.fullmatch(r"([\"']).*\1", value) else value
        lines.pop(0)
    return found, "\n".join(lines)


# ---------------------------------------------------------------- running


def hash_of(paths, *more):
    "Changes with the names and the contents of files, those in folders too, and with other texts."
    digest = hashlib.sha256("\0".join(map(str, more)).encode())
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])}
    for path in sorted(files):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def library_hash(package):
    """Changes with the library, the data and the pinned versions: what a run depends on, beside the
    notebook's own text."""
    return hash_of([ROOT / package, ROOT / "data", ROOT / "requirements.lock"])


def book_hash(package, committed):
    "Changes with all that the book is made of; `committed`: whether with the committed outputs."
    about = [ROOT / "settings.ini", ROOT / "CITATION.cff"]
    npm = shutil.which("npm") is not None  # without it one page stands still
    return hash_of([NBS, BOOK, *about], library_hash(package), committed, npm)


def is_skipped(cell):
    "Cells that nbdev does not run either keep their committed outputs."
    found, _ = directives(cell)
    return found.get("eval") == "false" or "slow" in found


def solutions(cells):
    "Cells to run after the chapter: each solution's code, then the check cell of its exercise."
    check = None
    for cell in cells:
        if cell.cell_type == "code" and "check" in directives(cell)[0]:
            check = cell.source
        elif cell.cell_type == "markdown":
            for solution in SOLUTION.findall(cell.source):
                if code := "\n".join(PYTHON_FENCE.findall(solution)):
                    yield new_code_cell(code)
                    if check:
                        yield new_code_cell(check, metadata={"must_print": "Correct"})
                    check = None


def printed_by(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def run_cells(nb, timeout=CELL_TIMEOUT):
    "Every cell in a new kernel, in a folder that holds nothing else."
    try:
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                nb,
                timeout=timeout,
                kernel_name="python3",
                resources={"metadata": {"path": folder}},
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
            client.create_kernel_manager()
            if address := os.environ.get(WARM):
                start = [sys.executable, "-ES", str(BOOK / "warm.py"), "kernel", address]
                client.km.kernel_spec.argv = [*start, "-f", "{connection_file}"]
            client.execute()
    except CellTimeoutError as error:
        if timeout == PATIENCE:
            raise
        print(f"once more, for no answer came: {error}", flush=True)
        run_cells(nb, PATIENCE)


def execute(path, target):
    """Run one notebook, its solutions and its controls included, and keep it with its outputs and
    its run-time."""
    nb = nbformat.read(path, as_version=4)
    own, solved = nb.cells, list(solutions(nb.cells))
    nb.cells = [new_code_cell(WATCH_CONTROLS), *own, *solved, new_code_cell(MOVE_CONTROLS)]
    for cell in nb.cells:
        if cell.cell_type == "code" and is_skipped(cell):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]
    started = time.perf_counter()
    os.environ["MPLBACKEND"] = INLINE  # whoever calls may have another, which shows no figures
    try:
        run_cells(nb)
    except CellExecutionError as error:
        raise BookError(
            f"{error}\n{path.name}: a cell raised {error.ename}: {error.evalue}"
        ) from None
    for cell in own:
        if "check" in directives(cell)[0] and "Correct" in printed_by(cell):
            raise BookError(
                f"{path.name}: an exercise passes its check before anybody has done it:\n"
                f"{cell.source}"
            )
    for cell in solved:
        printed = printed_by(cell)
        if cell.metadata.get("must_print", "") not in printed:
            raise BookError(
                f"{path.name}: a solution does not pass its check, which printed {printed!r}:\n"
                f"{cell.source}"
            )
    nb.cells = own
    nb.metadata["seconds"] = round(time.perf_counter() - started, 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{path.stem}.*.ipynb"):
        old.unlink()
    nbformat.write(nb, target)


def kept_run(name, library):
    "Where the run of a chapter is kept that has this text, with the library of this hash."
    key = hash_of([NBS / f"{name}.ipynb"], library)[:16]
    return EXECUTED / f"{name}.{key}.ipynb"


@contextmanager
def warm_kernels(python=sys.executable, env=None):
    "Kernels that have imported what chapters import, see warm.py; where they come from."
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/kernels"
        env = (env or os.environ) | {"MPLBACKEND": INLINE}  # is read where matplotlib is imported
        server = subprocess.Popen([python, "-P", BOOK / "warm.py", "serve", address], env=env)
        try:
            yield address
        finally:
            server.kill()
            server.wait()


def execute_all(names, package, jobs):
    "Run what has changed, `jobs` at a time; where each run is kept."
    library = library_hash(package)
    targets = {name: kept_run(name, library) for name in names}
    todo = [name for name in names if not targets[name].exists()]
    print(f"chapters to run: {len(todo)} of {len(names)}, the others are unchanged", flush=True)
    if not todo:
        return targets
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    errors = []
    with (
        warm_kernels() as address,
        patch.dict(os.environ, {WARM: address}),
        ProcessPoolExecutor(jobs) as pool,
    ):
        running = {
            pool.submit(execute, NBS / f"{name}.ipynb", targets[name]): name for name in todo
        }
        for future in as_completed(running):
            try:
                future.result()
                seconds = nbformat.read(targets[running[future]], as_version=4).metadata["seconds"]
                print(f"  {running[future]}: {seconds:.0f} s", flush=True)
            except BookError as error:
                errors.append(str(error))
    if errors:
        raise BookError("\n\n".join(errors))
    return targets


# ---------------------------------------------------------------- translating


def relink(text, repository):
    """Links between the repository's folders become links between pages; badges from elsewhere
    become their text."""
    text = re.sub(r"!\[([^\]]*)\]\(https?://[^)]*\)", r"\1", text)
    text = re.sub(r"\]\(\.\./(?:book|nbs)/", "](", text)
    return re.sub(r"\]\(\.\./", f"]({repository}/", text)


def cell_metadata(found, code):
    """MyST-NB's tags and settings for what the directives ask for. Imports, plots and the checks of
    exercises are folded: a page shows the code that it speaks of."""
    tags = {TAGS[item] for item in found.items() if item in TAGS}
    summary = found.get("code-summary")
    folded = {directive: name for directive, name in minutes.FOLDS.items() if directive in found}
    if minutes.only_imports(code):
        folded["import"] = "Imports"
    if folded:
        tags.add("hide-input")
        summary = summary or " ".join(folded.values())
    if COLAB in found:
        tags.add("hide-input")
        summary = "On Colab, run this first"
    settings = {}
    if alt := found.get("fig-alt"):
        settings["image"] = {"alt": alt}
    if caption := found.get("fig-cap"):
        settings["figure"] = {"caption": caption}
    if summary:
        settings |= {"code_prompt_show": summary, "code_prompt_hide": summary}
    return {"tags": sorted(tags)} | ({"mystnb": settings} if settings else {})


def show_doc_text(output, level):
    """What `show_doc` printed, as Sphinx takes it: no leading rule, no Quarto attributes, the right
    heading level."""
    text = output["data"]["text/markdown"].removeprefix("---").strip()
    text = re.sub(r"\{target=[^}]*\}", "", text)
    return re.sub(r"^#+ (.+)$", lambda m: f"{'#' * level} `{m[1]}`", text, count=1, flags=re.M)


def is_progress_bar(output):
    "Of tqdm: it says nothing to those who come later."
    data = output.get("data", {})
    return WIDGET_VIEW in data and PROGRESS_BAR.search(data.get("text/plain", ""))


def translate_outputs(cell, alt):
    "Takes away what a page cannot show; what is wrong with the rest, if anything."
    cell.outputs = [output for output in cell.outputs if not is_progress_bar(output)]
    if COLAB in directives(cell)[0]:
        cell.outputs = []  # the tests run it as on Colab, where it has something to say
    images = 0
    for output in cell.outputs:
        data = output.get("data", {})
        images += any(kind.startswith("image/") for kind in data)
        if re.search(r"<img(?![^>]*\balt=[\"'][^\"'])", data.get("text/html", "")):
            yield "an <img> in its HTML output has no alt text"
        if WIDGET_VIEW in data:
            yield (
                "a widget would stand still on the page; mark its cell `#| live` and let a piece "
                "of book/assets stand for it"
            )
    if alt and not images:
        yield "it has an alt text, but no picture; was it run where its data are?"
    if images and not alt:
        yield "its image has no alt text; begin the cell with `#| fig-alt: what the picture shows`"
    if images > 1:
        yield f"it has {images} images, but one alt text can describe one only; make a cell of each"


def translate(nb, name, repository):
    "The chapter as a page of the book; raises `BookError` with all that is wrong in it."
    cells, problems, level = [], [], 1
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, repository)
            level = max(
                (len(m) for m in re.findall(r"^(#+) ", cell.source, re.M)[-1:]), default=level
            )
        elif cell.cell_type == "code":
            found, code = directives(cell)
            if (HIDDEN | {LIVE}) & set(found) or found.get("include") == "false":
                continue
            if re.search(r"^show_doc\(", code, re.M):
                shown = [
                    output for output in cell.outputs if "text/markdown" in output.get("data", {})
                ]
                cells += [
                    new_markdown_cell(show_doc_text(output, min(level + 1, 4))) for output in shown
                ]
                continue
            cell.source = NOT_FOR_READERS.sub("", code).strip()
            cell.metadata = cell_metadata(found, cell.source)
            wrong = translate_outputs(cell, found.get("fig-alt", ""))
            problems += [f"nbs/{name}.ipynb, cell {i}: {problem}" for problem in wrong]
        cells.append(cell)
    if not any(
        cell.cell_type == "markdown" and re.search(r"^# ", cell.source, re.M) for cell in cells
    ):
        problems.append(f"nbs/{name}.ipynb has no title; begin a markdown cell with `# `")
    if problems:
        raise BookError("\n".join(problems))
    nb.cells = cells
    kept = ("kernelspec", "language_info")
    nb.metadata = {key: nb.metadata[key] for key in kept if key in nb.metadata}
    return nb


# --------------------------------------------------- pages made from the library and from the runs


def reference(names, package):
    "Every exported name, module by module, with its signature and its docstring."
    sys.path.insert(0, str(ROOT))
    from nbdev.showdoc import show_doc

    parts = []
    for name in names:
        source = nbformat.read(NBS / f"{name}.ipynb", as_version=4)
        code = [directives(cell)[0] for cell in source.cells if cell.cell_type == "code"]
        module_name = next((found["default_exp"] for found in code if "default_exp" in found), None)
        if module_name is None:
            continue
        module = importlib.import_module(f"{package}.{module_name}")
        parts.append(f"## `{package}.{module_name}`\n\nMade in {{doc}}`{name}`.")
        for symbol in module.__all__:
            thing = getattr(module, symbol)
            if not (inspect.isfunction(thing) or inspect.isclass(thing)):
                continue
            members = [(symbol, thing)]
            if inspect.isclass(thing):
                members += [
                    (f"{symbol}.{key}", value)
                    for key, value in vars(thing).items()
                    if inspect.isfunction(value) and not key.startswith("_") and value.__doc__
                ]
            for full_name, member in members:
                parts.append(f"```{{index}} single: {full_name} ({package}.{module_name})\n```")
                text = show_doc(member, name=full_name)._repr_markdown_()
                parts.append(
                    show_doc_text({"data": {"text/markdown": text}}, 3 if member is thing else 4)
                )
    return "\n\n".join(parts)


def run_times(names, notebooks):
    "A table of how long each chapter took when this book was built."
    if not all("seconds" in notebooks[name].metadata for name in names):
        return "This copy of the book was built from committed outputs, so nothing was measured."
    rows = [f"| {{doc}}`{name}` | {notebooks[name].metadata['seconds']:.0f} s |" for name in names]
    system = f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores"
    machine = f"{system}, Python {platform.python_version()}"
    return "\n".join(
        [f"Measured on: {machine}.", "", "| chapter | run-time |", "|---|---:|", *rows]
    )


# ---------------------------------------------------------------- staging and building


def stage(names, sources, settings):
    "Everything that Sphinx reads, in one folder."
    package = settings["lib_name"]
    repository = settings["git_url"]
    blob = f"{repository}/blob/{settings['branch']}"
    notebooks = {name: nbformat.read(sources[name], as_version=4) for name in names}
    toc = read_toc()
    maps = apparatus.maps_of(toc)
    filled = {
        "reference": reference(names, package),
        "run_times": run_times(names, notebooks),
        "preface": apparatus.book_map(toc),
        "cite": apparatus.how_to_cite(
            yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")),
            re.search(r"\d{4}", settings["copyright"])[0],
        ),
    }
    keys = apparatus.keys_of(BOOK / "references.bib")
    terms = apparatus.terms_of((BOOK / "glossary.md").read_text(encoding="utf-8"))

    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(BOOK, STAGE, ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.md"))
    import live  # takes as long as all the rest, and a chapter's run has no use for it

    try:
        filled["live_model"] = live.stage(STAGE / "assets")
    except live.LiveError as error:
        raise BookError(str(error)) from None
    for page in BOOK.glob("*.md"):
        source = page.read_text(encoding="utf-8")
        if page.stem == "teaching":
            source = minutes.fill(source)
        text = apparatus.cite(relink(source, blob), keys)
        text = text.replace(PLACEHOLDER, filled.get(page.stem, ""))
        if page.stem.startswith("quiz_"):
            text = apparatus.quiz_page(text, page.stem)
        (STAGE / page.name).write_text(text, encoding="utf-8")
    errors = []
    for name, nb in notebooks.items():
        try:
            page = translate(nb, name, blob)
            for cell in page.cells:
                if cell.cell_type == "markdown":
                    cell.source = apparatus.cite(cell.source, keys)
            if re.match(r"\d", name):
                apparatus.index_cells(page.cells, terms)
        except BookError as error:
            errors.append(str(error))
        else:
            if name in maps:
                page.cells.insert(1, new_markdown_cell(maps[name]))
            nbformat.validate(page)
            nbformat.write(page, STAGE / f"{name}.ipynb")
    if errors:
        raise BookError("\n".join(errors))

    config = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))
    config |= {
        "title": settings["title"],
        "author": settings["author"],
        "copyright": settings["copyright"],
        "repository": {"url": repository, "branch": settings["branch"], "path_to_book": NBS.name},
    }
    (STAGE / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def offer_downloads(names):
    "Beside each page, the chapter as it is in nbs/: what the page shows lacks its hidden cells."
    for name in names:
        shutil.copyfile(NBS / f"{name}.ipynb", BUILD / "html" / "_sources" / f"{name}.ipynb")


def lighten(page):
    "A page's HTML without what it loads in vain."
    page = apparatus.unwrap(page)
    page = ICONS.sub("", page)
    if "DOCUMENTATION_OPTIONS.pagename = 'search'" not in page:
        page = SEARCH.sub("", page)
    if 'class="math' not in page:
        page = MATHJAX.sub("", page)
    return page.replace("fab fa-github", "fas fa-code-branch")  # else a font for one icon


def finish(names):
    "What Sphinx does not do: the downloads, and lighter pages."
    offer_downloads(names)
    for path in (BUILD / "html").glob("*.html"):
        path.write_text(lighten(path.read_text(encoding="utf-8")), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Build the book into _build/html.")
    parser.add_argument(
        "--no-execute", action="store_true", help="use the notebooks' committed outputs"
    )
    parser.add_argument(
        "--run", metavar="CHAPTER", help="only run this chapter, and keep the run for the book"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="chapters to run at the same time (default: 2)"
    )
    args = parser.parse_args()
    os.chdir(ROOT)  # nbdev looks for settings.ini from the working directory upwards
    site, made_of = BUILD / "html", BUILD / "book.sha256"
    try:
        settings, names = read_settings(), chapters_of_toc()
        if args.run:
            execute_all([args.run], settings["lib_name"], 1)
            return
        now = book_hash(settings["lib_name"], args.no_execute)
        if made_of.exists() and made_of.read_text() == now and (site / "index.html").exists():
            print("the book: nothing has changed")
            return
        made_of.unlink(missing_ok=True)
        committed = {name: NBS / f"{name}.ipynb" for name in names}
        stage(
            names,
            committed if args.no_execute else execute_all(names, settings["lib_name"], args.jobs),
            settings,
        )
    except BookError as error:
        raise SystemExit(f"{error}\nbook: not built, see above") from None
    shutil.rmtree(site, ignore_errors=True)  # pages of chapters that are gone
    built = subprocess.run(
        [
            Path(sys.executable).with_name("jupyter-book"),
            "build",
            STAGE,
            "--path-output",
            ROOT,
            "--all",
            "--quiet",
            "-W",
            "--keep-going",
        ]
    )
    if built.returncode:
        raise SystemExit("book: Sphinx has warnings, see above; each of them must be mended")
    finish(names)
    made_of.write_text(now)
    print(f"the book: {(site / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
