"""scheduler/scheduler_config.json of diffusers: how a teacher was trained, how its samples step.

Every key that changes either is honoured here or refused by name. Four things differ from diffusers
on purpose. Its classes take many kinds of step, ours is one of two (`diffusion.sample_ode`), from
the same time to the next. DDIM and CogVideoX's classes step back by n // steps indices even where
the next call is at another index, off by one where steps do not divide n; here a step ends where
the next one begins. UniPC shows a flow's network its time rounded down to a whole index. And
clip_sample is of pixels: latents are not clipped, as in Stable Diffusion's pipeline.
"""

import contextlib
import math
import os
from dataclasses import dataclass

import torch

from models.diffusion import VP, Flow
from models.files import UserError, load_json

PREDICTION_TYPES = {"eps": "epsilon", "vp_v": "v_prediction", "x0": "sample"}

# How a class lays its steps: the rule, and what it takes where the file leaves out timestep_spacing
# and set_alpha_to_one. Samples of classes that are not named have even steps.
DDIM = {
    "DDIMScheduler": True,
    "DDPMScheduler": True,
    "PNDMScheduler": False,
    "CogVideoXDDIMScheduler": True,
    "CogVideoXDPMScheduler": True,
}
EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")

# Keys that change the levels or the rule of samples, and the one value that they may have.
ONLY = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "thresholding": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}
OF_FLOWS = {"final_sigmas_type": "zero", "num_train_timesteps": 1000}  # flows' networks count 1000


# ---- the steps of samples ------------------------------------------------------------------------


@dataclass(frozen=True)
class Spacing:
    """How a scheduler lays the steps of its samples (Lin 2305.08891, Table 2).

    rule    "ddim", "euler" or "multistep", which lays one step more and leaves out the last
    kind    "leading", "linspace", "trailing"; "flow": of UniPC, whose last step would end at 1 / n;
            "flow end": of the other multistep classes, which begin at 1 - 1 / n
    n       number of betas; index i is the time (i + 1) / n
    offset  what is added to leading indices (steps_offset)
    end     time of the sample: 0, or 1 / n (set_alpha_to_one false, final_sigmas_type sigma_min)
    """

    rule: str
    kind: str
    n: int
    offset: int = 0
    end: float = 0.0

    def indices(self, steps):
        """The indices of a sample's calls, from noise on, fractions among them."""
        n, count = self.n, steps + (self.rule == "multistep")
        if self.kind == "trailing":
            return [round(n - i * n / steps) - 1 for i in range(steps)]
        if self.kind == "leading":
            return [i * (n // count) + self.offset for i in range(count)][::-1][:steps]
        spread = [i * (n - 1) / max(count - 1, 1) for i in range(count)][::-1][:steps]
        return spread if self.rule == "euler" else [round(i) for i in spread]

    def times(self, steps):
        """Descending times of so many steps, before the shift; even ones where so many do not fit.

        -> list of steps + 1 floats, the last of which is `end`.
        """
        even = [1 - i / steps for i in range(steps + 1)]
        if self.kind == "flow":
            return [1 - (1 - u) * (1 - 1 / self.n) for u in even[:-1]] + [0.0]
        if self.kind == "flow end":
            return [u * (1 - 1 / self.n) for u in even]
        indices = self.indices(steps)
        descend = all(a > b for a, b in zip(indices, indices[1:]))
        if not descend or indices[0] > self.n - 1:
            return even
        return [(i + 1) / self.n for i in indices] + [self.end]


def read_spacing(folder):
    """A scheduler/ folder -> its Spacing, or None where samples have even steps from t = 1."""
    with blamed(folder):
        return spacing_of(load_json(os.path.join(folder, "scheduler_config.json")))


def spacing_of(c):
    """The same, of the dict of a scheduler_config.json, which may be damaged."""
    name, n = c.get("_class_name", ""), number_of_steps(c)
    if is_flow(c):
        kind = "flow" if name.startswith("UniPC") else "flow end"
        return Spacing("multistep", kind, n) if c.get("use_flow_sigmas") else None
    to_zero = c.get("final_sigmas_type") != "sigma_min"
    if name in DDIM:
        rule, kind, to_zero = "ddim", "leading", c.get("set_alpha_to_one", DDIM[name])
    elif name in EULER or name in MULTISTEP:
        rule, kind = "euler" if name in EULER else "multistep", "linspace"
        to_zero = to_zero and not name.startswith("DEIS")  # which has no such key
    else:
        return None
    end = 0.0 if to_zero else 1 / n
    offset = c.get("steps_offset") or 0
    if not is_number(offset, -1, n - 1, (int,)):
        raise ValueError(f"steps_offset {offset!r}")
    return Spacing(rule, c.get("timestep_spacing") or kind, n, offset, end)


def number_of_steps(c):
    """num_train_timesteps. Raises ValueError for what is no number of steps."""
    n = c.get("num_train_timesteps", 1000)
    if not is_number(n, 0, MOST_STEPS, (int,)):
        raise ValueError(f"num_train_timesteps {n!r}")
    return n


# ---- the whole file ------------------------------------------------------------------------------


def dynamic_shift(c, tokens):
    """The shift that a scheduler with use_dynamic_shifting has for an image of so many tokens.

    c: its scheduler_config.json. mu is linear in the number of tokens. Exponential time shifting
    has the shift exp(mu), linear time shifting mu itself.
    """
    few, many = c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096)
    low, high = c.get("base_shift", 0.5), c.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return mu if c.get("time_shift_type") == "linear" else math.exp(mu)


def is_flow(c):
    """Whether a scheduler_config.json is a flow's."""
    named = "FlowMatch" in c.get("_class_name", "") or c.get("use_flow_sigmas")
    return bool(named) or c.get("prediction_type") == "flow_prediction"


def read_scheduler(folder, tokens=None):
    """A scheduler/ folder -> (schedule, prediction, shift or None); raises UserError.

    tokens: of an image, for a shift that depends on their number.
    """
    c = load_json(os.path.join(folder, "scheduler_config.json"))
    with blamed(folder):
        schedule, prediction, shift = schedule_of(c, folder, tokens)
        check_schedule(schedule)
        if shift is not None and not is_number(shift, 0, 1e6):
            raise ValueError(f"shift {shift}")
        if c.get("shift_terminal") and not is_number(c["shift_terminal"], 0, 1):
            raise ValueError(f"shift_terminal {c['shift_terminal']!r}")
    return schedule, prediction, shift


MOST_STEPS = 100_000  # of a schedule or a sampler: more are a damaged file


def is_number(value, low, high, kinds=(int, float)):
    """Whether an entry of a JSON file is a number above low, at most high. NaN never is."""
    return type(value) in kinds and low < value <= high


def check_schedule(schedule):
    """Raises ValueError for betas with which no noise can be added."""
    alpha = schedule.alpha(torch.linspace(0, 1, 11))
    if not alpha.isfinite().all() or (alpha.diff() > 0).any():
        raise ValueError(f"betas from {schedule.beta_start} to {schedule.beta_end}")


@contextlib.contextmanager
def blamed(folder):
    """Errors inside are those of a damaged scheduler_config.json."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as e:
        raise UserError(
            f"{folder}: scheduler_config.json has an entry that no scheduler has ({e}): restore it "
            "from the source of the checkpoint"
        ) from None


def schedule_of(c, folder, tokens):
    """What read_scheduler gives, of the dict of a scheduler_config.json, which may be damaged."""
    for key, value, remedy in unsupported(c):
        what = key if value is True else f"{key} {value!r}"
        raise UserError(
            f"{folder}: {what} is not supported: set it to {remedy} in scheduler_config.json"
        )
    if not is_flow(c):
        return (*read_betas(folder, c), None)
    if not c.get("use_dynamic_shifting"):
        return Flow(), "flow_v", float(c.get("shift") or c.get("flow_shift") or 1.0)
    if not tokens:
        raise UserError(
            f"{folder}: use_dynamic_shifting lets the shift depend on the size of the image: "
            "set it to false there, and shift to the one of your size"
        )
    return Flow(), "flow_v", dynamic_shift(c, tokens)


def unsupported(c):
    """Keys of a scheduler_config.json that are not honoured: (key, its value, what to set it to).

    A key that is null has its default.
    """
    only = {**ONLY, **(OF_FLOWS if is_flow(c) else {})}
    for key, value in only.items():
        if c.get(key) is not None and c[key] != value:
            yield key, c[key], json_of(value)
    kinds = ("leading", "linspace", "trailing")
    if c.get("timestep_spacing") not in (None, *kinds):
        yield "timestep_spacing", c["timestep_spacing"], ", ".join(kinds[:2]) + " or trailing"
    if c.get("time_shift_type") not in (None, "exponential", "linear"):
        yield "time_shift_type", c["time_shift_type"], "exponential or linear"
    if c.get("lambda_min_clipped") not in (None, float("-inf")):
        yield "lambda_min_clipped", c["lambda_min_clipped"], "-Infinity"
    if is_flow(c) and c.get("prediction_type") not in (None, "flow_prediction"):
        yield "prediction_type", c["prediction_type"], "flow_prediction"


def json_of(value):
    """A value as a JSON file has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_betas(folder, c):
    """The schedule and the prediction of a VP scheduler. Raises UserError."""
    kinds = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    prediction = kinds.get(c.get("prediction_type", "epsilon"))
    betas, n = c.get("trained_betas") or c.get("beta_schedule"), number_of_steps(c)
    trained = isinstance(betas, list)
    if prediction is None or not (trained or betas in ("linear", "scaled_linear")):
        raise UserError(
            f"{folder}: prediction_type {c.get('prediction_type')!r} with beta_schedule {betas!r} "
            "is not supported (linear or scaled_linear; epsilon, v_prediction or sample; or a "
            "flow scheduler)"
        )
    if trained and len(betas) != n:
        raise UserError(
            f"{folder}: scheduler_config.json has {len(betas)} trained_betas and "
            f"num_train_timesteps {n}: restore it from the source of the checkpoint"
        )
    if not trained and not {"beta_start", "beta_end"} <= set(c):
        raise UserError(
            f"{folder}: scheduler_config.json lacks beta_start or beta_end: restore it from the "
            "source of the checkpoint"
        )
    zero_snr = bool(c.get("rescale_betas_zero_snr"))
    if zero_snr and prediction == "eps":
        raise UserError(
            f"{folder}: an eps network says nothing about x0 at zero terminal SNR: "
            "use v_prediction or sample"
        )
    ends = c.get("beta_start"), c.get("beta_end")
    # Only CogVideoX's schedulers have this key, and 3 where it is left out.
    is_shifted = c.get("_class_name", "").startswith("CogVideoX")
    snr_shift = float(c.get("snr_shift_scale", 3.0)) if is_shifted else 1.0
    return VP(betas, *ends, n, zero_snr, snr_shift), prediction
