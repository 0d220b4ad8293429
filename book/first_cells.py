"""The first cell of every notebook: it installs the version that the notebook belongs to.

`python book/first_cells.py` writes it anew, from the version in settings.ini and the run-time that
the notebook's last cell has printed, and leaves everything else as it is. The landing page keeps
the cell hidden, for README.md is made from it, and says nothing of minutes. The workshop, and
chapters that look at models or a commit, need more than the package holds: there the cell fetches
the repository, and imports the package from it.
"""

import json
import math

from build import NBS, read_settings
from minutes import load_of

INSTALL = """import importlib.util
{clock}if importlib.util.find_spec("terd_nb") is None:
    get_ipython().run_line_magic("pip", "install -q terd_nb{extra}=={version}")
"""
CHECKOUT = """    book = "{repository}"
    get_ipython().system(f"git clone -q --depth 1 -b v{version} {{book}} terd-book")
    sys.path.insert(0, "terd-book")
"""
FROM_CHECKOUT = ("14_", "16_", "18c_", "20", "21", "22_", "23_")  # and the workshop
EXTRAS = {"l_serving": "[serve]"}
HIDDEN = "#| hide\n# On Colab the package must be installed first.\n" + INSTALL.rstrip()
SHOWN = f"""#| colab
# @title On Colab, run this first
{INSTALL}{{checkout}}from terd_nb.colab import welcome

welcome(minutes={{minutes}})"""
CLOCK = "import time\n\nclock = time.perf_counter()\n"


def needs_checkout(name):
    "Whether a chapter needs what the package does not hold."
    return name != "index" and (not name[0].isdigit() or name.startswith(FROM_CHECKOUT))


def first_cell(name, minutes=None):
    "The text of a chapter's; without minutes, that of the landing page."
    settings = read_settings()
    version, more = settings["version"], ""
    about = {"version": version, "extra": EXTRAS.get(name, "")}
    if minutes is None:
        return HIDDEN.format(clock="\n", **about)
    if needs_checkout(name):
        more = CHECKOUT.format(version=version, repository=settings["git_url"])
    cell = SHOWN.format(clock=CLOCK, minutes=minutes, checkout=more, **about)
    return cell.replace("import time", "import sys\nimport time") if more else cell


def place_of(cells):
    "Where the cell stands among a notebook's cells."
    return next(i for i, cell in enumerate(cells) if "find_spec(" in "".join(cell["source"][:9]))


def main():
    for path in sorted(NBS.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        nb = json.loads(text)
        minutes = max(1, math.ceil(load_of(path).seconds / 60))
        source = first_cell(path.stem, None if path.stem == "index" else minutes)
        cell = nb["cells"][place_of(nb["cells"])]
        cell["source"] = source.splitlines(keepends=True)
        end = "\n" * text.endswith("\n")
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + end, encoding="utf-8")


if __name__ == "__main__":
    main()
