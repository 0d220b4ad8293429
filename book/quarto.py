"""Stages the website that _quarto.yml describes in _build/quarto: each notebook as nbdev documents it.

Render it with `quarto render _build/quarto`; `make quarto-check` does so without Quarto.
"""
import os
import re
import shutil

import nbformat
from build import BUILD, NBS, ROOT, read_settings
from nbdev.serve import proc_nbs

STAGE = BUILD / "quarto"


def main():
    os.chdir(ROOT)  # nbdev looks for settings.ini from here upwards
    settings = read_settings()
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    processed = proc_nbs(force=True)
    shutil.move(processed, STAGE / NBS.name)
    shutil.copy(ROOT / "_quarto.yml", STAGE)
    for path in (STAGE / NBS.name).glob("*.ipynb"):
        nb = nbformat.read(path, as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "markdown":  # what lies beside nbs/ is not part of the website
                cell.source = re.sub(r"\]\(\.\./", f"]({settings['git_url']}/blob/{settings['branch']}/", cell.source)
        nbformat.write(nb, path)


if __name__ == "__main__":
    main()
