"Mutants of honest folders, see fuzz.py: what `make fuzz` does with thousands, on a hundred or two."

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the child measures itself in /proc"),
]

DEEDS = {
    "exec": "code",
    "system": "code",
    "read": "code",
    "write": "code",
    "allocate": "traceback",  # a MemoryError
    "grow": "memory",
    "shout": "unreadable",
    "talk": "unreadable",
    "raise": "traceback",
    "nothing": "refused",
    "die": "crash",
    "wait": "hang",
}


@pytest.fixture(scope="module")
def worker():
    "One child for all tests; it takes seconds to start."
    with fuzz.Worker() as child:
        yield child


def test_a_seed_says_all_of_a_mutant(tmp_path):
    def content(home, number):
        folder, made = fuzz.make_mutant(tmp_path / home, 5, number)
        return made, [
            (str(path.relative_to(folder)), path.read_bytes())
            for path in fuzz.names_of(folder, "*")
            if path.stat().st_size < 10**8 and not path.is_symlink()
        ]

    for number in range(10):
        assert content("a", number) == content("b", number)


def test_loader_opens_a_mutant_or_refuses_it(worker):
    found = fuzz.fuzz(worker, 200, seed=0)
    print(fuzz.table(found))
    assert fuzz.bad(found) == []
    assert sum(row["end"] == "opened" for row in found) > 20, "nothing gets far any more"


def test_scan_judges_a_mutant_or_refuses_it(worker):
    found = fuzz.fuzz(worker, 10, seed=0, task="scan")     # `make fuzz SCAN=1` tries more
    print(fuzz.table(found))
    assert fuzz.bad(found) == []
    assert sum(row["end"] != "error" for row in found) > 1, "nothing is searched any more"


def test_the_fuzzer_sees_what_must_not_happen(tmp_path, worker):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("1")
    (folder := tmp_path / "mutant").mkdir()
    found = {}
    for deed in DEEDS:
        (folder / "deed").write_text(deed)
        patience = 1 if deed == "wait" else fuzz.SECONDS
        found[deed] = worker.ask(folder, "misbehave", patience)["end"]
    assert found == DEEDS
