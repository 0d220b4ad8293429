"""Writes README.md from nbs/index.ipynb, with the outputs saved in it; its pictures go to
nbs/index_files.

Hidden cells go, as they do in the book, and links, which start from nbs/ there, start from the
repository's root here.
"""

import re
import shutil

import nbformat
from build import HIDDEN, NBS, ROOT, directives
from nbconvert import MarkdownExporter

PICTURES = NBS / "index_files"
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`; change it there. -->\n\n"


def relink(text):
    "The same links, seen from the root instead of from nbs/."

    def target(match):
        path = match[1]
        if re.match(r"[a-z]+:|#", path):
            return match[0]
        return f"]({path[3:] if path.startswith('../') else f'{NBS.name}/{path}'})"

    return re.sub(r"\]\(([^)\s]+)\)", target, text)


def visible(nb):
    "The cells a reader sees, without their directives; the alt texts of their pictures, in order."
    cells, alts = [], []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
        if cell.cell_type == "code":
            found, cell.source = directives(cell)
            if HIDDEN & set(found) or found.get("include") == "false":
                continue
            if found.get("output") == "false":
                cell.outputs = []
            if found.get("echo") == "false":
                cell.metadata["transient"] = {"remove_source": True}
            alts += [
                found.get("fig-alt", "")
                for output in cell.outputs
                if "image/png" in output.get("data", {})
            ]
        cells.append(cell)
    return cells, alts


def main():
    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}  # nbdev cleans it away
    nb.cells, alts = visible(nb)
    resources = {"output_files_dir": PICTURES.relative_to(ROOT).as_posix()}
    text, resources = MarkdownExporter().from_notebook_node(nb, resources)
    alts = iter(alts)
    text = re.sub(r"!\[png\]", lambda _: f"![{next(alts)}]", text)
    text = re.sub(r"\n\s*\n", "\n\n", text).strip()  # nbconvert is generous with blank lines
    (ROOT / "README.md").write_text(f"{NOTE}{text}\n", encoding="utf-8")

    shutil.rmtree(PICTURES, ignore_errors=True)
    for name, data in resources["outputs"].items():
        PICTURES.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)


if __name__ == "__main__":
    main()
