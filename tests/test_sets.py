"""Sets of pictures in every form: pixels and labels of the plain folder; a line for broken ones."""

import io
import json
import shutil
import sys
import tarfile
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import launch
from helpers import ROOT, refusal_of
from PIL import Image
from safetensors.torch import load_file, save_file

import latent_fm
from models.draws import Draws
from models.files import UserError
from models.networks import save_network
from models.networks.autoencoders import AutoencoderKL
from models.networks.dit import DiT
from models.networks.latent_space import load_space
from models.plumbing import images, latents, loading, sets
from models.plumbing.data import load_data, real_batches

VAE = dict(
    block_out_channels=[8, 8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, norm_num_groups=4,
)  # fmt: skip
TINY = """--max_train_steps 2 --train_batch_size 4 --width 32 --depth 1 --cond_dim 16
    --sample_steps 1 --resolution 8""".split()


def encoded(seed, size=(12, 9), kind="png"):
    """The bytes of a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


# Odd names, nested folders, mixed sizes and kinds, a broken member, one that is no picture, and
# what is hidden.
MEMBERS = {
    "a b/x.y/2.png": encoded(0),
    "a b/1.png": encoded(1, (8, 8)),
    "a b/cut.png": encoded(2)[:90],
    "z/é'\".jpg": encoded(3, (30, 11), "jpeg"),
    "z/UPPER.PNG": encoded(4, (7, 20)),
    "z/.hidden/no.png": encoded(5),
    "m/only.webp": encoded(6, (16, 16), "webp"),
}


def write_folder(root, members):
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def numbered(path, members, write, labels):
    """Pictures without folders, KEY.EXT and KEY.cls or KEY.json beside them, in two shards."""
    path.mkdir()
    parts = [{}, {}]
    for i, (name, data) in enumerate(members.items()):
        key, part = f"{i // 2:04d}", parts[i % 2]  # both count from 0
        part[f"{key}.{name.rsplit('.', 1)[1]}"] = data
        part[f"{key}.txt"] = b"a caption"
        if i % 3:
            part[f"{key}.cls"] = str(labels[name]).encode()
        else:
            part[f"{key}.json"] = json.dumps({"label": labels[name]}).encode()
    for i, part in enumerate(parts):
        write(path / f"{i:05d}.tar", part)
    return path


def with_json(members, labels):
    """A dataset.json in front, in another order than the files'."""
    rows = [[name, labels[name]] for name in reversed(labels)]
    return {"dataset.json": json.dumps({"labels": rows}).encode(), **members}


FORMS = {
    "zip": lambda root: write_zip(root / "s.zip", MEMBERS),
    "stored zip": lambda root: write_zip(root / "s.zip", MEMBERS, zipfile.ZIP_STORED),
    "zip of a folder": lambda root: write_zip(
        root / "s.ZIP", {f"data/{name}": data for name, data in MEMBERS.items()}
    ),
    "tar": lambda root: write_tar(root / "s.tar", MEMBERS),
    "tar of a folder": lambda root: write_tar(
        root / "s.tar", {f"./data/{name}": data for name, data in MEMBERS.items()}
    ),
}


def same(found, want):
    """Pixels, labels and names of classes."""
    (x, cond, names), (x_want, cond_want, names_want) = found, want
    every = torch.arange(len(x_want))
    assert len(x) == len(x_want) and torch.equal(x[every], x_want[every])
    assert torch.equal(cond["label"], cond_want["label"]) and names == names_want


@pytest.mark.parametrize("form", FORMS)
def test_archives_are_the_folder(tmp_path, capsys, form):
    folder = write_folder(tmp_path / "plain", MEMBERS)
    want = load_data(str(folder), 8)
    lines = capsys.readouterr()
    assert lines.err.count("skipped") == 1 and "cut.png" in lines.err
    said = "a folder with 5 pictures of 3 classes, 8 to 20 pixels wide and 7 to 30 high, 1 skipped"
    assert said in lines.out
    assert len(want[0]) == 5 and want[2] == ["a b", "m", "z"]
    source = str(FORMS[form](tmp_path))
    same(load_data(source, 8), want)
    lines = capsys.readouterr()
    assert lines.err.count("skipped") == 1 and f"{source}: a b/cut.png" in lines.err
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".jpg", ".webp")][2:]  # unpacked
    flat = load_data(str(folder), 8, flat=True)[0]
    x = load_data(source, 8, flat=True)[0]
    assert torch.equal(x[torch.arange(5)], flat[torch.arange(5)])


WHOLE = {name: data for name, data in MEMBERS.items() if "cut" not in name and "hid" not in name}
LABELS = dict(zip(WHOLE, [1, 0, 2, 2, 1]))


def test_which_of_two_keys_of_a_row_counts():
    """KEY.json of img2dataset's and others' shards: "label" before "cls", "caption" before "text";
    a file of its own, KEY.cls or KEY.txt, before both."""
    both = b'{"text": "t", "cls": 2, "caption": "c", "label": 1}'
    others, files = b'{"text": "t", "cls": 2}', {}
    tars = SimpleNamespace(read=lambda name, place: files[place])
    for text, label, caption in ((both, 1, "c"), (others, 2, "t"), (b"[]", None, None)):
        files["json"] = text
        assert sets.Tars.label_of(tars, {"json": "json"}) == label
        assert sets.Tars.caption_of(tars, {"json": "json"}) == caption
    files |= {"json": both, "cls": b" 7\n", "txt": "é".encode()}
    there = {kind: kind for kind in files}
    assert (sets.Tars.label_of(tars, there), sets.Tars.caption_of(tars, there)) == (7, "é")


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_dataset_json_in_an_archive(tmp_path, write):
    members = with_json(WHOLE, LABELS)
    want = load_data(str(write_folder(tmp_path / "plain", members)), 8)
    assert want[1]["label"].tolist() == list(LABELS.values())[::-1]
    path = write(tmp_path / f"s.{write.__name__[6:]}", members)
    same(load_data(str(path), 8), want)


def test_webdataset(tmp_path):
    """Labels of .cls and .json; captions are passed over; both shards count from 0."""
    path = numbered(tmp_path / "shards", WHOLE, write_tar, LABELS)
    x, cond, names = load_data(str(path), 8)
    order = [0, 1, 2, 3, 4]
    rows = {images.read_image(io.BytesIO(WHOLE[n]), 8).sum().item(): n for n in WHOLE}
    found = [rows[x[i].sum().item()] for i in order]
    assert sorted(found) == sorted(WHOLE)
    assert cond["label"].tolist() == [LABELS[name] for name in found] and names == ["0", "1", "2"]


def test_class_in_name(tmp_path):
    """guided-diffusion's: sorted names of classes, whatever the folders."""
    names = ["dog_1.png", "sub/cat_x_2.png", "dog_3.png"]
    folder = write_folder(tmp_path / "d", {n: encoded(i) for i, n in enumerate(names)})
    _, cond, classes = load_data(str(folder), 8, class_in_name=True)
    assert classes == ["cat", "dog"] and cond["label"].tolist() == [1, 1, 0]
    (folder / "bare.png").write_bytes(encoded(7))
    with pytest.raises(UserError, match="bare.png has no _ behind a class"):
        load_data(str(folder), 8, class_in_name=True)


def test_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 12, 3)).astype(np.uint8)
    np.savez(tmp_path / "s.npz", pixels, np.array([0, 2, 1, 1, 0]))
    members = {f"{i}.png": Image.fromarray(p) for i, p in enumerate(pixels)}
    (tmp_path / "plain").mkdir()
    for name, image in members.items():
        image.save(tmp_path / "plain" / name)
    want = load_data(str(tmp_path / "plain"), 8, flat=True, crop="adm")[0]
    x, cond, names = load_data(str(tmp_path / "s.npz"), 8, crop="adm")
    assert torch.equal(x[torch.arange(5)], want[torch.arange(5)])
    assert cond["label"].tolist() == [0, 2, 1, 1, 0] and names == ["0", "1", "2"]


def test_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    members = {name.replace("/", "-"): data for name, data in sorted(WHOLE.items())}
    with lmdb.open(str(tmp_path / "church"), map_size=2**20) as file, file.begin(write=True) as w:
        for name, data in members.items():
            w.put(name.encode(), data)
    want = load_data(str(write_folder(tmp_path / "plain", members)), 8, flat=True)[0]
    for source in ("church", "church/data.mdb"):
        x = load_data(str(tmp_path / source), 8, flat=True)[0]
        assert torch.equal(x[torch.arange(5)], want[torch.arange(5)])
    with pytest.raises(UserError, match="an LMDB without labels or class folders"):
        load_data(str(tmp_path / "church"), 8)


def test_parquet(tmp_path):
    """Structs as the hub has them, with names of classes, in two files of several row groups."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [(data, LABELS[name]) for name, data in WHOLE.items()]
    features = {"features": {"label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}}
    about = {b"huggingface": json.dumps({"info": features}).encode()}
    (tmp_path / "set").mkdir()
    for i, part in enumerate((rows[:3], rows[3:])):
        image = pa.array([{"bytes": data, "path": None} for data, _ in part])
        table = pa.table({"image": image, "label": pa.array([k for _, k in part])})
        table = table.replace_schema_metadata(about)
        pq.write_table(table, tmp_path / "set" / f"train-{i}.parquet", row_group_size=2)
    x, cond, names = load_data(str(tmp_path / "set"), 8)
    assert names == ["x", "y", "z"] and cond["label"].tolist() == list(LABELS.values())
    for i, data in enumerate(WHOLE.values()):
        assert torch.equal(x[i], images.read_image(io.BytesIO(data), 8))


@pytest.mark.parametrize("name, library", [("s.mdb", "lmdb"), ("s.parquet", "pyarrow")])
def test_missing_libraries_are_named(tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"needs the library {library}: pip install {library}"):
        load_data(str(tmp_path / name), 8)


# ---- what is refused -----------------------------------------------------------------------------


def bomb(root):
    """A few KB that become more than a picture may have."""
    write_zip(root / "s.zip", {"a/x.png": bytes(sets.LARGEST + 1000)})


def wide(root):
    """A small PNG that says it has 10^10 pixels."""
    data = bytearray(encoded(0))
    data[16:24] = (100000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    write_zip(root / "s.zip", {"a/x.png": bytes(data)})


def truncated(root):
    data = write_zip(root / "s.zip", WHOLE).read_bytes()
    (root / "s.zip").write_bytes(data[:-30])


def cut_tar(root):
    data = write_tar(root / "s.tar", WHOLE).read_bytes()
    (root / "s.tar").write_bytes(data[:700])


BROKEN = {
    "bomb": (bomb, "s.zip", "no readable image"),
    "wide": (wide, "s.zip", "no readable image"),
    "truncated zip": (truncated, "s.zip", "is not a whole zip"),
    "cut tar": (cut_tar, "s.tar", "is not a whole, uncompressed tar"),
    "zip leads out": (
        lambda root: write_zip(root / "s.zip", {"../../x.png": encoded(0)}), "s.zip",
        "which is not in",
    ),
    "tar leads out": (
        lambda root: write_tar(root / "s.tar", {"/etc/x.png": encoded(0)}), "s.tar",
        "which is not in",
    ),
    "no classes": (
        lambda root: write_zip(root / "s.zip", {"x.png": encoded(0)}), "s.zip",
        "a zip without labels or class folders: train without",
    ),
    "some labels": (
        lambda root: write_tar(
            root / "s.tar", {"1.png": encoded(0), "1.cls": b"0", "2.png": encoded(1)}
        ), "s.tar", "2.png has no class number",
    ),
    "compressed": (
        lambda root: (root / "s.tar.gz").write_bytes(b"x"), "s.tar.gz", "make it a zip",
    ),
    "compressed npz": (
        lambda root: np.savez_compressed(root / "s.npz", np.zeros((2, 8, 8, 3), np.uint8)),
        "s.npz", "save it again by numpy.savez",
    ),
    "floats": (
        lambda root: np.savez(root / "s.npz", np.zeros((2, 8, 8, 3))), "s.npz",
        "wanted uint8 (N, H, W, 3)",
    ),
    "pickle": (
        lambda root: np.savez(
            root / "s.npz", np.zeros((1, 8, 8, 3), np.uint8), np.array([{}], dtype=object)
        ), "s.npz", "is not a whole npz",
    ),
    "missing": (lambda root: None, "s.zip", "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sets_are_one_line(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(sets, "LARGEST", 2**20)
    make, file, says = BROKEN[name]
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path / file), 8)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    if "without classes" in str(error.value):
        load_data(str(tmp_path / file), 8, flat=True)
    if name in ("bomb", "wide"):
        assert "x.png" in (line := capsys.readouterr().err)
        assert "more than" in line or "exceeds limit" in line


# ---- not all in memory ---------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Which pictures are decoded: names are appended."""
    seen, real = [], sets.Folder.read

    def read(self, name, place):
        seen.append(name)
        return real(self, name, place)

    monkeypatch.setattr(sets.Folder, "read", read)
    return seen


@pytest.fixture
def twelve(tmp_path):
    names = [f"{k}/{i}.png" for k in "ab" for i in range(6)]
    return write_folder(tmp_path / "data", {n: encoded(i) for i, n in enumerate(names)})


def flags_for(folder, tmp_path, *more, out="run"):
    return [*TINY, "--data", str(folder), *more, "--output_dir", str(tmp_path / out)]


def test_an_index_is_built_once(twelve, tmp_path, counted):
    """A second start opens no picture; one that is replaced, or a new one, is seen."""
    index = str(tmp_path / "i" / "index.safetensors")
    first = load_data(str(twelve), 8, index=index)
    assert len(counted) == 12
    again = load_data(str(twelve), 8, index=index)
    assert len(counted) == 12 and again[0].sum == first[0].sum
    same(again, first)
    (twelve / "b" / "x.png").write_bytes(encoded(50))
    more, _, _ = load_data(str(twelve), 8, index=index)
    assert len(more) == 13 and more.sum != first[0].sum
    with open(index, "r+b") as f:
        f.truncate(100)
    assert load_data(str(twelve), 8, index=index)[0].sum == more.sum


def test_large_sets_stay_on_disk(twelve, monkeypatch, counted):
    """Rows are decoded for their batch, those of the next update ahead, and then dropped."""
    want = load_data(str(twelve), 8)[0][torch.arange(12)]
    monkeypatch.setattr(loading, "KEPT", 0)
    x = load_data(str(twelve), 8)[0]
    assert x.kept is None
    for step in range(5, 8):  # a resumed run decodes nothing of what it skips
        del counted[:]
        draw = Draws(0, step, 0, range(3))
        index = draw.integer("item", 12)
        assert torch.equal(loading.drawn(x, draw, "item", index), want[index])
        [f.result() for _, fs in x.ahead.coming.values() for f in fs]
        assert len(counted) == (6 if step == 5 else 3)
        assert len(x.ahead.coming) == 1


def test_a_picture_that_is_gone_is_one_line(twelve, monkeypatch):
    x = load_data(str(twelve), 8)[0]
    (twelve / "a" / "0.png").write_bytes(b"other")
    with pytest.raises(UserError, match="a/0.png was read before and cannot be read now"):
        x[torch.tensor([0])]


def test_a_gan_reads_the_same_sets(tmp_path, twelve):
    """dmd.py's batches: of a zip, with this script's flags."""
    members = {str(p.relative_to(twelve)): p.read_bytes() for p in twelve.rglob("*.png")}
    write_zip(tmp_path / "s.zip", members)
    net = DiT(size=(8, 8), patch=(4, 4), dim=32, depth=1, num_classes=2)
    teacher = SimpleNamespace(world=None, base=net, shape=(3, 8, 8), config={}, folder=None)
    found = []
    for source in (twelve, tmp_path / "s.zip"):
        args = SimpleNamespace(data=str(source), seed=0, workers=2, class_in_name=None)
        args.output_dir = str(tmp_path / "run")
        batch = real_batches(args, teacher, torch.device("cpu"))
        found.append(batch(Draws(0, 3, "fake", range(4)), "real"))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].min() >= -1
    assert torch.equal(found[0][1]["label"], found[1][1]["label"])
    assert len(list((tmp_path / "indexes").iterdir())) == 2


# ---- the cache of latents ------------------------------------------------------------------------


def test_a_whole_cache_opens_no_picture(twelve, tmp_path, counted, monkeypatch):
    """Nor does the index; and a cache that was stopped goes on with the missing part."""
    monkeypatch.setattr(latents, "ROWS", 5)
    monkeypatch.setattr(latent_fm, "finish", lambda *a: None)
    flags = flags_for(twelve, tmp_path, "--hflip", "--cache_latents", str(tmp_path / "latents"))
    latent_fm.main(flags)
    folder, tensors = tmp_path / "latents", {}
    for part in range(3):
        tensors[part] = load_file(folder / f"{part:05d}.safetensors")["moments"]
    assert [len(t) for t in tensors.values()] == [5, 5, 2]
    assert torch.equal(tensors[0][:, 1], tensors[0][:, 0].flip(-1))  # pixels, and their mirror
    del counted[:]
    latent_fm.main(flags)
    assert counted == []
    (folder / "00001.safetensors").unlink()
    latent_fm.main(flags)
    assert len(counted) == 5
    assert torch.equal(load_file(folder / "00001.safetensors")["moments"], tensors[1])
    (folder / "00002.safetensors").write_bytes((folder / "00001.safetensors").read_bytes())
    (folder / "00000.safetensors").write_bytes((folder / "00001.safetensors").read_bytes()[:50])
    with pytest.raises(UserError, match="truncated"):
        latent_fm.main(flags)
    shutil.copy(folder / "00002.safetensors", folder / "00000.safetensors")
    with pytest.raises(UserError, match="has parts of another cache: remove it"):
        latent_fm.main(flags)


def test_rows_of_a_cache(tmp_path, monkeypatch):
    """In any order, over parts, of the picture or its mirror image; all of one kind, or refused."""
    monkeypatch.setattr(latents, "ROWS", 5)
    moments = torch.randn(12, 2, 2, 4, 3, 3).half()
    cache = latents.LatentCache(str(tmp_path / "cache"), 12, {})
    cache.begin()
    for part, rows in enumerate(moments.split(5)):
        save_file({"moments": rows.contiguous()}, cache.path(part))
    index, flip = torch.tensor([11, 0, 7, 7, 4]), torch.tensor([True, False, True, False, True])
    mean, std = cache.open().rows(index, flip, "cpu")
    assert torch.equal(torch.stack([mean, std], 1), moments[index, flip.long()].float())
    assert torch.equal(cache.rows(index, None, "cpu")[1], moments[index, 0, 1].float())
    moments[7, 1, 0, 2] = torch.inf
    save_file({"moments": moments[5:10].contiguous()}, cache.path(1))
    cache.open(most=0)
    with pytest.raises(UserError, match="00001.safetensors has numbers that are not finite"):
        cache.rows(index, flip, "cpu")
    for other in (moments[5:10].float(), moments[5:10, :1]):
        save_file({"moments": other.contiguous()}, cache.path(1))
        with pytest.raises(UserError, match="has parts of another cache"):
            cache.open()


def test_two_ranks_index_and_cache_what_one_does(twelve, tmp_path, capsys):
    for name, ranks in (("one", 1), ("two", 2)):
        more = ["--cache_latents", str(tmp_path / name / "latents"), "--seed", "1"]
        batch = ["--train_batch_size", str(4 // ranks), "--max_train_steps", "1"]
        flags = flags_for(twelve, tmp_path, *more, *batch, out=f"{name}/run")
        if ranks == 1:
            latent_fm.main(flags)
            continue
        done = launch(ROOT / "latent_fm.py", flags, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name for name in ("one", "two"))
    for path in (one / "indexes").iterdir():
        theirs = load_file(two / "indexes" / path.name)
        assert all(torch.equal(v, theirs[k]) for k, v in load_file(path).items())
    a, b = (load_file(p / "latents" / "00000.safetensors")["moments"] for p in (one, two))
    assert torch.equal(a, b)


def test_cache_in_a_file(twelve, tmp_path, capsys):
    (tmp_path / "c.safetensors").write_bytes(b"")
    flags = flags_for(twelve, tmp_path, "--cache_latents", str(tmp_path / "c.safetensors"))
    assert "is a file: name a folder" in refusal_of(capsys, latent_fm.main, *flags)


# ---- latents that were made elsewhere ------------------------------------------------------------


@pytest.fixture
def posteriors(tmp_path):
    """Of twelve items, as EDM2 and REPA store them, and as one file.  -> the VAE's folder, both"""
    vae = AutoencoderKL(**VAE)
    save_network(vae, {"_class_name": "AutoencoderKL", **vae.config}, str(tmp_path / "vae"))
    g = torch.Generator().manual_seed(0)
    mean, std = torch.randn(12, 4, 2, 2, generator=g), torch.rand(12, 4, 2, 2, generator=g)
    labels = [i % 3 for i in range(12)]
    names = [f"{i // 8:05d}/img-mean-std-{i:08d}.npy" for i in range(12)]
    for name, both in zip(names, torch.cat([mean, std], 1)):
        (tmp_path / "npy" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "npy" / name, both.numpy())
    rows = {"labels": list(zip(names, labels))}
    (tmp_path / "npy" / "dataset.json").write_text(json.dumps(rows))
    tensors = {"mean": mean, "std": std, "cond.label": torch.tensor(labels)}
    save_file(tensors, tmp_path / "one.safetensors")
    return tmp_path / "vae", (tmp_path / "npy", tmp_path / "one.safetensors"), tensors


def test_posteriors_made_elsewhere(posteriors, tmp_path, monkeypatch):
    """Both forms train alike, on scaled latents, and are shown as pictures."""
    vae, sources, tensors = posteriors
    seen, real = [], latent_fm.flow_matching_loss

    def spy(net, x0, *rest):
        seen.append(x0.clone())
        return real(net, x0, *rest)

    monkeypatch.setattr(latent_fm, "flow_matching_loss", spy)
    for source in sources:
        latent_fm.main(flags_for(source, tmp_path, "--autoencoder", str(vae), "--patch_size", "1"))
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    draw = Draws(0, 0, 0, range(4))
    i, scale = draw.integer("item", 12), load_space(str(vae)).autoencoder.config["scaling_factor"]
    noise = draw.normal("posterior", (4, 2, 2))
    want = scale * (tensors["mean"][i] + tensors["std"][i] * noise)
    torch.testing.assert_close(seen[0], want, rtol=1e-5, atol=1e-5)


def test_posteriors_that_do_not_fit(posteriors, tmp_path, capsys):
    vae, (folder, file), _ = posteriors
    given = ["--autoencoder", str(vae)]
    for flags, says in [
        ([], "has latents: give --autoencoder FOLDER"),
        ([*given, "--hflip"], "leave --hflip and --cache_latents out"),
        ([*given, "--task", "inpaint"], "has latents, not pictures"),
    ]:
        assert says in refusal_of(capsys, latent_fm.main, *flags_for(folder, tmp_path, *flags))
    np.save(folder / "00000" / "img-mean-std-00000000.npy", np.zeros((3, 2, 2), np.float32))
    flags = flags_for(folder, tmp_path, *given)
    assert "wanted floats (2 C, h, w)" in refusal_of(capsys, latent_fm.main, *flags)
    save_file({"mean": torch.zeros(3, 4, 2, 2), "std": torch.zeros(3, 4, 2, 2)}, file)
    flags = flags_for(file, tmp_path, *given)
    assert "no cond.label tensor: give it, or --task uncond" in refusal_of(
        capsys, latent_fm.main, *flags
    )
    latent_fm.main([*flags, "--task", "uncond", "--patch_size", "1"])  # what it advises
