"""Stages the website that _quarto.yml describes in _build/quarto: each notebook as nbdev documents
it.

Render it with `quarto render _build/quarto`; `make quarto-check` does so without Quarto.
"""

import os
import re
import shutil

import nbformat
from build import BUILD, NBS, ROOT, directives, read_settings
from nbdev.serve import proc_nbs

STAGE = BUILD / "quarto"


def prepare(nb, repository):
    """Only what defines the library is run, for its documentation; links beside nbs/ lead to the
    repository."""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(\.\./", f"]({repository}/", cell.source)
        elif (
            cell.cell_type == "code"
            and "export" not in directives(cell)[0]
            and "show_doc(" not in cell.source
        ):
            cell.source = f"#| eval: false\n{cell.source}"


def main():
    os.chdir(ROOT)  # nbdev looks for settings.ini from here upwards
    settings = read_settings()
    repository = f"{settings['git_url']}/blob/{settings['branch']}"
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(NBS, STAGE / NBS.name)
    shutil.copy(ROOT / "_quarto.yml", STAGE)
    for path in (STAGE / NBS.name).glob("*.ipynb"):
        nb = nbformat.read(path, as_version=4)
        prepare(nb, repository)
        nbformat.write(nb, path)
    processed = proc_nbs(STAGE / NBS.name, force=True)
    shutil.copytree(processed, STAGE / NBS.name, dirs_exist_ok=True)
    shutil.rmtree(processed)


if __name__ == "__main__":
    main()
