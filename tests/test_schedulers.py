"""models/plumbing/schedulers.py: every key of a scheduler_config.json is honoured or refused.

Against diffusers, with the files of the released teachers.
"""

import json

import pytest
import torch

from models.files import UserError
from models.plumbing.schedulers import DDIM, EULER, MULTISTEP, read_scheduler, read_spacing
from models.plumbing.teachers import Teacher
from tests.schedulers import SCHEDULERS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
STEPS = (1, 4, 7, 20, 50)
TOKENS = 4096  # of an image of 1024 x 1024
MU = 0.5 + 0.4 * (TOKENS - 256) / (8192 - 256)  # of Qwen-Image


def write(folder, config):
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    return str(folder)


def teacher_of(folder, config):
    """A Teacher that has nothing but this scheduler."""
    where = write(folder, config)
    schedule, prediction, shift = read_scheduler(where, TOKENS)
    how = dict(schedule=schedule, prediction=prediction, shift=shift or 1.0)
    none = dict(net=None, config=None, folder=None, world_name=None, label="")
    terminal = config.get("shift_terminal")
    return Teacher(**how, **none, terminal=terminal, spacing=read_spacing(where))


def grid_of_diffusers(config, steps):
    """The times of the calls, as the family's own pipeline sets them, and that of the sample.

    Of a flow these are the levels; UniPC begins 1e-6 below 1. Other schedulers have indices.
    """
    diffusers = pytest.importorskip("diffusers")
    name = config["_class_name"]
    config = {k: v for k, v in config.items() if k != "lambda_min_clipped"}  # -inf, the default
    scheduler = getattr(diffusers, name).from_config(config)
    if "FlowMatch" in name:
        mu = MU if config["use_dynamic_shifting"] else None
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
        return scheduler.sigmas.tolist()
    scheduler.set_timesteps(steps)
    if config.get("use_flow_sigmas"):
        first, *others = scheduler.sigmas.tolist()
        return [first + 1e-6 * name.startswith("UniPC"), *others]
    table, sigmas = scheduler.alphas_cumprod, getattr(scheduler, "sigmas", None)
    if sigmas is None:  # DDPMScheduler ends without noise
        left = 1 - float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    else:
        left = float(sigmas[-1] ** 2 / (1 + sigmas[-1] ** 2))
    assert left == pytest.approx(0, abs=1e-9) or left == pytest.approx(float(1 - table[0]))
    indices = dict.fromkeys(scheduler.timesteps.tolist())  # some make two calls at one of them
    return [(i + 1) / len(table) for i in indices] + [1 / len(table) if left > 1e-9 else 0.0]


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "PixArt-LCM"])
def test_grids_of_releases_are_diffusers(tmp_path, name):
    """Those of teachers' own many-step samples; shift_terminal is for two steps and more."""
    teacher = teacher_of(tmp_path, SCHEDULERS[name])
    for steps in STEPS:
        want = grid_of_diffusers(SCHEDULERS[name], steps)
        if steps == 1 and teacher.terminal:
            want = [1.0, 0.0]
        assert len(want) == steps + 1 and teacher.grid(steps) == pytest.approx(want, abs=1e-6)
    even = teacher_of(tmp_path, {**SCHEDULERS["Lumina-Image 2.0"], "shift": teacher.shift})
    differs = any(teacher.grid(n) != pytest.approx(even.grid(n), abs=1e-6) for n in STEPS)
    assert differs == (name not in ("Lumina-Image 2.0", "Z-Image", "Z-Image-Turbo"))


BETAS = dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)


@pytest.mark.parametrize("name", [*DDIM, *EULER, *MULTISTEP])
@pytest.mark.parametrize("kind", ["leading", "linspace", "trailing", None])
def test_keys_of_the_grid(tmp_path, name, kind):
    """timestep_spacing, steps_offset, set_alpha_to_one and final_sigmas_type, or a class's own."""
    config = dict(BETAS, _class_name=name)
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    if kind:
        config["timestep_spacing"] = kind
    ends = [("set_alpha_to_one", True), ("set_alpha_to_one", False)]
    if name not in DDIM:
        ends = [("final_sigmas_type", "zero"), ("final_sigmas_type", "sigma_min")]
    if name.startswith(("DDPM", "DEIS", "Heun", "EulerAncestral")):
        ends = []  # they have no such key
    for change in [{}, {"steps_offset": 1}, *({key: value} for key, value in ends)]:
        whole = {**config, **change}
        teacher = teacher_of(tmp_path, whole)
        for steps in STEPS:
            if name == "PNDMScheduler" and steps == 1:
                continue  # which fails there
            want = grid_of_diffusers(whole, steps)
            assert teacher.grid(steps) == pytest.approx(want, abs=1e-6), (change, steps)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flows_of_multistep_classes(tmp_path, name):
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    config = dict(BETAS, _class_name=name, **flow)
    teacher = teacher_of(tmp_path, config)
    assert (teacher.prediction, teacher.shift) == ("flow_v", 5.0)
    for steps in STEPS:
        want = grid_of_diffusers(config, steps)
        assert teacher.grid(steps) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "CogVideoXDDIMScheduler"])
def test_where_a_step_of_ddim_ends(tmp_path, name):
    """At the next call where steps divide n; elsewhere within an index of it, which ours is at."""
    config = dict(BETAS, _class_name=name, timestep_spacing="trailing", clip_sample=False)
    teacher = teacher_of(tmp_path, config)
    for steps in STEPS[1:]:
        scheduler = getattr(pytest.importorskip("diffusers"), name).from_config(config)
        scheduler.set_timesteps(steps)
        sigma = (1 - scheduler.alphas_cumprod) ** 0.5
        for k, index in enumerate(scheduler.timesteps.tolist()[:-1]):
            x = scheduler.step(torch.ones(1), index, sigma[index].reshape(1)).prev_sample
            end = int((sigma - x).abs().argmin())  # of x0 = 0 and eps = 1 only sigma is left
            ours = round(1000 * teacher.grid(steps)[k + 1]) - 1
            assert abs(end - ours) <= (1000 % steps > 0)


def test_more_steps_than_indices_are_even(tmp_path):
    for name in ("Stable Diffusion 1.5", "SDXL base 1.0", "PixArt-alpha 512", "CogVideoX-2B"):
        for steps in (1000, 1500):
            grid = teacher_of(tmp_path, SCHEDULERS[name]).grid(steps)
            assert len(grid) == steps + 1 and all(a > b for a, b in zip(grid, grid[1:]))


STABLE, QWEN = SCHEDULERS["Stable Diffusion 1.5"], SCHEDULERS["Qwen-Image"]
WAN, PIXART = SCHEDULERS["Wan 2.1 T2V 1.3B"], SCHEDULERS["PixArt-alpha 512"]


@pytest.mark.parametrize(
    "config, change, says, remedy",
    [
        (STABLE, dict(use_karras_sigmas=True), "use_karras_sigmas is", False),
        (STABLE, dict(use_beta_sigmas=True), "use_beta_sigmas is", False),
        (STABLE, dict(use_exponential_sigmas=True), "use_exponential_sigmas is", False),
        (STABLE, dict(thresholding=True), "thresholding is", False),
        (STABLE, dict(timestep_spacing="karras"), "timestep_spacing 'karras' is", "leading"),
        (STABLE, dict(interpolation_type="log_linear"), "interpolation_type 'log_", "linear"),
        (STABLE, dict(timestep_type="continuous"), "timestep_type 'continuous' is", "discrete"),
        (PIXART, dict(lambda_min_clipped=-5.1), "lambda_min_clipped -5.1 is", float("-inf")),
        (PIXART, dict(use_lu_lambdas=True), "use_lu_lambdas is", False),
        (QWEN, dict(use_karras_sigmas=True), "use_karras_sigmas is", False),
        (QWEN, dict(invert_sigmas=True), "invert_sigmas is", False),
        (QWEN, dict(stochastic_sampling=True), "stochastic_sampling is", False),
        (QWEN, dict(time_shift_type="cubic"), "time_shift_type 'cubic' is", "exponential"),
        (QWEN, dict(num_train_timesteps=500), "num_train_timesteps 500 is", 1000),
        (WAN, dict(final_sigmas_type="sigma_min"), "final_sigmas_type 'sigma_min' is", "zero"),
        (WAN, dict(prediction_type="epsilon"), "prediction_type 'epsilon' is", "flow_prediction"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(tmp_path, config, change, says, remedy):
    """And what the message says helps."""
    key = next(iter(change))
    with pytest.raises(UserError, match=f"{says}.*: set it to ") as error:
        read_scheduler(write(tmp_path, {**config, **change}), TOKENS)
    told, message = str(remedy).lower() if remedy is False else str(remedy), str(error.value)
    told = "-Infinity" if remedy == float("-inf") else told
    assert told in message and "\n" not in message and message.endswith("scheduler_config.json")
    read_scheduler(write(tmp_path, {**config, key: remedy}), TOKENS)
    read_scheduler(write(tmp_path, {**config, key: None}), TOKENS)


@pytest.mark.parametrize("offset", [-1, 1000, 0.5, "1"])
def test_offsets_that_leave_the_table_are_refused(tmp_path, offset):
    """-1 would be a call at t = 0, where an x0-network's noise is 0 / 0."""
    with pytest.raises(UserError, match="steps_offset"):
        read_spacing(write(tmp_path, {**STABLE, "steps_offset": offset}))
    assert read_spacing(write(tmp_path, {**STABLE, "steps_offset": 999})).offset == 999
