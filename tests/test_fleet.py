"Many models: who is named, what is kept, who dies, what is written, and the hooks around it."
import csv
import errno
import importlib.util
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import fuzz
import pytest
import soak
import torch
import yaml
from bs4 import BeautifulSoup
from jsonschema import validate

from terd_nb import cli, fleet, formats, ledger
from terd_nb import scanning as scan_module
from terd_nb.cli import main
from terd_nb.fleet import LOST, Apart, Here, Task, expanded, scan_fleet, work_off
from terd_nb.formats import FORMATS, Row
from terd_nb.loading import files
from terd_nb.loading.things import ARCHIVES, OTHER_FORMATS, PICKLES
from terd_nb.path_fit import Round
from terd_nb.zoo import zoo_path

HOSTILE = "[red]x\x1b[2J\u202e\nclean=1|<script>"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    "Every test starts in a folder of its own."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(scope="module")
def real():
    "One scan with a search of a few steps, whose verdict the tests change as they need it."
    with pytest.MonkeyPatch.context() as patch:
        fuzz.shorten(patch)
        return scan_module.scan(zoo_path("benign-a"), progress=False)


@pytest.fixture
def scanner(real, monkeypatch):
    "A scan whose outcome is the model's first word; only names with a slash are looked for."
    look, scanned = files.check_folder, []

    def fake_look(model, **weights):
        return look(model, **weights) if "/" in str(model) else Path(model)

    def fake(model, progress=True, callback=None, variant=None, **settings):
        word = str(model).split("-")[0]
        scanned.append(str(model))
        if word == "stopped":
            raise KeyboardInterrupt
        if word == "late":
            raise TimeoutError("ran out of time")
        changed = {"verdict": word, "model": str(model), "attack": None, "notes": [],
                   "sha256": f"{len(str(model)):064x}", "score": float(len(word)), "variants": []}
        return replace(real, result=real.result.model_copy(update=changed))

    monkeypatch.setattr(files, "check_folder", fake_look)
    monkeypatch.setattr(scan_module, "scan", fake)
    monkeypatch.setattr(fleet, "checksum_of", lambda task, fetched=False: f"files of {task.given}")
    return scanned


def verdicts(path):
    return [row.verdict for row, _ in ledger.read_lines(Path(path))[0]]


# ---------------------------------------------------------------- which models


def test_lists_patterns_and_folders_name_each_model_once(scanner, capsys):
    for name in ("m/a", "m/b", "m/deep/c"):
        Path(name).mkdir(parents=True)
        Path(name, "model_index.json").write_text("{}")
    os.symlink("..", "m/deep/up")
    Path("m/notes.md").touch()
    Path("list").write_bytes(b"\xef\xbb\xbf# all of them\n\nclean-x\n m/[ab] \nm\n\xe9\nclean-x\n")
    models = expanded(fleet.read_list(Path("list")))
    assert models == ["clean-x", "m/a", "m/b", "m/deep/c", "m/deep/up", "\udce9"]
    assert main(["scan", "clean-y", "--list", "list", "--json", "out.json"]) == 2
    said = [result["source"] for result in json.loads(Path("out.json").read_text())["results"]]
    assert said == ["clean-y", "clean-x", "m/a", "m/b", "m/deep/c", "m/deep/up", r"\udce9"]
    assert "clean-y" in capsys.readouterr().out


def test_a_place_is_scanned_once_however_it_is_written(scanner):
    for name in ("clean-a", "clean-b", "deep/er", "deep/clean-a"):
        Path(name).mkdir(parents=True)
    os.symlink("clean-a", "clean-link")
    os.symlink("deep/er", "way")
    os.symlink("nowhere", "broken")
    Path("list").write_text("clean-a/\n./clean-a\n")
    ways = ["clean-a", "clean-a/", ".//clean-a/.", "clean-b/../clean-a", "clean-link/"]
    run = ["scan", "--jsonl", "rows"]
    assert main([*run, *ways, "--list", "list"]) == 0
    assert scanner == ["clean-a", "clean-link"]       # a link is a name of its own
    assert main([*run, "./clean-a/", "--resume"]) == 0 and len(scanner) == 2
    assert expanded(["way/../clean-a", "./broken"]) == ["way/../clean-a", "broken"]
    assert expanded(["./nobody/here", "zoo:benign-a"]) == ["./nobody/here", "zoo:benign-a"]


def test_a_folder_with_the_name_of_an_embedded_model_is_no_embedded_model():
    "Or a stranger's would be passed over, and the embedded one's verdict be said of it."
    Path("zoo:benign-a").mkdir()
    for inside in ([], ["model_index.json"]):
        for name in inside:
            Path("zoo:benign-a", name).touch()
        for given in ("*", "./zoo:benign-a", "zoo:benign-a/", "zoo:benign-a"):
            (found,) = expanded([given])
            assert fleet.located(found) == "./zoo:benign-a"
    assert expanded(["."]) == ["./zoo:benign-a"]


@pytest.mark.parametrize("line", [
    "scan", "scan --list missing", "scan clean --resume", "scan clean --jobs 0",
    "scan clean --fail-on sorrow", "scan clean --allow missing", "scan clean --csv no/such.csv",
    "scan clean --pages no/such", "scan clean --jsonl .", "scan clean --jsonl -",
    "scan clean --csv ''", "scan clean --junit '' --json -", "scan clean --html ''",
    "scan clean --html - --json -",
])
def test_wrong_use_is_one_line_and_2(scanner, capsys, line):
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("terd: ")
    assert not os.listdir() and scanner == []


def test_a_list_that_is_no_text_is_refused_by_its_line(scanner, capsys):
    Path("list").write_bytes(b"clean-a\n\xff*[\n~who\0/\n")
    Path("rows").touch()
    for more in ([], ["--allow", "rows"], ["--jsonl", "rows"]):
        assert main(["scan", "--list", "list", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("terd: list, line 3 holds a NUL") and scanner == []
    Path("terd.toml").write_text('json = "a\\u0000b"')
    assert main(["scan", "clean-a"]) == 2 and scanner == []
    assert "terd.toml: json holds a NUL" in capsys.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("words", [
    "terd.toml", "pyproject.toml", "--list x", "--allow x", "--jsonl x --resume"])
def test_what_is_read_is_a_plain_file(scanner, capsys, monkeypatch, make, words):
    "A pipe would be waited for, and a device read until the memory is full."
    os.mkdir("here")
    monkeypatch.chdir("here")
    make("x" if "x" in words.split() else words)
    assert main(["scan", "clean", *(words.split() if "x" in words.split() else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("terd: ") and ";" in line and scanner == []
    if "x" not in words.split():
        assert main(["scan", "clean", "--no-settings"]) == 0


# ---------------------------------------------------------------- what counts, what was reviewed


@pytest.mark.parametrize("models, words, status", [
    ("backdoored inconclusive", None, 1), ("backdoored late", "inconclusive", 2),
    ("backdoored", "error", 0), ("clean late", "backdoored,error", 0),
    ("no/such inconclusive", "error", 2), ("no/such inconclusive", "backdoored", 0),
    ("no/such backdoored", "error,backdoored", 1),
])
def test_what_fails_can_be_chosen(scanner, models, words, status):
    options = [f"--fail-on={word}" for word in words.split(",")] if words else []
    assert main(["scan", *models.split(), *options]) == status
    assert main(["scan", *models.split(), *(["--fail-on", words] if words else [])]) == status


def test_a_reviewed_model_is_allowed_and_said_to_be(scanner, monkeypatch, capsys):
    Path("allow.txt").write_text(f"# by two of us\n{'5E' * 32}  a\n", encoding="utf-8-sig")
    names = {"backdoored-a": "5e" * 32}
    monkeypatch.setattr(
        fleet, "checksum_of", lambda task, fetched=False: names.get(task.given, "other"))
    places = [word for name in FORMATS for word in (f"--{name}", f"out.{name}")]
    run = ["scan", "backdoored-a", "clean-bc", "--allow", "allow.txt"]
    assert main([*run, "--jsonl", "out.jsonl", *places]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("allowed") and "the search says backdoored" in out.splitlines()[0]
    assert "All 2 models are clean or allowed" in err
    results = json.loads(Path("out.json").read_text())["results"]
    assert [r["verdict"] for r in results] == ["backdoored", "clean"]
    assert [r["allowed"] for r in results] == [True, False]
    (finding,) = json.loads(Path("out.sarif").read_text())["runs"][0]["results"]
    assert finding["suppressions"][0]["kind"] == "external"
    assert verdicts("out.jsonl") == ["backdoored", "clean"]   # what the search said
    assert main([*run[:3]]) == 1
    assert main(["scan", "backdoored-other", "--allow", "allow.txt"]) == 1
    Path("allow.txt").write_text("12345")
    assert main([*run]) == 2 and "no fingerprint" in capsys.readouterr().err


def test_reviewed_weights_are_not_allowed_as_another_model(monkeypatch, capsys):
    "On another schedule, with other options, or known by their checksum alone."
    fuzz.shorten(monkeypatch)
    monkeypatch.setattr(scan_module.ModelDetector, "verdict", lambda self, score: "backdoored")
    shutil.copytree(zoo_path("baddiffusion-box"), "m")
    run = ["scan", "m", "--no-settings", "--json", "out.json", "--csv", "out.csv"]

    def judged(*words):
        status = main([*run, *words])
        (row,) = json.loads(Path("out.json").read_text())["results"]
        return status, row

    status, row = judged()
    (line,) = csv.DictReader(io.StringIO(Path("out.csv").read_text()))
    assert status == 1 and line["fingerprint"] == row["fingerprint"] != row["sha256"]
    Path("allow").write_text(row["fingerprint"] + "  # by two of us")
    Path("weights").write_text(row["sha256"])
    status, row = judged("--allow", "allow")
    assert (status, row["allowed"]) == (0, True)
    assert not judged("--allow", "allow", "--classes", "3")[1]["allowed"]
    capsys.readouterr()
    assert judged("--allow", "weights")[0] == 1
    assert "not with this schedule" in (said := capsys.readouterr().err)
    assert row["fingerprint"] in said
    config = Path("m/scheduler/scheduler_config.json")
    config.write_text(config.read_text().replace('"beta_end": 0.02', '"beta_end": 0.018'))
    status, other = judged("--allow", "allow")
    assert other["sha256"] == row["sha256"] and other["schedule"] != row["schedule"]
    assert status == 1 and not other["allowed"] and other["fingerprint"] != row["fingerprint"]


@pytest.mark.parametrize("lacking", [{"not_scanned": ["unet/other.bin"]}, {"as_run": False}])
def test_what_was_not_all_looked_at_is_not_allowed_nor_searched_longer(real, lacking):
    "A review is of what was looked at, and says nothing of what nobody could look at."
    result = json.loads(real.result.model_dump_json()) | {"verdict": "inconclusive"}
    reviewed = frozenset(["5e" * 32])
    whole = Row("m", None, result, "5e" * 32)
    part = replace(whole, result=result | lacking | {"allowed": True})
    assert fleet._reviewed(whole, reviewed).verdict == "allowed"
    assert fleet._reviewed(part, reviewed).verdict == "inconclusive"     # whatever a ledger said
    assert fleet._reviewed(whole, frozenset()).verdict == "inconclusive"
    assert "--method thorough" in str(cli.verdict_line(whole))
    assert "thorough" not in str(cli.verdict_line(fleet._reviewed(part, reviewed)))


def test_defaults_come_from_a_file_which_is_told(scanner, capsys):
    Path("pyproject.toml").write_text(
        '[tool.terd]\nfail-on = ["backdoored"]\nseed = 3\njson = "out.json"\nquiet = true\n')
    assert main(["scan", "inconclusive"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err == "note: pyproject.toml gives --fail-on, --seed, --json, --quiet\n"
    assert Path("out.json").exists()
    assert main(["scan", "inconclusive", "--fail-on", "inconclusive"]) == 2    # the line wins
    Path("terd.toml").write_text("max-second = 3")
    assert main(["scan", "clean"]) == 2
    assert "'max-second' is no option" in capsys.readouterr().err.splitlines()[-1]
    Path("terd.toml").write_text("jobs = 'many'")
    assert main(["scan", "clean"]) == 2
    Path("terd.toml").write_text("[")
    assert main(["scan", "clean"]) == 2 and "is no TOML" in capsys.readouterr().err
    assert main(["zoo", "show", "benign-a"]) == 0      # it is `terd scan`'s alone


@pytest.mark.parametrize("text, said", [
    ("tool = 1", None), ("\ufefftool = 1", None),
    ("[tool.terd]\njobs = true", "jobs takes no bool"),
    ("[tool.terd]\nquiet = 'yes'", "quiet takes no str"), ("[tool.terd]", None),
    ("[tool]\nterd = 3", "is no table"), ("[tool]\nterd = []", "is no table"),
    ("[[tool.terd]]", "is no table"), ("[tool.terd]\njson = ['a', 'b']", "json takes no list"),
    ("[tool.terd]\nseed = {a = 1}", "seed takes no dict"),
    ("[tool.terd]\nfail-on = 'error'", "gives --fail-on"),
])
def test_a_settings_file_of_another_form_is_refused_in_a_line(scanner, capsys, text, said):
    Path("pyproject.toml").write_text(text)
    refused = said is not None and "gives" not in said
    assert main(["scan", "clean"]) == (2 if refused else 0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None) and (said or "") in "".join(lines)


def test_a_folder_that_is_scanned_sets_no_options(scanner, monkeypatch, tmp_path, capsys):
    "Its author would choose what fails, and which files are written."
    model = tmp_path / "clean-model"
    model.mkdir(exist_ok=True)
    (model / "terd.toml").write_text(f"fail-on = []\njson = '{tmp_path}/precious'\nquiet = true")
    (tmp_path / "precious").write_text("precious")
    (model / "unet").mkdir(exist_ok=True)
    (model / "model_index.json").touch()
    (tmp_path / "fleet" / "clean").mkdir(parents=True)
    (tmp_path / "fleet" / "clean" / "model_index.json").touch()
    (tmp_path / "fleet" / "link").symlink_to(model)
    (tmp_path / "list").write_text("../*-mod?l\n")
    monkeypatch.chdir(model)
    for given in (".", str(model), "..", "../*", "../fleet", "--list=../list"):
        assert main(["scan", given]) == 2
        assert "may be a stranger's" in capsys.readouterr().err
    assert scanner == []
    main(["scan", ".", "--no-settings"])
    assert "stranger" not in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("option", ["--jsonl", "--allow"])
def test_what_is_believed_does_not_lie_in_what_is_scanned(scanner, capsys, option):
    "Its author would write the verdict that he likes."
    Path("m/clean").mkdir(parents=True)
    Path("m/clean/model_index.json").touch()
    Path("m/rows").touch()
    Path("link").symlink_to("m/rows")
    for file in ("m/rows", "m/clean/rows", "link"):
        Path(file).touch()
        assert main(["scan", "m", option, file, "--no-settings"]) == 2
        assert f"{file} lies in what is scanned" in capsys.readouterr().err
    assert scanner == [] and main(["scan", "clean", option, "m/rows"]) == 0


def test_two_outputs_need_two_places(scanner, capsys):
    for outputs in (["--jsonl", "x", "--json", "x"], ["--json", "a", "--csv", "./a"],
                    ["--json", "-", "--csv", "-"]):
        assert main(["scan", "clean", *outputs]) == 2
        assert "two of the outputs have one place" in capsys.readouterr().err
    assert main(["scan", "clean", "--jobs", "99999999"]) == 2


# ---------------------------------------------------------------- kept, resumed, stopped


def test_resume_scans_what_has_no_verdict_or_other_files(scanner, monkeypatch, capsys):
    run = ["scan", "clean-a", "late-b", "backdoored-c", "--jsonl", "rows"]
    assert main(run) == 1 and main(run) == 2      # it has rows already
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert scanner == ["clean-a", "late-b", "backdoored-c"]
    scanner.clear()
    with open("rows", "ab") as file:
        file.write(b'{"model": "cut o')
    assert main([*run, "--resume", "clean-new"]) == 1
    assert scanner == ["late-b", "clean-new"] and len(verdicts("rows")) == 4
    scanner.clear()
    monkeypatch.setattr(fleet, "checksum_of", lambda task, fetched=False: "changed")
    assert main([*run[:2], "--jsonl", "rows", "--resume"]) == 0 and scanner == ["clean-a"]
    scanner.clear()
    assert main([*run[:2], "--jsonl", "rows", "--resume", "--seed", "1"]) == 0
    assert scanner == ["clean-a"] and len(verdicts("rows")) == 5
    monkeypatch.setitem(ledger.VERSIONS, "diffusers", "0.0.0")
    scanner.clear()
    assert main([*run[:2], "--jsonl", "rows", "--resume"]) == 0 and scanner == ["clean-a"]
    assert sorted(os.listdir()) == ["rows"]       # and no lock is left


def test_a_file_that_holds_something_else_is_left_alone(scanner, capsys):
    for text in ("notes\n", '{"verdict": "clean"}\n', "[]\n", '{"kept": 3}\n'):
        Path("rows").write_text(text)
        assert main(["scan", "clean", "--jsonl", "rows", "--resume"]) == 2
        assert "line 1: this is no row of a scan" in capsys.readouterr().err
        assert Path("rows").read_text() == text


@pytest.mark.parametrize("field, value, said", [
    ("notes", None, "notes"), ("verdict", "cleen", "verdict"), ("score", "high", "score"),
    ("kept", {"given": []}, ""), ("kept", {"asked": []}, ""), ("kept", {"html": {"page": "x"}}, ""),
])
def test_a_damaged_row_is_told_by_its_line(scanner, capsys, field, value, said):
    run = ["scan", "clean-a", "clean-b", "--jsonl", "rows"]
    assert main(run) == 0
    first, second = map(json.loads, Path("rows").read_text().splitlines())
    second[field] = second[field] | value if field == "kept" else value
    text = json.dumps(first) + "\n" + json.dumps(second) + "\n"
    Path("rows").write_text(text)
    capsys.readouterr()
    assert main([*run, "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"rows, line 2: this is no row of a scan{' (' + said if said else ';'}" in line
    assert Path("rows").read_text() == text and os.listdir() == ["rows"]


def test_a_row_of_another_version_is_kept_and_not_believed(scanner):
    run = ["scan", "clean-a", "--jsonl", "rows"]
    assert main(run) == 0
    row = json.loads(Path("rows").read_text())
    row["kept"]["asked"]["terd_nb"] = "0.0.1"
    del row["share_missed"]           # which that version did not know
    Path("rows").write_text(json.dumps(row) + "\n")
    assert main([*run, "--resume"]) == 0
    assert len(scanner) == 2 and len(verdicts("rows")) == 2


def test_a_ledger_has_one_owner_whatever_it_is_called(scanner, capsys):
    "Rows are written where a link leads, and so the lock lies there, too."
    Path("kept").mkdir()
    Path("link").symlink_to("kept/rows")
    for first, second in (("link", "kept/rows"), ("kept/rows", "link"), ("link", "link")):
        owner = ledger.Ledger(Path(first), {})
        assert main(["scan", "clean-a", "--jsonl", second, "--resume"]) == 2
        assert f"another scan is writing {second}" in capsys.readouterr().err
        owner.close()
    assert scanner == [] and os.listdir("kept") == ["rows"]


FULL = "No space left on device; make room there, or name another place"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_what_cannot_be_written_stops_nothing_else(scanner, capsys):
    pages = Path("out")
    Path(pages, f"{Row('clean-a', None, {}).name}.html").mkdir(parents=True)
    run = ["scan", "clean-a", "clean-b", "--pages", "out"]
    assert main([*run, "--json", "/dev/full", "--csv", "out.csv"]) == 2
    out, err = capsys.readouterr()
    assert f"terd: /dev/full: {FULL}" in err and "Is a directory" in err
    assert len(out.splitlines()) == 2 and len(Path("out.csv").read_text().splitlines()) == 3
    assert sorted(pages.glob("*.html"))[-1].name == "index.html" and len(os.listdir(pages)) == 3
    assert main(["scan", "clean-a", "--jsonl", "/dev/full"]) == 2
    assert f"terd: /dev/full: {FULL}\n" == capsys.readouterr().err[-len(FULL) - 18:]
    assert not os.path.exists("/dev/full.lock")


def test_a_ledger_on_a_full_disk_keeps_what_it_has(scanner, monkeypatch, capsys):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = ["scan", "clean-a", "clean-b", "--jsonl", "rows"]
    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "fsync", full)
        assert main(run) == 2
    assert f"terd: rows: {FULL}\n" == capsys.readouterr().err and os.listdir() == ["rows"]
    assert main([*run, "--resume"]) == 0 and len(verdicts("rows")) == 2


def test_pages_need_a_folder_that_can_be_written(scanner, monkeypatch, capsys):
    os.mkdir("out")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (
        Path(path).name == "out" and mode == os.W_OK))
    assert main(["scan", "clean", "--pages", "out"]) == 2
    assert "out/index.html cannot be written" in capsys.readouterr().err and scanner == []


@pytest.mark.parametrize("words, said", [
    ("--jsonl rows", "kept in rows; go on with --resume"),
    ("--jsonl rows --json out.json", "kept in rows, out.json; go on with --resume"),
    ("--json out.json --csv out.csv --pages out", "kept in out.json, out.csv, out"),
    ("", "nothing is kept; --jsonl FILE keeps each as soon as it is there"),
])
def test_stopped_it_writes_what_is_done_and_says_where(scanner, capsys, words, said):
    assert main(["scan", "clean-a", "clean-b", "stopped", "clean-c", *words.split()]) == 130
    err = capsys.readouterr().err.splitlines()
    assert err == [f"2 of 4 models are done and {said}", "terd: interrupted"]
    if "rows" in words:
        assert verdicts("rows") == ["clean", "clean"]
    if "out.json" in words:
        results = json.loads(Path("out.json").read_text())["results"]
        assert [one["verdict"] for one in results] == ["clean", "clean", "error", "error"]
        assert results[2]["error"] == fleet.STOPPED
    if "out.csv" in words:
        assert len(Path("out.csv").read_text().splitlines()) == 5
        assert "stopped before" in Path("out/index.html").read_text(encoding="utf-8")


def test_stopped_it_does_not_forget_other_weights():
    rows = [Row("b", None, {"verdict": "clean", "variants": ["ema", "fp16"]}),
            Row("b", "ema", {"verdict": "clean"})]
    found = fleet.with_unjudged(rows, [Task("a"), Task("b")])
    assert [(row.given, row.variant, row.verdict) for row in found] == [
        ("a", None, "error"), ("b", None, "clean"), ("b", "ema", "clean"), ("b", "fp16", "error")]


def test_stopped_it_claims_nothing_that_it_could_not_write(scanner, capsys):
    run = ["scan", "clean-a", "stopped", "--json", "/dev/full", "--csv", "out.csv"]
    assert main(run) == 130
    assert "1 of 2 models are done and kept in out.csv\n" in capsys.readouterr().err


def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_rows(tmp_path, monkeypatch):
    fuzz.shorten(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kinds = ["honest", "cut", "circle"]
        expected = soak.judged_specimens(tmp_path / "specimens", kinds)
        (tmp_path / "fleet").mkdir()
        made = soak.make_fleet(tmp_path / "fleet", tmp_path / "specimens", 6, kinds)
        counts = soak.kill_and_resume(tmp_path / "fleet", tmp_path / "rows", 3)
    finally:
        torch.set_num_threads(threads)
    assert len(counts) == 3
    found = soak.compare(soak.rows_in(tmp_path / "rows"), made, expected)
    assert not any(found.values()), (counts, found)


# ---------------------------------------------------------------- workers that die


def dying(times):
    "A worker in a process of its own, whose process kills itself at so many tasks of one name."

    def work(task, parent):
        if task.given == "deadly" and len(os.listdir("deaths")) < times:
            open(f"deaths/{os.getpid()}", "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return Row(task.given, None, {"verdict": "clean", "process": os.getpid()})

    class Dying(Apart):
        def submit(self, task):
            from joblib.externals.loky import BrokenProcessPool

            try:
                return self._started().submit(work, task, os.getpid())
            except BrokenProcessPool:
                self.stop()
                return self._started().submit(work, task, os.getpid())

    return Dying()


@pytest.mark.parametrize("times, verdict", [(1, "clean"), (9, "error")])
def test_a_worker_that_dies_costs_its_model_one_attempt_and_no_other(times, verdict):
    os.mkdir("deaths")
    names = ["a", "deadly", "b", "c", "d"]
    ended = list(work_off(deque(map(Task, names)), [dying(times), dying(times)], lambda task: None))
    found = {row.given: row for _, row in ended}
    assert sorted(found) == sorted(names) and len(ended) == len(names)
    assert found.pop("deadly").verdict == verdict
    assert all(row.verdict == "clean" for row in found.values())
    assert len(os.listdir("deaths")) == min(times, 2)


def test_a_worker_that_died_idle_is_made_anew():
    worker = Apart()
    first = worker.submit(Task("nowhere")).result()
    (process,) = worker.pool._processes.values()
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.5)
    second = worker.submit(Task("nowhere")).result()
    worker.stop()
    assert first == second and "no folder" in second.result["error"] and LOST not in str(second)


def test_a_worker_ends_with_the_scan_that_it_works_for():
    fleet._stay_with(os.getppid(), "searching", 0.5, {})
    child = os.fork()
    if child == 0:
        fleet._stay_with(os.getpid(), "searching", 0.5, {})   # its parent is another one
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def bare(rows):
    return [(row.given, {key: value for key, value in row.result.items()
                         if key not in ("seconds", "date")}) for row in rows]


SHORT = {"device": "cpu", "looks": ("shift",), "starts": 2, "rounds": (Round(1, 40, 8),)}
MODELS = [Task(model, settings=SHORT) for model in ("zoo:baddiffusion-box", "nowhere")]


@pytest.mark.slow
def test_rows_are_the_same_from_every_kind_of_worker():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = fleet.in_order(list(scan_fleet(MODELS, [Here()])), MODELS)
    torch.set_num_threads(threads)
    apart = fleet.in_order(list(scan_fleet(MODELS, fleet.workers_for(2))), MODELS)
    assert bare(here) == bare(apart) and here[0].trigger == apart[0].trigger
    assert here[0].verdict == "backdoored" and here[0].files == apart[0].files


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None,
                    reason="Ray is not installed: pip install 'terd_nb[ray]'")
def test_rows_come_from_a_ray_cluster_and_a_dead_task_is_tried_again(tmp_path):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        workers = fleet.ray_workers("auto", None)
        tasks = [Task("nowhere"), Task("zoo:tiger"), *MODELS[1:]]
        rows = list(work_off(deque(tasks), workers, lambda task: None))
        flag = tmp_path / "died"

        def deadly(task):
            if not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return Row(task.given, None, {"verdict": "clean"})

        remote = ray.remote(num_cpus=1, max_retries=0)(deadly)
        ((task, row),) = work_off(deque([Task("a")]), [fleet.OnRay(remote)], lambda task: None)
    finally:
        ray.shutdown()
    assert len(workers) == 2 and (row.verdict, task.lost) == ("clean", 1)
    assert bare(sorted((row for _, row in rows), key=lambda row: row.given)) == bare(
        sorted(map(fleet.scan_task, tasks), key=lambda row: row.given))


def test_without_ray_there_is_one_clear_line(scanner, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["scan", "clean", "--ray", "auto"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "terd_nb[ray]" in err


def test_a_cluster_that_does_not_answer_is_not_waited_for(scanner, monkeypatch, capsys):
    "Ray would ask for minutes, and say so in a page of warnings."

    def ask(*given, **settings):
        raise AssertionError(given)

    never = SimpleNamespace(is_initialized=lambda: False, init=ask)
    monkeypatch.setitem(sys.modules, "ray", never)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for known in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "local"):
            with pytest.raises(AssertionError, match=known):     # Ray is asked
                fleet.ray_workers(known, None)
    nobody = [f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999", "x" * 80 + ":1"]
    for address in [*nobody, "nowhere", "a:b", "ray://", "a b:1", "::1", "\x1b[2J:1"]:
        assert main(["scan", "clean", "--ray", address, "--jsonl", "rows"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        said = "no Ray cluster answers at" if address in nobody else "is no address; give HOST:PORT"
        assert said in line and "\x1b" not in line
    assert scanner == [] and not os.listdir()


# ---------------------------------------------------------------- what is written


def some_rows(real):
    "Rows of every verdict, with names that every format must spell out."
    judged = json.loads(real.result.model_dump_json())
    rows = []
    for word in ("clean", "backdoored", "inconclusive", "backdoored"):
        for name in ("plain", f"=1+1{HOSTILE}", os.fsdecode(b"\xe9")):
            given = f"{name}-{len(rows)}"
            changed = {"verdict": word, "model": scan_module.utf8(given),
                       "source": formats.printable(given), "score": float(len(rows)),
                       "attack": HOSTILE if word == "backdoored" else None}
            rows.append(Row(given, None, judged | changed, trigger="data:image/png;base64,AA=="))
    rows[-1].result["allowed"] = True
    return rows + [fleet.failure_of(Task(f"{HOSTILE}/m"), ValueError(HOSTILE))]


# What code scanning reads, after the standard's sections 3.13 to 3.28. With TERD_SCHEMAS, a folder
# that holds the published sarif-2.1.0.json, github-action.json and pre-commit-hooks.json, those
# are used, too.
TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}
SARIF_RESULT = {
    "type": "object", "additionalProperties": False,
    "required": ["ruleId", "level", "message", "locations"],
    "properties": {
        "ruleId": {"enum": ["backdoored", "inconclusive", "error"]},
        "level": {"enum": ["none", "note", "warning", "error"]}, "message": TEXT,
        "locations": {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["physicalLocation"],
            "properties": {"physicalLocation": {"type": "object", "properties": {
                "artifactLocation": {"type": "object", "required": ["uri"], "properties": {
                    "uri": {"type": "string", "pattern": r"^[A-Za-z0-9_.~%/:+-]+$"}}},
                "region": {"type": "object", "required": ["startLine"]}}}}}},
        "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
        "suppressions": {"type": "array", "items": {"type": "object", "required": ["kind"],
            "properties": {"kind": {"enum": ["inSource", "external"]}}}}}}
SARIF = {
    "type": "object", "required": ["version", "runs"],
    "properties": {"version": {"const": "2.1.0"}, "runs": {"type": "array", "items": {
        "type": "object", "required": ["tool", "results"],
        "properties": {
            "tool": {"type": "object", "required": ["driver"], "properties": {"driver": {
                "type": "object", "required": ["name", "rules"], "properties": {
                    "rules": {"type": "array", "uniqueItems": True, "items": {
                        "type": "object", "required": ["id", "shortDescription"],
                        "properties": {"shortDescription": TEXT}}}}}}},
            "results": {"type": "array", "items": SARIF_RESULT}}}}}}


def published(name):
    "A published schema, if the environment says where they are; else one that allows all."
    folder = os.environ.get("TERD_SCHEMAS")
    return json.loads((Path(folder) / name).read_text(encoding="utf-8")) if folder else {}


def test_sarif_keeps_its_schema(real):
    rows = some_rows(real)
    log = json.loads(formats.as_sarif(rows))
    validate(log, SARIF)
    validate(log, published("sarif-2.1.0.json"))
    found = log["runs"][0]["results"]
    assert len(found) == sum(row.result["verdict"] != "clean" for row in rows)
    rules = log["runs"][0]["tool"]["driver"]["rules"]
    assert {one["ruleId"] for one in found} <= {rule["id"] for rule in rules}
    assert sum("suppressions" in one for one in found) == 1
    validate(json.loads(formats.as_sarif([])), SARIF)


def test_sarif_names_the_weights_below_the_present_folder(real, tmp_path):
    inside = tmp_path / "a b" / "model"
    inside.mkdir(parents=True)
    result = {"weights": ["unet/w.safetensors"]}
    assert formats.file_uri(Row(str(inside), None, result)) == "a%20b/model/unet/w.safetensors"
    assert formats.file_uri(Row("a b/model", None, result)) == "a%20b/model/unet/w.safetensors"
    assert formats.file_uri(Row("user/name", None, result)) == "user/name"
    os.chdir(inside)
    assert formats.file_uri(Row(str(tmp_path), None, {})).startswith("file:///")


def test_junit_is_xml_whose_counts_are_right(real):
    rows = some_rows(real)
    root = ElementTree.fromstring(formats.as_junit(rows).encode())
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert {case.tag for case in suite} == {"testcase"}
    count = {tag: len(suite.findall(f"testcase/{tag}")) for tag in ("failure", "error", "skipped")}
    assert count == {"failure": 8, "error": 1, "skipped": 1} and len(suite) == len(rows)
    for place in (root, suite):
        assert place.get("tests") == str(len(rows)) and float(place.get("time")) > 0
        assert (place.get("failures"), place.get("errors")) == ("8", "1")
    assert [case.get("name") for case in suite] == [row.result["source"] for row in rows]


def test_csv_is_a_table_without_formulas(real):
    rows = some_rows(real)
    table = list(csv.DictReader(io.StringIO(formats.as_csv(rows))))
    assert len(table) == len(rows) and "\x1b" not in formats.as_csv(rows)
    assert all(not line["source"].startswith("=") for line in table)
    scores = [row.result["score"] for row in rows[:-1]]
    assert [float(line["score"]) for line in table[:-1]] == scores


def test_json_keeps_its_schema(real):
    schema = json.loads((files.data_dir() / "schema" / "scan-1.json").read_text(encoding="utf-8"))
    validate(json.loads(formats.as_json(some_rows(real))), schema)
    assert set(real.result.model_dump()) == set(schema["$defs"]["ScanResult"]["properties"])
    assert "allowed" in schema["$defs"]["ScanResult"]["properties"]


def test_a_page_of_hundreds_has_the_urgent_first_and_pictures(real):
    rows = some_rows(real) * 40
    start = time.process_time()
    page = formats.as_html(rows)
    assert time.process_time() - start < 20 and len(page) < 1_000_000
    soup = BeautifulSoup(page, "html.parser")
    order = [line["class"][0] for line in soup.select("tbody tr")]
    assert len(order) == len(rows) and not soup.find_all("script") and "\x1b" not in page
    assert [order[i] for i in range(len(order)) if i == 0 or order[i] != order[i - 1]] == [
        "backdoored", "inconclusive", "failed", "allowed", "clean"]
    assert len(soup.select("tbody img")) == 480 and all(img["alt"] for img in soup.select("img"))


def test_pages_are_written_as_they_come_and_linked(scanner):
    run = ["scan", "clean-a", "backdoored-b", "no/such", "--pages", "out", "--jsonl", "rows"]
    assert main(run) == 1
    soup = BeautifulSoup(Path("out/index.html").read_text(encoding="utf-8"), "html.parser")
    links = [a["href"] for a in soup.select("tbody a")]
    assert len(links) == 2 and links[0].startswith("backdoored-b-")
    assert all("terd" in Path("out", link).read_text(encoding="utf-8") for link in links)
    assert main([*run, "--resume", "--html", "all.html"]) == 1
    assert len(os.listdir("out")) == 3      # the pages of kept rows are still linked
    again = BeautifulSoup(Path("out/index.html").read_text(encoding="utf-8"), "html.parser")
    assert [a["href"] for a in again.select("tbody a")] == links


def test_a_terminal_sees_a_bar_and_obeys_no_name(scanner, monkeypatch):
    "On a terminal of its own, with a name that would clear it."
    name = "clean-\x1b[2J\x07\u202e"
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        assert main(["scan", name, "clean-b"]) == 0
        said = os.read(parent, 100_000).decode()
    assert "1 of 2" in said and r"\x1b[2J\x07\u202e" in said
    assert "\x1b[2J" not in said and "\x07" not in said and "\u202e" not in said


# ---------------------------------------------------------------- shells, hooks, actions


@pytest.fixture
def path_with_terd(tmp_path, monkeypatch):
    "A PATH with the command as it is installed, and a pip that only notes what it was asked."
    programs = tmp_path.parent / f"{tmp_path.name}-bin"
    programs.mkdir()
    start = "import sys; from terd_nb.cli import main; sys.exit(main())"
    scripts = {"terd": f'exec {shlex.quote(sys.executable)} -c {shlex.quote(start)} "$@"',
               "python": 'echo "python $*" >>pip.log'}
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return programs


def bash(script, **env):
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    env = os.environ | env
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_the_shell_completes_commands_and_options(path_with_terd, tmp_path):
    shown = bash("terd --show-completion bash")
    assert shown.returncode == 0 and "complete" in shown.stdout
    (tmp_path / "completion.sh").write_text(shown.stdout)
    ask = ("source ./completion.sh; COMP_WORDS=(terd {}); COMP_CWORD={}; "
           "_terd_completion terd; printf '%s\\n' \"${{COMPREPLY[@]}}\"")
    assert bash(ask.format("sc", 1)).stdout.split() == ["scan", "schema"]
    assert "--fail-on" in bash(ask.format("scan --fa", 2)).stdout.split()
    for said, place, wanted in [
            ("repair a b --st", 4, "--steps"), ("plant --atta", 2, "--attack"),
            ("zoo verify --", 3, "--help"), ("data fe", 2, "fetch"),
            ("scan m --fail-on inc", 4, "inconclusive")]:
        found = bash(ask.format(said, place)).stdout.split()
        assert wanted in found and all(one.startswith(said.split()[-1]) for one in found)
    installed = bash("terd --install-completion bash", HOME=str(tmp_path))
    assert installed.returncode == 0, installed.stderr
    assert "terd" in (tmp_path / ".bashrc").read_text()


def test_the_hook_is_what_pre_commit_runs(root, path_with_terd):
    "In a repository that has settings, files of other kinds, and a ledger that somebody committed."
    (hook,) = yaml.safe_load((root / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    validate([hook], published("pre-commit-hooks.json"))
    assert hook["language"] == "python" and hook["id"] == "terd-scan"
    kinds = (".safetensors", ".json", ".py", *PICKLES, *ARCHIVES, *OTHER_FORMATS)
    assert all(re.search(hook["files"], f"m/unet/a{kind}") for kind in kinds)
    assert not re.search(hook["files"], "notes.md")
    soak.pickled(Path("models"), None)
    Path("main.c").touch()
    Path("terd.toml").write_text("seed = 3")
    Path(".terd.jsonl").write_text("forged")
    subprocess.run(["git", "init", "-q"], check=True)
    for run in (hook["entry"] + " models", hook["entry"] + " models"):     # and again
        done = bash(run)
        assert done.returncode == 2 and "only a pickle" in done.stderr, done.stderr
        assert "terd.toml gives --seed" in done.stderr and len(done.stderr.splitlines()) == 2
        assert verdicts(".git/terd.jsonl") == ["error"]
    assert Path(".terd.jsonl").read_text() == "forged"
    assert "there is nothing to scan" in bash(hook["entry"]).stderr    # a folder must be named
    assert "lies in what is scanned" in bash(hook["entry"] + " .").stderr


def test_the_steps_of_the_action_run(root, path_with_terd, tmp_path):
    action = yaml.safe_load((root / "action.yml").read_text(encoding="utf-8"))
    validate(action, published("github-action.json"))
    install, scan = action["runs"]["steps"]
    place = {"GITHUB_ACTION_PATH": "the action's folder", "RUNNER_TEMP": str(tmp_path)}
    assert bash(install["run"], **place).returncode == 0
    assert Path("pip.log").read_text() == "python -m pip install the action's folder\n"
    assert "${{" not in scan["run"]          # an input is never part of a command
    soak.pickled(Path("m 1"), None)
    Path("terd.toml").write_text("fail-on = []")      # may come with a pull request
    given = {"MODELS": "m 1\n$(touch owned)", "SARIF": "out.sarif",
             "OPTIONS": "--fail-on error\n--csv out.csv  --seed 1\n"}
    assert set(scan["env"]) == set(given)
    done = bash(scan["run"], **place, **given)
    assert done.returncode == 2 and not os.path.exists("owned"), done.stderr
    found = json.loads(Path("out.sarif").read_text())["runs"][0]["results"]
    assert [one["ruleId"] for one in found] == ["error", "error"] and os.path.exists("out.csv")
    assert "terd.toml" not in done.stderr
    given["OPTIONS"] = ""
    assert bash(scan["run"], **place, **given | {"MODELS": ""}).returncode == 2


def test_every_format_has_an_option_and_the_table_is_complete():
    options = {word for parameter in cli.typer.main.get_command(cli._app).commands["scan"].params
               for word in parameter.opts}
    assert {f"--{name}" for name in FORMATS} <= options
