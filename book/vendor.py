"""Fetches the JavaScript that the book needs, so that its pages make no outside request.

Run it to change a version: `python book/vendor.py` (it needs npm). The files are copied unchanged.
"""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent / "vendor"

# package, version, licence, what it is for, {file in the package: file here}; a folder ends in "/".
PACKAGES = [
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

The licence of MathJax lies beside it.
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
    rows = "\n".join(
        f"| {package} | {version} | {terms} | {use} |"
        for package, version, terms, use, _ in PACKAGES
    )
    (HERE / "README.md").write_text(README.format(rows=rows), encoding="utf-8")


if __name__ == "__main__":
    main()
