"""The first cell of every notebook: it installs the version that the notebook belongs to.

`python book/first_cells.py` writes it anew, from the version in settings.ini and the run-time that
the notebook's last cell has printed, and leaves everything else as it is. The landing page keeps
the cell hidden, for README.md is made from it, and says nothing of minutes.
"""

import json
import math

from build import NBS, read_settings
from minutes import load_of

INSTALL = """import importlib.util
{clock}if importlib.util.find_spec("terd_nb") is None:
    get_ipython().run_line_magic("pip", "install -q terd_nb=={version}")
"""
HIDDEN = "#| hide\n# On Colab the package must be installed first.\n" + INSTALL.rstrip()
SHOWN = f"""#| colab
# @title On Colab, run this first
{INSTALL}from terd_nb.colab import welcome

welcome(minutes={{minutes}})"""
CLOCK = "import time\n\nclock = time.perf_counter()\n"


def first_cell(version, minutes=None):
    "Its text; without minutes, that of the landing page."
    if minutes is None:
        return HIDDEN.format(clock="\n", version=version)
    return SHOWN.format(clock=CLOCK, version=version, minutes=minutes)


def place_of(cells):
    "Where the cell stands among a notebook's cells."
    return next(i for i, cell in enumerate(cells) if "find_spec(" in "".join(cell["source"][:9]))


def main():
    version = read_settings()["version"]
    for path in sorted(NBS.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        nb = json.loads(text)
        minutes = max(1, math.ceil(load_of(path).seconds / 60))
        source = first_cell(version, None if path.stem == "index" else minutes)
        cell = nb["cells"][place_of(nb["cells"])]
        cell["source"] = source.splitlines(keepends=True)
        end = "\n" * text.endswith("\n")
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + end, encoding="utf-8")


if __name__ == "__main__":
    main()
