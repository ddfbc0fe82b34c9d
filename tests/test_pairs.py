"""models/pairs.py: images and videos with captions as real data for the teachers of prompts."""

import json

import numpy as np
import pytest
import torch
from helpers import refusal_of
from PIL import Image, ImageOps
from pipelines import encoded
from released import PIXART, WAN, Z_IMAGE
from safetensors.torch import load_file
from test_pipeline import saved  # noqa: F401

import dmd
from models import encode
from models.files import RowWriter, open_tensors
from models.pairs import find_pairs, noise, read_pixels

CAPTIONS = ["a cat runs", "dog", "a dog runs fast"]


@pytest.fixture
def pictures(tmp_path):
    """Three images of other shapes with captions beside them, and one that is broken."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    names = ["0.png", "2.png", "more/3.png"]
    for name, text, size in zip(names, CAPTIONS, [(16, 24), (40, 20), (17, 17)]):
        pixels = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"{text}\n")
    (folder / "1.png").write_bytes(b"broken")
    (folder / "1.txt").write_text("a broken one")
    return folder


def run_encode(*flags):
    encode.main(list(map(str, flags)))


def pixels_of(path, size):
    """What diffusers' VAE would be given: (1, 3, H, W) in [-1, 1]."""
    image = ImageOps.fit(Image.open(path).convert("RGB"), size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize(
    "model, flags",
    [(PIXART, ["--max_length", "9"]), (Z_IMAGE, []), (Z_IMAGE, ["--max_length", "6"])],
    ids=["pixart", "z_image", "z_image-cut"],
)
def test_images_with_captions(saved, pictures, tmp_path, capsys, model, flags):  # noqa: F811
    """Row by row the pipeline's own latents and features, and dmd.py trains a GAN on them.

    A latent without the pipeline's scale and shift is far off.
    """
    pipe, folder = saved(model)
    output = tmp_path / "new" / "data.safetensors"
    asked = ["--teacher", folder, "--images", pictures, "--resolution", 8, 16, *flags]
    run_encode(*asked, "--output", output)
    assert "1.png" in capsys.readouterr().err
    tensors = load_file(output)
    want = encoded(folder, CAPTIONS, max_length=int(flags[1]) if flags else None)
    assert set(tensors) == {"x0", *want}
    for name, value in want.items():
        assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype
    assert tensors["x0"].dtype == torch.float16 and tensors["x0"].shape == (3, 4, 4, 8)
    vae, paths = pipe.vae, ["0.png", "2.png", "more/3.png"]
    for i, path in enumerate(paths):
        with torch.no_grad():
            law = vae.encode(pixels_of(pictures / path, (8, 16))).latent_dist
        latent = law.mean + law.std * noise(i, law.mean)
        scaled = (latent - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        torch.testing.assert_close(tensors["x0"][i].float(), scaled[0], rtol=1e-3, atol=2e-3)
        assert (latent[0] - scaled[0]).abs().max() > 0.05
    if not flags or model is PIXART:
        short = "--max_train_steps 1 --train_batch_size 2 --teacher_steps 0 --preview_samples 1"
        files = ["--prompts", output, "--data", output, "--sample_shape", 4, 4, 8]
        gan = ["--gan_weight", 0.01, "--output_dir", tmp_path / "run"]
        dmd.main(list(map(str, ["--teacher", folder, *short.split(), *files, *gan])))
        assert (tmp_path / "run" / "student").is_dir()


def test_videos_with_captions(saved, tmp_path):  # noqa: F811
    """Five frames of animated PNGs through Wan's autoencoder; a still one is skipped."""
    pipe, folder = saved(WAN)
    rng, frames = np.random.default_rng(0), []
    (tmp_path / "v").mkdir()
    for _ in range(6):
        frames.append(Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)))
    frames[0].save(tmp_path / "v" / "a.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "v" / "b.png")
    (tmp_path / "c.json").write_text('{"a.png": "a cat runs", "b.png": "dog"}')
    asked = ["--teacher", folder, "--images", tmp_path / "v", "--captions", tmp_path / "c.json"]
    asked += ["--resolution", 16, "--max_length", 7, "--output", tmp_path / "data.safetensors"]
    run_encode(*asked, "--frames", 5)
    tensors = load_file(tmp_path / "data.safetensors")
    x = torch.cat([torch.from_numpy(np.asarray(f) / 127.5 - 1)[None] for f in frames[:5]]).float()
    with torch.no_grad():
        law = pipe.vae.encode(x.permute(3, 0, 1, 2)[None]).latent_dist
    latent = (law.mean + law.std * noise(0, law.mean))[0]
    mean, std = (
        torch.tensor(v)[:, None, None, None]
        for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    assert tensors["x0"].shape == (1, 16, 2, 2, 2)
    torch.testing.assert_close(
        tensors["x0"][0].float(), (latent - mean) / std, rtol=1e-3, atol=1e-3
    )
    assert tensors["cond.text"].shape == (1, 7, 16) and tensors["uncond.text"].shape == (1, 7, 16)
    run_encode(*asked)  # one frame: images, which are videos of one frame
    assert load_file(tmp_path / "data.safetensors")["x0"].shape == (2, 16, 1, 2, 2)


def test_captions_of_every_form(pictures, tmp_path):
    """.txt beside the images, {"name": "caption"}, and lines with file_name and text."""
    (pictures / "1.png").unlink()
    names = ["0.png", "2.png", "more/3.png"]
    rows = [{"file_name": n, "text": t} for n, t in zip(names, CAPTIONS)]
    (tmp_path / "c.json").write_text(json.dumps(dict(zip(names, CAPTIONS))))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    want = [(str(pictures / n), t) for n, t in zip(names, CAPTIONS)]
    for captions in (None, str(tmp_path / "c.json"), str(tmp_path / "c.jsonl")):
        assert find_pairs(str(pictures), captions) == want


def wrong_input(pictures, folder, tmp_path):
    """Pairs (flags, part of the message that refuses them)."""
    (tmp_path / "few.json").write_text('{"0.png": "a cat"}')
    (tmp_path / "no.jsonl").write_text('{"name": "x"}')
    (tmp_path / "list.json").write_text('{"0.png": 1}')
    (tmp_path / "empty").mkdir()
    asked = f"--images {pictures} --resolution 8"
    return [
        (f"{asked} --captions {tmp_path}/few.json", "3 of 4 images have no caption, such as 1.png"),
        (f"{asked} --captions {tmp_path}/no.jsonl", "wanted FILE.json with"),
        (f"{asked} --captions {tmp_path}/list.json", "with one text each"),
        (f"--images {tmp_path}/empty --resolution 8", "holds no images"),
        ("--images nowhere --resolution 8", "is not a folder"),
        (f"--images {pictures}", "give --resolution H W"),
        (f"--images {pictures} --resolution 8 17", "multiples of 2"),
        (f"{asked} --frames 5", "encodes images, leave it out"),
        (f"{asked} --vae {folder}/transformer", "give --vae with AutoencoderKL"),
    ]


def test_wrong_input_of_pairs(saved, pictures, tmp_path, capsys):  # noqa: F811
    """One line and exit code 2, and no file."""
    _, folder = saved(PIXART)
    out = ["--teacher", str(folder), "--output", str(tmp_path / "out.safetensors")]
    for flags, says in wrong_input(pictures, folder, tmp_path):
        line = refusal_of(capsys, encode.main, *out, *flags.split())
        assert says in line, (flags, line)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_pixels_are_cut_to_the_shape(tmp_path):
    """40 x 20 at 8 x 8 is the middle square, scaled."""
    a = np.zeros((20, 40, 3), np.uint8)
    a[:, 10:30] = 200
    Image.fromarray(a).save(tmp_path / "a.png")
    x = read_pixels(str(tmp_path / "a.png"), (8, 8), 1)
    assert x.shape == (3, 8, 8) and x[:, :, 1:-1].min() > 190
    with pytest.raises(ValueError, match="it has 1 frames, --frames wants 5"):
        read_pixels(str(tmp_path / "a.png"), (8, 8), 5)


def test_row_writer(tmp_path):
    """Rows in any order, several types, a tensor cut short; nothing is left after an error."""
    path, rows = tmp_path / "rows.safetensors", torch.randn(3, 2, 5)
    with RowWriter(str(path)) as file:
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
    tensors = load_file(path)
    assert torch.equal(tensors["x"], rows.bfloat16())
    assert tensors["mask"].tolist() == [[False, False, True], [True, False, True]]
    assert (
        tensors["n"].tolist() == [7] and open_tensors(str(path)).get_slice("x")[1:2].shape[0] == 1
    )
    with pytest.raises(KeyboardInterrupt):
        with RowWriter(str(tmp_path / "gone.safetensors")) as file:
            file.add("x", torch.float32, (1, 2))
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["rows.safetensors"]
