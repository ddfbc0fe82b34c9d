"""models/encode.py and models/decode.py: equal to the pipelines of diffusers; their commands."""

import functools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from forks import launch
from helpers import ROOT, fill, refusal_of, relative
from PIL import Image
from pipelines import CONFIGS, save_pipeline
from released import MODELS, PIXART, WAN, Z_IMAGE
from safetensors.torch import load_file, save_file

from models import decode, encode
from models.decode import to_bytes
from models.files import save_json
from models.networks.autoencoders import PatchPCA
from models.networks.latent_space import LatentSpace, load_space
from models.plumbing.data import Prompts
from models.plumbing.run import run_main
from models.prompts import open_prompts

each = pytest.mark.parametrize(
    "model", [pytest.param(model, id=name) for name, model in MODELS.items()]
)
NAMES = {model: name for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """-> function of a model: a pipeline of tiny random networks, and the folder where it is."""

    @functools.cache
    def make(model):
        folder = tmp_path_factory.mktemp(model.name) / "pipeline"
        return save_pipeline(NAMES[model], folder), folder

    return make


# ---- latents to pixels: tests/test_vaes.py has the autoencoders of pipelines ---------------------


def save_space(run, channels=3, normed=True):
    """autoencoder/ of a run: PCA of patches of 2, 4 components, normalised if asked for."""
    g = torch.Generator().manual_seed(0)
    pca = PatchPCA(channels, patch=2, latent_channels=4).fit(
        torch.randn(40, channels, 8, 8, generator=g)
    )
    norm = (torch.randn(4, generator=g), 0.5 + torch.rand(4, generator=g)) if normed else ()
    LatentSpace(pca, *norm).save(str(run / "autoencoder"))
    (run / "student").mkdir()
    save_json({"_class_name": "DiT"}, str(run / "student" / "config.json"))


@pytest.mark.parametrize("channels, normed", [(3, True), (3, False), (1, True)])
def test_decode_in_a_space_of_ours(tmp_path, capsys, channels, normed):
    """The run, its student/ and its autoencoder/ name one latent space; grey has 3 channels."""
    save_space(tmp_path, channels, normed)
    x0 = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    space = load_space(str(tmp_path / "autoencoder"))
    want = to_bytes(space.to_pixels(x0)).expand(3, 3, 4, 6)
    assert want.float().std() > 10
    save_file({"x0": x0}, tmp_path / "x0")
    for teacher in ("", "student", "autoencoder"):
        output = tmp_path / f"pictures{teacher}"
        flags = ["--latents", str(tmp_path / "x0"), "--output", str(output)]
        decode.main(["--teacher", str(tmp_path / teacher), *flags])
        paths = sorted(output.glob("[0-9]*"))
        assert [path.name for path in paths] == ["000.png", "001.png", "002.png"]
        got = np.stack([np.asarray(Image.open(path)) for path in paths])
        assert np.array_equal(got, want.permute(0, 2, 3, 1).numpy())
    save_file({"x0": x0[:, :3].contiguous()}, tmp_path / "x0")
    line = refusal_of(capsys, decode.main, "--teacher", str(tmp_path), *flags)
    assert "x0 has shape (3, 3, 2, 3), and the autoencoder of --teacher" in line
    assert "needs (B, 4, H, W): name the teacher that these were sampled from" in line


# ---- the commands --------------------------------------------------------------------------------


# Of each: shape of cond.text, true entries of the masks of "A cat", "a dog runs" and "".
@pytest.mark.parametrize(
    "model, shape, counts",
    [
        pytest.param(WAN, (2, 512, 16), None, id="wan"),
        pytest.param(Z_IMAGE, (2, 8, 10), (7, 8, 5), id="z_image"),
        pytest.param(PIXART, (2, 120, 10), (3, 4, 1), id="pixart"),
    ],
)
def test_command_line(saved, tmp_path, model, shape, counts):
    """encode writes what the scripts' --prompts and the network take; decode PNGs or GIFs."""
    teacher, video = ["--teacher", str(saved(model)[1])], model is WAN
    text, output = tmp_path / "prompts.txt", tmp_path / "new" / "prompts.safetensors"
    text.write_text("A cat\n\n a dog runs\n", encoding="utf-8")
    encode.main([*teacher, "--prompts_txt", str(text), "--output", str(output)])
    assert [p.name for p in output.parent.iterdir()] == ["prompts.safetensors"]
    assert tuple(open_prompts(output).get_slice("cond.text").get_shape()[1:]) == shape[1:]
    if counts:  # the file has the prompts' own tokens alone
        stored = load_file(output)
        assert len(stored["cond.text"]) == sum(counts[:2])
        assert len(stored["uncond.text"]) == counts[2]
    net = fill(model.net(**CONFIGS[model]))
    prompts = Prompts(str(output), net.cond_names, {"text": net.text_dim})
    cond, uncond = prompts.rows(torch.tensor([1, 0]), "cpu"), prompts.unconditional(2, "cpu")
    assert cond["text"].shape == shape
    if model.mask:
        given = cond[model.mask].sum(1).flip(0).tolist()
        assert (*given, *uncond[model.mask].sum(1).tolist()) == (*counts, counts[2])
    x, t = torch.randn(2, CONFIGS[model].get("in_channels", 4), *model.size), torch.ones(2)
    assert relative(net(x, t, **uncond), net(x, t, **cond)) > 1e-3

    latents = tmp_path / "samples.safetensors"
    save_file({"x0": torch.randn(2, 16, 2, 2, 3) if video else torch.randn(2, 4, 2, 3)}, latents)
    suffix = "gif" if video else "png"
    for fps, duration in ((None, 60), ("20", 50))[: 2 if video else 1]:  # ms, in steps of 10
        folder = tmp_path / f"pictures{fps}"
        flags = [] if fps is None else ["--fps", fps]
        decode.main([*teacher, "--latents", str(latents), "--output", str(folder), *flags])
        paths = sorted(folder.glob("[0-9]*"))
        assert [p.name for p in paths] == [f"000.{suffix}", f"001.{suffix}"]
        with Image.open(paths[1]) as picture:  # size is (W', H')
            if video:
                assert picture.n_frames == 5 and picture.size == (24, 16)
                assert picture.info["duration"] == duration and picture.info["loop"] == 0
            else:
                assert picture.size == (6, 4) and picture.mode == "RGB"


def write(folder, files):
    """Make a folder with {name: JSON, or None for an empty folder} in it. -> its path as str."""
    folder.mkdir()
    for name, value in files.items():
        path = folder / name
        (path if value is None else path.parent).mkdir(parents=True, exist_ok=True)
        if value is not None:
            path.write_text(json.dumps(value))
    return str(folder)


WAN_ROOT = {"model_index.json": {"_class_name": "WanPipeline"}}
TRELLIS_ROOT = {"pipeline.json": {"args": {}}}
WAN_VAE = {"vae/config.json": {"_class_name": "AutoencoderKLWan"}}
PIXART_BARE = {"transformer/config.json": {"_class_name": "PixArtTransformer2DModel"}}


@pytest.mark.parametrize(
    "root, flags, message",
    [
        (WAN_ROOT, [], "one of the arguments --prompts_txt --images is required"),
        (WAN_ROOT, ["--prompts_txt", "p", "--images", "i"], "not allowed with argument"),
        (None, ["--prompts_txt", "p"], "--prompts_txt needs --teacher"),
        ({}, ["--prompts_txt", "p"], "has no model_index.json, transformer/config.json"),
        ({}, ["--images", "i"], "pass a diffusers pipeline folder, or TRELLIS's root"),
        (TRELLIS_ROOT, ["--prompts_txt", "p"], "is TRELLIS, and --prompts_txt is for WanPipeline"),
        ({"ckpts": None}, ["--prompts_txt", "p"], "pass --images instead"),
        (WAN_ROOT, ["--images", "i"], "give --resolution H W"),
        (WAN_ROOT, ["--images", "i", "--dinov2", "d"], "no effect with --images with captions"),
        (None, ["--images", "i", "--captions", "c"], "no effect with --images without a teacher"),
        (PIXART_BARE, ["--images", "i"], "pass --max_length 120 for alpha, 300 for Sigma"),
        (
            {"model_index.json": {"_class_name": "DiTPipeline"}},
            ["--images", "i"],
            "is DiTPipeline, and --images is for TRELLIS's image models and for the pipelines that",
        ),
        (
            {"model_index.json": {"_class_name": "DiTPipeline"}, **PIXART_BARE},
            ["--prompts_txt", "p"],
            "is DiTPipeline, and --prompts_txt is for WanPipeline, ZImagePipeline, "
            "PixArtAlphaPipeline, PixArtSigmaPipeline, CogVideoXPipeline, QwenImagePipeline, "
            "Lumina2Pipeline, Lumina2Text2ImgPipeline, StableDiffusionPipeline, "
            "StableDiffusionXLPipeline, TrellisTextTo3DPipeline: pass one of these",
        ),
        (
            {"model_index.json": {"_class_name": ["a", "B"]}},
            ["--prompts_txt", "p"],
            "is ['a', 'B']",
        ),
        ({"model_index.json": []}, ["--prompts_txt", "p"], "is not a JSON object"),
        (PIXART_BARE, ["--prompts_txt", "p"], "pass --max_length 120 for alpha, 300 for Sigma"),
        (
            WAN_ROOT,
            ["--prompts_txt", "p", "--dinov2", "d"],
            "--dinov2 has no effect with --prompts",
        ),
        (None, ["--images", "i", "--max_length", "9"], "--max_length has no effect with --images"),
        (None, ["--images", "i", "--negative_prompt", ""], "--negative_prompt has no effect"),
        (WAN_ROOT, ["--prompts_txt", "p", "--fps", "8"], "unrecognized arguments: --fps"),
    ],
)
def test_wrong_combinations_of_encode(tmp_path, capsys, root, flags, message):
    teacher = [] if root is None else ["--teacher", write(tmp_path / "root", root)]
    flags = [*teacher, *flags, "--output", str(tmp_path / "out")]
    assert message in refusal_of(capsys, encode.main, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "root, flags, message",
    [
        ({}, [], "has no autoencoder: pass a diffusers pipeline folder with vae/, a run"),
        (WAN_ROOT, [], "has no autoencoder"),
        (TRELLIS_ROOT, [], "has no autoencoder"),
        ({"config.json": {"_class_name": "DiT"}}, [], "has no autoencoder"),
        ({"student/config.json": {"_class_name": "DiT"}}, [], "has no autoencoder"),
        (
            {"vae/config.json": {"_class_name": "AutoencoderDC"}},
            [],
            "its autoencoder is AutoencoderDC, which is not known here: pass a folder with "
            "AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan, AutoencoderKLCogVideoX",
        ),
        ({"autoencoder/latents.json": {}}, [], "is not a latent space of ours"),
        (
            {"vae/config.json": {"_class_name": "AutoencoderKL"}},
            ["--fps", "8"],
            "--fps is for videos, and --teacher",
        ),
        (
            {"vae/config.json": {"_class_name": "AutoencoderKLQwenImage"}},
            ["--format", "gif"],
            "--format is for videos, and --teacher",
        ),
        (WAN_VAE, ["--format", "png", "--fps", "8"], "--fps has no effect with --format png"),
        (WAN_VAE, ["--format", "avi"], "--format: invalid choice: 'avi'"),
        ({}, ["--fps", "0"], "--fps: must be > 0, got 0"),
        ({}, ["--fps", "-1"], "--fps: must be > 0, got -1"),
        ({}, ["--fps", "nan"], "--fps: must be > 0, got nan"),
    ],
)
def test_wrong_combinations_of_decode(tmp_path, capsys, root, flags, message):
    save_file({"x0": torch.zeros(1, 4, 2, 2)}, tmp_path / "x0")
    flags = ["--teacher", write(tmp_path / "root", root), *flags]
    files = ["--latents", str(tmp_path / "x0"), "--output", str(tmp_path / "out")]
    assert message in refusal_of(capsys, decode.main, *flags, *files)
    assert not (tmp_path / "out").exists()


def test_the_commands_run_and_refuse_in_one_line(tmp_path, capsys):
    """As processes; outputs that cannot be written and autoencoders that make no pictures, too."""
    save_space(tmp_path / "run", channels=3)
    save_space(tmp_path / "two", channels=2)
    save_file({"x0": torch.zeros(1, 4, 2, 2)}, tmp_path / "x0")
    (tmp_path / "file").write_text("")

    def command(name, *flags):
        return launch(ROOT / "models" / f"{name}.py", flags, cwd=ROOT)

    def decoding(run, output):
        flags = ["--latents", str(tmp_path / "x0"), "--output", str(tmp_path / output)]
        return "--teacher", str(tmp_path / run), *flags

    done = command("decode", *decoding("run", "out"))
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'out' / '000.png'}\n", done.stderr
    done = command("encode", "--output", "x", "--prompts_txt", "p")
    assert done.returncode == 2 and done.stderr.startswith("error: --prompts_txt needs --teacher")
    assert done.stderr.count("\n") == 1
    for flags, says in (
        (decoding("run", "file"), "cannot write --output"),
        (decoding("two", "other"), "gives pixels of 2 channels; pictures have 1 or 3"),
    ):
        assert says in refusal_of(capsys, decode.main, *flags)


@each
def test_wrong_input_is_one_line_and_exit_code_2(saved, tmp_path, capsys, monkeypatch, model):
    teacher, none = saved(model)[1], tmp_path / "none"
    text, blank, latin = tmp_path / "p.txt", tmp_path / "blank.txt", tmp_path / "latin.txt"
    junk, bad, y = tmp_path / "junk", tmp_path / "x0", tmp_path / "y"
    text.write_text("a cat\n")
    blank.write_text("\n\n")
    latin.write_bytes("café".encode("latin-1"))
    junk.write_bytes(b"junk")
    save_file({"x0": torch.zeros(1, 3, *((1,) if model is WAN else ()), 2, 2)}, bad)
    save_file({"y": torch.zeros(1)}, y)
    parts = {"tokenizer": None, "text_encoder": None}
    for name in ("model_index.json", "vae/config.json"):
        parts[name] = {"_class_name": json.loads((teacher / name).read_text())["_class_name"]}
    empty = write(tmp_path / "empty", parts)

    def encoding(text, *more, teacher=teacher):
        return encode.main, "--teacher", str(teacher), "--prompts_txt", str(text), *more

    def decoding(latents, *more, teacher=teacher):
        return decode.main, "--teacher", str(teacher), "--latents", str(latents), *more

    def refused(says, command, noisy=False):
        """noisy: a library that loads something may add lines of its own."""
        main, *flags = command
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: main([*flags, "--output", str(tmp_path / "out")]))
        lines = capsys.readouterr().err.splitlines()
        if noisy:
            lines = [line for line in lines if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        assert says in lines[0]
        assert not (tmp_path / "out").exists()

    refused("cannot read --prompts_txt", encoding(none))
    refused("cannot read --prompts_txt", encoding(latin))
    refused("holds no prompt", encoding(blank))
    refused("--max_length: must be >= 1, got 0", encoding(text, "--max_length", "0"))
    refused("cannot read --latents", decoding(junk))
    refused("cannot read --latents", decoding(none))
    refused("has no tensor x0", decoding(y))
    if model is WAN:
        refused("--fps: must be > 0, got 0", decoding(junk, "--fps", "0"))
    for command in (encoding(text, teacher=none), decoding(bad, teacher=none)):
        refused("is not a folder: pass a diffusers pipeline folder", command)
    refused("error: --teacher", encoding(text, teacher=empty), noisy=True)
    refused("error: --teacher", decoding(bad, teacher=empty), noisy=True)
    shutil.rmtree(tmp_path / "empty" / "tokenizer")
    says = "and there is no tokenizer: pass a whole pipeline folder"
    refused(says, encoding(text, teacher=empty))
    channels = "16, T" if model is WAN else 4
    refused(f"needs (B, {channels}, H, W)", decoding(bad), noisy=True)
    for name in ("transformers", "diffusers"):  # import then raises ImportError, as when absent
        monkeypatch.setitem(sys.modules, name, None)
    refused("pip install transformers", encoding(text))
    if model is WAN:
        refused("pip install diffusers", decoding(bad))
