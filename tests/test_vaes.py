"""models/vaes.py: latents and pixels of every released autoencoder are those of its pipeline."""

import functools

import pytest
import torch
from helpers import refusal_of
from PIL import Image
from pipelines import make_pipeline
from safetensors.torch import save_file

from models import decode, videos
from models.vaes import latent_shape, load_autoencoder


def unpacked(z, H, W):
    """Qwen-Image's packed latents (1, N, 4 C) -> (1, C, H, W), patch by patch."""
    z = z.unflatten(1, (H // 2, W // 2)).unflatten(3, (-1, 2, 2))
    return z.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# Of each family: z's shape and, where its pipeline has another, that of the latents it takes; how
# to make ours of its latents; what else its pipeline is called with.
QUICK = dict(num_inference_steps=2, guidance_scale=1.0)
IMAGE = dict(QUICK, height=16, width=32)
FAMILIES = {
    "sd15": ((4, 8, 16), None, None, IMAGE),
    "sdxl": ((4, 8, 16), None, None, IMAGE),
    "pixart": ((4, 8, 16), None, None, dict(IMAGE, use_resolution_binning=False)),
    "z_image": ((4, 4, 6), None, None, dict(QUICK, height=8, width=12)),
    "lumina2": ((4, 4, 6), None, None, dict(QUICK, height=32, width=48, system_prompt="")),
    "qwen_image": ((4, 2, 4), (2, 16), functools.partial(unpacked, H=2, W=4), dict(IMAGE)),
    "wan": ((16, 2, 2, 4), None, None, dict(IMAGE, num_frames=5)),
    "wan_5b": ((48, 2, 2, 4), None, None, dict(QUICK, height=32, width=64, num_frames=5)),
    "cogvideox": (
        (4, 3, 2, 4),
        (3, 4, 2, 4),
        lambda z: z.transpose(1, 2),
        dict(IMAGE, num_frames=9),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_pipeline(tmp_path, family):
    """Pixels are what the pipeline makes of the same latents, and latents are made the other way.

    The second part needs the first: encoding and decoding must be what the autoencoder alone does.
    """
    shape, theirs, ours, flags = FAMILIES[family]
    pipe, g = make_pipeline(family), torch.Generator().manual_seed(0)
    pipe.vae.save_pretrained(tmp_path / "vae")
    start = torch.randn(1, *(theirs or shape), generator=g)
    made = [pipe("a cat", latents=start, output_type=kind, **flags)[0] for kind in ("latent", "pt")]
    z, want = (ours or torch.Tensor.clone)(made[0]), made[1]
    space = load_autoencoder(str(tmp_path))
    x = space.to_pixels(z)
    assert z.shape[1:] == shape and want.std() > 0.01
    video = want if want.dim() == 5 else want.unsqueeze(1)  # (1, F, 3, H, W)
    got = x.transpose(1, 2) if x.dim() == 5 else x.unsqueeze(1)
    assert (((got / 2 + 0.5).clamp(0, 1)) - video).abs().max() < 1e-5
    with torch.no_grad():
        plain = pipe.vae.decode(z.unsqueeze(2) if family == "qwen_image" else z).sample
    assert (plain.reshape(x.shape) - x).abs().max() > 1e-3  # the normalisation is seen

    x, noise = 2 * torch.rand(x.shape, generator=g) - 1, torch.randn(1, *shape, generator=g)
    with torch.no_grad():
        frames = x.unsqueeze(2) if family == "qwen_image" else x
        law = pipe.vae.encode(frames).latent_dist
        own = law.mean + law.std * noise.reshape(law.mean.shape)
        want = [pipe.vae.decode(latent).sample.reshape(x.shape) for latent in (law.mean, own)]
    for given, pixels in zip((None, noise), want):
        z = space.to_latents(x, given)
        assert z.shape[1:] == shape == latent_shape(space, x.shape[-2:], x.shape[-3])
        assert (space.to_pixels(z) - pixels).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["sdxl", "cogvideox"])
def test_float32_whatever_the_files_are(tmp_path, family):
    """SDXL's overflows in float16."""
    make_pipeline(family).vae.half().save_pretrained(tmp_path / "vae")
    space, z = load_autoencoder(str(tmp_path)), latents(family, 1)
    net = space.vae if space.step else space.autoencoder
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    x = space.to_pixels(z)
    assert x.dtype == torch.float32 and x.isfinite().all()
    assert space.to_latents(x).dtype == torch.float32


# ---- python -m models.decode ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """-> function of a family: a folder with the autoencoder of its tiny pipeline in vae/."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        make_pipeline(family).vae.save_pretrained(folder / "vae")
        return str(folder)

    return make


def flags_of(folder, tmp_path, x0, *more):
    """Flags of models.decode for these latents, to be written into out/."""
    save_file({"x0": x0}, tmp_path / "x0")
    latents = ["--latents", str(tmp_path / "x0"), "--output", str(tmp_path / "out")]
    return ["--teacher", folder, *latents, *more]


def latents(family, rows=2):
    shape = FAMILIES[family][0]
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "family, frames, size, ms",
    [("wan", 5, (32, 16), 60), ("wan_5b", 5, (64, 32), 40), ("cogvideox", 9, (32, 16), 120)],
)
def test_videos_become_gifs_and_frames(saved, tmp_path, family, frames, size, ms):
    """A GIF at the rate of the teacher, or with --format png a folder of its frames, exact."""
    x0, folder = latents(family), saved(family)
    decode.main(flags_of(folder, tmp_path, x0))
    decode.main(flags_of(folder, tmp_path, x0, "--format", "png"))
    out, want = tmp_path / "out", load_autoencoder(folder).to_pixels(x0[1:])
    names = sorted(path.name for path in out.iterdir())
    assert names == ["000", "000.gif", "001", "001.gif", "decoded.json"]
    with Image.open(out / "001.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (frames, size, ms)
    images = [Image.open(path) for path in sorted((out / "001").iterdir())]
    assert [path.name for path in sorted((out / "001").iterdir())][-1] == f"{frames - 1:03d}.png"
    got = torch.stack([torch.tensor(list(image.tobytes())) for image in images])
    want = decode.to_bytes(want[0]).permute(1, 2, 3, 0).flatten(1)
    assert want.float().std() > 5 and torch.equal(got, want.long())


def test_pixels_become_the_nearest_of_256_levels():
    """-1 is 0 and 1 is 255; what autoencoders overshoot is cut, in bfloat16 too."""
    levels = torch.arange(256)
    assert torch.equal(decode.to_bytes(levels / 127.5 - 1), levels.byte())
    between = (levels[:-1] + torch.tensor([[0.4], [0.6]])) / 127.5 - 1
    assert torch.equal(decode.to_bytes(between), torch.stack([levels[:-1], levels[1:]]).byte())
    assert decode.to_bytes(torch.tensor([-3.0, -1.01, 1.01, 7])).tolist() == [0, 0, 255, 255]
    assert decode.to_bytes(torch.tensor([-2.0, 0, 2]).bfloat16()).tolist() == [0, 128, 255]


def test_images_of_qwen_image(saved, tmp_path, capsys):
    """Which come out of an autoencoder of videos: one PNG each."""
    decode.main(flags_of(saved("qwen_image"), tmp_path, latents("qwen_image", 3)))
    out = [tmp_path / "out" / f"{i:03d}.png" for i in range(3)]
    assert capsys.readouterr().out.split() == list(map(str, out))
    assert [Image.open(path).size for path in out] == [(32, 16)] * 3


@pytest.mark.parametrize("library", videos.LIBRARIES)
def test_mp4(monkeypatch, saved, tmp_path, library):
    for name in videos.LIBRARIES[library]:
        pytest.importorskip(name)
    monkeypatch.setattr(videos, "LIBRARIES", {library: videos.LIBRARIES[library]})
    decode.main(flags_of(saved("wan"), tmp_path, latents("wan"), "--format", "mp4"))
    frames = videos.read_video(str(tmp_path / "out" / "001.mp4"), 100)
    assert len(frames) == 5 and {frame.size for frame in frames} == {(32, 16)}


def test_rows_are_decoded_one_by_one(monkeypatch, saved, tmp_path, capsys):
    """What comes before a row that is not finite is written, and only that row is in memory."""
    x0, seen = latents("wan", 3), []
    x0[2, 0, 0, 0, 0] = float("inf")
    flags = flags_of(saved("wan"), tmp_path, x0)
    real = decode.decode_row
    monkeypatch.setattr(decode, "decode_row", lambda s, z, w: seen.append(len(z)) or real(s, z, w))
    line = refusal_of(capsys, decode.main, *flags)
    assert "row 2 of x0 has numbers that are not finite: sample again, or take it out" in line
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000.gif", "001.gif", "decoded.json"] and seen == [1, 1, 1]


def test_decoding_goes_on_and_mixes_nothing(monkeypatch, saved, tmp_path, capsys):
    """A row whose picture is there is not decoded again; other latents want another folder."""
    flags, out, real = flags_of(saved("wan"), tmp_path, latents("wan", 3)), tmp_path / "out", []
    decode.main(flags)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "001.gif").rename(out / ".begun-001.gif")  # killed while it was written
    row = decode.decode_row
    monkeypatch.setattr(decode, "decode_row", lambda s, z, w: real.append(w) or row(s, z, w))
    decode.main(flags)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert [where.split(": ")[1] for where in real] == ["row 1 of x0"]
    assert "name another folder" in refusal_of(capsys, decode.main, *flags, "--fps", "7")
    flags = flags_of(saved("wan"), tmp_path, latents("wan", 2))
    assert "name another folder" in refusal_of(capsys, decode.main, *flags)
    (out / "decoded.json").unlink()
    assert "pictures of something else" in refusal_of(capsys, decode.main, *flags)


@pytest.mark.parametrize(
    "family, shape, says",
    [
        ("wan", (2, 48, 2, 2, 2), "needs (B, 16, T, H, W): name the teacher that these were"),
        ("wan", (2, 16, 2, 2), "needs (B, 16, T, H, W)"),
        ("wan_5b", (2, 16, 2, 2, 2), "needs (B, 48, T, H, W)"),
        ("cogvideox", (1, 3, 4, 2, 2), "needs (B, 4, T, H, W)"),
        ("qwen_image", (1, 4, 1, 2, 2), "needs (B, 4, H, W)"),
        ("sd15", (1, 16, 2, 2), "needs (B, 4, H, W)"),
        ("sd15", (0, 4, 2, 2), "x0 has no rows"),
    ],
)
def test_latents_of_another_teacher(saved, tmp_path, capsys, family, shape, says):
    flags = flags_of(saved(family), tmp_path, torch.zeros(shape))
    assert says in refusal_of(capsys, decode.main, *flags)
    assert not (tmp_path / "out").exists()


def test_mp4_without_a_library(monkeypatch, saved, tmp_path, capsys):
    monkeypatch.setattr(videos, "LIBRARIES", {"av": ("no_such_library",)})
    flags = flags_of(saved("wan"), tmp_path, latents("wan"), "--format", "mp4")
    assert (
        "--format mp4 needs imageio with ffmpeg, PyAV or OpenCV, and none is installed: "
        "pip install imageio[ffmpeg]"
    ) in refusal_of(capsys, decode.main, *flags)
