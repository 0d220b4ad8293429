"What the committed tables must say. `pytest -m results` runs all but the quick look."
from pathlib import Path

HERE = Path(__file__).parent


def pytest_configure(config):
    told = "results: holds the committed tables against what is said of them"
    config.addinivalue_line("markers", told)


def pytest_collection_modifyitems(items):
    "Every test of this folder but those of the quick look."
    for item in items:
        if item.path.parent == HERE and item.path.name != "test_quick_look.py":
            item.add_marker("results")
