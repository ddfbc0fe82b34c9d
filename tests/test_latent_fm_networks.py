"""latent_fm.py on released networks: the paper's sizes for every task, --init, and --sample of what
models/convert.py wrote."""

import json

import numpy as np
import pytest
import torch
from helpers import fill, read_log, refusal_of
from PIL import Image
from safetensors.torch import load_file, save_file
from test_adm import TINY as TINY_ADM
from test_dit_imagenet import OFFICIAL, official_state, run_convert

import latent_fm
from models import convert
from models.diffusion import VP, Diffusion
from models.files import UserError
from models.networks import WEIGHTS, load_network, network_config, save_network
from models.networks.adm import UNetModel, to_adm
from models.networks.as_flow import AsFlow
from models.networks.autoencoders import AutoencoderKL, PatchPCA
from models.networks.dit_imagenet import DiTTransformer2DModel, to_official
from models.networks.latent_space import LatentSpace
from models.plumbing import report

RUN = """--max_train_steps 2 --train_batch_size 4 --sample_steps 2 --lr_warmup_steps 0
    --solver euler --resolution 8""".split()
DIT = dict(num_layers=1, num_attention_heads=2, attention_head_dim=12)
ADM = dict(model_channels=32, channel_mult=[1, 1], num_res_blocks=1, attention_resolutions=[2])
NETWORKS = {"DiT-B/2": DIT, "ADM": dict(ADM, num_head_channels=16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 pictures of 8 x 8 in 2 classes, maps of the same names, and a VAE of 4 channels."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(16):
        for kind, shape in (("images", (8, 8, 3)), ("maps", (8, 8))):
            (root / kind / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            array = rng.integers(0, 255 if kind == "images" else 3, shape).astype(np.uint8)
            Image.fromarray(array).save(root / kind / f"class{i % 2}" / f"{i:02d}.png")
    blocks = dict(block_out_channels=[4], layers_per_block=1, norm_num_groups=2)
    kinds = {f"{way}_block_types": [f"{Way}EncoderBlock2D"] for way, Way in [("down", "Down")]}
    vae = fill(AutoencoderKL(**blocks, **kinds, up_block_types=["UpDecoderBlock2D"]))
    save_network(vae, network_config(vae), str(root / "vae"))
    return root


def run(out, folder, *flags):
    data = ["--data", str(folder / "images")]
    latent_fm.main([*RUN, *data, "--output_dir", str(out), *map(str, flags)])
    return load_network(str(out / "student"))[0]


def convert_to(root, name, state, *flags):
    """-> the folder that models.convert makes of a state dict."""
    path = root / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    run_convert("--input", path, "--output", root / name, *flags)
    return root / name


# ---- the paper's networks ------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("task", ["class", "inpaint", "semantic"])
def test_every_task_of_the_papers_networks(tmp_path, folder, monkeypatch, task, network):
    """Trained with its condition in further channels, saved, and sampled again."""
    config = {**latent_fm.PAPER_NETWORKS[network], **NETWORKS[network]}
    monkeypatch.setitem(latent_fm.PAPER_NETWORKS, network, config)
    maps = ["--maps", folder / "maps"] if task == "semantic" else []
    flags = ["--network", network, "--task", task, *maps, "--t_scale", "1"]
    net = run(tmp_path / "run", folder, *flags)
    beside = {"class": 0, "inpaint": 4, "semantic": 3}[task]
    assert isinstance(net, UNetModel if network == "ADM" else DiTTransformer2DModel)
    assert net.context_channels == beside and net.latent_shape == (3, 8, 8)
    assert net.convention == "lfm" and net.num_classes == (2 if task == "class" else 0)
    first = net.input_blocks[0][0] if network == "ADM" else net.pos_embed.proj
    assert first.in_channels == {"class": 3, "inpaint": 7, "semantic": 6}[task]
    if task == "semantic":
        assert net.project.weight.shape[:2] == (3, 3)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        context = torch.randn(2, beside, 8, 8) if beside else None
        assert net(x, t, context=context).abs().max() > 0  # it was trained
    where = str(tmp_path / "again")
    latent_fm.main(["--sample", str(tmp_path / "run"), "--output_dir", where])
    assert (tmp_path / "again" / "samples.png").is_file()


# ---- converted folders ---------------------------------------------------------------------------

FLAGS = {
    "dit": [],
    "sit": ["--prediction", "flow_v", "--noise_at", "0"],
    "lfm": ["--prediction", "flow_v", "--noise_at", "1"],
}


@pytest.mark.parametrize("kind", FLAGS)
def test_converted_folders_are_sampled(tmp_path, folder, kind):
    """By their sampler.json, with their classes, through the VAE that --autoencoder names: the
    images are those of the network's own ODE."""
    state = official_state(outputs=OFFICIAL[kind][0], depth=1)
    out = convert_to(tmp_path, kind, state, "--num_attention_heads", "3", *FLAGS[kind])
    saved = json.loads((out / "sampler.json").read_text())
    assert saved["guidance_scale"] == 1.5 and saved["task"] == "class"
    assert saved["rule"] == ("heun" if kind == "dit" else "dopri5")
    flags = "--samples 3 --sample_steps 3 --solver euler --guidance_scale 1 --format npz"
    flags = [*flags.split(), "--autoencoder", str(folder / "vae")]
    where = tmp_path / "samples"
    latent_fm.main(["--sample", str(out), "--output_dir", str(where), *flags])
    images = np.load(where / "samples.npz")["arr_0"]
    assert images.shape == (3, 8, 8, 3) and images.std() > 5
    latent_fm.main(["--sample", str(out), "--output_dir", str(tmp_path / "again"), *flags])
    assert np.array_equal(images, np.load(tmp_path / "again" / "samples.npz")["arr_0"])


def test_inpainting_of_lfm_is_converted(tmp_path):
    """Nine channels in, four out: the network sees the image with holes and the mask."""
    state = official_state(channels=9, outputs=4, rows=1, depth=1)
    out = convert_to(tmp_path, "lfm", state, "--num_attention_heads", "3", *FLAGS["lfm"])
    assert json.loads((out / "sampler.json").read_text())["task"] == "inpaint"
    net, _ = load_network(str(out / "transformer"))
    assert net.context_channels == 5 and net.latent_shape == (4, 8, 8)
    call = torch.randn(2, 9, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 0])
    with torch.no_grad():
        x, context = call[0].split([4, 5], dim=1)
        got, want = net(x, call[1], context=context), OFFICIAL["lfm"][1](state, *call)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, state[k]) for k, v in to_official(net).items() if k != "pos_embed")


def test_a_network_of_another_schedule_as_a_flow():
    """The exact eps of N(0, s^2) under VP is its exact velocity, at every time that VP has."""
    s, schedule = 0.7, VP("linear", 1e-4, 0.02)

    class Exact(torch.nn.Module):
        latent_shape, num_classes = (4,), 0

        def forward(self, z, u):
            a, sigma = schedule.alpha(u)[:, None], schedule.sigma(u)[:, None]
            return sigma * z / (a**2 * s**2 + sigma**2)

    net = AsFlow(Exact(), Diffusion(schedule, "eps"))
    t = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    a = (1 - t)[:, None]
    want = (t[:, None] - a * s**2) * x / (a**2 * s**2 + t[:, None] ** 2)
    torch.testing.assert_close(net(x, t), want, rtol=1e-4, atol=1e-5)
    ends = net(x[:2], torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends[0], -x[0], rtol=1e-3, atol=1e-3)
    assert ends.isfinite().all()


# ---- --init --------------------------------------------------------------------------------------


def converted(root, kind):
    """A converted folder for samples of 3 x 8 x 8 and 2 classes; its network; the way back."""
    if kind == "sit":
        state = official_state(channels=3, outputs=6, rows=3, depth=1)
        flags, back = ["--num_attention_heads", "3", *FLAGS["sit"]], to_official
    else:
        config = {**TINY_ADM, "num_classes": 2, "channel_mult": [1, 1], "num_res_blocks": 1}
        state = to_adm(fill(UNetModel(**config)))
        flags = ["--num_attention_heads", "2", "--sample_size", "8", *FLAGS["lfm"]]
        back = to_adm
    return convert_to(root, kind, state, *flags), state, back


@pytest.mark.parametrize("kind", ["sit", "adm"])
def test_training_goes_on_from_a_converted_folder(tmp_path, folder, kind):
    """From its very weights, in its own convention, and what comes out goes back to its names."""
    out, state, back = converted(tmp_path, kind)
    start = load_file(out / "transformer" / WEIGHTS)
    flags = ["--init", out, "--learning_rate", "1e-9", "--guidance_scale", 1]
    still = run(tmp_path / "still", folder, *flags)
    assert all(torch.allclose(v, start[k], atol=1e-6) for k, v in still.state_dict().items())
    args = latent_fm.parse_args(["--data", "x", "--init", str(out)])
    assert (args.optimizer, args.max_grad_norm) == ("adamw", 0)
    flags = ["--init", out, "--learning_rate", "1e-3", "--ema_decay", 0, "--guidance_scale", 1]
    net = run(tmp_path / "run", folder, *flags)
    assert len(read_log(tmp_path / "run")) == 2
    assert net.config == load_network(str(out / "transformer"))[0].config
    moved = [k for k, v in net.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) > 10
    layout = {"sit": "dit"}.get(kind, kind)
    path = tmp_path / "back.safetensors"
    convert.main(["--export", str(tmp_path / "run"), "--output", str(path), "--layout", layout])
    stored, official = load_file(path), back(net)
    assert stored.keys() == official.keys() == state.keys()
    assert all(torch.equal(stored[k], official[k]) for k in official)


def test_what_training_cannot_start_from_is_named(tmp_path, folder, capsys):
    dit = official_state(channels=3, outputs=6, rows=3, depth=1)
    dit = convert_to(tmp_path, "dit", dit, "--num_attention_heads", "3")
    sit = converted(tmp_path, "sit")[0]
    plain = official_state(channels=3, outputs=3, rows=1, depth=1)
    plain = convert_to(tmp_path, "lfm", plain, "--num_attention_heads", "3", *FLAGS["lfm"])
    data = ["--data", str(folder / "images"), *RUN, "--output_dir", str(tmp_path / "run")]
    for flags, says in [
        (["--init", dit], "predicts eps, and this script trains velocities"),
        (["--init", sit, "--resolution", 16], "takes samples of (3, 8, 8), and --data gives"),
        (["--init", sit, "--task", "uncond"], "has 2 classes, and the data have 0"),
        (["--init", sit, "--network", "DiT-B/2"], "has a network of its own"),
        (["--init", plain, "--task", "inpaint"], "sees 0 channels beside a sample, and --task"),
        (["--init", folder / "vae"], "predicts nothing"),
        (["--init", tmp_path / "nowhere"], "is not a folder"),
    ]:
        line = refusal_of(capsys, latent_fm.main, *data, *map(str, flags))
        assert says in line, line
    flags = ["--sample", str(sit), "--autoencoder", "pca", "--output_dir", str(tmp_path / "s")]
    assert "names a VAE" in refusal_of(capsys, latent_fm.main, *flags)


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "takes samples of (3, 8, 8), and --data gives (3, 16, 16)"),
        (["--task", "uncond"], "takes samples of (3, 8, 8)"),
        (["--data", "shapes", "--autoencoder", "identity"], "and --data gives (3, 32, 32)"),
    ],
)
def test_a_dry_run_refuses_a_start_that_does_not_suit_a_world(tmp_path, capsys, flags, says):
    """In the words of the run; a network that suits is planned for."""
    sit = converted(tmp_path, "sit")[0]
    flags = ["--data", "glyphs", "--init", str(sit), "--output_dir", str(tmp_path / "run"), *flags]
    refused = refusal_of(capsys, latent_fm.main, *flags, "--dry_run")
    assert says in refused and refused == refusal_of(capsys, latent_fm.main, *flags)
    args = latent_fm.parse_args(["--data", "glyphs"])
    start = str(tmp_path / "start")
    net = latent_fm.planned_network(args)
    save_network(net, network_config(net), start)
    latent_fm.main(["--data", "glyphs", "--init", start, "--dry_run"])


def test_muon_needs_matrices_inside_blocks():
    """ADM's U-Net has none: all of it would go to AdamW, without a word."""
    args = latent_fm.parse_args(["--optimizer", "muon"])
    with pytest.raises(UserError, match="give --optimizer adamw"):
        latent_fm.build_optimizers(args, torch.nn.Conv2d(3, 3, 1))


def test_a_cache_and_a_set_know_their_autoencoder():
    """Two PCAs of one shape are two spaces; a measured scale changes samples, not a cache."""
    args = latent_fm.parse_args("--data shapes".split())
    x = torch.rand(2, 200, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[1, :, 0] *= 0.1
    spaces = [LatentSpace(PatchPCA(3, 4, 12).fit(part)) for part in x]
    first, second = (latent_fm.describe_encoder(args, space) for space in spaces)
    assert first != second
    made = [report.made_with(args, ".", space)["autoencoder"] for space in spaces]
    assert made[0] != made[1]
    spaces[0].measure_norm([spaces[0].own_moments(x[0])], "scale")
    assert latent_fm.describe_encoder(args, spaces[0]) == first
    assert report.made_with(args, ".", spaces[0])["autoencoder"] != made[0]


@pytest.mark.parametrize(
    "solver, interval, calls",
    [
        ("euler", (0.0, 1.0), 8),
        ("euler", (0.9, 0.95), 4),
        ("euler", (0.0, 0.5), 6),
        ("heun", (0.0, 1.0), 14),
    ],
)
def test_calls_are_those_of_the_network(solver, interval, calls):
    """Two where guidance acts, one elsewhere."""
    made, found = [], []

    class Net(torch.nn.Module):
        num_classes = 4

        def forward(self, x, t, label):
            made.append(len(x))
            return -x

    noise, label = torch.randn(3, 2), torch.zeros(3, dtype=torch.long)
    how = dict(steps=4, guidance_scale=2.0, solver=solver, interval=interval, calls=found)
    latent_fm.sample(Net(), noise, label, **how)
    assert found == [calls] and sum(made) == 3 * calls  # rows, of one call or of two
