"""Fetches the JavaScript that the book needs, so that its pages make no outside request.

Run it to change a version: `python book/vendor.py` (it needs npm). The files are copied unchanged.
"""

import importlib.metadata
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent / "vendor"

# package, version, licence, what it is for, {file in the package: file here}; a folder ends in "/".
PACKAGES = [
    (
        "@jupyter-widgets/html-manager",
        "1.0.15",
        "BSD-3-Clause",
        "draws saved ipywidgets",
        {
            "dist/embed-amd.js": "embed-amd.js",
            "dist/embed.js.LICENSE.txt": "embed-amd.LICENSE.txt",
            # Font Awesome's icons. The names are the package's own.
            "dist/1551f4f60c37af51121f.woff2": "1551f4f60c37af51121f.woff2",  # solid
            "dist/7a3337626410ca2f4071.woff2": "7a3337626410ca2f4071.woff2",  # regular
            "dist/d878b0a6a1144760244f.woff2": "d878b0a6a1144760244f.woff2",  # brands
        },
    ),
    ("requirejs", "2.3.8", "MIT", "loads the widgets' modules", {"require.js": "require.js"}),
    (
        "mathjax",
        "3.2.2",
        "Apache-2.0",
        "sets the equations",
        {
            "es5/tex-chtml-full.js": "mathjax/tex-chtml-full.js",
            "es5/output/chtml/fonts/woff-v2/": "mathjax/output/chtml/fonts/woff-v2/",
            "LICENSE": "mathjax/LICENSE",
        },
    ),
]

README = """# Vendored JavaScript

Written by `book/vendor.py`; change it there. With these files the built book works without a
network.

| package | version | licence | what it does here |
|---|---|---|---|
{rows}

The licence of MathJax lies beside it. `require.js` states its own in its first lines.
That of `embed-amd.js` is `ipywidgets.LICENSE.txt`, and the notices of what it bundles are in
`embed-amd.LICENSE.txt`.
The three fonts are Font Awesome Free 5 (fonts under the SIL OFL 1.1, icons under CC BY 4.0).
"""


def fetch(package, version, files):
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"],
            cwd=tmp,
            check=True,
            capture_output=True,
        )
        with tarfile.open(next(Path(tmp).glob("*.tgz"))) as archive:
            archive.extractall(tmp, filter="data")
        for source, target in files.items():
            copy = shutil.copytree if source.endswith("/") else shutil.copyfile
            (HERE / target).parent.mkdir(parents=True, exist_ok=True)
            copy(Path(tmp, "package", source), HERE / target)


def main():
    if not shutil.which("npm"):
        raise SystemExit(
            "vendor.py needs npm, and there is none: install Node.js, or keep the files as they are"
        )
    shutil.rmtree(HERE, ignore_errors=True)
    for package, version, *_, files in PACKAGES:
        fetch(package, version, files)
    # The npm package leaves its licence out; the Python package of the same project has it.
    licence = importlib.metadata.distribution("ipywidgets").read_text("licenses/LICENSE")
    (HERE / "ipywidgets.LICENSE.txt").write_text(licence, encoding="utf-8")
    rows = "\n".join(
        f"| {package} | {version} | {terms} | {use} |"
        for package, version, terms, use, _ in PACKAGES
    )
    (HERE / "README.md").write_text(README.format(rows=rows), encoding="utf-8")


if __name__ == "__main__":
    main()
