"Gives hatchling the project's metadata out of settings.ini, the one place where it is kept."

from configparser import ConfigParser
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


def read_settings(root):
    "The settings of the project whose checkout or source archive lies at `root`."
    parser = ConfigParser()
    parser.read_string(Path(root, "settings.ini").read_text(encoding="utf-8"))
    return parser["DEFAULT"]


def lines(value):
    "The non-empty lines of a setting that holds one item a line."
    return [line.strip() for line in value.splitlines() if line.strip()]


class SettingsIni(MetadataHookInterface):
    def update(self, metadata):
        s = read_settings(self.root)
        if metadata["name"] != s["lib_name"]:
            raise ValueError(
                f"pyproject.toml calls the project {metadata['name']}, settings.ini {s['lib_name']}"
            )
        docs = s["doc_host"] + s["doc_baseurl"]
        metadata.update(
            {
                "version": s["version"],
                "description": s["description"],
                "readme": "README.md",
                "requires-python": f">={s['min_python']}",
                "license": s["license"],
                "authors": [{"name": s["author"]}],
                "keywords": s["keywords"].split(),
                "classifiers": lines(s["classifiers"]),
                "dependencies": lines(s["requirements"]),
                "optional-dependencies": {
                    k: lines(s[f"{k}_requirements"]) for k in ("book", "dev", "ray", "serve")
                },
                "scripts": dict(script.split("=") for script in lines(s["console_scripts"])),
                "urls": {
                    "Homepage": docs,
                    "Documentation": docs,
                    "Source": s["git_url"],
                    "Changelog": f"{s['git_url']}/blob/{s['branch']}/CHANGELOG.md",
                },
            }
        )
