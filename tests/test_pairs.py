"""models/pairs.py: images and videos with captions as real data for the teachers of prompts."""

import contextlib
import errno
import functools
import importlib
import json
import os
import unicodedata

import numpy as np
import pytest
import torch
from helpers import refusal_of
from PIL import Image, ImageOps
from pipelines import save_pipeline
from safetensors.torch import load_file
from test_pipeline import save_space
from test_sets import write_tar, write_zip

import dmd
from models import encode, pairs, videos
from models.draws import Draws
from models.files import UserError, open_tensors
from models.pairs import RowWriter, find_pairs, read_pixels, write_pairs
from models.prompts import open_prompts
from models.vaes import load_autoencoder
from models.videos import read_video, write_mp4

CAPTIONS = ["a cat runs", "dog", "a dog runs fast"]
NAMES = ["0.png", "2.png", "more/3.png"]


@pytest.fixture
def pictures(tmp_path):
    """Three images of other shapes with captions beside them, and one that is broken."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for name, text, size in zip(NAMES, CAPTIONS, [(16, 24), (40, 20), (17, 17)]):
        pixels = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"{text}\n")
    (folder / "1.png").write_bytes(b"broken")
    (folder / "1.txt").write_text("a broken one")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """-> function of a family: the folder of its tiny pipeline."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family) / "pipeline"
        save_pipeline(family, folder)
        return folder

    return make


def run_encode(*flags):
    encode.main(list(map(str, flags)))


def pixels_of(path, size):
    """What an autoencoder is to be given: (1, 3, H, W) in [-1, 1]."""
    image = ImageOps.fit(Image.open(path).convert("RGB"), size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()


def noise(row, shape):
    return Draws(0, "posterior", 0, [row]).normal("posterior", shape)


def movie(frames, seed=0):
    """PIL images of 16 x 16 pixels."""
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)) for _ in range(frames)
    ]


def save_movie(path, frames):
    frames[0].save(path, save_all=True, append_images=frames[1:])


def unit(frames):
    """PIL images -> (1, 3, F, H, W) in [-1, 1]."""
    x = torch.stack([torch.from_numpy(np.asarray(f) / 127.5 - 1) for f in frames]).float()
    return x.permute(3, 0, 1, 2)[None]


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, size, shape, flags",
    [
        ("pixart", (8, 16), (4, 4, 8), ["--max_length", "9"]),
        ("z_image", (8, 16), (4, 4, 8), []),
        ("z_image", (8, 16), (4, 4, 8), ["--max_length", "6"]),
        ("sdxl", (8, 18), (4, 4, 9), []),
        ("qwen_image", (16, 32), (4, 2, 4), []),
        ("qwen_image", (16, 32), (4, 2, 4), ["--negative_prompt", "a dog runs fast, " * 3]),
    ],
    ids=["pixart", "z_image", "z_image-cut", "sdxl", "qwen_image", "longest is the negative"],
)
def test_images_with_captions(saved, pictures, tmp_path, capsys, family, size, shape, flags):
    """The latents of each image, and of its caption what --prompts_txt makes of it.

    dmd.py trains a GAN on them, and their rows of `size` are of each image.
    """
    folder, output = saved(family), tmp_path / "new" / "data.safetensors"
    asked = ["--teacher", folder, "--images", pictures, "--resolution", *size, *flags]
    run_encode(*asked, "--output", output)
    assert f"skipped {pictures / '1.png'}: UnidentifiedImageError" in capsys.readouterr().err
    tensors = load_file(output)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    prompts = tmp_path / "prompts.safetensors"
    more = ["--resolution", *size] if family == "sdxl" else []
    text = ["--prompts_txt", tmp_path / "captions.txt", *flags, *more]
    run_encode("--teacher", folder, *text, "--output", prompts)
    want = open_prompts(prompts)
    assert set(tensors) == {"x0", *want.keys()}
    for name in set(want.keys()) - {"cond.size"}:
        assert torch.equal(tensors[name], want.get_tensor(name)), name
        assert tensors[name].dtype == want.get_tensor(name).dtype
    if family == "sdxl":  # 16 x 24 becomes 12 x 18, 40 x 20 becomes 36 x 18, 17 x 17 18 x 18
        sizes = [[16, 24, 2, 0, 8, 18], [40, 20, 14, 0, 8, 18], [17, 17, 5, 0, 8, 18]]
        assert tensors["cond.size"].tolist() == sizes
        assert tensors["uncond.size"].tolist() == [[8, 18, 0, 0, 8, 18]]
    assert tensors["x0"].dtype == torch.float16 and tensors["x0"].shape == (3, *shape)
    space = load_autoencoder(folder)
    for i, name in enumerate(NAMES):
        z = space.to_latents(pixels_of(pictures / name, size), noise(i, shape))
        torch.testing.assert_close(tensors["x0"][i].float(), z[0], rtol=1e-3, atol=2e-3)
    if family == "pixart":
        short = "--max_train_steps 1 --train_batch_size 2 --teacher_steps 0 --preview_samples 1"
        files = ["--prompts", output, "--data", output, "--sample_shape", *shape]
        gan = ["--gan_weight", 0.01, "--output_dir", tmp_path / "run"]
        dmd.main(list(map(str, ["--teacher", folder, *short.split(), *files, *gan])))
        assert (tmp_path / "run" / "student").is_dir()


def test_videos_with_captions(saved, tmp_path, capsys):
    """Five frames of animated PNGs, of a folder of frames, and of what is too short none."""
    folder, frames, root = saved("wan"), movie(6), tmp_path / "v"
    (root / "c").mkdir(parents=True)
    save_movie(root / "a.png", frames)
    save_movie(root / "b.gif", frames[:3])
    for i, frame in enumerate(frames[:5]):
        frame.save(root / "c" / f"{i}.png")
    (root / "d.webp").write_bytes(b"broken")
    captions = {"a.png": "a cat runs", "b.gif": "dog", "c": "a dog runs", "d.webp": "x", "e": "y"}
    (tmp_path / "c.json").write_text(json.dumps(captions))
    asked = ["--teacher", folder, "--images", root, "--captions", tmp_path / "c.json"]
    asked += ["--resolution", 16, "--max_length", 7, "--output"]
    run_encode(*asked, tmp_path / "data.safetensors", "--frames", 5)
    says = capsys.readouterr().err
    assert f"skipped {root / 'b.gif'}: ValueError: it has 3 frames, --frames wants 5" in says
    assert f"skipped {root / 'd.webp'}: " in says
    assert "c.json: captions are left out, 1 without an image in" in says
    tensors = load_file(tmp_path / "data.safetensors")
    assert tensors["x0"].shape == (2, 16, 2, 2, 2) and tensors["cond.text"].shape == (2, 7, 16)
    space = load_autoencoder(folder)
    for i in range(2):
        z = space.to_latents(unit(frames[:5]), noise(i, (16, 2, 2, 2)))
        torch.testing.assert_close(tensors["x0"][i].float(), z[0], rtol=1e-3, atol=1e-3)
    del captions["c"]  # one frame: images, which are videos of one frame
    (root / "c.json").write_text(json.dumps({f"c/{i}.png": "a cat" for i in range(5)} | captions))
    asked[5] = root / "c.json"
    run_encode(*asked, tmp_path / "images.safetensors")
    assert load_file(tmp_path / "images.safetensors")["x0"].shape == (7, 16, 1, 2, 2)


def test_frames_without_leading_zeros_are_in_order(tmp_path):
    """1.png to 12.png, as ffmpeg's %d writes them: 10 comes behind 9."""
    for i in range(1, 13):
        Image.new("L", (4, 4), 10 * i).save(tmp_path / f"{i}.png")
    found = pairs.frames_of(str(tmp_path), 12, None)
    assert [frame.convert("L").getpixel((0, 0)) for frame in found] == list(range(10, 130, 10))


@pytest.mark.parametrize("library", videos.LIBRARIES)
def test_video_files(monkeypatch, tmp_path, library):
    """MP4s of each library that is installed: written, and the first frames read."""
    for name in videos.LIBRARIES[library]:
        pytest.importorskip(name)
    monkeypatch.setattr(videos, "LIBRARIES", {library: videos.LIBRARIES[library]})
    y, x = np.mgrid[:32, :48]
    frames = [np.stack([5 * x, 7 * y, np.full_like(x, 25 * i)], -1) for i in range(9)]
    frames, path = np.stack(frames).astype(np.uint8), str(tmp_path / "a.mp4")
    write_mp4(path, frames, 8.0)
    read = np.stack([np.asarray(image) for image in read_video(path, 5)])
    assert read.shape == (5, 32, 48, 3)
    assert np.abs(read.astype(int) - frames[:5]).mean() < 5  # of lossy files
    assert len(read_video(path, 100)) == 9
    half = np.stack([np.asarray(image) for image in read_video(path, 9, fps=4.0)])
    assert np.abs(half.astype(int) - frames[::2]).mean() < 5 and len(half) == 5
    with pytest.raises(ValueError, match="it has 8 frames a second, the teacher makes 16"):
        read_video(path, 9, fps=16)
    x, six = read_pixels(path, (16, 16), 5)
    assert x.shape == (3, 5, 16, 16) and six.tolist() == [32, 48, 0, 4, 16, 16]
    (tmp_path / "b.mp4").write_bytes(b"broken")
    with pytest.raises(Exception, match=r"\w"):
        read_video(str(tmp_path / "b.mp4"), 1)


def test_video_files_without_a_library(monkeypatch, saved, tmp_path, capsys):
    """One line that names what to install; without --frames they are not looked at."""
    monkeypatch.setattr(videos, "LIBRARIES", {"av": ("no_such_library",)})
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(b"")
    (tmp_path / "v" / "a.txt").write_text("a cat")
    flags = ["--teacher", saved("wan"), "--images", tmp_path / "v", "--resolution", 16]
    flags = [*map(str, flags), "--output", str(tmp_path / "out.safetensors")]
    line = refusal_of(capsys, encode.main, *flags, "--frames", "5")
    assert "a.mp4 needs imageio with ffmpeg, PyAV or OpenCV" in line
    assert line.strip().endswith("pip install imageio[ffmpeg]")
    assert "holds no images" in refusal_of(capsys, encode.main, *flags)


# ---- captions ------------------------------------------------------------------------------------


def test_captions_of_every_form(pictures, tmp_path):
    """.txt beside the images, {"name": "caption"}, and lines with file_name and text."""
    (pictures / "1.png").unlink()
    (pictures / "1.txt").unlink()
    rows = [{"file_name": n, "text": f" {t}\n"} for n, t in zip(NAMES, CAPTIONS)]
    (tmp_path / "c.json").write_text(json.dumps(dict(zip(NAMES, CAPTIONS))))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    want = [(str(pictures / n), t) for n, t in zip(NAMES, CAPTIONS)]
    for captions in (None, str(tmp_path / "c.json"), str(tmp_path / "c.jsonl")):
        assert find_pairs(str(pictures), captions) == want


def test_both_forms_of_an_accent_are_one_name(tmp_path):
    """A file's name may be composed, and its caption's not, or the other way round."""
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        folder = tmp_path / form
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / unicodedata.normalize(form, "caf\u00e9.png"))
        name = unicodedata.normalize(other, "caf\u00e9.png")
        captions = folder.with_suffix(".json")
        captions.write_text(json.dumps({name: "a cup"}))
        assert [text for _, text in find_pairs(str(folder), str(captions))] == ["a cup"]


def test_captions_of_sets(pictures, tmp_path):
    """Zip, tar shards with txt or json, and parquet where its library is installed: pixels and
    captions of the folder, in its order."""
    want = find_pairs(str(pictures))
    files = {os.path.relpath(path, pictures): caption for path, caption in want}
    found = {name: (pictures / name).read_bytes() for name in files}
    texts = {f"{name[:-4]}.txt": text.encode() for name, text in files.items()}
    json_texts = {
        f"{name[:-4]}.json": json.dumps({"caption": text, "label": 3}).encode()
        for name, text in files.items()
    }
    sets = [
        write_zip(tmp_path / "z.zip", {**found, **texts}),
        write_tar(tmp_path / "t.tar", {**found, **texts}),
        write_tar(tmp_path / "j.tar", {**found, **json_texts}),
    ]
    with contextlib.suppress(ImportError):
        pyarrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
        images = [{"bytes": data, "path": name} for name, data in found.items()]
        table = pyarrow.table({"image": images, "text": list(files.values())})
        sets.append(tmp_path / "p.parquet")
        parquet.write_table(table, sets[-1], row_group_size=3)
    for path in sets:
        pairs_of = find_pairs(str(path))
        assert [caption for _, caption in pairs_of] == list(files.values()), path
        for (a, _), (b, _) in zip(pairs_of, want, strict=True):
            if os.path.basename(b) != "1.png":  # broken
                pixels = read_pixels(a, (8, 16), 1), read_pixels(b, (8, 16), 1)
                assert all(torch.equal(*both) for both in zip(*pixels))
        assert len({json.dumps(pairs.about("", item)) for item, _ in pairs_of}) == len(want)
    with pytest.raises(UserError, match="4 of 4 images have no caption or an empty one, such as"):
        find_pairs(str(write_zip(tmp_path / "bare.zip", found)))
    with pytest.raises(UserError, match="--images .* is not a whole zip"):
        (tmp_path / "broken.zip").write_bytes(b"no")
        find_pairs(str(tmp_path / "broken.zip"))
    with pytest.raises(UserError, match="none.zip holds no images"):
        find_pairs(str(write_zip(tmp_path / "none.zip", texts)))
    with pytest.raises(UserError, match="give --frames 1, or a folder"):
        find_pairs(str(sets[0]), frames=5)


def test_captions_without_images_are_named(pictures, capsys):
    (pictures / "more" / "4.txt").write_text("nothing there")
    find_pairs(str(pictures))
    without = f"1 without an image in {pictures}, such as that of more/4"
    assert capsys.readouterr().err == f"{pictures}: captions are left out, {without}\n"
    path = write_zip(pictures.parent / "z.zip", {"a.png": b"x"})
    captions = pictures.parent / "c.json"
    captions.write_text('{"a.png": "a cat", "b.png": "nothing there"}')
    assert len(find_pairs(str(path), str(captions))) == 1
    without = f"1 without an image in {path}, such as that of b.png"
    assert capsys.readouterr().err == f"{captions}: captions are left out, {without}\n"


def test_captions_as_windows_writes_them(pictures):
    """A byte order mark, and an ending in capitals: alike in folders and archives."""
    (pictures / "0.txt").write_bytes(b"\xef\xbb\xbfa cat")
    (pictures / "2.txt").rename(pictures / "2.TXT")
    names = [*NAMES, "0.txt", "2.TXT", "more/3.txt"]
    members = {name: (pictures / name).read_bytes() for name in names}
    (pictures / "1.png").unlink()
    for where in (pictures, write_zip(pictures.parent / "z.zip", members)):
        assert [text for _, text in find_pairs(str(where))] == ["a cat", *CAPTIONS[1:]]


def test_frames_that_were_replaced_are_other_content(tmp_path):
    """The folder's own size and time stay."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"x")
    before, about = os.stat(folder), pairs.about(str(tmp_path), str(folder))
    first = sorted(folder.iterdir())[0]
    first.write_bytes(first.read_bytes() + b"x")
    assert os.stat(folder).st_mtime_ns == before.st_mtime_ns
    assert pairs.about(str(tmp_path), str(folder)) != about


def test_a_picture_is_not_skipped_for_a_busy_disk(saved, pictures, tmp_path, monkeypatch):
    def busy(*a):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(pairs, "read_pixels", busy)
    flags = ["--resolution", 8, "--output", tmp_path / "d.safetensors"]
    with pytest.raises(OSError, match="Too many open files"):
        run_encode("--teacher", saved("pixart"), "--images", pictures, *flags)


def wrong_input(pictures, folder, wan, tmp_path):
    """Pairs (flags, part of the message that refuses them)."""
    files = {"few.json": '{"0.png": "a cat"}', "no.jsonl": '{"name": "x"}', "bad.json": '{"0.png'}
    files |= {"list.json": '{"0.png": 1}', "array.json": '["a cat"]'}
    files["empty.json"] = json.dumps({n: "a cat" for n in NAMES} | {"1.png": " "})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    asked, at = f"--images {pictures} --resolution 8", f"--captions {tmp_path}"
    return [
        (f"{asked} {at}/few.json", "3 of 4 images have no caption or an empty one, such as 1.png"),
        (f"{asked} {at}/empty.json", "1 of 4 images have no caption or an empty one, such as 1.p"),
        (f"{asked} {at}/no.jsonl", "KeyError: 'file_name'; wanted FILE.json with"),
        (f"{asked} {at}/bad.json", "wanted FILE.json with"),
        (f"{asked} {at}/array.json", "wanted FILE.json with"),
        (f"{asked} {at}/nowhere.json", "wanted FILE.json with"),
        (f"{asked} {at}/list.json", "with one text each"),
        (f"--images {tmp_path}/empty --resolution 8", "holds no images"),
        ("--images nowhere --resolution 8", "is not a folder"),
        (f"--images {pictures}", "give --resolution H W"),
        (f"--images {pictures} --resolution 8 18", "8 18: sides must be multiples of 4"),
        (f"{asked} --frames 5", "--frames 5: this teacher makes images, leave it out"),
        (f"{asked} --vae {folder}/transformer", "has no autoencoder: pass a diffusers pipeline"),
        (f"{asked} --vae {wan}", "sides must be multiples of 16"),
    ]


def test_wrong_input_of_pairs(saved, pictures, tmp_path, capsys):
    """One line and exit code 2, and no file."""
    folder = saved("pixart")
    out = ["--teacher", str(folder), "--output", str(tmp_path / "out.safetensors")]
    for flags, says in wrong_input(pictures, folder, saved("wan"), tmp_path):
        capsys.readouterr()
        line = refusal_of(capsys, encode.main, *out, *flags.split())
        assert says in line, (flags, line)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_no_image_can_be_read(saved, pictures, tmp_path):
    """It is said, beside the names of all of them, and no file is left."""
    for name in NAMES:
        (pictures / name).write_bytes(b"broken")
    flags = ["--teacher", str(saved("pixart")), "--images", str(pictures), "--resolution", "8"]
    with pytest.raises(UserError, match="none of the 4 images could be read"):
        encode.main([*flags, "--output", str(tmp_path / "out.safetensors")])
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "family, sides, good", [("wan", 16, 5), ("wan_5b", 32, 5), ("cogvideox", 16, 9)]
)
def test_frames_and_sides_of_videos(saved, family, sides, good):
    """1, 5, 9, ... frames, and sides that divide into patches of latents."""
    folder = str(saved(family))
    space = load_autoencoder(folder)
    for frames in (1, good, 4 * good + 1):
        pairs.check_shape(space, (sides, 2 * sides), frames, folder)
    for frames in (2, 4, 8):
        with pytest.raises(UserError, match="this teacher's videos have 1, 5, 9, ... frames"):
            pairs.check_shape(space, (sides, sides), frames, folder)
    with pytest.raises(UserError, match=f"multiples of {sides}$"):
        pairs.check_shape(space, (sides, sides + sides // 2), good, folder)


# ---- pixels and rows -----------------------------------------------------------------------------


def test_pixels_are_cut_to_the_shape(tmp_path):
    """40 x 20 at 8 x 8 is the middle square, scaled."""
    a = np.zeros((20, 40, 3), np.uint8)
    a[:, 10:30] = 200
    Image.fromarray(a).save(tmp_path / "a.png")
    x, size = read_pixels(str(tmp_path / "a.png"), (8, 8), 1)
    assert x.shape == (3, 8, 8) and x[:, :, 1:-1].min() > 190
    assert size.tolist() == [20, 40, 0, 4, 8, 8]
    with pytest.raises(ValueError, match="it has 1 frames, --frames wants 5"):
        read_pixels(str(tmp_path / "a.png"), (8, 8), 5)


def test_row_writer(tmp_path):
    """Rows in any order, several types, a tensor cut short."""
    path, rows = tmp_path / "rows.safetensors", torch.randn(3, 2, 5)
    with RowWriter(str(path), {"fingerprint": "x"}) as file:
        file.add("x", torch.bfloat16, (4, 2, 5))
        for i in (2, 0, 1):
            file.write("x", i, rows[i])
        file.cut(3)
        file.add("mask", torch.bool, (2, 3))
        file.write("mask", 1, torch.tensor([True, False, True]))
        file.write("mask", 0, torch.tensor([False, False, True]))
        file.add("n", torch.int64, (1,))
        file.write("n", 0, torch.tensor(7))
        assert not path.exists()
    tensors, file = load_file(path), open_tensors(str(path))
    assert torch.equal(tensors["x"], rows.bfloat16()) and file.metadata() == {"fingerprint": "x"}
    assert tensors["mask"].tolist() == [[False, False, True], [True, False, True]]
    assert tensors["n"].tolist() == [7] and file.get_slice("x")[1:2].shape[0] == 1
    with pytest.raises(KeyboardInterrupt):
        with RowWriter(str(tmp_path / "gone.safetensors"), {}) as file:
            file.add("x", torch.float32, (1, 2))
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["rows.safetensors"]  # nothing was noted


def test_an_interrupted_file_is_gone_on_with(pictures, tmp_path):
    """Wherever it stops, the file is bit for bit that of one run, and nothing is done twice."""
    save_space(tmp_path)
    space, found = load_autoencoder(str(tmp_path)), find_pairs(str(pictures))
    limit, made = [10], []

    def count(what):
        if len(made) == limit[0]:
            raise KeyboardInterrupt
        made.append(what)

    class Counting:
        channels, factor, step, fps = space.channels, space.factor, 0, None

        def to_latents(self, x, noise):
            count("image")
            return space.to_latents(x, noise)

    def text_rows(captions):
        for caption in captions:
            count(caption)
            yield {"text": torch.full((2, 3), len(caption)), "size": torch.zeros(6).long()}
        yield {"text": torch.full((2, 3), -1), "size": torch.tensor([8, 8, 0, 0, 8, 8])}

    def run(name, at=10):
        limit[0] = at
        with RowWriter(str(tmp_path / name), {"fingerprint": "x"}) as file:
            write_pairs(file, found, Counting(), (8, 8), 1, text_rows)

    run("whole")
    whole = (tmp_path / "whole").read_bytes()
    assert made == ["image"] * 3 + CAPTIONS
    assert load_file(tmp_path / "whole")["cond.text"][:, 0, 0].tolist() == list(map(len, CAPTIONS))
    for at in range(1, 6):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            run(f"part{at}", at)
        partial = tmp_path / f"part{at}.partial"
        assert partial.is_dir() and not (tmp_path / f"part{at}").exists()
        with open(partial / "notes", "a") as notes:
            notes.write("16 24")  # a line that a killed process began
        run(f"part{at}")
        assert (tmp_path / f"part{at}").read_bytes() == whole and not partial.exists()
        assert made == ["image"] * 3 + CAPTIONS


def test_the_same_command_again(saved, pictures, tmp_path, capsys, monkeypatch):
    """It goes on; with other captions it is refused; and a whole file is left alone."""
    output = tmp_path / "data.safetensors"
    flags = ["--teacher", str(saved("pixart")), "--images", str(pictures), "--resolution", "8"]
    flags += ["--max_length", "9", "--output", str(output)]
    real, calls = pairs.read_pixels, []

    def stop(path, *rest):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(pairs, "read_pixels", stop)
    with pytest.raises(KeyboardInterrupt):
        encode.main(flags)
    text = (pictures / "0.txt").read_text()
    (pictures / "0.txt").write_text("another")
    line = refusal_of(capsys, encode.main, *flags)
    assert "of an interrupted python -m models.encode with other prompts or settings" in line
    (pictures / "0.txt").write_text(text)
    encode.main(flags)
    assert "going on after 2 of 4 images" in capsys.readouterr().out and len(calls) == 5
    before = output.stat().st_mtime_ns
    encode.main(flags)
    assert "is there already, of the same images and settings" in capsys.readouterr().out
    assert output.stat().st_mtime_ns == before and len(calls) == 5
