"""A fleet under fire: what `terd scan` keeps when its processes are killed.

    python tests/soak.py --n 1000 --period 60   # folders; a worker is killed each minute
    python tests/soak.py --kills 50             # the whole scan is killed, and resumed
    python tests/soak.py --speed                # models a minute: this process, joblib, Ray

With --csv FILE, what was found is kept there, in the place of what the same test found before; the
rows of the book are in data/results/fleet.csv.

Each kind of folder has a specimen that one undisturbed process has judged. A row is wrong if it is
not its specimen's, but for names, seconds and date. It ends with 1 if a row is lost, doubled or
wrong, or if the memory grows.

With --short a search has a few steps: its verdict is worth nothing, but it is always the same, and
this is about what becomes of it. All models are opened, asked, searched and drawn as ever."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from terd_nb.fleet import LOST, Apart, Here, OnRay, Task, ray_workers, scan_fleet
from terd_nb.formats import printable
from terd_nb.lab.measure import circumstances, read_rows, write_rows
from terd_nb.path_fit import Round
from terd_nb.zoo import zoo_cards, zoo_path

TERD = [sys.executable, "-c", "import sys; from terd_nb.cli import main; sys.exit(main())", "scan"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "unet/config.json"
PERSONAL = ("model", "source", "seconds", "date")  # what two folders with equal files do not share


# ---------------------------------------------------------------- the folders


def linked(source, folder):
    "A copy of a folder whose files are hard links, where the disk allows it."

    def link(a, b):
        try:
            os.link(a, b)
        except OSError:
            shutil.copyfile(a, b)

    shutil.copytree(source, folder, copy_function=link)
    return folder


def rewritten(folder, name, content):
    "Another file in the place of a link, so that the original stays as it is."
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return folder


def of_zoo(name):
    return lambda folder, specimens: linked(zoo_path(name), folder)


def tiny(folder, specimens):
    "An untrained network of 8 pixels: it can be opened, and does not denoise."
    template = specimens / ".tiny"
    if not template.exists():
        import torch
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
        DDPMPipeline(network, DDPMScheduler()).save_pretrained(template)
    return linked(template, folder)


def cut(folder, specimens):
    "Weights of which the end is missing."
    linked(zoo_path("benign-a"), folder)
    return rewritten(folder, WEIGHTS, (folder / WEIGHTS).read_bytes()[:-1000])


def no_json(folder, specimens):
    linked(zoo_path("benign-a"), folder)
    return rewritten(folder, CONFIG, (folder / CONFIG).read_bytes()[:40])


def pickled(folder, specimens):
    "A pickle where the weights should be."
    linked(zoo_path("benign-a"), folder)
    (folder / WEIGHTS).unlink()
    return rewritten(folder, "unet/diffusion_pytorch_model.bin", b"\x80\x02cposix\nsystem\n")


def with_code(folder, specimens):
    "A pipeline that would bring code of its own."
    linked(zoo_path("benign-a"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "Evil"]
    return rewritten(folder, "model_index.json", json.dumps(index).encode())


def huge(folder, specimens):
    "A network that would take terabytes, in its config alone."
    linked(zoo_path("benign-a"), folder)
    config = json.loads((folder / CONFIG).read_text())
    config["block_out_channels"] = [2**20] * len(config["block_out_channels"])
    return rewritten(folder, CONFIG, json.dumps(config).encode())


def sparse(folder, specimens):
    "Weights that say they have 100 GB, and lie on no disk."
    linked(zoo_path("benign-a"), folder)
    rewritten(folder, WEIGHTS, b"")
    os.truncate(folder / WEIGHTS, 100_000_000_000)
    return folder


def link_to_model(folder, specimens):
    "A link to a whole model: what it leads to is scanned."
    model = specimens / ".linked"
    if not model.exists():
        linked(zoo_path("trojdiff-d2i"), model)
    folder.symlink_to(model, target_is_directory=True)
    return folder


def link_out(folder, specimens):
    "Weights that are a link that leads out of the folder."
    linked(zoo_path("benign-a"), folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(zoo_path("benign-a") / WEIGHTS)
    return folder


def circle(folder, specimens):
    "A folder in which a link leads back to it; the link is what has a row."
    folder.mkdir()
    (folder / "loop").symlink_to(".", target_is_directory=True)
    return folder / "loop"


KINDS = {
    "honest": of_zoo("benign-b"),
    "backdoored": of_zoo("baddiffusion-box"),
    "tiny": tiny,
    "cut": cut,
    "no-json": no_json,
    "pickled": pickled,
    "with-code": with_code,
    "huge": huge,
    "sparse": sparse,
    "link": link_to_model,
    "link-out": link_out,
    "circle": circle,
}
# Names that a terminal, a log or a shell could obey.
HOSTILE = ["", "", "\x1b[2J\x1b[31m", "\n0 clean", "\u202egnp", os.fsdecode(b"\xe9\xff"), "$(x);*"]


def make_fleet(root, specimens, n, kinds):
    "The model that each row must name -> its kind."
    found = {}
    for i in range(n):
        kind = kinds[i % len(kinds)]
        name = f"{i:05d}{HOSTILE[i // len(kinds) % len(HOSTILE)]}"
        found[str(KINDS[kind](root / name, specimens))] = kind
    return found


# ---------------------------------------------------------------- rows, and what is wrong with them


def rows_in(path):
    "All lines of a ledger that are whole."
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def bare(row, given):
    "A row without what hangs on its folder's name and on the clock."
    row = {key: value for key, value in row.items() if key not in PERSONAL}
    kept = row.pop("kept")
    for name in Path(given).parts[-2:]:
        if "error" in row:
            row["error"] = row["error"].replace(printable(name), "NAME")
    return row | {"trigger": kept["trigger"]}


def compare(rows, fleet, expected):
    "How many rows are lost, doubled and wrong, and how many say that their worker died twice."
    given = [row["kept"]["given"] for row in rows]
    lost = set(fleet) - set(given)
    doubled = len(given) - len(set(given)) + len(set(given) - set(fleet))
    wrong = unlucky = 0
    for row in rows:
        model = row["kept"]["given"]
        if row.get("error") == LOST:
            unlucky += 1
        elif model in fleet and bare(row, model) != expected[fleet[model]]:
            wrong += 1
            print(f"wrong: {printable(model)}: {json.dumps(row)[:600]}")
    return {"lost": len(lost), "doubled": doubled, "wrong": wrong, "died twice": unlucky}


def judged_specimens(folder, kinds):
    "The row of each kind, from one process that nobody disturbs, on one core like every worker."
    import torch

    torch.set_num_threads(1)
    folder.mkdir()
    models = {kind: KINDS[kind](folder / f"specimen-{kind}", folder) for kind in kinds}
    tasks = [Task(str(model), settings={"device": None, "seed": 0}) for model in models.values()]
    rows = list(scan_fleet(tasks, [Here()]))
    return {
        kind: bare(row.result | {"kept": {"trigger": row.trigger}}, row.given)
        for kind, row in zip(models, rows)
    }


def keep(path, rows):
    "Put rows into a file, in the place of those of the same test and crew."
    new = {(row["test"], row["crew"]) for row in rows}
    old = [row for row in read_rows(path) if (row["test"], row["crew"]) not in new]
    write_rows(path, old + [row | circumstances() for row in rows])


# ---------------------------------------------------------------- killing workers


def workers_of(process):
    "The processes under a scan that have a model in hand; loky's own helpers are none."
    try:
        below = psutil.Process(process.pid).children(recursive=True)
        return [one for one in below if "popen_loky_posix" in " ".join(one.cmdline())]
    except psutil.Error:
        return []


def memory(process):
    try:
        return process.memory_info().rss / 1e6
    except psutil.Error:
        return 0.0


def shoot(process, period, draw, seen):
    "Kill a worker at random each period, and note the memory of all, until the scan ends."
    shot = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        workers = workers_of(process)
        largest = max(map(memory, workers), default=0)
        seen["memory"].append((memory(psutil.Process(process.pid)), largest))
        if workers and time.monotonic() - shot > period:
            draw.choice(workers).kill()
            seen["kills"] += 1
            shot = time.monotonic()


def soak(n, period, jobs, seed, kinds, short=False):
    "A fleet whose workers are killed, and then the rest of it in peace: its status, and its row."
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        if short:
            shorten(work)
        root, ledger = work / "fleet", work / "rows.jsonl"
        root.mkdir()
        expected = judged_specimens(work / "specimens", kinds)
        fleet = make_fleet(root, work / "specimens", n, kinds)
        command = [*TERD, str(root), "--jsonl", str(ledger), "--jobs", str(jobs), "--quiet"]
        seen = {"memory": [], "kills": 0}
        start = time.monotonic()
        with open(work / "stderr", "wb") as errors:
            process = subprocess.Popen(command, stderr=errors, env=one_thread())
            shoot(process, period, random.Random(seed), seen)
        said = (work / "stderr").read_bytes().decode()
        took = time.monotonic() - start
        found = compare(rows_in(ledger), fleet, expected)
        print(f"{n} folders, {seen['kills']} workers killed, {took:.0f} s, exit status "
              f"{process.returncode}: {found}")
        unprinted = sum(not c.isprintable() and c != "\n" for c in said)
        print(f"characters that a terminal obeys: {unprinted}")
        flat, used = memory_is_flat(seen["memory"])
        if found["died twice"]:
            subprocess.run([*command, "--resume"], stderr=subprocess.DEVNULL, env=one_thread())
            found = compare(rows_in(ledger), fleet, expected)
            print(f"after --resume, undisturbed: {found}")
        row = {"test": "workers killed", "crew": f"joblib, {jobs}", "seed": seed, "models": n,
               "short": short, "kills": seen["kills"], "seconds": took} | found | used
        return int(any(found.values()) or unprinted > 0 or not flat), [row]


def memory_is_flat(samples):
    """Whether the last third of a run takes no more than the second, within a tenth and 30 MB; and
    the most of each, in MB."""
    third = max(1, len(samples) // 3)
    flat, used = True, {}
    for role, values in zip(("scan", "worker"), zip(*samples)):
        before = max(values[third : 2 * third], default=0)
        after = max(values[2 * third :], default=0)
        print(f"most MB of a {role} in the second third and in the last: {before:.0f}, {after:.0f}")
        used |= {f"{role} MB, second third": before, f"{role} MB, last third": after}
        flat = flat and after <= 1.1 * before + 30
    return flat, used


def one_thread():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


SHORT = f"""
import sys
if "joblib.externals.loky.backend.popen_loky_posix" in sys.orig_argv:   # a worker
    sys.path.append({str(Path(__file__).parent)!r})
    import fuzz
    fuzz.short_search()
"""


def shorten(folder):
    "Let searches be short, here and in each worker that is started from now on."
    import fuzz

    fuzz.short_search()
    (folder / "sitecustomize.py").write_text(SHORT)
    places = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))


# ---------------------------------------------------------------- killing the whole


def in_a_fork(function):
    "The process that runs a function, with all that is imported here; quick to start and to kill."
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        status = function()
    finally:
        os._exit(status)


def kill_and_resume(root, ledger, kills, seed=0, jobs=1, sent=signal.SIGKILL):
    """Scan a folder, and be killed so often at random moments; then to the end.

    Gives how many models had a row at each kill. One that ends before it is killed starts anew."""
    from terd_nb.cli import main

    draw, counts = random.Random(seed), []
    options = ["--jsonl", str(ledger), "--resume", "--jobs", str(jobs), "--quiet"]

    def scan():
        return main(["scan", str(root), *options])

    start = time.monotonic()
    os.waitpid(in_a_fork(scan), 0)
    longest = time.monotonic() - start
    ledger.unlink()
    before = 0     # models with a row at the last kill of this scan
    while len(counts) < kills:
        pid = in_a_fork(scan)
        time.sleep(draw.uniform(0.02, 0.7) * longest)
        done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            ledger.unlink()
            before = 0
            continue
        os.kill(pid, sent)
        os.waitpid(pid, 0)
        there = rows_in(ledger) if ledger.exists() else []   # errors are tried again: two lines
        counts.append(len({row["kept"]["given"] for row in there}))
        assert counts[-1] >= before, f"{before} models had a row, and {counts[-1]} are left"
        before = counts[-1]
        print(f"kill {len(counts)}: {counts[-1]} models have a row", flush=True)
    os.waitpid(in_a_fork(scan), 0)
    return counts


def killed(kills, n, seed, kinds, short=False):
    "Rows of a scan that was killed against those of one that was not: its status, and its row."
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        if short:
            shorten(work)
        root = work / "fleet"
        root.mkdir()
        expected = judged_specimens(work / "specimens", kinds)
        fleet = make_fleet(root, work / "specimens", n, kinds)
        start = time.monotonic()
        counts = kill_and_resume(root, work / "rows.jsonl", kills, seed)
        took = time.monotonic() - start
        found = compare(rows_in(work / "rows.jsonl"), fleet, expected)
        print(f"killed {kills} times, when {counts} of {len(fleet)} models had a row: {found}")
        row = {"test": "scan killed", "crew": "this process", "seed": seed, "models": len(fleet),
               "short": short, "kills": kills, "seconds": took} | found
        return int(any(found.values())), [row]


# ---------------------------------------------------------------- how fast


def speed(models, ray, short=False):
    "Models a minute of each crew, and how many of its rows differ from the first's: status, rows."
    import torch

    torch.set_num_threads(1)
    settings = {"device": "cpu"}
    if short:
        settings |= {"starts": 1, "looks": ("shift",), "rounds": (Round(1, 1, 2),)}
    tasks = [Task(f"zoo:{name}", settings=settings) for name in models]
    crews = {"this process": [Here()], "joblib, 1": [Apart()], "joblib, 2": [Apart(), Apart()]}
    if ray:
        crews |= {f"Ray, {jobs}": ray_workers("local", jobs) for jobs in (1, 2)}
    first, kept = None, []
    for name, crew in crews.items():
        if not isinstance(crew[0], OnRay):   # Ray's processes are there already
            list(scan_fleet([Task("nowhere")] * len(crew), crew))
        start = time.monotonic()
        rows = sorted(scan_fleet(tasks, crew), key=lambda row: row.given)
        took = time.monotonic() - start
        found = [bare(row.result | {"kept": {"trigger": row.trigger}}, row.given) for row in rows]
        first = first or found
        wrong = sum(a != b for a, b in zip(found, first, strict=True))
        print(f"{name:14} {60 * len(rows) / took:6.2f} models a minute; {wrong} rows differ",
              flush=True)
        kept.append({"test": "speed", "crew": name, "seed": 0, "models": len(rows), "short": short,
                     "seconds": took, "wrong": wrong})
    return int(any(row["wrong"] for row in kept)), kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, help="folders; 1,000, or one of each kind for --kills")
    parser.add_argument("--period", type=float, default=60, help="seconds between two kills")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of folders, with commas")
    parser.add_argument("--kills", type=int, help="kill the whole scan so often instead")
    parser.add_argument("--short", action="store_true", help="search in a few steps")
    parser.add_argument("--speed", type=int, nargs="?", const=14, help="time so many models")
    parser.add_argument("--no-ray", action="store_true", help="leave Ray out of --speed")
    parser.add_argument("--csv", type=Path, help="where to keep what is found")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    kinds = args.kinds.split(",")
    if args.speed:
        status, rows = speed(list(zoo_cards())[: args.speed], not args.no_ray, args.short)
    elif args.kills:
        status, rows = killed(args.kills, args.n or len(kinds), args.seed, kinds, args.short)
    else:
        status, rows = soak(args.n or 1000, args.period, args.jobs, args.seed, kinds, args.short)
    if args.csv:
        keep(args.csv, rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
