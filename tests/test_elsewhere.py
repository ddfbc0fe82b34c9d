"""docs/elsewhere.md: students sampled by diffusers, with the scheduler that is saved beside them.

Every Python block of the page runs here, on tiny pipelines with random networks, and must give what
our own sampler gives from the same noise.
"""

import json
import re
import warnings

import pytest
import torch
from helpers import ROOT, fill, relative
from pipelines import CONFIGS, FAMILIES, encoded, image_vae
from released import MODELS
from safetensors.torch import load_file, save_file

import dmd
import phased_dmd
from models.diffusion import VP, Diffusion, Flow, step_grid
from models.draws import Draws
from models.networks import load_network, lora
from models.networks.dit import DiT
from models.plumbing import report
from models.plumbing.run import Run
from models.plumbing.teachers import load_teacher, read_sampler, scheduler_config

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PROMPT = "a cat runs"
TINY_DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
)
CLASSES = {  # of the page's blocks, in its order
    "wan": "WanPipeline",
    "z_image": "ZImagePipeline",
    "qwen_image": "QwenImagePipeline",
    "lumina2": "Lumina2Pipeline",
    "sd15": "StableDiffusionPipeline",
    "pixart": "PixArtAlphaPipeline",
    "dit": "DiTPipeline",
    "cogvideox": "CogVideoXPipeline",
    "experts": "WanPipeline",
}
SAME_BLOCK = {"sdxl": "sd15"}
CLASSES_OF = {**CLASSES, "sdxl": "StableDiffusionXLPipeline"}
SHAPES = {"wan": (16, 2, 4, 6), "z_image": (4, 4, 6), "pixart": (4, 8, 8), "dit": (4, 8, 8)}
SHAPES |= {"cogvideox": (4, 2, 4, 6), "qwen_image": (4, 4, 6), "lumina2": (4, 4, 6)}
SHAPES |= {"sd15": (4, 8, 8), "sdxl": (4, 8, 8)}
VP_FAMILIES = ("pixart", "dit", "cogvideox", "sd15", "sdxl")  # whose times have no shift
SIZES = {  # in pixels, as arguments of the pipelines
    "wan": dict(height=32, width=48, num_frames=5),
    "z_image": dict(height=8, width=12),
    "pixart": dict(height=16, width=16, use_resolution_binning=False),
    "dit": {},
    "cogvideox": dict(height=32, width=48, num_frames=5),
    "qwen_image": dict(height=32, width=48),
    "lumina2": dict(height=32, width=48),
    "sd15": dict(height=16, width=16),
    "sdxl": dict(height=16, width=16),
}
STUDENT = "--max_train_steps 1 --fake_update_ratio 1 --teacher_steps 0 --preview_samples 2"


def blocks():
    page = (ROOT / "docs" / "elsewhere.md").read_text()
    found = dict(zip(CLASSES, re.findall(r"```python\n(.*?)```", page, re.S), strict=True))
    return {**found, **{name: found[other] for name, other in SAME_BLOCK.items()}}


def pipeline(family):
    """A pipeline of tiny random networks."""
    torch.manual_seed(0)
    if family == "dit":
        net = random_network(diffusers.DiTTransformer2DModel(**TINY_DIT))
        first, *others = (block.norm1.emb for block in net.transformer_blocks)
        for other in others:  # equal in every released checkpoint
            other.load_state_dict(first.state_dict())
        return diffusers.DiTPipeline(net, image_vae(scaling_factor=0.18215), stock("linear"))
    name, config, parts = FAMILIES[family]
    return parts(diffusers, transformers, random_network(getattr(diffusers, name)(**config)))


def random_network(net):
    """Random weights, small enough that four steps do not multiply the rounding of float32.

    diffusers rounds its clock, 1000 t, in places where we do not.
    """
    net = fill(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5 if p.dim() > 1 else 1.0)
    return net


def stock(betas):
    return diffusers.DDIMScheduler(beta_schedule=betas, beta_start=0.0001, beta_end=0.02)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """-> {family: (folder of a saved pipeline, flags of a run that distils it)}."""
    found = {}
    for family in SHAPES:
        root = tmp_path_factory.mktemp(family) / "root"
        pipeline(family).save_pretrained(root)
        flags = ["--teacher", str(root), *STUDENT.split(), "--sample_shape"]
        flags += map(str, SHAPES[family])
        if family != "dit":
            size = dict(resolution=(16, 16)) if family == "sdxl" else {}
            save_file(encoded(root, [PROMPT], **size), root / "prompts.safetensors")
            flags += ["--prompts", str(root / "prompts.safetensors")]
        found[family] = root, flags
    return found


def as_theirs(family, x):
    """Latents (B, C, ..., H, W) as the pipeline of this family has them."""
    if family == "qwen_image":  # packed: patches of 2 x 2 as tokens
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return x.transpose(1, 2) if family == "cogvideox" else x


def as_ours(family, x):
    """Its inverse."""
    if family == "qwen_image":
        C, H, W = SHAPES[family]
        x = x.view(len(x), H // 2, W // 2, C, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), C, H, W)
    return x.transpose(1, 2) if family == "cogvideox" else x


def noise_of(family, rows=1):
    draw = Draws(0, "elsewhere", 0, range(rows))
    return lambda name: draw.normal(name, SHAPES[family])


def condition(family, root):
    if family == "dit":
        return {"label": torch.tensor([207])}
    prompts = load_file(root / "prompts.safetensors")
    return {name[5:]: v for name, v in prompts.items() if name.startswith("cond.")}


def give_noise(monkeypatch, family):
    """Let diffusers draw our noise: z first, then renoise0, renoise1, ..."""
    noise, names = noise_of(family), iter(f"renoise{i}" for i in range(99))

    def fresh(*args, **kwargs):
        return as_theirs(family, noise(next(names)))

    for module in ("flow_match_euler_discrete", "lcm", "ddim"):
        name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
        monkeypatch.setattr(name, fresh)
    return noise("z")


def run_block(monkeypatch, family, code, root, student, **changes):
    """Run a block of the page on these folders -> its final latents, its names.

    changes: replacements in the code, {what: by what}.
    """
    kind = getattr(diffusers, CLASSES_OF[family])
    size = "wan" if family == "experts" else family
    z, call, latents = give_noise(monkeypatch, size), kind.__call__, []
    given = {} if family == "dit" else dict(output_type="latent", **SIZES[size])
    if family != "dit":
        given["latents"] = as_theirs(family, z).clone()
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **k: call(self, *a, **k, **given))
    if family == "dit":  # it takes no latents and gives none
        where = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
        monkeypatch.setattr(where, lambda *args, **kwargs: z.clone())
        decode = diffusers.AutoencoderKL.decode

        def watched(self, x):
            latents.append(x * 0.18215)
            return decode(self, x)

        monkeypatch.setattr(diffusers.AutoencoderKL, "decode", watched)
    names = f"teacher, student = {str(root)!r}, {str(student)!r}"
    code, found = re.subn(r"^teacher, student = .*$", lambda m: names, code, flags=re.M)
    assert found == 1 and "bfloat16" in code
    code = code.replace("torch.bfloat16", "torch.float32")
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    space = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(steps_offset|clip_sample)")
        exec(compile(code, f"docs/elsewhere.md, {family}", "exec"), space)
    monkeypatch.undo()
    out = latents[0][0] if latents else space["out"]
    return as_ours(family, out[None])[0], space


# ---- the pipelines of diffusers ------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sde", "ode"])
@pytest.mark.parametrize("family", SHAPES)
def test_the_page_samples_a_student(monkeypatch, tmp_path, roots, family, rule):
    """With the saved scheduler as our own sampler does; with the teacher's own it does not."""
    root, flags = roots[family]
    out, shift = tmp_path / "run", "1" if family in VP_FAMILIES else "5"
    flags = [*flags, "--student_steps", "4", "--renoise", rule, "--timestep_shift", shift]
    dmd.main([*flags, "--output_dir", str(out), "--learning_rate", "1e-3"])
    student = out / "student"
    sampler, schedule, prediction, _ = read_sampler(student)
    net = load_network(str(student))[0]
    assert sampler["times"] == step_grid(4, float(shift))[:-1]
    with torch.no_grad():
        ours = dmd.sample(
            net,
            Diffusion(schedule, prediction),
            noise_of(family),
            sampler["times"],
            condition(family, root),
            rule,
        )[0]
    code = blocks()[family]
    theirs, space = run_block(monkeypatch, family, code, root, student)
    assert relative(theirs, ours) < 1e-5
    kind = type(space["pipe"].scheduler).__name__
    own = {"sde": "LCMScheduler", "ode": "DDIMScheduler"}[rule]
    vp = family in VP_FAMILIES
    assert kind == (own if vp else "FlowMatchEulerDiscreteScheduler")
    # the teacher's own scheduler, in as many steps
    code = re.sub(r"^pipe.scheduler.set_timesteps = .*\n", "", code, flags=re.M)
    loaded = next(line for line in code.splitlines() if 'subfolder="scheduler"' in line)
    wrong = {loaded: loaded.split(" = ")[0] + " = " + stock_of(family)}
    theirs, _ = run_block(monkeypatch, family, code, root, student, **wrong)
    assert relative(theirs, ours) > 1e-3


# Those of U-Nets are long: test_unet.py loads its LoRA files without a run.
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("sd15", "sdxl")]


@pytest.mark.parametrize(
    "family", [*(name for name in SHAPES if name not in ("sd15", "sdxl")), *LONG]
)
def test_the_page_samples_an_adapter(monkeypatch, tmp_path, roots, family):
    """--lora_rank: the page's lines with the adapter on the teacher sample as --sample does.

    Without the adapter they do not.
    """
    pytest.importorskip("peft")
    root, flags = roots[family]
    out = tmp_path / "run"
    flags = [*flags, "--student_steps", "4", "--renoise", "ode", "--lora_rank", "2"]
    flags += ["--fake_lora_rank", "2", "--learning_rate", "0.2", "--max_train_steps", "2"]
    flags += ["--timestep_shift", "1" if family in VP_FAMILIES else "5"]
    dmd.main([*flags, "--output_dir", str(out)])
    prompts = root / "prompts.safetensors"
    given = ["--prompts", str(prompts)] if prompts.is_file() else []
    args = dmd.parse_args(["--sample", str(out), *given])
    net, sampler, teacher = report.load_student(Run(args, "dmd"))
    at = teacher.diffusion, noise_of(family), sampler["times"], condition(family, root), "ode"
    ours = dmd.sample(net, *at)[0]
    page = (ROOT / "docs" / "elsewhere.md").read_text()
    load, wrap = re.findall(r"`(pipe\.(?:load_lora|transformer = peft).*?)`", page)[:2]
    line = load if (out / "student" / "adapter.safetensors").is_file() else wrap
    code = re.sub(r"^network = .*\n", "", blocks()[family], flags=re.M)
    code = "import peft\n" + re.sub("(transformer|unet)=network, ", "", code)
    code = code.replace("\nout = ", f"\n{line}\nout = ")
    theirs, _ = run_block(monkeypatch, family, code, root, out / "student")
    assert relative(theirs, ours) < 1e-5
    bare, _ = run_block(monkeypatch, family, code.replace(line, ""), root, out / "student")
    assert relative(bare, ours) > 1e-3


def stock_of(family):
    """Code of the scheduler that the teacher's own folder has."""
    kind = {"pixart": "diffusers.DPMSolverMultistepScheduler", "dit": "diffusers.DDIMScheduler"}
    kind |= {"cogvideox": "diffusers.CogVideoXDPMScheduler", "sd15": "diffusers.PNDMScheduler"}
    kind["sdxl"] = "diffusers.EulerDiscreteScheduler"
    kind = kind.get(family, "FlowMatchEulerDiscreteScheduler")
    return f"{kind}.from_pretrained(teacher, subfolder='scheduler')"


def test_experts_of_two_networks(monkeypatch, tmp_path, roots):
    """The page's lines load both LoRA files of a phased student of Wan 2.2 and sample it.

    Without the times, and with the LoRA files exchanged, the samples are others.
    """
    pytest.importorskip("peft")
    made, flags = roots["wan"]
    root, out = tmp_path / "root", tmp_path / "run"
    second = random_network(MODELS["wan"].theirs(**CONFIGS[MODELS["wan"]]))
    pipe = diffusers.WanPipeline.from_pretrained(made)
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(0.9)
    parts = dict(pipe.components, transformer_2=second, boundary_ratio=0.875)
    diffusers.WanPipeline(**parts).save_pretrained(root)
    flags = ["--teacher", str(root), *flags[2:], "--max_train_steps", "2", "--lora_rank", "2"]
    flags += ["--learning_rate", "0.05", "--fake_lora_rank", "2", "--timestep_shift", "5"]
    phased_dmd.main([*flags, "--output_dir", str(out)])
    student = out / "student"
    samples = tmp_path / "samples"
    noise = {}

    def ours(run, shape, first, last):
        noise["z"] = noise_of("wan", last - first)("z")
        return lambda name="z": noise["z"]

    with monkeypatch.context() as patch:
        patch.setattr(phased_dmd.report, "evaluation_noise", ours)
        more = ["--prompts", str(made / "prompts.safetensors"), "--preview_samples", "1"]
        phased_dmd.main(["--sample", str(student), "--output_dir", str(samples), *more])
    want = load_file(samples / "samples.safetensors")["x0"][0]
    code = blocks()["experts"]
    theirs, _ = run_block(monkeypatch, "experts", code, root, student)
    assert relative(theirs, want) < 1e-5
    grid = re.search(r"^pipe.scheduler.set_timesteps = .*\n", code, re.M).group()
    wrong, _ = run_block(monkeypatch, "experts", code, root, student, **{grid: ""})
    assert relative(wrong, want) > 1e-3
    code = code.replace("expert1", "x").replace("expert2", "expert1").replace("/x.", "/expert2.")
    wrong, _ = run_block(monkeypatch, "experts", code, root, student)
    assert relative(wrong, want) > 1e-3


def test_the_door_that_loads_nothing(tmp_path, caplog):
    """load_lora_adapter of a transformer leaves the network as it was; load_lora_weights loads."""
    pytest.importorskip("peft")
    config = CONFIGS[MODELS["wan"]]
    ours = random_network(MODELS["wan"].net(**config))
    lora.add(ours, "expert", 2, 2)
    with torch.no_grad():
        for p in lora.parameters(ours, "expert"):
            p.normal_(generator=torch.Generator().manual_seed(1))
    path = str(tmp_path / "expert1.safetensors")
    lora.save(ours, "expert", path)
    call = MODELS["wan"].inputs(config)
    base = {k: v for k, v in lora.base_state_dict(ours).items()}

    def velocity(load):
        pipe = pipeline("wan")
        pipe.transformer.load_state_dict(base)
        load(pipe)
        with torch.no_grad():
            t = 1000 * call["t"]
            return pipe.transformer(call["x"], t, call["text"], return_dict=False)[0]

    bare = velocity(lambda pipe: None)
    with torch.no_grad():
        want = ours(**call, adapter="expert")
    assert relative(velocity(lambda pipe: pipe.load_lora_weights(path)), want) < 1e-5
    diffusers.utils.logging.enable_propagation()
    nothing = velocity(lambda pipe: pipe.transformer.load_lora_adapter(path))
    diffusers.utils.logging.disable_propagation()
    assert torch.equal(nothing, bare) and "No LoRA keys" in caplog.text


# ---- the scheduler that is saved -----------------------------------------------------------------


def vp_student(times, rule="euler", **changes):
    """A sampler.json of a VP student, as a dict."""
    sampler = dict(times=times, timestep_shift=1.0, rule=rule, prediction="eps")
    return {**sampler, **changes}


@pytest.mark.parametrize("zero_snr, prediction", [(False, "eps"), (False, "x0"), (True, "vp_v")])
@pytest.mark.parametrize("given", [False, True], ids=["named betas", "trained betas"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
@pytest.mark.parametrize("rule", ["euler", "renoise"])
def test_the_scheduler_of_a_vp_student(
    monkeypatch, tmp_path, steps, rule, zero_snr, prediction, given
):
    """Step by step with a function in place of a network: the same states as our sampler's.

    As eps it is divided by alpha = .006 at t = 1, where diffusers has six digits.
    """
    betas = [1e-4 + 2e-5 * i for i in range(1000)] if given else "linear"
    schedule = VP(betas, 1e-4, 2e-2, 1000, zero_snr)
    sampler = vp_student(step_grid(steps)[:-1], rule, prediction=prediction)
    net = MODELS["pixart"].net(**CONFIGS[MODELS["pixart"]])
    config = json.loads(json.dumps(scheduler_config(net, schedule, sampler)))
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    assert [(int(i) + 1) / 1000 for i in scheduler.timesteps] == pytest.approx(sampler["times"])

    def predict(x, t, **cond):
        return torch.sin(3 * x) + 0.3 * x

    noise, how = noise_of("pixart"), "sde" if rule == "renoise" else "ode"
    give_noise(monkeypatch, "pixart")
    diffusion = Diffusion(schedule, prediction)
    ours, x = dmd.sample(predict, diffusion, noise, sampler["times"], {}, how), noise("z")
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    assert relative(x, ours) < (1e-4 if prediction == "eps" else 1e-5)


def test_which_students_get_a_scheduler():
    """None where diffusers has no such pipeline, network or steps."""
    pixart = MODELS["pixart"].net(**CONFIGS[MODELS["pixart"]])
    vp, quarter = VP("linear"), [1.0, 0.25]
    flow = dict(timestep_shift=3.0, rule="euler", prediction="flow_v")
    wan = MODELS["wan"].net(**CONFIGS[MODELS["wan"]])
    assert scheduler_config(wan, Flow(), {**flow, "times": quarter})["shift"] == 1
    assert scheduler_config(wan, Flow(), {**flow, "times": quarter, "prediction": "x0"}) is None
    z_image = MODELS["z_image"].net(**CONFIGS[MODELS["z_image"]])
    for times, shift in ((step_grid(4, 3.0)[:-1], 3), (step_grid(4, 2.0)[:-1], 1), (quarter, 1)):
        config = scheduler_config(z_image, Flow(), {**flow, "times": times})
        assert config["shift"] == shift and config["stochastic_sampling"] is False
    assert scheduler_config(pixart, vp, vp_student(step_grid(4)[:-1]))
    assert scheduler_config(pixart, vp, vp_student(quarter)) is None  # DDIM's steps are even
    assert scheduler_config(pixart, vp, vp_student(step_grid(3)[:-1])) is None
    assert scheduler_config(pixart, vp, vp_student(quarter, "renoise"))  # takes timesteps=[...]
    assert scheduler_config(pixart, vp, vp_student(step_grid(3)[:-1], "renoise")) is None
    assert scheduler_config(pixart, vp, vp_student([1.0], prediction="score")) is None
    small = DiT(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=2, num_classes=3)
    assert scheduler_config(small, Flow(), {**flow, "times": [1.0]}) is None
    linear = MODELS["wan"].net(**CONFIGS[MODELS["wan"]], linear_layers=[0])
    assert scheduler_config(linear, Flow(), {**flow, "times": [1.0]}) is None


def test_sampler_json_stays_the_truth(tmp_path, roots):
    """A student as a teacher is read from sampler.json, also where scheduler/ says less.

    Of a Wan student that has shift 1, because its times are given by hand.
    """
    root, flags = roots["wan"]
    out = tmp_path / "run"
    dmd.main([*flags, "--timestep_shift", "7", "--output_dir", str(out)])
    config = json.loads((out / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert config["shift"] == 1 and config["stochastic_sampling"] is True
    for place in (out, out / "student"):
        assert load_teacher(str(place)).shift == 7
