"""models/plumbing/teachers.py and what it reads: betas, clocks, names, numbers of checkpoints."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    PIXART_SCHEDULER,
    fill,
    refusal_of,
    save_tiny_pixart,
    save_tiny_teacher,
    save_tiny_vp_teacher,
    save_tiny_wan,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models.diffusion import VP
from models.files import UserError, save_json
from models.networks import load_network, network_config, save_network
from models.networks.dit import DiT
from models.networks.dit_imagenet import DiTTransformer2DModel
from models.networks.latent_space import space_beside
from models.plumbing import report
from models.plumbing.data import in_space_of
from models.plumbing.teachers import load_teacher, read_scheduler, refuse_empty_guidance
from models.worlds import WORLDS, load_world

QUICK = "--max_train_steps 1 --teacher_steps 0 --fake_update_ratio 1".split()
BETAS = [float(b) for b in torch.linspace(0.01, 0.14, 1000) ** 2]


def change_scheduler(root, **changes):
    path = root / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


# ---- betas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
def test_trained_betas_are_used(tmp_path, zero_snr):
    """The alphas are those of diffusers, not those of the named schedule that stands beside."""
    diffusers = pytest.importorskip("diffusers")
    changes = dict(trained_betas=BETAS, rescale_betas_zero_snr=zero_snr)
    if zero_snr:
        changes["prediction_type"] = "v_prediction"
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(PIXART_SCHEDULER))
    change_scheduler(tmp_path, **changes)
    schedule = read_scheduler(str(tmp_path / "scheduler"))[0]
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    ours, want = schedule.alpha(t), theirs.alphas_cumprod.double().sqrt()
    assert (ours - want).abs().max() < 1e-6
    named = VP("linear", 1e-4, 2e-2, 1000, zero_snr).alpha(t)
    assert (named - want).abs().max() > 0.1
    assert "given betas" in schedule.describe()


def test_a_student_keeps_trained_betas(monkeypatch, tmp_path):
    flags, out = save_tiny_pixart(tmp_path / "root", 512), tmp_path / "run"
    change_scheduler(tmp_path / "root", trained_betas=BETAS)
    dmd.main([*flags, "--max_train_steps", "1", "--output_dir", str(out)])
    teacher, student = load_teacher(str(tmp_path / "root")), load_teacher(str(out))
    assert teacher.schedule.betas == student.schedule.betas == BETAS
    saved = json.loads((out / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["trained_betas"] == BETAS and "beta_start" not in saved
    dmd.main(["--sample", str(out), *flags[2:4], "--output_dir", str(tmp_path / "samples")])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(trained_betas=BETAS[:500]), ["500 trained_betas", "num_train_timesteps 1000"]),
        (dict(beta_schedule="squaredcos_cap_v2"), ["'squaredcos_cap_v2'", "not supported"]),
        (dict(beta_start="gone"), ["lacks beta_start"]),
    ],
)
def test_betas_that_are_refused(tmp_path, capsys, changes, words):
    flags = save_tiny_pixart(tmp_path / "root", 512)
    change_scheduler(tmp_path / "root", **changes)
    error = refusal_of(capsys, dmd.main, *flags, *QUICK)
    assert all(word in error for word in words)


def test_vp_takes_names_or_as_many_numbers():
    assert torch.equal(VP(BETAS).sqrt_abar, VP(torch.tensor(BETAS, dtype=torch.float64)).sqrt_abar)
    for wrong in (BETAS[:10], "cosine"):
        with pytest.raises(ValueError, match="betas must be"):
            VP(wrong)
    assert VP(BETAS[:10], n=10).n == 10


# ---- clocks --------------------------------------------------------------------------------------


def test_another_number_of_betas_is_counted_or_refused(tmp_path, capsys):
    """PixArt's clock counts the indices of its scheduler, DiT's 1,000; our own see t itself."""
    diffusers = pytest.importorskip("diffusers")
    save_tiny_pixart(tmp_path / "pixart", 512)
    change_scheduler(tmp_path / "pixart", num_train_timesteps=500)
    teacher = load_teacher(str(tmp_path / "pixart"))
    reference = diffusers.PixArtTransformer2DModel.from_pretrained(
        tmp_path / "pixart" / "transformer"
    )
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 4, 6, generator=g), torch.randn(2, 5, 16, generator=g)
    none = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        ours = teacher.net(x, torch.tensor([0.5, 1.0]), text=text, mask=torch.ones(2, 5).bool())
        index = torch.tensor([249.0, 499.0])
        theirs = reference(x, text, index, added_cond_kwargs=none).sample[:, :4]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()

    net = fill(DiTTransformer2DModel(2, 8, 4, 8, num_layers=1, sample_size=8))
    save_network(net, network_config(net), str(tmp_path / "dit" / "transformer"))
    (tmp_path / "dit" / "model_index.json").write_text("{}")
    (tmp_path / "dit" / "scheduler").mkdir()
    scheduler = tmp_path / "dit" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**PIXART_SCHEDULER, "num_train_timesteps": 500}))
    error = refusal_of(capsys, dmd.main, *QUICK, "--teacher", str(tmp_path / "dit"))
    assert "num_train_timesteps" in error and "500" in error and "1000" in error
    save_tiny_vp_teacher(tmp_path / "small")
    change_scheduler(tmp_path / "small", num_train_timesteps=500)
    assert load_teacher(str(tmp_path / "small" / "transformer")).schedule.n == 500


def test_a_shift_that_depends_on_the_size_is_refused(tmp_path, capsys):
    flags = save_tiny_wan(tmp_path / "wan")
    change_scheduler(tmp_path / "wan", use_dynamic_shifting=True)
    error = refusal_of(capsys, dmd.main, *flags, *QUICK)
    assert "use_dynamic_shifting" in error and "set it to false" in error
    change_scheduler(tmp_path / "wan", use_dynamic_shifting=False)  # what it says works
    assert load_teacher(str(tmp_path / "wan")).shift == 3


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_integers_are_no_weights(tmp_path, dtype):
    """A quantised checkpoint under plain names: its numbers would be taken as they are."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    path = tmp_path / "teacher" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(k for k, v in tensors.items() if v.dim() == 2)
    save_file({**tensors, name: (100 * tensors[name]).to(dtype)}, path)
    with pytest.raises(UserError, match=f"{name}.*integers.*quantised"):
        load_network(teacher)


# ---- names of worlds -----------------------------------------------------------------------------


def test_a_folder_that_is_called_like_a_world(monkeypatch, tmp_path, capsys):
    """The bare name is refused where somebody gives it, ./NAME is the folder, defaults stay."""
    monkeypatch.chdir(tmp_path)
    save_tiny_teacher(tmp_path / "glyphs")
    for i in range(4):
        (tmp_path / "shapes" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "shapes" / str(i % 2) / f"{i}.png")
    assert {"glyphs", "shapes"} <= set(WORLDS)
    error = refusal_of(capsys, dmd.main, *QUICK, "--teacher", "glyphs")
    assert "embedded world" in error and "./glyphs" in error
    error = refusal_of(capsys, latent_fm.main, "--data", "shapes")
    assert "./shapes" in error
    error = refusal_of(capsys, dmd.main, "--gan_weight", "1", "--data", "shapes")
    assert "./shapes" in error
    args = dmd.parse_args(["--teacher", "./glyphs"])
    assert load_teacher(args.teacher).shape == () and load_teacher(args.teacher).world is None
    assert dmd.parse_args([]).teacher == "glyphs"  # nobody named it: the world
    args = latent_fm.parse_args(["--data", "./shapes", "--resolution", "8"])
    assert len(latent_fm.load_training_data(args, None).x) == 4
    assert latent_fm.parse_args([]).data == "shapes"
    (tmp_path / "glyphs").rename(tmp_path / "other")  # the other remedy
    assert dmd.parse_args(["--teacher", "glyphs"]).timestep_shift == 2


@pytest.mark.parametrize("latent", [True, False])
def test_data_of_a_world_are_as_its_teacher_has_them(latent):
    """Of a latent teacher latents: phased_dmd.py's distances, a GAN's real samples."""
    world = load_world("shapes")
    x0 = world.data(4, 1)[0]
    shape = world.latent_shape if latent else world.shape
    want = world.space.to_latents(x0) if latent else x0
    assert torch.equal(in_space_of(world, shape, x0), want) and tuple(want.shape[1:]) == shape


def test_a_student_keeps_its_teacher_s_autoencoder(tmp_path):
    """Of every script: without it samples could not be decoded."""
    space = load_world("shapes").space
    (tmp_path / "teacher" / "student").mkdir(parents=True)
    space.save(str(tmp_path / "teacher" / "autoencoder"))
    like = SimpleNamespace(folder=str(tmp_path / "teacher" / "student"))
    report.save_autoencoder(SimpleNamespace(folder=str(tmp_path / "run")), like)
    assert space_beside(str(tmp_path / "run" / "student")).digest() == space.digest()


# ---- guidance that has nothing to guide by -------------------------------------------------------


def saved_dit(folder, classes, dropout):
    """A tiny DiT, as latent_fm.py leaves it. dropout: --label_dropout of its training."""
    net = DiT(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=2, num_classes=classes)
    save_network(net, network_config(net), str(folder))
    about = dict(method="latent_fm", prediction="flow_v", schedule={"type": "flow"}, rule="heun")
    about |= dict(times=[1.0], timestep_shift=1.0, label_dropout=dropout)
    save_json(about, str(folder / "sampler.json"))
    return str(folder)


@pytest.mark.parametrize("dry", [[], ["--dry_run", "2"]], ids=["run", "plan"])
@pytest.mark.parametrize(
    "classes, dropout, why",
    [(3, 0.1, None), (0, 0.1, "has no classes"), (3, 0.0, "was trained with every label")],
)
def test_guidance_by_nothing_is_refused(tmp_path, capsys, classes, dropout, why, dry):
    """Of a teacher without classes, and of one whose null label was never trained."""
    teacher = saved_dit(tmp_path / "teacher", classes, dropout)
    flags = [*QUICK, *dry, "--teacher", teacher, "--output_dir", str(tmp_path / "run")]
    if why:
        says = refusal_of(capsys, dmd.main, *flags, "--guidance_scale", "2")
        assert f"--guidance_scale 2: the teacher {why}" in says and says.endswith("_scale 1\n")
    dmd.main([*flags, "--guidance_scale", "1" if why else "2"])


def test_released_unets_without_a_null_label():
    """ADM's and EDM's; LFM's dropped labels."""
    for convention, refused in (("adm", True), ("edm", True), ("lfm", False)):
        net = SimpleNamespace(cond_names=["label"], num_classes=3)
        teacher = SimpleNamespace(base=net, config={"convention": convention}, folder=None)
        args = SimpleNamespace(guidance_scale=2.0)
        if refused:
            with pytest.raises(UserError, match="trained with every label"):
                refuse_empty_guidance(teacher, args)
        else:
            refuse_empty_guidance(teacher, args)
