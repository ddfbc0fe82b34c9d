"""latent_fm.py as a user starts it.

Every task on the embedded world, folders of PNGs through a VAE of Stable Diffusion's layout, what
is saved, and what is refused.
"""

import json
import math

import numpy as np
import pytest
import torch
from helpers import alone, read_log, refusal_of
from PIL import Image
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models.draws import Draws
from models.files import UserError, save_json
from models.networks import WEIGHTS, load_network, save_network
from models.networks.autoencoders import AutoencoderKL
from models.networks.dit_imagenet import DiTTransformer2DModel
from models.networks.latent_space import LatentSpace, load_space
from models.plumbing import report, work
from models.plumbing.data import load_data, load_real_data, to_unit
from models.plumbing.film import Film
from models.plumbing.images import read_image
from models.plumbing.loading import open_pictures
from models.plumbing.run import Run
from models.plumbing.teachers import load_teacher, start_teacher
from models.worlds import load_world
from models.worlds.measures import balanced_labels

TINY = """--max_train_steps 3 --train_batch_size 4
    --sample_steps 2 --checkpointing_steps 2 --lr_warmup_steps 2""".split()
SIZES = "--width 32 --depth 1 --cond_dim 16".split()  # of --network small
POOL = ["--pool", "200"]  # items of a world to train on
VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[8] * 4,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    sample_size=32,
    scaling_factor=0.18215,
)  # f = 8, as Stable Diffusion's


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Measure 24 samples instead of thousands."""
    many, labels = report.many, balanced_labels

    def fewer(n):
        return 24 if n > 500 else n

    monkeypatch.setattr(report, "many", lambda draw, n, batch=500: many(draw, fewer(n), batch))
    for module in (latent_fm, report):
        monkeypatch.setattr(module, "balanced_labels", lambda n, k: labels(fewer(n), k))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """240 PNGs of 40 x 32 in two classes, maps of the same names, and a VAE as diffusers writes it.

    -> root
    """
    root, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for i in range(240):
        name, w = ("left", "right")[i % 2], int(rng.integers(8, 14))
        image = np.full((32, 40, 3), rng.integers(0, 90, 3), np.uint8)
        numbers = np.zeros((32, 40), np.uint8)
        x = int(rng.integers(6, 10)) + (0 if name == "left" else 10)
        image[10:22, x : x + w] = rng.integers(150, 255, 3)
        numbers[10:22, x : x + w] = 1 + i % 2
        for kind, a in (("images", image), ("maps", numbers)):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(a).save(root / kind / name / f"{i:03d}.png")
    (root / "names.json").write_text('["background", "circle", "square"]')
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE)
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.35.0", **vae.config}
    save_network(vae, config, str(root / "vae"))
    return root


def tiny(flags):
    """TINY, and where the flags name no other network and no points its sizes."""
    return TINY + ([] if {"--network", "ring"} & {*flags} else SIZES)


def run(where, *flags):
    """latent_fm.py with tiny sizes, into this folder."""
    latent_fm.main([*tiny(flags), *map(str, flags), "--output_dir", str(where)])


def sample(run_folder, where, *flags):
    """latent_fm.py --sample of a run, into the folder `where`."""
    latent_fm.main(["--sample", str(run_folder), *flags, "--output_dir", str(where)])


def through_vae(folder, *more):
    """Flags that train on the folder's images through its VAE."""
    return ["--data", folder / "images", "--autoencoder", folder / "vae", *more]


def report_of(run_folder):
    return json.loads((run_folder / "report.json").read_text())


def rows_of(run_folder):
    return {row["name"]: row for row in report_of(run_folder)["results"]}


def losses_of(run_folder):
    return np.array([float(row["loss"]) for row in read_log(run_folder)])


# ---- ring.gif ------------------------------------------------------------------------------------


def test_film_of_the_ring(tmp_path, monkeypatch):
    """A frame every fortieth of the run and one before it; as many in a run that was resumed.

    Without labels there is a film too; --preview_every 0 and other spaces make none.
    """
    monkeypatch.setattr(latent_fm, "finish", lambda *a: None)

    def frames(name):
        with Image.open(tmp_path / name / "ring.gif") as film:
            return film.n_frames

    ring = ["--data", "ring", *POOL, "--optimizer", "adamw", "--train_batch_size", 400]
    run(tmp_path / "whole", *ring, "--max_train_steps", 4)
    run(tmp_path / "parts", *ring, "--max_train_steps", 2)
    assert frames("parts") == 3
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    run(tmp_path / "parts", *ring, *more)
    assert frames("whole") == frames("parts") == 5
    run(tmp_path / "plain", *ring, "--task", "uncond")
    assert frames("plain") == 4
    for name, flags in (("off", "--preview_every 0"), ("scaled", "--latent_norm scale")):
        run(tmp_path / name, *ring, *flags.split())
        assert not (tmp_path / name / "ring.gif").exists()


def test_film_is_of_the_exact_velocity(tmp_path, monkeypatch):
    """The first arrows are x0 in closed form, which the exact velocity gives, the second the
    network's."""
    films = []
    monkeypatch.setattr(latent_fm, "finish", lambda *a: None)
    monkeypatch.setattr(Film, "frame", lambda film, step: films.append(film))
    run(tmp_path / "run", "--data", "ring", *POOL, "--train_batch_size", 400)
    film, g = films[0], torch.Generator().manual_seed(0)
    x_t, t, label = torch.randn(8, 2, generator=g), torch.full((8,), 0.4), torch.arange(8) % 4
    exact, network = (mu(x_t, t, {"label": label}, None) for mu in film.mus)
    v = load_world("ring").exact(x_t, t, label)
    torch.testing.assert_close(exact, x_t - 0.4 * v, check_dtype=False)
    assert film.names == ("exact", "network") and not torch.allclose(exact, network, atol=0.1)
    net, _ = load_network(str(tmp_path / "run" / "student"))
    with torch.no_grad():
        torch.testing.assert_close(network, x_t - 0.4 * net(x_t, t, label))


def test_the_average_of_the_weights_is_saved(tmp_path, monkeypatch):
    """student/ holds the EMA, whose decay grows as (1 + n) / (10 + n) up to --ema_decay."""
    weights, real = [], Run.update_ema

    def spy(run, ema, net, step, start):
        for module in (ema, net) if step == 0 else (net,):
            weights.append(module.hidden[0].weight.detach().clone())
        real(run, ema, net, step, start)

    monkeypatch.setattr(Run, "update_ema", spy)
    monkeypatch.setattr(latent_fm, "finish", lambda *a: None)
    run(tmp_path / "run", "--data", "ring", *POOL, "--preview_every", 0, "--ema_decay", 0.15)
    average, *updated = weights
    for decay, w in zip((1 / 10, 0.15, 0.15), updated, strict=True):
        average = decay * average + (1 - decay) * w
    net, _ = load_network(str(tmp_path / "run" / "student"))
    torch.testing.assert_close(net.hidden[0].weight.detach(), average)
    assert not torch.allclose(average, updated[-1], atol=1e-5)


# ---- the embedded world --------------------------------------------------------------------------


def test_default_is_a_latent_class_model(tmp_path):
    """python latent_fm.py: shapes in patch-PCA latents.

    There is a grid of samples, fd and accuracy are in the report, and the autoencoder is beside the
    student.
    """
    run(tmp_path / "run", *POOL)
    rows = rows_of(tmp_path / "run")
    assert set(rows) == {"data", "reconstruction", "teacher", "guided", "euler_4", "euler_1"}
    assert all({"fd", "accuracy", "patch_swd", "diversity"} <= set(r) for r in rows.values())
    assert rows["data"]["fd"] < rows["teacher"]["fd"]
    assert rows["guided"]["nfe"] == 2 * rows["teacher"]["nfe"] == 6
    net, config = load_network(str(tmp_path / "run" / "student"))
    assert net.latent_shape == (12, 8, 8) and config["world"] == "shapes" and net.num_classes == 6
    assert (tmp_path / "run" / "samples.png").is_file()
    assert load_space(str(tmp_path / "run" / "autoencoder")).factor == 4
    assert len(read_log(tmp_path / "run")) == 3


def test_the_log(tmp_path):
    """Every step has the loss, its parts by quarter of t, the gradient's norm and the rate.

    The parts are means over the items of the batch in that quarter: weighted by how many there are,
    they add up to the loss.
    """
    run(tmp_path / "run", *POOL, "--train_batch_size", 8, "--gradient_accumulation_steps", 2)
    log = read_log(tmp_path / "run")
    columns = {"step", "lr", "loss", "norm_net", "seconds", "peak_memory_mb"}
    assert set(log[0]) == columns | {f"loss_t{quarter}" for quarter in range(4)}
    assert [float(row["lr"]) for row in log] == pytest.approx([1.5e-3, 2e-3, 1e-3])
    for step, row in enumerate(log):
        n = torch.zeros(4)
        for first in (0, 8):
            u = Draws(0, step, 0, range(first, first + 8)).normal("u", ()).sigmoid()
            n += (u * 4).long().bincount(minlength=4)
        parts = [float(row[f"loss_t{quarter}"]) for quarter in range(4)]
        total = sum(k * part for k, part in zip(n.tolist(), parts)) / 16
        assert total == pytest.approx(float(row["loss"]), rel=1e-5)
        assert all((part > 0) == (k > 0) for k, part in zip(n.tolist(), parts))


def test_a_dry_run_knows_the_shape_of_latents(tmp_path, folder, capsys):
    """Of a run's own autoencoder and of a VAE's folder, without weights; --init is held to it."""
    run(tmp_path / "teacher", *POOL)
    own = tmp_path / "teacher" / "autoencoder"
    for where in (own, folder / "vae"):
        args = latent_fm.parse_args(["--data", "shapes", "--autoencoder", str(where)])
        z, _ = load_space(str(where)).own_moments(torch.zeros(1, 3, 32, 32))
        assert tuple(latent_fm.planned_network(args).latent_shape) == tuple(z.shape[1:])
    flags = ["--data", "shapes", "--init", str(tmp_path / "teacher"), "--dry_run"]
    latent_fm.main([*flags, "--autoencoder", str(own)])
    for where, says in [
        (folder / "vae", "takes samples of"),
        (tmp_path / "teacher" / "student", "not an autoencoder"),
        (tmp_path / "nowhere", "is not a folder"),
    ]:
        line = refusal_of(capsys, latent_fm.main, *flags, "--autoencoder", str(where))
        assert says in line, line


def posteriors_of(folder, side=8):
    """Means and standard deviations of four latents, in two classes: a folder of .npy, a file."""
    g = torch.Generator().manual_seed(0)
    both = torch.randn(4, 2, 4, side, side, generator=g).abs()
    for i, item in enumerate(both):
        path = folder / "npy" / "ab"[i % 2] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, item.flatten(0, 1).numpy())
    mean, std = both.unbind(1)
    tensors = {"mean": mean.contiguous(), "std": std.contiguous()}
    tensors["cond.label"] = torch.arange(4) % 2
    save_file(tensors, str(folder / "one.safetensors"))
    return folder / "npy", folder / "one.safetensors"


def test_latents_made_elsewhere_are_planned_as_they_are(tmp_path, folder, capsys):
    """Their own shape says it all: no --resolution, and a space of another f than 8."""
    vae = AutoencoderKL(**{**VAE, "block_out_channels": [8] * 3, "down_block_types":
        VAE["down_block_types"][:3], "up_block_types": VAE["up_block_types"][:3]})  # fmt: skip
    config = {"_class_name": "AutoencoderKL", **vae.config}
    save_network(vae, config, str(tmp_path / "f4"))
    sources = posteriors_of(tmp_path)
    for source in sources:
        for space in (folder / "vae", tmp_path / "f4"):
            flags = ["--data", str(source), "--autoencoder", str(space)]
            args = latent_fm.parse_args(flags)
            assert tuple(latent_fm.planned_network(args).latent_shape) == (4, 8, 8)
        line = refusal_of(capsys, latent_fm.main, "--data", str(source), "--dry_run")
        assert "has latents: give --autoencoder FOLDER" in line
    args = latent_fm.parse_args([*flags, "--network", "ADM"])  # whose sides are halved three times
    with torch.device("meta"):
        assert latent_fm.planned_network(args).latent_shape == (4, 8, 8)
    broken = sources[0] / "a" / "0.npy"
    broken.write_bytes(broken.read_bytes()[:100])
    flags[1] = str(sources[0])
    assert "is not a whole .npy" in refusal_of(capsys, latent_fm.main, *flags, "--dry_run")


def test_a_dry_run_refuses_what_no_data_can_train(tmp_path, folder, capsys):
    """Muon on a network without matrices in blocks; --init of what predicts no velocity."""
    out = ["--output_dir", str(tmp_path / "run"), "--train_batch_size", "4"]
    own = ["--data", str(folder / "images"), *out]
    muon = ["--network", "ADM-CelebA", "--optimizer", "muon", "--resolution", "64"]
    muon += ["--autoencoder", str(folder / "vae"), "--dry_run"]
    line = refusal_of(capsys, latent_fm.main, *own, *muon)
    assert "a UNetModel has none: give --optimizer adamw" in line
    init = [*own, "--init", str(folder / "vae")]
    line = refusal_of(capsys, latent_fm.main, *init, "--dry_run")
    assert "predicts nothing, and this script trains velocities" in line
    assert refusal_of(capsys, latent_fm.main, *init) == line


def test_a_finished_run_whose_work_cannot_be_planned_ends_well(tmp_path, capsys):
    """As where its data have gone: the line about its work is left out."""
    args = latent_fm.parse_args(["--data", "shapes", "--output_dir", str(tmp_path)])
    (tmp_path / "log.csv").write_text("step,seconds\n" + "1,20\n" * 3)

    def gone(args):
        raise UserError("--init is not there any more")

    work.work_done(args, *latent_fm.cost(args), build=gone)
    assert capsys.readouterr().out == ""


def test_a_latent_teacher_is_distilled(tmp_path):
    """dmd.py --teacher of that run is measured and pictured in pixels.

    Its student has the autoencoder beside it. For a GAN the world's data come as latents.
    """
    run(tmp_path / "teacher", *POOL)
    start = ["--teacher", str(tmp_path / "teacher")]
    short = "--max_train_steps 1 --train_batch_size 4 --teacher_steps 0 --preview_samples 3".split()
    dmd.main([*start, "--output_dir", str(tmp_path / "student"), *short])
    assert set(rows_of(tmp_path / "student")) >= {"data", "student"}
    with Image.open(tmp_path / "student" / "samples.png") as shown:
        assert shown.size[0] == 3 * (32 * 2 + 2)
    a, b = (load_file(tmp_path / n / "autoencoder" / WEIGHTS) for n in ("teacher", "student"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    args = dmd.parse_args(start)
    teacher = start_teacher(alone(args))
    data, _ = load_real_data(args, teacher)
    assert teacher.world is load_world("shapes") and teacher.shape == (12, 8, 8)
    assert tuple(data.shape[1:]) == (12, 8, 8) and data.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("task", ["uncond", "inpaint", "semantic"])
def test_tasks_on_the_world(tmp_path, task, capsys):
    """Each task ends with its measures, and known pixels stay exact.

    A run is sampled again with the solver asked for. dmd.py refuses what needs a context.
    """
    out, again = tmp_path / "run", tmp_path / "again"
    run(out, *POOL, "--task", task)
    rows = rows_of(out)
    net, config = load_network(str(out / "student"))
    assert net.num_classes == 0 and report_of(out)["task"] == task
    context = {"uncond": (None, None), "inpaint": (13, None), "semantic": (7, 12)}[task]
    assert (config.get("context_channels"), config.get("context_width")) == context
    row = rows["teacher"]
    if task == "uncond":
        assert "accuracy" not in row and row["fd"] > 0
    elif task == "inpaint":
        assert row["known_error"] == 0 < row["known_mse_before"]
        assert min(row["hole_mse"], row["mean_fill"], row["shuffled"]) > 0
    else:
        assert 0 <= row["iou"] <= 1 and 0 <= row["iou_shuffled"] <= 1 and rows["data"]["iou"] > 0.9
    capsys.readouterr()
    sample(out, again, *"--solver dopri5 --atol 1e-2 --rtol 1e-2".split())
    lines = capsys.readouterr().out.splitlines()
    assert (again / "samples.png").is_file() and not (again / "report.json").exists()
    line = lines[-2]
    if task == "uncond":
        line = [line for line in lines if line.startswith("teacher")][0]
    nfe = float(line.split()[1])
    assert (nfe - 2) % 6 == 0 and nfe > 3
    no = ["--output_dir", str(tmp_path / "no")]
    guided = ["--sample", str(out), "--guidance_scale", "2"]
    assert "no labels to guide by" in refusal_of(capsys, latent_fm.main, *guided, *no)
    if task != "uncond":
        assert "takes context" in refusal_of(capsys, dmd.main, "--teacher", str(out), *no)


def test_measures_of_tasks_know_right_from_wrong(tmp_path, monkeypatch):
    """A sampler that returns the truth has hole error near the autoencoder's and IoU near 1.

    One that returns another item does not.
    """
    world, label = load_world("shapes"), balanced_labels(24, 6)
    truth = world.space.to_latents(world.data(24, 779, label)[0])
    order = []

    def oracle(net, z, label, context=None, calls=None, **settings):
        order.append(0)
        calls.append(1)
        # asked with the right context first, then with the neighbour's
        return truth if len(order) == 1 else truth.roll(1, 0)

    monkeypatch.setattr(latent_fm, "sample", oracle)
    for task in ("inpaint", "semantic"):
        order.clear()
        run(tmp_path / task, *POOL, "--task", task)
        assert len(order) == 2
        row = rows_of(tmp_path / task)["teacher"]
        if task == "inpaint":
            assert row["hole_mse"] < 0.03 < row["mean_fill"] < row["shuffled"]
            assert row["known_error"] == 0 and row["known_mse_before"] < 0.02
        else:
            assert row["iou"] > 0.8 and row["iou_shuffled"] < 0.6 and row["accuracy"] == 1


def test_pixel_and_other_spaces_on_the_world(tmp_path):
    """identity: pixels at an equal network.

    Another PCA is measured through its own decoder, and its latents are not taken for the world's.
    """
    for name, flags, shape, reads in (
        ("pixels", "--autoencoder identity --latent_norm none", (3, 32, 32), "shapes"),
        ("pca8", "--pca_channels 8", (8, 8, 8), None),
        ("channel", "--latent_norm channel", (12, 8, 8), None),
    ):
        patch = 8 if name == "pixels" else 2
        run(tmp_path / name, *POOL, *flags.split(), "--patch_size", patch)
        net, config = load_network(str(tmp_path / name / "student"))
        assert net.latent_shape == shape and config["world"] == reads
        latent = name != "pixels"
        assert ("reconstruction" in rows_of(tmp_path / name)) == latent
        assert (tmp_path / name / "autoencoder").is_dir() == latent


# ---- folders of images ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, flags",
    [("class", ["--hflip"]), ("uncond", []), ("inpaint", ["--hflip"]), ("semantic", ["--hflip"])],
)
def test_folder_through_a_vae(tmp_path, folder, task, flags):
    """240 PNGs from end to end.

    Latents are cached in one folder, with the mirrored ones, and read in every step; pictures are
    decoded; --sample finds VAE and data again.
    """
    out, file = tmp_path / "run", tmp_path / "latents"
    if task == "semantic":
        flags = [*flags, "--maps", folder / "maps", "--map_names", folder / "names.json"]
    more = ["--task", task, *flags, "--cache_latents", file, "--latent_norm", "channel"]
    run(out, *through_vae(folder, *more))
    cached = load_file(file / "00000.safetensors")["moments"]
    assert cached.shape == (240, 1 + ("--hflip" in flags), 2, 4, 4, 4)
    assert cached.dtype == torch.float16 and (cached[:, :, 1] > 0).all()
    about = json.loads((out / "autoencoder" / "latents.json").read_text())
    assert about["autoencoder"] == str(folder / "vae") and len(about["std"]) == 4
    space = load_space(str(out / "autoencoder"))
    mean, std = space.normed(*cached[:, 0].float().unbind(1))
    total = mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))
    assert (total - 1).abs().max() < 0.01  # unit variance of what is sampled, not only of its mean
    net, _ = load_network(str(out / "student"))
    assert net.latent_shape == (4, 4, 4)
    with Image.open(out / "samples.png") as shown:
        assert shown.size[0] == 20 * (32 * 3 + 2)
    sample(out, tmp_path / "again")
    if task == "inpaint":
        assert report_of(out)["results"][0]["known_error"] == 0


def test_cached_latents_are_those_of_every_step(tmp_path, folder):
    """The losses are the same with and without the cache.

    The mirrored item is the encoder's view of the mirrored image.
    """
    flags = through_vae(folder, "--hflip", "--train_batch_size", 16)
    cache = ["--cache_latents", tmp_path / "latents"]
    for name, more in (("each", []), ("cache", cache), ("again", cache)):
        run(tmp_path / name, *flags, *more)
    each, cached, again = (losses_of(tmp_path / n) for n in ("each", "cache", "again"))
    np.testing.assert_allclose(each, cached, rtol=1e-3)  # which is in half precision
    np.testing.assert_array_equal(cached, again)  # from the file that is there already
    x = to_unit(read_image(str(folder / "images" / "left" / "000.png"), 32))[None]
    space = load_space(str(folder / "vae"))
    first = load_file(tmp_path / "latents" / "00000.safetensors")["moments"][0, :, 0]
    for view, image in ((first[0], x), (first[1], x.flip(-1))):
        want = space.own_moments(image)[0][0].half()  # up to a rounding of the encoder's own error
        torch.testing.assert_close(view, want, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(first[0], first[1], atol=1e-3)


def test_cached_latents_may_move(tmp_path, folder, capsys):
    """A run goes on with them under another name, not with those of other images."""
    flags = through_vae(folder, "--train_batch_size", 16)
    out, there, moved = (tmp_path / name for name in ("run", "latents", "moved"))
    run(out, *flags, "--cache_latents", there)
    there.rename(moved)
    again = ["--resume_from_checkpoint", "latest", "--cache_latents"]
    run(out, *flags, *again, moved)
    assert not there.exists()
    about = json.loads((moved / "cache.json").read_text())
    (moved / "cache.json").write_text(json.dumps({**about, "pixels": "others"}))
    start = [*tiny(flags), *map(str, flags), "--output_dir", str(out), *again, str(moved)]
    assert "was made with other pixels" in refusal_of(capsys, latent_fm.main, *start)


def test_flips_reach_images_and_maps_alike(tmp_path, folder, monkeypatch):
    """Half of the items are mirrored, and a mirrored image has the mirrored map."""
    seen, images = [], []
    encode, real = LatentSpace.moments, latent_fm.semantic_context

    def on_image(self, x):
        images.append(x.clone())
        return encode(self, x)

    def on_map(maps, *rest):
        seen.append(maps.clone())
        return real(maps, *rest)

    monkeypatch.setattr(LatentSpace, "moments", on_image)
    monkeypatch.setattr(latent_fm, "semantic_context", on_map)
    flags = ["--task", "semantic", "--maps", folder / "maps", "--hflip"]
    flags += ["--map_names", folder / "names.json"]
    sizes = ["--train_batch_size", 32, "--patch_size", 8]
    run(tmp_path / "run", "--data", folder / "images", *flags, *sizes)
    for x, maps in zip(images[:3], seen[:3]):
        bright = (x - x[:, :, :1, :1]).abs().amax(1) > 0.1
        assert torch.equal(bright, maps > 0)
    sides = torch.cat([(m > 0).float().mean(1).argmax(1) for m in seen[:3]])  # where a shape begins
    classes = torch.cat([m.flatten(1).amax(1) for m in seen[:3]])
    left = sides[classes == 1]
    assert len(left.unique()) > 4 and left.max() > 12  # some left one became a right one


def test_paper_networks_and_compile(tmp_path, folder, monkeypatch):
    """--network DiT-B/2 is diffusers' class with velocities and our clock, or raw with --t_scale 1.

    --compile compiles every block of what is trained.
    """
    compiled = []
    sizes = dict(num_layers=1, num_attention_heads=2, attention_head_dim=12)
    small = {**latent_fm.PAPER_NETWORKS["DiT-B/2"], **sizes}
    monkeypatch.setitem(latent_fm.PAPER_NETWORKS, "DiT-B/2", small)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    flags = "--network DiT-B/2 --compile --mixed_precision bf16 --optimizer adamw".split()
    for scale, convention in (("1000", "flow"), ("1", "lfm")):
        run(tmp_path / scale, *through_vae(folder, *flags, "--t_scale", scale))
        net, _ = load_network(str(tmp_path / scale / "student"))
        assert isinstance(net, DiTTransformer2DModel) and net.prediction == "flow_v"
        assert net.convention == convention and net.num_classes == 2
        assert net.proj_out_2.weight.abs().max() > 0
    assert len(compiled) == 2
    args = latent_fm.parse_args(["--data", "x", "--network", "DiT-B/2"])
    assert (args.optimizer, args.learning_rate) == ("adamw", 1e-4)
    assert (args.ema_decay, args.lr_decay_share) == (0.9999, 0)
    teacher = load_teacher(str(tmp_path / "1"))
    assert teacher.prediction == "flow_v" and teacher.net.latent_shape == (4, 4, 4)


def test_maps_of_every_kind(tmp_path, folder, capsys):
    """Missing, coloured and misshapen maps are named and their images skipped.

    Palette, 1-bit and 16-bit ones are read as numbers, and the crops agree.
    """
    images, maps = tmp_path / "images", tmp_path / "maps"
    images.mkdir()
    maps.mkdir()
    numbers = np.zeros((32, 40), np.uint8)
    numbers[:, 14:] = 3
    for i in range(8):
        Image.new("RGB", (40, 32), (10 * i, 0, 0)).save(images / f"{i}.png")
    Image.fromarray(numbers).save(maps / "0.png")
    palette = Image.fromarray(numbers)
    palette.putpalette([7, 7, 7] * 256)
    palette.save(maps / "1.png")
    Image.fromarray(numbers > 0).save(maps / "2.png")
    Image.fromarray(numbers.astype(np.uint16)).save(maps / "3.png")
    Image.fromarray(numbers).resize((80, 64), Image.Resampling.NEAREST).save(maps / "4.png")
    Image.new("RGB", (40, 32)).save(maps / "5.png")
    Image.fromarray(numbers[:, :32]).save(maps / "6.png")
    x, cond, names = load_data(str(images), 16, flat=True, maps=str(maps))
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].rsplit("/", 1)[1] for line in error] == ["5.png", "6.png", "7.png"]
    assert "mode RGB" in error[0] and "FileNotFound" in error[2]
    assert "32 x 32, its image 40 x 32" in error[1]
    assert len(x) == 5 and names == ["images"] and not cond["label"].any()
    want = torch.tensor([0] * 5 + [3] * 11, dtype=torch.uint8).expand(16, 16)
    for i in (0, 1, 3, 4):
        assert torch.equal(cond["map"][i], want), i
    assert torch.equal(cond["map"][2], want // 3)


def wrong_input(folder, tmp_path):
    """Pairs (flags, part of the message that refuses them)."""
    images, vae = f"--data {folder / 'images'}", f"--autoencoder {folder / 'vae'}"
    sized = "--network DiT-B/2"
    return [
        (f"--task semantic {images}", "needs --maps"),
        ("--task semantic --data glyphs", "no segmentation maps"),
        (f"--maps {folder / 'images'} {images}", "goes with --task semantic"),
        (f"--task semantic {images} --maps nowhere", "goes with"),
        (f"--task semantic --data {tmp_path}/floats.safetensors", "must hold integers"),
        (f"--task semantic --data {tmp_path}/none.safetensors", "every map is 255"),
        (f"--task semantic --data {tmp_path}/bare.safetensors", "needs cond.map"),
        (f"--task inpaint --data {tmp_path}/none.safetensors", "give --data FOLDER"),
        ("--task uncond --guidance_scale 2", "no labels to guide by"),
        ("--task inpaint --data clips", "wanted images"),
        ("--data ring --autoencoder pca", "use identity"),
        (f"{images} --autoencoder nowhere", "nowhere is not a folder"),
        (f"{images} {vae} --resolution 12", "not multiples of 8"),
        (f"{images} --autoencoder pca --pca_channels 49", "1 to 48 components"),
        (f"{images} --autoencoder pca --pca_patch 5", "divide by it"),
        (f"--data clips {sized}", "square images only; use --network small"),
        (f"{images} {vae} {sized} --t_scale 7", "--t_scale 1 or 1000"),
        (f"{images} {vae} --cache_latents {tmp_path}/other", "was made with other pca_patch"),
        ("--data clips --patch_size 2 2", "one for each of the 3 axes"),
        ("--guidance_interval 0.6 0.5", "LO must not be above HI"),
        ("--solver rk4", "invalid choice"),
        ("--atol 0", "must be >= 1e-08"),
    ]


def test_wrong_input(tmp_path, folder, capsys):
    """One line and exit code 2, before any training."""
    x0 = torch.zeros(3, 1, 8, 8)
    maps = {"floats": torch.zeros(3, 8, 8), "none": torch.full((3, 8, 8), 255)}
    for name, values in maps.items():
        save_file({"x0": x0, "cond.map": values}, tmp_path / f"{name}.safetensors")
    save_file({"x0": x0}, tmp_path / "bare.safetensors")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cache.json").write_text("{}")
    out = ["--output_dir", str(tmp_path / "run")]
    for flags, says in wrong_input(folder, tmp_path):
        given = [*tiny(flags.split()), "--pool", "100", *flags.split(), *out]
        line = refusal_of(capsys, latent_fm.main, *given)
        assert says in line, (flags, line)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no readable image with a map"):
        maps = ["--maps", tmp_path / "empty"]
        run(tmp_path / "run", "--task", "semantic", "--data", folder / "images", *maps)


def test_wrong_autoencoder_of_a_saved_run(tmp_path, folder, capsys):
    """--sample of a run whose VAE has moved, or whose latents.json has wrong numbers."""
    moved = tmp_path / "moved"
    run(moved, *through_vae(folder))
    path = moved / "autoencoder" / "latents.json"
    about = json.loads(path.read_text())
    again = ["--sample", str(moved), "--output_dir", str(tmp_path / "s")]
    save_json({**about, "autoencoder": str(tmp_path / "gone")}, str(path))
    assert "put it back" in refusal_of(capsys, latent_fm.main, *again)
    save_json({**about, "mean": [0.0, 1.0], "std": [1.0, 1.0]}, str(path))
    assert "has numbers for 2 channels" in refusal_of(capsys, latent_fm.main, *again)


def test_samples_have_the_precision_of_the_run(tmp_path, folder, monkeypatch):
    """At the end and with --sample networks run in bfloat16 where training did; decoders never."""
    seen, calls, decode = [], [], LatentSpace.to_pixels
    guided = latent_fm.guided_velocity

    def on_call(*args):
        calls.append(torch.is_autocast_enabled("cpu"))
        return guided(*args)

    def on_decode(self, z):
        seen.append((torch.is_autocast_enabled("cpu"), z.dtype))
        return decode(self, z)

    monkeypatch.setattr(latent_fm, "guided_velocity", on_call)
    monkeypatch.setattr(LatentSpace, "to_pixels", on_decode)
    run(tmp_path / "low", *through_vae(folder, "--mixed_precision", "bf16"))
    assert calls and all(calls) and set(seen) == {(False, torch.float32)}
    for precision in ("bf16", "no"):
        calls.clear()
        sample(tmp_path / "low", tmp_path / precision, "--mixed_precision", precision)
        assert calls and set(calls) == {precision == "bf16"}


def test_ranks_share_out_the_samples(tmp_path, folder, monkeypatch):
    """Rank 1 draws the rows that it is given, of one process's noise, and measures nothing."""
    run(tmp_path / "one", *POOL)
    drawn, real = [], latent_fm.sample

    def on_sample(net, noise, *rest, **more):
        drawn.append(noise)
        return real(net, noise, *rest, **more)

    def asked(run, draw, n, shape, batch=500):  # what rank 1 is given and gives back
        assert tuple(shape) == (3, 32, 32)
        draw(10, 20)
        return None, 0.0

    monkeypatch.setattr(latent_fm, "sample", on_sample)
    monkeypatch.setattr(report, "many_on_all_ranks", asked)
    monkeypatch.setattr(report, "save_samples", lambda *a: pytest.fail("only rank 0 writes"))
    real_init = latent_fm.Run.__init__

    def second(self, *args):
        real_init(self, *args)
        self.main, self.rank = False, 1

    monkeypatch.setattr(latent_fm.Run, "__init__", second)
    sample(tmp_path / "one", tmp_path / "two")
    whole = torch.randn(2000, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn[0], whole[10:20])


# ---- flags ---------------------------------------------------------------------------------------


def test_defaults_suit_the_data_and_the_task():
    args = latent_fm.parse_args([])
    assert (args.data, args.sample_steps, args.solver) == ("shapes", 8, "heun")
    assert (args.guidance_scale, args.logit_normal, args.autoencoder) == (1.5, True, "pca")
    assert latent_fm.parse_args(["--no-logit_normal"]).logit_normal is False
    args = latent_fm.parse_args(["--data", "glyphs"])
    assert (args.sample_steps, args.logit_normal, args.autoencoder) == (32, False, "identity")
    assert (args.max_train_steps, args.t_scale) == (8000, 1000.0)
    args = latent_fm.parse_args(["--task", "inpaint"])
    assert (args.guidance_scale, args.output_dir) == (1, "runs/latent_fm-inpaint-shapes")
    args = latent_fm.parse_args(["--task", "semantic"])
    assert (args.max_train_steps, args.patch_size, args.pool) == (1200, [2], 20000)


@pytest.mark.parametrize("flag", ["--patch_size", "--width", "--depth", "--cond_dim"])
def test_sizes_are_for_the_small_network(capsys, flag):
    line = refusal_of(capsys, latent_fm.main, "--network", "DiT-B/2", flag, "64")
    assert f"{flag}: --network DiT-B/2 has sizes of its own: leave it out" in line
    assert latent_fm.parse_args([flag, "64"])


def test_sampler_flags(tmp_path, monkeypatch):
    """Flags given to --sample win over the saved ones, which win over the defaults."""
    given = "--solver euler --sample_steps 3 --guidance_scale 2".split()
    run(tmp_path / "run", *POOL, *given)
    seen = []

    def spy(run, *rest):
        args = run.args
        seen.append((args.solver, args.sample_steps, args.guidance_scale, args.task))

    monkeypatch.setattr(latent_fm, "finish", spy)
    sample(tmp_path / "run", tmp_path / "a")
    sample(tmp_path / "run", tmp_path / "b", "--solver", "heun", "--guidance_scale", "1.25")
    assert seen == [("euler", 3, 2.0, "class"), ("heun", 3, 1.25, "class")]


# ---- training ------------------------------------------------------------------------------------


def test_loss_falls_towards_its_floor(tmp_path):
    """White unit-variance latents start at 2 and cannot go below pi / 2.

    A run on noise ends between them, near the floor.
    """
    x0 = torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    save_file({"x0": x0}, tmp_path / "white.safetensors")
    flags = """--task uncond --max_train_steps 150 --width 32 --depth 1 --sample_steps 1
        --lr_warmup_steps 10 --learning_rate 5e-3 --output_dir""".split()
    data = ["--data", str(tmp_path / "white.safetensors")]
    latent_fm.main([*data, *flags, str(tmp_path / "run")])
    loss = losses_of(tmp_path / "run")
    assert loss[0] == pytest.approx(2, abs=0.15)
    assert math.pi / 2 - 0.08 < np.mean(loss[-30:]) < 1.75


def test_posterior_enters_the_training(tmp_path, folder, monkeypatch):
    """With a VAE the network is trained on mean + std noise, fresh in every step.

    The same seed draws the same.
    """
    seen, real = [], latent_fm.flow_matching_loss

    def spy(net, x0, *rest):
        seen.append(x0.clone())
        return real(net, x0, *rest)

    monkeypatch.setattr(latent_fm, "flow_matching_loss", spy)
    monkeypatch.setattr(latent_fm, "finish", lambda *a: None)
    run(tmp_path / "run", *through_vae(folder))
    space, (x, *_) = (load_space(str(folder / "vae")), open_pictures(str(folder / "images"), 32))
    assert len(seen) == 3
    for step, x0 in enumerate(seen):
        draw = Draws(0, step, 0, range(4))
        z, std = space.moments(to_unit(x[draw.integer("item", 240)]))
        want = z + std * draw.normal("posterior", (4, 4, 4))
        torch.testing.assert_close(x0, want, rtol=1e-4, atol=1e-5)
        assert (x0 - z).abs().max() > 0.01


def test_measures_use_the_neighbours_condition(tmp_path, monkeypatch):
    """The second sampling of inpainting sees the contexts rolled by one, from the same noise."""
    seen, real = [], latent_fm.sample

    def spy(net, z, label, context=None, **settings):
        seen.append((z.clone(), context.clone()))
        return real(net, z, label, context=context, **settings)

    monkeypatch.setattr(latent_fm, "sample", spy)
    monkeypatch.setattr(report, "many", lambda draw, n, batch=500: (draw(0, n), 1.0))
    run(tmp_path / "run", *POOL, "--task", "inpaint")
    (z, c), (z_other, c_other) = seen
    assert torch.equal(z, z_other) and len(c) == 24
    assert torch.equal(c_other, c.roll(1, 0)) and not torch.equal(c_other, c)
