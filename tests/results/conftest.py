"What the committed tables must say. `pytest -m results` runs all but the quick look."
from pathlib import Path

import pytest

from terd_nb.lab.measure import read_results

HERE = Path(__file__).parent


def pytest_configure(config):
    told = "results: holds the committed tables against what is said of them"
    config.addinivalue_line("markers", told)


def pytest_collection_modifyitems(items):
    "Every test of this folder but those of the quick look."
    for item in items:
        if item.path.parent == HERE and item.path.name != "test_quick_look.py":
            item.add_marker("results")


@pytest.fixture(scope="session")
def hard():
    "The rows of the default search on the hard set, and whether each calls its model backdoored."
    table = read_results("hard")
    table = table[(table["method"] == "fast") & (table["settings"] == "")]
    return table.assign(called=table["verdict"] == "backdoored")


@pytest.fixture(scope="session")
def families():
    "The rows of the other families."
    table = read_results("families")
    return table.assign(flagged=table["verdict"] != "clean")


@pytest.fixture(scope="session")
def larger():
    "The rows of the default search on the larger models, judged by small ones."
    table = read_results("sizes")
    table = table[table["method"] == "fast"]
    return table.assign(flagged=table["score"] > 3)
