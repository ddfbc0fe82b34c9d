"""Noise schedules, the five things a network may predict, and the ODE that samples from one.

One convention holds throughout: x_t = alpha(t) x0 + sigma(t) eps, where t = 0 is data and t = 1 is
noise. A flow model has alpha = 1 - t and sigma = t. A variance-preserving (VP) model has
alpha^2 + sigma^2 = 1 and takes alpha from a table of betas. All functions are pure, work on any
shape (B, ...) with t of shape (B,), and need only torch.

    symbol          meaning                                          shape
    x0              clean sample                                     (B, ...)
    eps             standard normal noise                            (B, ...)
    x_t             noised sample                                    (B, ...)
    t               time in [0, 1], after the shift                  (B,)
    u               raw time in [0, 1], before the shift             (B,)
    "flow_v"        eps - x0                                         Lipman 2210.02747, Wan, SD3
    "vp_v"          alpha eps - sigma x0                             Salimans & Ho 2202.00512
    "score"         grad log p_t(x_t) = -eps_hat / sigma             Song 2011.13456
"""

import math

import torch
import torch.nn.functional as F

PREDICTIONS = ("x0", "eps", "flow_v", "vp_v", "score")


def expand(t, x):
    """View t (B,) as (B, 1, ..., 1) so that it broadcasts against x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.dim() - t.dim()))


def advance_rows(x, chosen, cond, step):
    """A network's step of some rows of a batch; the others stay.  x (B, ...) -> (B, ...)

    chosen (B,) bool, on the CPU. step(x, cond, rows) is given those rows of x and cond, and their
    numbers (n,), on the CPU. If none is chosen it steps one row and drops the result, since all
    ranks of a network that is shared out have to make the same calls.
    """
    rows = chosen.nonzero()[:, 0]
    used = len(rows)
    if used == len(x):
        return step(x, cond, rows)
    rows = rows if used else rows.new_zeros(1)
    here = rows.to(x.device)
    after = step(x[here], {name: v[here] for name, v in cond.items()}, rows)
    return x.index_copy(0, here[:used], after[:used])


# ---- schedules -----------------------------------------------------------------------------------


class Flow:
    """Rectified flow: alpha = 1 - t, sigma = t, for t of any shape."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def describe(self):
        """The schedule in words."""
        return "flow (alpha = 1 - t, sigma = t)"


class VP:
    """Variance-preserving diffusion with a table of betas (DDPM 2006.11239, Stable Diffusion).

    betas:    "linear" (DDPM, PixArt), "scaled_linear" (linear in sqrt(beta), Stable Diffusion), or
              the n betas themselves, which need no ends; something else raises ValueError.
    snr_shift: divide alpha^2 / sigma^2 by this number, before zero_snr (CogVideoX 2408.06072, where
              it is 3: a video's many frames need more noise).
    zero_snr: rescale so that alpha(1) is exactly 0 (Lin 2305.08891, Alg. 1).

    Index i of the table's n entries is t = (i + 1) / n, so the indices 999, 749, 499 and 249 of
    1000 are t = 1, .75, .5 and .25, and t = 0 is exactly clean. Between indices the log-SNR is
    interpolated linearly. It is infinite at two places: below index 0, where sigma^2 grows linearly
    from 0 instead, and in the last interval with zero_snr, where alpha falls linearly to 0 instead.
    """

    def __init__(
        self,
        betas="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        n=1000,
        zero_snr=False,
        snr_shift=1.0,
    ):
        if betas == "linear":
            beta = torch.linspace(beta_start, beta_end, n, dtype=torch.float64)
        elif betas == "scaled_linear":
            beta = torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2
        elif not isinstance(betas, str) and len(betas) == n:
            betas = [float(b) for b in betas]
            beta = torch.tensor(betas, dtype=torch.float64)
        else:
            what = repr(betas) if isinstance(betas, str) else f"{len(betas)} numbers"
            raise ValueError(f"betas must be 'linear', 'scaled_linear' or {n} numbers, got {what}")
        if not snr_shift > 0:
            raise ValueError(f"snr_shift must be above 0, got {snr_shift}")
        self.betas, self.n, self.zero_snr, self.snr_shift = betas, n, zero_snr, snr_shift
        self.beta_start, self.beta_end = beta_start, beta_end
        abar = torch.cumprod(1 - beta, 0)
        if snr_shift != 1:
            abar = abar / (abar + snr_shift * (1 - abar))
        sqrt_abar = abar.sqrt()
        if zero_snr:  # keep alpha at index 0, move the last index to exactly 0
            sqrt_abar = (sqrt_abar - sqrt_abar[-1]) * sqrt_abar[0] / (sqrt_abar[0] - sqrt_abar[-1])
        self.sqrt_abar = sqrt_abar  # (n,) alpha at t = 1/n, 2/n, ..., 1

    def alpha(self, t):
        """alpha(t) for t (any shape) in [0, 1], same dtype and device as t."""
        table = self.sqrt_abar.to(t.device)
        i = (t.double() * self.n - 1).clamp(-1, self.n - 1)  # fractional index; -1 is t = 0
        lo = i.floor().clamp(0, self.n - 2).long()
        w = (i - lo).clamp(0, 1)
        a_lo, a_hi = table[lo], table[lo + 1]

        def log_snr(a):
            return torch.log(a**2 / (1 - a**2))

        # alpha^2 = sigmoid(log-SNR); the last interval may have zero terminal SNR
        alpha = torch.sigmoid(log_snr(a_lo) * (1 - w) + log_snr(a_hi) * w).sqrt()
        alpha = torch.where(a_hi == 0, a_lo * (1 - w), alpha)
        # sigma^2 is linear in t on [0, 1/n]
        clean_end = (1 - (1 - table[0] ** 2) * (i + 1).clamp(0, 1)).sqrt()
        return torch.where(i < 0, clean_end, alpha).to(t.dtype)

    def sigma(self, t):
        """sigma(t) = sqrt(1 - alpha^2), in float64 because alpha is close to 1 near t = 0."""
        return (1 - self.alpha(t.double()) ** 2).clamp_min(0).sqrt().to(t.dtype)

    def describe(self):
        """The schedule in words."""
        ending = f", SNR / {self.snr_shift:g}" if self.snr_shift != 1 else ""
        ending += ", zero terminal SNR" if self.zero_snr else ""
        kind = self.betas if isinstance(self.betas, str) else "given"
        return f"VP ({kind} betas, {self.n} steps{ending})"

    def in_diffusers(self):
        """The table as entries of a scheduler_config.json.

        Few classes of diffusers know a shifted SNR; the betas that it amounts to suit them all.
        """
        if self.snr_shift != 1:
            abar = self.sqrt_abar**2
            betas = 1 - abar / torch.cat([torch.ones(1).double(), abar[:-1]])
            betas = {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
            return {"num_train_timesteps": self.n, **betas}
        table = {"num_train_timesteps": self.n, "rescale_betas_zero_snr": self.zero_snr}
        if isinstance(self.betas, list):
            return {**table, "trained_betas": self.betas}
        ends = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        return {**table, "beta_schedule": self.betas, **ends}


def add_noise(schedule, x0, eps, t):
    """x_t = alpha(t) x0 + sigma(t) eps.  x0, eps (B, ...), t (B,) -> (B, ...)."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def transition(schedule, s, t):
    """Coefficients of x_t given x_s for s <= t: x_t = a x_s + b eps.  s, t (B,) -> a, b (B,).

    a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2. Noising x0 to s and then from s to t
    gives the same distribution as noising it to t directly.
    """
    # s = t = 1 would give 0 / 0 where alpha(1) = 0
    a = torch.where(s == t, torch.ones_like(t), schedule.alpha(t) / schedule.alpha(s))
    return a, (schedule.sigma(t) ** 2 - a**2 * schedule.sigma(s) ** 2).clamp_min(0).sqrt()


def noise_on(schedule, x_s, eps, s, t):
    """Carry a sample at level s on to level t >= s: x_t = alpha_{t|s} x_s + sigma_{t|s} eps.

    x_s, eps (B, ...), s, t (B,) -> (B, ...).
    """
    a, b = transition(schedule, s, t)
    return expand(a, x_s) * x_s + expand(b, x_s) * eps


# ---- what a network predicts ---------------------------------------------------------------------


def to_x0_eps(prediction, kind, x_t, alpha, sigma):
    """Read a prediction as (x0, eps), the pair with x_t = alpha x0 + sigma eps, both (B, ...).

    prediction, x_t: (B, ...); alpha, sigma: (B,); kind: one of PREDICTIONS, else ValueError.
    "x0" needs sigma > 0. "eps" and "score" need alpha > 0, since at alpha = 0 such a network says
    nothing about x0. The two velocities work everywhere.
    """
    a, s = expand(alpha, x_t), expand(sigma, x_t)
    if kind == "x0":
        return prediction, (x_t - a * prediction) / s
    if kind == "eps":
        return (x_t - s * prediction) / a, prediction
    if kind == "score":
        return (x_t + s**2 * prediction) / a, -s * prediction
    if kind == "flow_v":  # v = eps - x0  =>  x_t = (a + s) x0 + s v
        return (x_t - s * prediction) / (a + s), (x_t + a * prediction) / (a + s)
    if kind == "vp_v":  # v = a eps - s x0
        square = a**2 + s**2
        return (a * x_t - s * prediction) / square, (s * x_t + a * prediction) / square
    raise ValueError(f"prediction must be one of {PREDICTIONS}, got {kind!r}")


def from_x0_eps(kind, x0, eps, alpha, sigma):
    """The inverse of to_x0_eps: what a network of this kind should output, its regression target.

    x0, eps: (B, ...); alpha, sigma: (B,) -> (B, ...). Raises ValueError for an unknown kind.
    """
    a, s = expand(alpha, x0), expand(sigma, x0)
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    if kind == "score":
        return -eps / s
    if kind == "flow_v":
        return eps - x0
    if kind == "vp_v":
        return a * eps - s * x0
    raise ValueError(f"prediction must be one of {PREDICTIONS}, got {kind!r}")


def predict_x0(net, schedule, kind, x_t, t, **cond):
    """Run net(x_t, t, **cond) and read its output as x0.

    x_t (B, ...), t (B,) -> (B, ...) in the wider dtype of the two: float32, if t is, also of x_t in
    bfloat16. A network whose weights are in bfloat16 is called under autocast, or casts its input.
    """
    return predict_x0_eps(net, schedule, kind, x_t, t, **cond)[0]


def predict_x0_eps(net, schedule, kind, x_t, t, **cond):
    """Run net(x_t, t, **cond) and read its output as the pair (x0, eps), both (B, ...)."""
    # the output of a bf16 network joins the float32 state here
    prediction = net(x_t, t, **cond).to(x_t.dtype)
    return to_x0_eps(prediction, kind, x_t, schedule.alpha(t), schedule.sigma(t))


def guide(cond, uncond, scale):
    """Classifier-free guidance (2207.12598): uncond + scale (cond - uncond).

    Scale 1 is off and scale 0 is unconditional. The weights sum to one, so it makes no difference
    whether x0, eps, a velocity or the score is guided. Code that writes cond + w (cond - uncond)
    has w = scale - 1.
    """
    return uncond + scale * (cond - uncond)


RESCALES = ("patch", "row")


def rescale(guided, cond, over):
    """A guided prediction, brought to the norms of the conditional one (B, C, H, W).

    over: which numbers share a norm, one of RESCALES. "patch": all channels of 2 x 2 places, as
    QwenImagePipeline has it; "row": each row of each channel, as Lumina2Pipeline has it. Both
    are what the network itself predicts: read as x0 they would have other norms. H, W even.
    """

    def norms(x):
        if over == "row":
            return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        square = F.avg_pool2d(x.square().sum(1, keepdim=True), 2) * 4  # (B, 1, H / 2, W / 2)
        return square.sqrt().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    return guided * (norms(cond) / norms(guided).clamp_min(1e-12))


# ---- time ----------------------------------------------------------------------------------------


def shift(u, s):
    """Timestep shift (SD3, Wan) t = s u / (1 + (s - 1) u): s > 1 puts more times near noise."""
    return s * u / (s * u + (1 - u))  # in this form u = 1 gives exactly 1


def unshift(t, s):
    """Inverse of shift, equal to shift(t, 1 / s)."""
    return t / (s - (s - 1) * t)


def step_grid(steps, timestep_shift=1.0, terminal=None, raw=None):
    """Times 1 = t_0 > t_1 > ... > t_steps = 0, uniform in u and then shifted.

    terminal: where given, all times before the 0 are stretched, so that the last of them is this
    one (shift_terminal of diffusers). raw: other times u, descending, steps + 1 of them. -> list of
    steps + 1 floats. Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"a step grid needs at least 1 step, got {steps}")
    raw = raw or [1 - i / steps for i in range(steps + 1)]
    times = [shift(u, timestep_shift) for u in raw]
    if terminal and steps > 1:
        stretch = (1 - terminal) / (1 - times[-2])
        times = [1 - (1 - t) * stretch for t in times[:-1]] + [0.0]
    return times


def logit_normal(normal, mean=0.0, std=1.0):
    """u = sigmoid(mean + std n), SD3's distribution of training times (2403.03206, Eq. 19).

    normal: n, standard normal (B,) -> u (B,).
    """
    return torch.sigmoid(mean + std * normal)


# ---- sampling a many-step teacher ----------------------------------------------------------------


def ode_step(schedule, x0, eps, s):
    """Move to time s along the line through x0 and eps: alpha_s x0 + sigma_s eps.

    x0, eps (B, ...), s (B,) -> (B, ...). For flow this is the Euler step x + (s - t) v, and for VP
    it is DDIM (eta = 0).
    """
    return add_noise(schedule, x0, eps, s)


@torch.no_grad()
def sample_ode(predict, schedule, noise, grid, solver="heun"):
    """Integrate the probability-flow ODE over a grid, from t = 1 to 0.  -> x0 (B, ...).

    predict: (x_t (B, ...), t (B,)) -> (x0, eps), each (B, ...).
    noise:   (B, ...), taken as x at the grid's first time, which is exact at t = 1 if alpha(1) = 0.
    grid:    descending times that end at 0, or where the teacher's diffusers scheduler ends.
    solver:  "euler" (one call a step) or "heun" (two calls a step, one on the last step).

    In the variables y = x / (alpha + sigma) and tau = sigma / (alpha + sigma) every schedule is the
    flow schedule, with dy/dtau = eps - x0. So the same Heun step serves flow and VP, also where
    alpha = 0. Raises ValueError for another solver.
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver must be 'euler' or 'heun', got {solver!r}")
    x = noise
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        t_now, t_next = x.new_full((len(x),), t), x.new_full((len(x),), s)
        x0, eps = predict(x, t_now)
        x_next = ode_step(schedule, x0, eps, t_next)
        # not every prediction has a slope at t = 0, so the last step is Euler's
        if solver == "heun" and s > grid[-1]:
            x0_next, eps_next = predict(x_next, t_next)
            scale_now = schedule.alpha(t_now) + schedule.sigma(t_now)
            scale_next = schedule.alpha(t_next) + schedule.sigma(t_next)
            tau_now = schedule.sigma(t_now) / scale_now
            tau_next = schedule.sigma(t_next) / scale_next
            slope = ((eps - x0) + (eps_next - x0_next)) / 2
            y = x / expand(scale_now, x) + expand(tau_next - tau_now, x) * slope
            x_next = y * expand(scale_next, x)
        x = x_next
    return x


def guided_x0(teacher, schedule, kind, x_t, t, cond, uncond, guidance_scale, over=None):
    """A network's x0 under guidance: two calls, or one when guidance is off (scale 1).

    x_t (B, ...), t (B,) -> (B, ...). cond, uncond: keywords of the network, with the condition and
    without it. over: one of RESCALES, see `rescale`; None: guidance as it is.
    """
    if over and guidance_scale != 1:
        given, null = (teacher(x_t, t, **c).to(x_t.dtype) for c in (cond, uncond))
        guided = rescale(guide(given, null, guidance_scale), given, over)
        return to_x0_eps(guided, kind, x_t, schedule.alpha(t), schedule.sigma(t))[0]
    x0 = predict_x0(teacher, schedule, kind, x_t, t, **cond)
    if guidance_scale == 1:
        return x0
    return guide(x0, predict_x0(teacher, schedule, kind, x_t, t, **uncond), guidance_scale)


@torch.no_grad()
def sample_teacher(
    teacher, schedule, kind, z, grid, cond, uncond, guidance_scale, solver, over=None
):
    """Guided probability-flow ODE of the teacher over a grid 1 = t_0 > ... > 0.

    z (B, ...), the noise -> x0 (B, ...). over: see `guided_x0`.
    """

    def predict(x_t, t):
        x0 = guided_x0(teacher, schedule, kind, x_t, t, cond, uncond, guidance_scale, over)
        return x0, to_x0_eps(x0, "x0", x_t, schedule.alpha(t), schedule.sigma(t))[1]

    return sample_ode(predict, schedule, z, grid, solver)


def ode_calls(steps, solver):
    """Calls of `predict` that sample_ode makes; guidance doubles the number of network calls."""
    return steps if solver == "euler" else 2 * steps - 1


def sinusoid(t, dim, max_period=10000.0, scale=1000.0):
    """Sinusoidal features of scale * t: cos, then sin, at dim / 2 geometric frequencies.

    t (B,) -> (B, dim) float32.
    """
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    freq = torch.exp(-math.log(max_period) * i / (dim // 2))
    angle = scale * t.float()[:, None] * freq  # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# ---- a schedule and a prediction together --------------------------------------------------------


class Diffusion:
    """A noise schedule and what networks predict under it: every conversion that a script needs.

    Times are floats, the same for the whole batch, or tensors (B,). Networks are called as
    net(x_t, t, **cond); x, eps, x_t and all results are (B, ...). over: how guidance is rescaled,
    one of RESCALES (`rescale`), or None.
    """

    def __init__(self, schedule, prediction, over=None):
        self.schedule, self.prediction, self.over = schedule, prediction, over

    def add_noise(self, x0, eps, t):
        """x_t = alpha(t) x0 + sigma(t) eps."""
        return add_noise(self.schedule, x0, eps, per_row(t, x0))

    def noise_on(self, x_s, eps, s, t):
        """A sample at level s carried on to level t >= s: alpha_{t|s} x_s + sigma_{t|s} eps."""
        return noise_on(self.schedule, x_s, eps, per_row(s, x_s), per_row(t, x_s))

    def target(self, x0, eps, t):
        """What a network should output at x_t = alpha(t) x0 + sigma(t) eps."""
        t = per_row(t, x0)
        return from_x0_eps(self.prediction, x0, eps, self.schedule.alpha(t), self.schedule.sigma(t))

    def x0(self, net, x_t, t, **cond):
        """The network's prediction, read as x0."""
        return self.x0_eps(net, x_t, t, **cond)[0]

    def x0_eps(self, net, x_t, t, **cond):
        """The network's prediction, read as the pair x0, eps."""
        return predict_x0_eps(net, self.schedule, self.prediction, x_t, per_row(t, x_t), **cond)

    def guided_x0(self, net, x_t, t, cond, uncond, guidance_scale):
        """The network's x0 under guidance: two calls, one when guidance is off."""
        how = self.schedule, self.prediction, x_t, per_row(t, x_t)
        return guided_x0(net, *how, cond, uncond, guidance_scale, self.over)

    def sample(self, net, z, grid, cond, uncond, guidance_scale, solver):
        """The guided probability-flow ODE from z over a grid 1 = t_0 > ... > 0.  -> x0."""
        given = z, grid, cond, uncond, guidance_scale, solver, self.over
        return sample_teacher(net, self.schedule, self.prediction, *given)


def per_row(t, x):
    """A time as one number a row: a float or a tensor () becomes (B,), another tensor stays."""
    if torch.is_tensor(t):
        return t.to(x.device).expand(len(x)) if t.dim() == 0 else t
    return x.new_full((len(x),), t)
