"""From prompts.txt to pictures: the commands that the pages print, on tiny pipelines."""

import importlib
import shlex
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import save_pipeline
from safetensors.torch import load_file

PROMPTS = "a cat runs\na dog runs fast\na cat\n"
SHORT = "--max_train_steps 3 --train_batch_size 2 --teacher_steps 0 --preview_samples 2"


@dataclass(frozen=True)
class Way:
    """script, flags: what trains, beside the flags of SHORT. latent: shape of a sample. pictures:
    their ending, frames and size (W, H). data: flags of models.encode for real samples of the
    GAN."""

    script: str
    flags: str
    latent: tuple
    pictures: tuple
    data: str = ""


WAYS = {
    "sd15": Way("dmd", "--fake_update_ratio 1", (4, 8, 8), (".png", 1, (16, 16))),
    "sdxl": Way(
        "dmd",
        "--student_steps 2 --fake_update_ratio 1 --gan_weight 5e-3",
        (4, 8, 8),
        (".png", 1, (16, 16)),
        "--resolution 16",
    ),
    "cogvideox": Way(
        "tdm", "--student_steps 2 --sample_shape 4 3 4 6", (4, 3, 4, 6), (".gif", 9, (48, 32))
    ),
    "qwen_image": Way(
        "phased_dmd",
        "--guidance_rescale patch --sample_shape 4 4 6",
        (4, 4, 6),
        (".png", 1, (48, 32)),
    ),
    "lumina2": Way(
        "decoupled_dmd", "--student_steps 2 --sample_shape 4 4 6", (4, 4, 6), (".png", 1, (12, 8))
    ),
    "wan_5b": Way(
        "dmd",
        "--student_steps 2 --fake_update_ratio 1 --gan_weight 5e-3 --sample_shape 48 2 2 4",
        (48, 2, 2, 4),
        (".gif", 5, (64, 32)),
        "--resolution 32 64 --frames 5",
    ),
}


def run(line):
    """A line as a page has it, in this process."""
    words = shlex.split(line)
    at = 2 if words[1] == "-m" else 1
    importlib.import_module(words[at].removesuffix(".py")).main(words[at + 1 :])


def save_clips(folder, size, frames):
    """Three animated images with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, text in enumerate(PROMPTS.splitlines()):
        pixels = rng.integers(0, 255, (frames, size[1], size[0], 3)).astype(np.uint8)
        first, *rest = map(Image.fromarray, pixels)
        first.save(folder / f"{i}.png", save_all=True, append_images=rest)
        (folder / f"{i}.txt").write_text(text)


@pytest.mark.parametrize(
    "family",
    [name if name == "sd15" else pytest.param(name, marks=pytest.mark.long) for name in WAYS],
)
def test_from_prompts_to_pictures(tmp_path, monkeypatch, family):
    """Encode, train three updates, sample, decode, one command a line."""
    way = WAYS[family]
    ending, frames, size = way.pictures
    save_pipeline(family, tmp_path / "TEACHER")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    more = "--resolution 16 16" if family == "sdxl" else ""
    run(
        "python -m models.encode --teacher TEACHER --prompts_txt prompts.txt "
        f"--output prompts.safetensors {more}"
    )
    data = ""
    if way.data:
        save_clips(tmp_path / "clips", size, frames)
        run(
            f"python -m models.encode --teacher TEACHER --images clips {way.data} "
            "--output data.safetensors"
        )
        data = "--data data.safetensors"
    run(
        f"python {way.script}.py --teacher TEACHER --prompts prompts.safetensors {data} {SHORT} "
        f"{way.flags} --output_dir run"
    )
    run(
        f"python {way.script}.py --sample run/student --prompts prompts.safetensors "
        "--preview_samples 2 --output_dir samples"
    )
    run(
        "python -m models.decode --teacher TEACHER --latents samples/samples.safetensors "
        "--output pictures"
    )
    x = load_file("samples/samples.safetensors")["x0"]
    assert x.shape == (2, *way.latent) and x.isfinite().all() and x.std() > 0.01
    paths = sorted((tmp_path / "pictures").glob("[0-9]*"))
    assert [path.name for path in paths] == [f"{i:03d}{ending}" for i in range(2)]
    for path in paths:
        with Image.open(path) as picture:
            assert (getattr(picture, "n_frames", 1), picture.size) == (frames, size)
            assert np.asarray(picture.convert("RGB")).std() > 2
    assert torch.isfinite(load_file("run/samples.safetensors")["x0"]).all()
