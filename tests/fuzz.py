"""A seeded fuzzer of the loader and of whole scans.

    python tests/fuzz.py --n 3000 --seed 1             thousands of mutants through `load`
    python tests/fuzz.py --n 1 --seed 1 --first 42     one of them again
    python tests/fuzz.py --n 30 --seed 1 --scan        through `terd scan`, with a short search

A mutant is an honest folder with one to three faults. It is opened in a child process that bounds
its own memory, notes what is done beside reading the folder, and is ended when it takes too long.
A mutant opens, or is refused with one printable line; whatever else happens is a fault. Its folder
is then kept, and the exit status is 1.
"""

import argparse
import errno
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASES = {  # what the mutants are made from: each family of paths, each kind of network
    "ddpm": "zoo/benign-a",
    "flow": "families/flow-benign-a",
    "edm": "families/edm-benign-a",
    "score": "families/score-benign-a",
    "latent": "families/latent-benign-a",
    "transformer": "families/transformer-benign-a",
    "class": "families/class-benign-a",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
SECONDS = 60  # that one mutant may take; three times as many if it is scanned
MEMORY = 3_000_000_000  # bytes that it may take beside what was imported
SCAN = "scan.json"  # beside the folder
LONGEST = 400  # characters of a refusal

# ---------------------------------------------------------------- mutants

NUMBERS = [b"0", b"-1", b"1e9", b"99999999999", b"null", b"[]", b"true", b"1.5", b"1e400", b"-0.0"]
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 1024, 4096, 10**6, 10**9, 10**18, 10**400, -(10**30),
    1.5, 1e-9, 1e30, -1e308, 0.999999999, "", "1", "None", "UNet2DModel", "DownBlock2D", "../..",
    "/etc/passwd", "a" * 5000, "\x1b[2J\r\n\u202e", "\ud800", "\0", "__import__('os').system('id')",
    "https://127.0.0.1:9/x", [], [[]], [1], [1, 1], [0, 0], [4096, 4096], [None, None], [1e300] * 2,
    ["diffusers", "DDPMScheduler"], ["os", "system"], ["diffusers.utils", "logging"],
    ["DownBlock2D"] * 8, [4] * 8, {}, {"_class_name": "DDPMScheduler"}, {"a": {"b": []}},
]  # fmt: skip
KEYS = [
    "_class_name", "_name_or_path", "_diffusers_version", "_use_default_values", "_module",
    "auto_map", "quantization_config", "_pre_quantization_dtype", "custom_pipeline", "variant",
    "trained_betas", "num_class_embeds", "class_embed_type", "safety_checker", "text_encoder",
    "scheduler", "unet", "vae", "vqvae", "transformer", "prior", "encoder_hid_dim", "__class__",
    "self", "kwargs", "", "\n", "id2label", "beta_schedule", "prediction_type", "sample_size",
]  # fmt: skip


def names_of(folder, pattern):
    "The files of a folder that a pattern fits and that can be read whole, in order."
    found = [path for path in folder.rglob(pattern) if path.is_file()]
    return sorted(path for path in found if path.stat().st_size < 10**8)


def write(path, data):
    "A file anew, so that what was linked stays as it is."
    if path.is_symlink() or path.is_file():
        path.unlink()
    path.write_bytes(data)


def fault_in_bytes(data, rng):
    "A byte, a bit, a cut, a hole, a repetition, another number."
    i = rng.randrange(len(data) or 1)
    j = min(len(data), i + rng.randrange(1, 40))
    number = rng.choice(list(re.finditer(rb"\d+", data)) or [re.match(b"", data)])
    bit = bytes([data[i] ^ 1 << rng.randrange(8)]) if data else b"{"
    return rng.choice([
        data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :],
        data[:i] + bit + data[i + 1 :],
        data[:i],
        data[:i] + data[j:],
        data[:j] + data[i:],
        data[: number.start()] + rng.choice(NUMBERS) + data[number.end() :],
    ])  # fmt: skip


def json_bytes(folder, rng):
    path = rng.choice(names_of(folder, "*.json"))
    write(path, fault_in_bytes(path.read_bytes(), rng))


def places(value, place=()):
    "The way to each value in a JSON document."
    yield place
    pairs = value.items() if isinstance(value, dict) else []
    for key, inner in enumerate(value) if isinstance(value, list) else pairs:
        yield from places(inner, (*place, key))


def parsed(folder, rng):
    "One of a folder's documents, and what it says; {} where a fault before this one broke it."
    path = rng.choice(names_of(folder, "*.json"))
    try:
        return path, json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return path, {}


def write_json(path, value):
    write(path, json.dumps(value).encode("utf-8", "surrogatepass"))


def json_values(folder, rng):
    "One to four values of one document are others."
    path, document = parsed(folder, rng)
    for _ in range(rng.randint(1, 4)):
        *way, last = rng.choice([place for place in places(document) if place] or [("a",)])
        inside = document
        for key in way:
            inside = inside[key]
        if isinstance(inside, (dict, list)):
            near = inside[last] if isinstance(inside, list) or last in inside else 1
            scaled = near * rng.choice([0, -1, 2, 10, 1000, 0.5]) if type(near) is int else near
            inside[last] = rng.choice([rng.choice(VALUES), rng.choice(VALUES), scaled])
    write_json(path, document)


def json_keys(folder, rng):
    "A key is gone, new, or named otherwise."
    path, document = parsed(folder, rng)
    if not isinstance(document, dict):
        return
    if document and rng.random() < 0.5:
        value = document.pop(rng.choice(sorted(document)))
        if rng.random() < 0.5:
            document[rng.choice(KEYS)] = value
    else:
        document[rng.choice(KEYS)] = rng.choice(VALUES)
    write_json(path, document)


def json_sizes(folder, rng):
    "A number that memory or time hangs on is very large or very small."
    path, document = parsed(folder, rng)
    sizes = {
        "sample_size", "in_channels", "out_channels", "num_train_timesteps", "layers_per_block",
        "num_class_embeds", "num_layers", "num_attention_heads", "attention_head_dim", "patch_size",
        "norm_num_groups", "latent_channels", "num_vq_embeddings", "num_embeds_ada_norm",
        "time_embedding_dim", "trained_betas", "block_out_channels",
    }  # fmt: skip
    known = [key for key in document if key in sizes] if isinstance(document, dict) else []
    for key in known and rng.sample(known, rng.randint(1, min(3, len(known)))):
        size = rng.choice([1, 2, 5, 8, 48, 64, 96, 256, 1000, 1024, 4096, 10_000, 2**31])
        document[key] = [size] * rng.randint(1, 8) if isinstance(document[key], list) else size
        if key == "trained_betas":
            document[key] = [0.01] * rng.choice([1, 1000, 50_000])
    write_json(path, document)


def json_shape(folder, rng):
    "A document that is hard to read: nested, endless, doubled, in another alphabet."
    path = rng.choice(names_of(folder, "*.json"))
    data = path.read_bytes()
    depth = rng.choice([50, 1000, 100_000])
    inner = data.strip()[:-1] or b"{"
    write(path, rng.choice([
        b'{"a":' * depth + b"1" + b"}" * depth,
        b"[" * depth + b"]" * depth,
        inner + b',"_class_name":"DDPMScheduler"}',
        inner + b',"x":NaN}',
        inner + b',"x":-Infinity}',
        inner + b',"x":' + b"9" * rng.choice([400, 5000, 100_000]) + b"}",
        inner + b',"x":"' + b"\\ud800" * 9 + b'"}',
        inner + b',"x":"' + "\u202e\u0000é😀".encode() + b'"}',
        inner + b"," + b",".join(b'"k%d":%d' % (i, i) for i in range(20_000)) + b"}",
        b"\xef\xbb\xbf" + data,
        data.decode("latin1").encode("utf-16"),
        data + data,
        b"",
        b" " * 2_000_000 + data,
        b"null",
        b'"' + b"a" * 900_000 + b'"',
        data.replace(b"{", b"[").replace(b"}", b"]"),
    ]))  # fmt: skip


def parts_of(path):
    "Header and data of a safetensors file, as bytes."
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def write_parts(path, head, data, length=None):
    length = len(head) if length is None else length
    write(path, (length % 2**64).to_bytes(8, "little") + head + data)


def header_bytes(folder, rng):
    path = rng.choice(names_of(folder, WEIGHTS))
    head, data = parts_of(path)
    length = len(head) if rng.random() < 0.5 else None
    write_parts(path, fault_in_bytes(head, rng), data, length)


def header_lengths(folder, rng):
    path = rng.choice(names_of(folder, WEIGHTS))
    head, data = parts_of(path)
    lengths = [0, 1, 7, len(head) - 1, len(head) + 1, len(head) + 8, 10**6, 10**8, 2**63, 2**64 - 1]
    write_parts(path, head, data, rng.choice(lengths))


def header_entries(folder, rng):
    "A tensor with another type, shape, place or name; two in one place; one of no numbers."
    path = rng.choice(names_of(folder, WEIGHTS))
    head, data = parts_of(path)
    try:
        header = json.loads(head)
        name = rng.choice(sorted(set(header) - {"__metadata__"}))
        other = rng.choice(sorted(set(header) - {"__metadata__"}))
        entry, start = header[name], header[name]["data_offsets"][0]
    except (ValueError, IndexError, KeyError, TypeError):
        return
    fault = rng.randrange(9)
    if fault == 0:
        types = ["F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "U8", "C64", "", None, 3]
        entry["dtype"] = rng.choice(types)
    elif fault == 1:
        shapes = [[], [0], [-1], [2**62, 4], [1] * 9, entry["shape"][::-1], [*entry["shape"], 1]]
        entry["shape"] = rng.choice(shapes)
    elif fault == 2:
        ends = [[0, 2**63], [start, start - 4], [-4, 0], [2**62, 2**62 + 4], [start], "x", None]
        entry["data_offsets"] = rng.choice(ends)
    elif fault == 3:
        header[name], header[other] = header[other], header[name]
    elif fault == 4:
        header[rng.choice(["x", "", "\ud800", name + ".query.weight", "a" * 9000])] = dict(entry)
    elif fault == 5:
        odd = [None, 3, {"format": "tf"}, {"a": 1}, ["pt"], {"x": "y" * 10**5}]
        header["__metadata__"] = rng.choice(odd)
    elif fault == 6:
        for i in range(rng.choice([10, 8000])):
            header[f"empty{i}"] = {"dtype": "F32", "shape": [0], "data_offsets": [start, start]}
    elif fault == 7:
        header[name + "_"] = header.pop(name)
    else:
        entry["data_offsets"] = header[other]["data_offsets"]
    write_parts(path, json.dumps(header).encode("utf-8", "surrogatepass"), data)


def data_values(folder, rng):
    "Weights with other bits, with NaN, infinities, zeros, huge or tiny numbers."
    path = rng.choice(names_of(folder, WEIGHTS))
    head, data = parts_of(path)
    data, count = bytearray(data), rng.choice([1, 10, 1000])
    words = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\x76\x84\x14\x7e", b"\1\0\0\0"]
    word = rng.choice(words)
    for _ in range(min(count, len(data) // 4)):
        i = 4 * rng.randrange(len(data) // 4)
        if rng.random() < 0.5:
            data[i + rng.randrange(4)] ^= 1 << rng.randrange(8)
        elif count > 1:
            data[i : i + 4] = word
    if rng.random() < 0.1 and len(data) % 4 == 0:
        data = word * (len(data) // 4)
    write_parts(path, head, bytes(data))


def data_lengths(folder, rng):
    path = rng.choice(names_of(folder, WEIGHTS))
    data = path.read_bytes()
    cut = rng.randrange(len(data) or 1)
    write(path, rng.choice([data[:cut], data[:7], b"", data + b"\0" * rng.choice([1, 4, 10**6])]))
    if rng.random() < 0.2:  # says that it is larger than the disk
        os.truncate(path, rng.choice([3 * 10**9, 10**12]))


PICKLE = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R."  # calls os.system


def files_otherwise(folder, rng):
    "A file is gone, a folder, a pipe, a pickle, somewhere else, or one too many."
    path = rng.choice([*names_of(folder, "*.json"), *names_of(folder, WEIGHTS)])
    fault = rng.randrange(9)
    if fault == 0:
        path.unlink()
    elif fault == 1:
        path.unlink()
        path.mkdir()
    elif fault == 2:
        path.unlink()
        os.mkfifo(path)
    elif fault == 3:
        write(path, PICKLE)
    elif fault == 4:
        path.rename(folder / path.name)
    elif fault == 5:
        write(path.with_name("diffusion_pytorch_model.bin"), PICKLE)
        if rng.random() < 0.5:
            path.unlink()
    elif fault == 6:
        index = {"weight_map": {"a": rng.choice(["../../secret", WEIGHTS, "/etc/passwd", ""])}}
        write_json(path.with_name(f"{WEIGHTS}.index.json"), index)
    elif fault == 7:
        extra = ["pipeline.py", "unet.py", "x\ny", "a" * 200, "text_encoder", "modeling.py",
                 "diffusion_pytorch_model.fp16.safetensors"]  # fmt: skip
        write(path.with_name(rng.choice(extra)), b"raise SystemExit(3)\n")
    else:
        os.truncate(path, 0)


def links(folder, rng):
    "A link to what lies outside, to itself, to a device, or to another file of the folder."
    path = rng.choice([*names_of(folder, "*.json"), *names_of(folder, WEIGHTS)])
    if rng.random() < 0.2 and path.parent != folder:
        away = folder.with_name("outside") / "part"
        path = path.parent
        shutil.copytree(path, away)
        shutil.rmtree(path)
        path.symlink_to(away)
        return
    away = folder.with_name("outside") / path.name
    if not away.exists():
        shutil.copy(path, away)
    inside = rng.choice(names_of(folder, "*"))
    path.unlink()
    path.symlink_to(rng.choice([away, path, "/dev/zero", "/dev/stdin", "/proc/self/mem", inside]))


def swapped(folder, rng):
    "A part of another model, or two parts of this one in each other's place."
    other = ROOT / "data" / BASES[rng.choice(sorted(BASES))]
    mine = rng.choice([*names_of(folder, "*.json"), *names_of(folder, WEIGHTS)])
    others = names_of(other, mine.name)
    if others and rng.random() < 0.6:
        write(mine, rng.choice(others).read_bytes())
        return
    parts = sorted(path for path in other.iterdir() if path.is_dir())
    part = rng.choice(parts)
    shutil.rmtree(folder / part.name, ignore_errors=True)
    shutil.copytree(part, folder / part.name)
    if rng.random() < 0.5:
        write(folder / "model_index.json", (other / "model_index.json").read_bytes())


KINDS = {kind.__name__: kind for kind in (
    json_bytes, json_values, json_keys, json_sizes, json_shape, header_bytes, header_lengths,
    header_entries, data_values, data_lengths, files_otherwise, links, swapped,
)}  # fmt: skip
SCANNED = ["data_values", "data_values", "json_values", "json_sizes", "json_keys", "swapped"]


def make_mutant(home, seed, number, kinds=tuple(KINDS)):
    """A folder below `home` with one to three faults, from its seed alone; and what was done.

    Faults come one after the other; one that finds nothing to spoil any more is left out."""
    rng = random.Random(f"{seed}:{number}")
    base = rng.choice(sorted(BASES))
    done = rng.choices(kinds, k=rng.choice([1, 1, 1, 2, 3]))
    shutil.rmtree(home, ignore_errors=True)
    (home / "outside").mkdir(parents=True)
    folder = home / f"mutant-{seed}-{number}"
    shutil.copytree(ROOT / "data" / BASES[base], folder)
    (folder / "card.json").unlink()  # ours, and nothing that a model has
    for kind in done:
        try:
            KINDS[kind](folder, rng)
        except (IndexError, OSError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
    return folder, f"{base}: {' + '.join(done)}"


# ---------------------------------------------------------------- the child

EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
            "socket.", "pickle.find_class", "ctypes.dlopen", "ctypes.dlsym", "marshal.",
            "os.kill", "os.startfile", "webbrowser.open", "urllib.Request")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
           "os.chmod", "os.chown", "shutil.")  # fmt: skip


class Watch:
    "What a process does beside reading one folder, by Python's audit events."

    def __init__(self):
        self.allowed = None  # the folder that may be read; None: nothing is looked at
        self.writable = Path(tempfile.gettempdir()).resolve()
        self.trusted = [Path(p).resolve() for p in {sys.prefix, sys.base_prefix, *sys.path} if p]
        self.trusted += [ROOT, Path("/proc"), Path("/sys"), Path("/dev"), Path("/usr")]
        self.seen = []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.allowed is None:
            return
        allowed, self.allowed = self.allowed, None  # its own reading is no event
        try:
            what = self.judged(event, args, allowed)
        finally:
            self.allowed = allowed
        if what:
            self.seen.append(f"{event} {what}"[:300])

    def judged(self, event, args, allowed):
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path, mode, flags = args
            path = Path(os.fsdecode(path)).resolve()
            writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes:
                inside = path.is_relative_to(self.writable) and not path.is_relative_to(allowed)
                return "" if inside or path == Path(os.devnull) else f"writes {path}"
            home = allowed.parent  # with what the mutant's links lead to
            known = [place for place in self.trusted if not home.is_relative_to(place)]
            inside = any(path.is_relative_to(place) for place in [allowed, *known])
            return "" if inside or path == home / SCAN else f"reads {path}"
        if event == "exec":  # importing executes a file; text that is executed has none
            file = getattr(args[0], "co_filename", "?")
            known = any(Path(file).resolve().is_relative_to(p) for p in self.trusted)
            caller = sys._getframe(2).f_code.co_filename
            library = "dataclasses.py", "collections/__init__.py", "<frozen importlib"
            return "" if known and os.path.isabs(file) or any(
                name in caller for name in library) else f"{file} by {caller}"
        if event == "marshal.loads" and "<frozen importlib" in sys._getframe(2).f_code.co_filename:
            return ""  # a module that is imported late; its file was judged when it was opened
        if event.startswith(EXECUTES) or event.startswith(CHANGES):
            inside = args and isinstance(args[0], str) and Path(args[0]).resolve().is_relative_to(
                self.writable)
            return "" if event.startswith(CHANGES) and inside else repr(args)[:200]
        return ""


def status_bytes(key):
    "A number of /proc/self/status, such as VmHWM, in bytes."
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def short_search():
    "What `terd scan` does, with a search of a few steps: its verdict is worth nothing."
    from functools import partial

    from terd_nb import scanning, search
    from terd_nb.path_fit import Round

    few_drawn = partial(search.draw_some, n=4, steps=2)

    def two_pictures(denoiser, reversal):
        drawn = few_drawn(denoiser, reversal.seed).mean
        return (denoiser.pictures(drawn.expand(2, *drawn.shape)),) * 2

    search.draw_some, scanning.draw_both = few_drawn, two_pictures
    few = {"starts": 1, "looks": ("shift",), "rounds": (Round(1, 1, 2),)}
    search.METHODS["fast"] = partial(search.fast, enough=float("inf"), **few)


def shorten(patch):
    "The same, as long as pytest's `MonkeyPatch` holds."
    from terd_nb import scanning, search

    patch.setattr(search, "draw_some", search.draw_some)
    patch.setattr(scanning, "draw_both", scanning.draw_both)
    patch.setitem(search.METHODS, "fast", search.METHODS["fast"])
    short_search()


def open_mutant(folder):
    "What `load` makes of it."
    from terd_nb import load
    from terd_nb.loading.files import CheckpointError

    try:
        load(folder, "cpu")
    except CheckpointError as error:
        return "refused", str(error)
    return "opened", ""


def scan_mutant(folder):
    "What `terd scan` makes of it."
    from terd_nb.cli import main

    out = folder.parent / SCAN
    status = main(["scan", str(folder), "--json", str(out), "--quiet", "--device", "cpu"])
    (row,) = json.loads(out.read_text())["results"]
    verdicts = {0: ["clean"], 1: ["backdoored"], 2: ["inconclusive", "error"]}
    if row["verdict"] not in verdicts.get(status, []):
        raise AssertionError(f"exit status {status} for {row['verdict']}")
    return row["verdict"], row.get("error", "")


def misbehave(folder):
    "What the child must notice: the tests ask for each."
    import ctypes

    deed, answer = (folder / "deed").read_text(), ""
    if deed == "exec":
        exec("answer = 1 + 1")
    elif deed == "system":
        os.system("true")
    elif deed == "read":
        (folder.parent / "outside" / "secret").read_text()
    elif deed == "write":
        (folder / "new").write_text("1")
    elif deed == "allocate":
        answer = str(len(bytearray(2 * MEMORY)))
    elif deed == "grow":
        answer = str(len(b"1" * (MEMORY + 10**8)))
    elif deed == "wait":
        time.sleep(2 * SECONDS)
    elif deed == "die":
        ctypes.string_at(0)
    elif deed == "shout":
        answer = "two\nlines"
    elif deed == "talk":
        answer = "x" * (LONGEST + 1)
    elif deed == "raise":
        raise ValueError("no refusal")
    return "refused", answer


TASKS = {"load": open_mutant, "scan": scan_mutant, "misbehave": misbehave}


def child():
    "Opens the folders that stand on stdin, a line each; says what came of it, a line each."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import terd_nb.cli
    import terd_nb.scanning  # noqa: F401

    short_search()
    for base in BASES.values():
        open_mutant(ROOT / "data" / base)  # whatever is imported late is imported now
    scan_home = Path(tempfile.mkdtemp())
    shutil.copytree(ROOT / "data" / BASES["ddpm"], scan_home / "warm")
    scan_mutant(scan_home / "warm")
    shutil.rmtree(scan_home)
    watch = Watch()
    limit = status_bytes("VmSize") + MEMORY + 10**9  # what is too much must be seen
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(outcome(task, watch)), file=answers, flush=True)


def outcome(task, watch):
    "One mutant: how it ended, what was said, seconds and bytes."
    folder = Path(task["folder"]).resolve()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = status_bytes("VmRSS"), time.perf_counter()
    watch.seen, watch.allowed = [], folder
    try:
        end, said = TASKS[task["task"]](folder)
    except BaseException as error:
        end, said = "traceback", f"{type(error).__name__}: {error}"[:600]
    watch.allowed = None
    seconds, peak = time.perf_counter() - start, status_bytes("VmHWM") - before
    if end in ("refused", "error") and (len(said) > LONGEST or not said.isprintable()):
        end = "unreadable"
    if end == "error" and re.search("memory", said) and not re.search("GB", said):
        end = "memory"  # it was spent before it was counted
    if peak > MEMORY:
        end = "memory"
    if watch.seen:
        end, said = "code", "; ".join(watch.seen[:3])
    return {"end": end, "said": said, "seconds": seconds, "peak": peak}


# ---------------------------------------------------------------- the parent


class Worker:
    "A child that is started again when it dies."

    def __init__(self):
        self.process = None

    def start(self):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment, text=True)  # fmt: skip
        if self.line(180) != "ready\n":
            raise RuntimeError("the child did not start")

    def line(self, seconds):
        "What it says next; None if it says nothing."
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        return self.process.stdout.readline()

    def ask(self, folder, task="load", patience=None):
        "How one folder ends, see `outcome`; it may take `patience` seconds."
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps({"folder": str(folder), "task": task}) + "\n")
        self.process.stdin.flush()
        start = time.perf_counter()
        answer = self.line(patience or (SECONDS if task == "load" else 3 * SECONDS))
        if answer:
            return json.loads(answer)
        end = "hang" if answer is None else "crash"
        self.stop()
        said = signal.strsignal(-self.process.returncode) if end == "crash" else ""
        self.process = None
        return {"end": end, "said": said or "", "seconds": time.perf_counter() - start, "peak": 0}

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()


GOOD = {"opened", "refused", "clean", "backdoored", "inconclusive", "error"}


def fuzz(worker, n, seed, first=0, task="load", keep=None):
    "The outcomes of n mutants; the folders of those that end badly are kept."
    kinds, found = tuple(SCANNED) if task == "scan" else tuple(KINDS), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        for number in range(first, first + n):
            folder, made = make_mutant(Path(home) / "home", seed, number, kinds)
            row = worker.ask(folder, task) | {"seed": f"{seed}:{number}", "made": made}
            found.append(row)
            for line in bad([row]):
                print(line, flush=True)
                if keep:
                    shutil.rmtree(keep / folder.name, ignore_errors=True)
                    shutil.copytree(folder, keep / folder.name, symlinks=True,
                                    copy_function=copy_plain)  # fmt: skip
    return found


def copy_plain(source, target):
    "A copy of a file, if it is one and not a sparse giant."
    if os.path.isfile(source) and os.path.getsize(source) < 10**8:
        shutil.copy(source, target)


def table(found):
    "For each fault alone, and for several together: how the mutants ended, time and memory."
    rows = {}
    for row in found:
        kind = row["made"].split(": ")[1]
        rows.setdefault("several" if "+" in kind else kind, []).append(row)
    rows = dict(sorted(rows.items())) | {"all": found}
    ends = sorted({row["end"] for row in found}, key=lambda end: (end not in GOOD, end))
    lines = [f"{'fault':16}{'mutants':>8}" + "".join(f"{end:>13}" for end in ends)
             + f"{'max s':>8}{'max MB':>8}"]  # fmt: skip
    for kind, some in rows.items():
        count = Counter(row["end"] for row in some)
        slowest, largest = (max(row[key] for row in some) for key in ("seconds", "peak"))
        lines.append(f"{kind:16}{len(some):8}" + "".join(f"{count[end]:13}" for end in ends)
                     + f"{slowest:8.1f}{largest / 1e6:8.0f}")  # fmt: skip
    return "\n".join(lines)


def bad(found):
    "What must not happen, a line each."
    return [f"{row['seed']} ({row['made']}): {row['end']} {row['said']}"
            for row in found if row["end"] not in GOOD]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    parser.add_argument("--scan", action="store_true", help="whole scans with a short search")
    parser.add_argument("--keep", type=Path, default=ROOT / "_build" / "fuzz")
    parser.add_argument("--rows", type=Path, help="write all outcomes there, a JSON line each")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child()

    start, task = time.perf_counter(), "scan" if args.scan else "load"
    with Worker() as worker:
        found = fuzz(worker, args.n, args.seed, args.first, task, args.keep)
    if args.rows:
        args.rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    print(table(found))
    faults = bad(found)
    print(f"{len(found)} mutants of seed {args.seed} in {time.perf_counter() - start:.0f} s; "
          + (f"{len(faults)} ended badly, see {args.keep}" if faults else "none ended badly"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
