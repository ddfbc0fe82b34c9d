"""LinVideo (2510.08318 v2): linear attention for some layers of a video model, without data.

The idea. Self-attention over all n tokens of a video costs O(n^2) and linear attention O(n), but a
network trained with the first breaks when all of it is replaced. So only a given number of layers
changes, and training chooses them: each layer mixes both kinds with one weight r, a constraint
counts the layers below one half, and a regulariser drives every r to 1 (softmax) or 0 (linear).
Meanwhile the student has to stay a good sampler. At every time t the states that it reaches should
have the distribution of the teacher's, and the gradient of the KL divergence between the two is a
difference of two scores. Both networks are flow models, whose velocities give their scores, so
the student is its own fake score. No data is needed, only a bank of states that the teacher's
sampler passes through. In the limit of short steps that is a regression onto the teacher's velocity
at the student's own states (--objective adm). The default, also for released models, is the simpler
regression of Eq. 7 at the teacher's states: as good by these measures, and the cheapest.

    paper         here      meaning                                                      shape
    r^(l)         r         weight of softmax attention in layer l, 1 = softmax          (layers,)
    target        target    how many layers become linear                                int
    x_t, u_t      x_t, v_t  state and velocity on the teacher's trajectory; t = 1: noise (B, ...)
    x-hat_t       x_hat     the student's state at s < t, one step of its own from x_t   (B, ...)
    u, u-hat      v, v_hat  velocities of teacher and student at x_hat                   (B, ...)
    Eq. 12 and 13 g         the student's score at x_hat minus the teacher's             (B, ...)
    alpha         alpha     exponent of the regulariser (Eq. 10)                         float

Launch.
    laptop      python linvideo.py               # clips, 4 of 8 layers, eight minutes on two cores
    then        python dmd.py --teacher clips --student_init runs/linvideo-clips/student \
                    --student_steps 4 --timestep_shift 2
    paper       python linvideo.py --objective adm --state part --weight eq13 --count round \
                    --learning_rate 1e-4 --selection_share 1 --selection_weight 0.01 --alpha 20 2
    ablations   python linvideo.py --no_regularizer                 # Tab. 3, with Eq. 7
                python linvideo.py --objective adm                  # the student's own states
                python linvideo.py --objective adm_critic --weight unit --learning_rate 1e-4
    torchrun    torchrun --nproc-per-node 8 linvideo.py --teacher Wan2.1-T2V-1.3B-Diffusers \
                    --prompts prompts.safetensors --target_layers 16 --mixed_precision bf16
    sampling    python linvideo.py --sample runs/linvideo-clips/student

Deviations; the reasons are in docs/linvideo.md. The authors have published no code. Chosen here are
the way to x_hat (--state), the sign of Eq. 9, its gradient straight through the rounding, r's start
and rate, the shape of phi's W, and a last phase with exactly `target` layers fixed. By default
lambda is .001, alpha falls from 4 to 2 (paper: .01, 20 to 2), and released models get a count
without rounding (--count soft). The bank is guided, the losses are not.
"""

import copy
import csv
import math
import os
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw
from torch import nn

from kernels.linear_attention import FEATURE_MAPS, LinearAttention, use_linear_attention
from models.diffusion import Flow, add_noise, expand, guide, shift, step_grid
from models.draws import Draws
from models.files import UserError, load_json, open_tensors, save_json, save_tensors
from models.networks import lora
from models.plumbing import report
from models.plumbing.data import Bank, Conditions, try_network
from models.plumbing.dry_run import Network, Turn, dry_run
from models.plumbing.film import Film
from models.plumbing.flags import (
    distillation_parser,
    given_flags,
    number,
    paper_values,
    parse,
    refuse,
)
from models.plumbing.run import Run, nearest, place_among_ranks, run_main
from models.plumbing.teachers import (
    average_of,
    freeze_teacher,
    merged_copy,
    start_teacher,
    starting_network,
    trainable,
)
from models.plumbing.work import work_done
from models.progress import progress

# ---- the losses. x_t, v_t, g (B, ...), s < t (B,); networks: net(x_t, t, **cond) -> velocity -----


def velocity(net, x_t, t, cond):
    """What a flow network predicts, eps - x0, in x_t's dtype also if the network is bfloat16."""
    return net(x_t, t, **cond).to(x_t.dtype)


def adm_loss(student, teacher, x_t, t, s, cond):
    """Anytime distribution matching (Sec. 4.2).  -> scalar; g, v, v_hat (B, ...).

    One Euler step of the student takes x_t to x_hat at time s. A flow's score at x_hat is
    -(x_hat + (1 - s) v) / s, so the KL divergence of the student's distribution there from the
    teacher's (Eq. 11) has the gradient

        g = (1 - s) / s (v - v_hat)                                             (Eq. 12 and 13)

    which is a constant: it reaches the student through x_hat alone. The loss has the gradient
    g / numel(g) in x_hat. 0 < s < t <= 1; keep s >= .02, since (1 - s) / s diverges. Both networks
    predict eps - x0, without guidance.
    """
    x_hat = x_t + expand(s - t, x_t) * velocity(student, x_t, t, cond)  # the call with gradient
    with torch.no_grad():
        v = velocity(teacher, x_hat, s, cond)
        v_hat = velocity(student, x_hat, s, cond)  # the student is its own score
        g = expand((1 - s) / s, x_hat) * (v - v_hat)
    return 0.5 * (x_hat - (x_hat - g).detach()).square().mean(), g, v, v_hat


def regression_loss(student, x_t, v_t, t, cond):
    """Regression onto the teacher's velocity v_t at x_t.  -> scalar; error, v_t, v_hat (B, ...).

    At states of the teacher's trajectories this is Eq. 7. At states of the student's own it is the
    limit of Eq. 11 to 13 for short steps, in which x_hat is x_t and the gradient in v_hat is the
    difference of velocities there (--state policy; derived in docs/linvideo.md). x_t is a constant.
    """
    v_hat = velocity(student, x_t, t, cond)
    error = v_hat - v_t
    return 0.5 * error.square().mean(), error, v_t, v_hat.detach()


def constraint(r, target):
    """(number of linear layers - target)^2 (Eq. 9).  r (layers,) -> scalar.

    The layers are counted by rounding; the gradient, -2 (count - target) for every layer, passes
    straight through it. The paper prints sum round(r) - target, which with r = 1 for softmax would
    count the layers that stay.
    """
    rounded = r + (r.round() - r).detach()
    linear = (1 - rounded).sum()
    return (linear - target) ** 2


def regularizer(r, alpha):
    """sum 1 - |2 r - 1|^alpha (Eq. 10): 0 where r is 0 or 1, and 1 where it is one half.

    A large alpha > 1 makes it flat in between. Keep r in [0, 1] after every update, since outside
    this falls without bound.  r (layers,) -> scalar.
    """
    # 1 at both ends, 0 at one half
    distance = (2 * r - 1).abs()
    return (1 - distance**alpha).sum()


# ---- variants of the losses, and baselines (Tab. 4) ----------------------------------------------


def soft_constraint(r, target):
    """Eq. 9 with layers counted as sum (1 - r), without rounding.  r (layers,) -> scalar.

    With rounding, all r fall to one half together, and there the constraint's gradient, the same
    for all, changes its sign from update to update: what tells one layer from another drowns. This
    count changes smoothly, and one layer can fall while another rises.
    """
    return ((1 - r).sum() - target) ** 2


def matching_loss(x, g):
    """1/2 |x - sg(x - g)|^2, a mean over all elements: its gradient in x is g / numel(x).

    x, g (B, ...) -> scalar.
    """
    return 0.5 * (x - (x - g).detach()).square().mean()


def matching_gradient(v, v_hat, s, weight):
    """adm_loss's g with a weight of choice, a constant.  v, v_hat (B, ...), s (B,) -> (B, ...).

    "eq13" is the paper's, "unit" is the bare difference of velocities, and "dmd" is the difference
    of x0 divided by the mean |x0 of the student - x0 of the teacher| at x_hat of each sample. All
    of them are gradients in x_hat.
    """
    difference = (v - v_hat).detach()
    if weight == "eq13":
        return expand((1 - s) / s, difference) * difference
    if weight == "dmd":
        distance = (expand(s, difference) * difference).abs().flatten(1).mean(1)  # of x0, (B,)
        return expand(s / distance.clamp_min(1e-8), difference) * difference
    return difference


def adm_variant_loss(args, student, teacher, score, x_t, v_t, t, s, cond):
    """adm_loss with --weight, and with --regression_weight of Eq. 7 beside it.

    score: the network that gives the student's score, the student itself or a critic. v_t: the
    teacher's velocity at x_t, which only the regression needs. A gradient in x_hat reaches v_hat_t
    times s - t, which is random and small; with the weight "velocity" g is the gradient in v_hat_t
    itself, the bare difference of velocities at x_hat.  -> scalar; g, v, v_hat (B, ...).
    """
    v_hat_t = velocity(student, x_t, t, cond)
    x_hat = x_t + expand(s - t, x_t) * v_hat_t
    with torch.no_grad():
        v = velocity(teacher, x_hat, s, cond)
        v_hat = velocity(score, x_hat, s, cond)
    if args.weight == "velocity":
        g = v_hat - v
        loss = matching_loss(v_hat_t, g)
    else:
        g = matching_gradient(v, v_hat, s, args.weight)
        loss = matching_loss(x_hat, g)
    if args.regression_weight:
        loss = loss + args.regression_weight * (0.5 * (v_hat_t - v_t).square().mean())
    return loss, g, v, v_hat


def dmd_baseline_loss(x0, teacher, critic, eps, t, cond):
    """DMD's loss on one-jump samples x0, as a few-step student would have it.

    -> scalar; g, v, v_critic (B, ...).
    """
    with torch.no_grad():
        x_t = add_noise(Flow(), x0, eps, t)
        v, v_critic = velocity(teacher, x_t, t, cond), velocity(critic, x_t, t, cond)
        error = (x0 - x_t + expand(t, x_t) * v).abs().flatten(1).mean(1)  # |x0 - teacher's x0|
        g = expand(t / error.clamp_min(1e-8), x_t) * (v - v_critic)
    return matching_loss(x0, g), g, v, v_critic


def flow_matching_loss(critic, x0, eps, t, cond):
    """|v - (eps - x0)|^2 at x_t = (1 - t) x0 + t eps.  -> scalar.

    It trains a critic, whose score is then that of the samples x0, which are constants.
    """
    x0 = x0.detach()
    x_t = add_noise(Flow(), x0, eps, t)
    return (velocity(critic, x_t, t, cond) - (eps - x0)).square().mean()


# ---- the layers and their selection (Sec. 4.1) ---------------------------------------------------


class MixedAttention(nn.Module):
    """r softmax attention + (1 - r) linear attention of the same q, k, v (Eq. 8).

    q, k, v (B, n, heads, head_dim), after norm and rotation -> the same shape. softmax: the layer's
    own attention, called as softmax(q, k, v) without a mask. r is one trained number; at r = 1 this
    is the softmax attention, bit for bit. After `fix` only one is computed; a state that is loaded
    needs `fix` again where `decided` is set. Both kinds take `share`, where other ranks have
    further tokens.
    """

    whole = True  # over several ranks every one keeps all of it: r is a single number

    def __init__(self, softmax, heads, head_dim, feature_map, r, feature_dim=None):
        super().__init__()
        self.softmax, self.only = softmax, None
        self.linear = LinearAttention(heads, head_dim, feature_map, feature_dim)
        self.r = nn.Parameter(torch.tensor(float(r)))
        self.register_buffer("decided", torch.tensor(False))  # so that a resumed run knows

    def forward(self, q, k, v, **share):
        if self.only:
            attend = self.softmax if self.only == "softmax" else self.linear
            return attend(q, k, v, **share)
        softmax, linear = self.softmax(q, k, v, **share), self.linear(q, k, v, **share)
        wide = torch.promote_types(v.dtype, torch.float32)  # r and 1 - r rounded are no longer 1
        return (self.r * softmax.to(wide) + (1 - self.r) * linear.to(wide)).to(v.dtype)

    def fix(self, linear):
        """From now on this layer is either linear, or softmax attention."""
        self.only = "linear" if linear else "softmax"
        self.r.requires_grad_(False).fill_(0.0 if linear else 1.0)
        self.r.grad = None
        self.decided.fill_(True)


def mix_attention(net, feature_map, r, feature_dim=None):
    """Put a MixedAttention into every self-attention layer of net.  -> the list of them.

    Of an Adapted they take part in calls with its adapter only, so that the network itself, the
    teacher, keeps its softmax attention.
    """
    mixed = [
        MixedAttention(place.attend, net.heads, net.head_dim, feature_map, r, feature_dim)
        for place in net.self_attentions
    ]
    device = next(iter(net.parameters())).device
    for i, (place, m) in enumerate(zip(net.self_attentions, mixed)):
        if isinstance(net, lora.Adapted):
            net.more[str(i)] = m.to(device)
        else:
            place.attend = m.to(device)
    attend_by_adapter(net)
    return mixed


def attend_by_adapter(net):
    """Let the MixedAttention that an Adapted has be used in calls with its adapter."""
    if isinstance(net, lora.Adapted):
        for place, mixed in zip(net.self_attentions, net.more.values()):
            place.attends[net.adapter] = mixed


def convert(run, net, layers, feature_map, feature_dim=None):
    """A copy of a network of MixedAttention layers with linear attention in `layers` only.

    Each layer keeps one kind of attention, and the weights of the other are gone. The config of the
    copy names the linear layers. An adapter is merged into the copy's weights: no other program
    would know what to do with an adapter that has linear attention.
    """
    if isinstance(net, lora.Adapted):
        mixed, net = list(copy.deepcopy(net.more).values()), merged_copy(run, net)
    else:
        net = run.copy_of(net)
        mixed = [place.attend for place in net.self_attentions]
    use_linear_attention(net, layers, feature_map, feature_dim)
    for i, (place, m) in enumerate(zip(net.self_attentions, mixed)):
        del place.attend  # nn.Module refuses a plain function under a registered module's name
        place.attend = m.linear if i in layers else m.softmax
    return net


def smallest(r, target):
    """The `target` layers with the smallest r, the first of equal ones.  -> sorted indices."""
    return sorted(sorted(range(len(r)), key=lambda i: (float(r[i]), i))[:target])


@dataclass
class Selection:
    """Which layers become linear, and until when that is open.

    mixed    the MixedAttention of every layer
    target   how many become linear
    end      the step before which the selection ends
    alpha    the regulariser's exponent at its start and at its end
    layers   the linear layers, once they are fixed; None while they are selected
    """

    mixed: list
    target: int
    end: int
    alpha: tuple
    layers: list | None = None

    @property
    def r(self):
        """The trained r of every layer, a list of scalars."""
        return [m.r for m in self.mixed]

    def layers_now(self):
        """The layers that would become linear now. Waits for the device."""
        return smallest([r.item() for r in self.r], self.target)

    def fix(self, layers):
        """From now on these layers are linear and the others softmax attention."""
        self.layers = layers
        for i, m in enumerate(self.mixed):
            m.fix(linear=i in layers)


def start_selection(args, mixed):
    """The selection that --select asks for, in the state that a resumed run has reached."""
    target, layers = chosen_layers(args, len(mixed))
    end = min(int(args.max_train_steps * args.selection_share), args.max_train_steps - 1)
    selection = Selection(mixed, target, end, exponents(args, len(mixed), target))
    if layers is None and mixed[0].decided:
        layers = [i for i, m in enumerate(mixed) if m.r == 0]
    if layers is not None:
        selection.fix(layers)
    return selection


def r_is_held(args, layers, target, alpha):
    """Whether all r, equal at the start, are pulled up to softmax and so no layer is selected.

    The regulariser pulls r > 1/2 up with 2 alpha (2 r - 1)^(alpha - 1), the constraint pulls it
    down with 2 (target - count). Without the regulariser the constraint alone moves them.
    """
    r = args.r_init
    count = layers * (1 - r) if args.count == "soft" else 0.0
    if r <= 0.5 or args.no_regularizer:
        return False
    return alpha * (2 * r - 1) ** (alpha - 1) >= target - count


def exponents(args, layers, target):
    """--alpha: the regulariser's exponent at the start and at the end of the selection."""
    if args.alpha:
        return tuple(args.alpha)
    # 20 is flat at r = .9, where 4 would hold every r if few layers are wanted
    return (20.0 if r_is_held(args, layers, target, 4.0) else 4.0), 2.0


RULES = ("learned", "first", "last", "uniform", "random")


def layers_listed(args):
    """Whether --select lists layers instead of naming a rule."""
    return len(args.select) > 1 or args.select[0] not in RULES


def chosen_layers(args, count):
    """--target_layers and --select in a network of `count` self-attention layers.

    -> how many become linear, and which: a sorted list, or None where they are learned.
    """
    if layers_listed(args):
        return len(args.select), sorted(map(int, args.select))
    target = max(1, count // 2) if args.target_layers is None else args.target_layers
    generator = torch.Generator().manual_seed(args.seed)
    layers = {
        "learned": None,
        "first": list(range(target)),
        "last": list(range(count - target, count)),
        "uniform": [int((i + 0.5) * count / target) for i in range(target)],
        "random": sorted(torch.randperm(count, generator=generator).tolist()[:target]),
    }
    return target, layers[args.select[0]]


# ---- the bank of states, and the sampler ---------------------------------------------------------


@torch.no_grad()
def trajectory(teacher, z, grid, cond, uncond, guidance_scale, sampler=None):
    """Pairs (x_t, u_t) as in Sec. 4.2, on a guided Euler trajectory from z along the grid.

    sampler: the network whose trajectory it is, the teacher itself unless it is given. The
    velocities are the teacher's, also at states of a student's.
    z (B, ...) -> {"x": states at grid[:-1] (B, K, ...), "v": the conditional velocity at each, and
    under guidance "v_uncond": the unconditional one}. The paper does not say which one u_t is.
    """
    x, found = z, {"x": [], "v": [], "v_uncond": []}
    conds = [cond] if guidance_scale == 1 else [cond, uncond]
    for t, t_next in zip(grid[:-1], grid[1:]):
        at = z.new_full((len(z),), t)
        v = own = [velocity(teacher, x, at, c) for c in conds]
        if sampler:
            own = [velocity(sampler, x, at, c) for c in conds]
        for name, value in zip(found, (x, *v)):
            found[name].append(value)
        x = x + (t_next - t) * (guide(*own, guidance_scale) if len(own) == 2 else own[0])
    return {name: torch.stack(parts, 1) for name, parts in found.items() if parts}


def bank_size(run, folder):
    """How many trajectories the bank has: --bank_size, or those of a bank that is there already.

    Else as many states as the run reads, with replacement, and at most the paper's 50,000.
    """
    args, path = run.args, os.path.join(folder, "bank.json")
    if args.bank_size:
        return args.bank_size
    if os.path.isfile(path):
        return int(load_json(path)["trajectories"])
    per_update = run.parts * args.train_batch_size * args.gradient_accumulation_steps
    return -(-min(50_000, args.max_train_steps * per_update) // args.sampling_steps)


def bytes_of_trajectory(args, teacher):
    """What one trajectory takes on disk: float16 states and velocities."""
    tensors = 2 if args.guidance_scale == 1 else 3
    return 2 * tensors * args.sampling_steps * math.prod(teacher.shape)


def announce(run, teacher, folder, rows, whose, remedy):
    """Say what trajectories take on disk before they are written. Raises UserError if too much."""
    size, there = rows * bytes_of_trajectory(run.args, teacher), nearest(folder)
    free = shutil.disk_usage(there).free if os.path.exists(there) else 0  # a drive may be missing
    take = f"{rows:,} trajectories of the {whose} take {size / 1e6:,.1f} MB in {folder}"
    if size > free:
        raise UserError(f"{take}, where {free / 1e6:,.1f} MB are free: {remedy}")
    if rows:
        run.say(take)


def make_bank(run, teacher, grid):
    """The teacher's trajectories on disk, each written once, by the part whose share it is.

    Those that are there already are kept.  -> an open Bank. Raises UserError for another one's, and
    where the disk is too small.
    """
    args, conditions = run.args, teacher.conditions
    folder = args.bank or os.path.join(run.folder, "bank")
    size = bank_size(run, folder)
    about = {
        "teacher": teacher.fingerprint(),
        "trajectories": size,
        "grid": grid,
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
        "shape": list(teacher.shape),
        "prompts": conditions.prompts and conditions.prompts.fingerprint(),
    }
    about |= {"mixed_precision": "bf16"} if args.mixed_precision == "bf16" else {}
    bank = Bank(folder, about, size, args.bank_batch, create=False)
    rows = sum(len(bank.rows_of(part)) for part in bank.missing())
    remedy = "lower --bank_size or --sampling_steps, or name a --bank FOLDER on a larger disk"
    announce(run, teacher, folder, rows, "teacher", remedy)
    bank = Bank(folder, about, size, args.bank_batch, create=run.main)
    run.wait_for_all()  # until the folder is ready
    missing = bank.missing()
    run.wait_for_all()  # all ranks have looked before one of them writes
    shares = [[part for part in missing if part % run.parts == p] for p in range(run.parts)]
    mine, turns = shares[run.part], range(max(map(len, shares)))  # all ranks take as many
    for i in progress(turns, "bank", disable=not run.main or not missing):
        part = mine[i] if i < len(mine) else missing[0]
        rows = bank.rows_of(part)
        draw = Draws(args.seed, "bank", 0, rows, run.device, teacher.shape)
        index = conditions.index(draw)
        cond, uncond = conditions.pick(index, run.device)
        scale = args.guidance_scale
        with run.autocast():
            states = trajectory(teacher.net, draw.noise("z"), grid, cond, uncond, scale)
        if i < len(mine) and run.writes:
            bank.write(part, {"index": index, **{name: x.half() for name, x in states.items()}})
    run.wait_for_all()
    return bank.open(conditions.count)


class OwnTrajectories:
    """The student's latest trajectories: a ring of files that starts as the teacher's bank.

    They are numbered as they are made, --fresh of them every --fresh_every updates. `rows` counts
    back from the latest; where the student has not made so many yet, it takes one of the bank's.
    What an update makes is read from the next one on, when every rank has written its share.

    size   how many of the latest trajectories are read
    kept   how many are kept for a run that is resumed from the last checkpoint but one
    made   how many the student has made before this update
    """

    def __init__(self, args, run=None):
        """run: whose folder has them, which moves (`Run.settle`); None: only to count them."""
        self.args, self.run, self.size = args, run, args.own_trajectories
        lasting = 2 * args.checkpointing_steps // args.fresh_every + 2
        self.kept = self.size + args.fresh * lasting

    def begin(self, step, bank=None):
        """An update begins. bank: the teacher's, an open Bank."""
        self.made, self.bank = self.args.fresh * -(-step // self.args.fresh_every), bank

    @property
    def folder(self):
        return os.path.join(self.run.folder, "own")

    def path(self, i):
        """The file of this trajectory."""
        return os.path.join(self.folder, f"{i:08d}.safetensors")

    def rows(self, row, state):
        """One state of each of B trajectories, as `Bank.rows` gives them."""
        found = []
        for r, k in zip(row.tolist(), state.tolist()):
            i = self.made - 1 - r
            if i < 0:
                at = torch.tensor([-1 - i]) % self.bank.size
                found.append(self.bank.rows(at, torch.tensor([k])))
                continue
            with open_tensors(self.path(i)) as f:
                names = [name for name in f.keys() if name != "index"]
                parts = {name: f.get_slice(name)[k : k + 1].float() for name in names}
                found.append({"index": f.get_tensor("index"), **parts})
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def write(self, i, tensors):
        """Write this trajectory, and remove the one that no checkpoint needs any more."""
        save_tensors(tensors, self.path(i))
        if os.path.isfile(self.path(i - self.kept)):
            os.remove(self.path(i - self.kept))


def start_own_trajectories(run, teacher):
    """-> OwnTrajectories. Raises UserError where they have gone, or the disk is too small."""
    args, own = run.args, OwnTrajectories(run.args, run)
    own.begin(run.first)
    if 0 < run.first < args.max_train_steps and not os.path.isfile(own.path(own.made - 1)):
        raise UserError(
            f"{own.path(own.made - 1)} is not there, but a run with --state policy goes on with "
            "the trajectories that its student has made: copy the interrupted run's folder own/"
        )
    whole = args.fresh * -(-args.max_train_steps // args.fresh_every) - own.made
    remedy = "lower --own_trajectories, --fresh or --checkpointing_steps"
    announce(run, teacher, own.folder, min(own.kept, whole), "student", remedy)
    os.makedirs(own.folder, exist_ok=True)
    return own


def make_own_trajectories(run, step, own, bank, student, teacher, grid):
    """Where it is time, roll the student out and write this rank's share of the trajectories."""
    args, conditions = run.args, teacher.conditions
    own.begin(step, bank)
    mine = [i for i in range(own.made, own.made + args.fresh) if i % run.parts == run.part]
    if step % args.fresh_every:
        return
    rows = mine or [own.made]  # a rank without any calls the student all the same, for the others
    draw = Draws(args.seed, "own", 0, rows, run.device, teacher.shape)
    index = conditions.index(draw)
    cond, uncond = conditions.pick(index, run.device)
    z, scale = draw.noise("z"), args.guidance_scale
    with run.autocast():
        states = trajectory(teacher.net, z, grid, cond, uncond, scale, sampler=student)
    for row, i in enumerate(mine if run.writes else ()):
        one = {name: x[row].half() for name, x in states.items()}
        own.write(i, {"index": index[row, None], **one})


def student_sampler(run, student, teacher, grid):
    """The student's sampler is the teacher's: Euler along the grid, guided as in training.

    -> a function (index, first, last) -> samples, of the conditions index[first:last].
    """

    def samples(index, first, last):
        z = report.evaluation_noise(run, teacher.shape, first, last)("z")
        cond, uncond = teacher.conditions.pick(index[first:last], run.device)
        scale = run.args.guidance_scale
        return teacher.diffusion.sample(student, z, grid, cond, uncond, scale, "euler")

    return samples


# ---- what an update works on: states of the bank, and the student's step to x_hat ----------------


def times_at(grid, k, device):
    """The times of these points of the grid.  k (B,) on the CPU -> (B,) on the device."""
    return torch.tensor(grid)[k].to(device)


def bank_states(args, draw, bank, teacher, grid, last_step=True):
    """One state of the bank for each of these rows, some of them without their condition.

    bank: a Bank, or OwnTrajectories. last_step: whether the state before the sampler's last step is
    among them.
    -> x_t, v_t (B, ...), t (B,), cond, and k (B,), the place of t in the grid, on the CPU.
    """
    k = draw.spread_integer("state", args.sampling_steps - (not last_step))
    rows = bank.rows(draw.integer("trajectory", bank.size), k)
    cond, uncond = teacher.conditions.pick(rows["index"], draw.device)
    x_t, v_t = rows["x"].to(draw.device), rows["v"].to(draw.device)
    cond, drop = some_unconditional(args, draw, cond, uncond)
    if drop is not None:
        v_t = torch.where(expand(drop, v_t), rows["v_uncond"].to(draw.device), v_t)
    return x_t, v_t, times_at(grid, k, draw.device), cond, k


def part_of_step(draw, t, t_next, part):
    """A time between t and t_next, uniform within this share of the sampler's step.  (B,)."""
    return t + part * draw.uniform("part") * (t_next - t)


def any_later_time(draw, k, steps, timestep_shift):
    """A time below that of the grid's point k, uniform in raw time.  (B,)."""
    u = draw.uniform("jump") * (1 - k / steps).to(draw.device)
    return shift(u, timestep_shift)


def some_unconditional(args, draw, cond, uncond):
    """With guidance --uncond_share of the rows lose their condition.

    -> cond; which rows (B,), or None without guidance.
    """
    if args.guidance_scale == 1:
        return cond, None
    drop = draw.uniform("drop") < args.uncond_share
    cond = {name: torch.where(expand(drop, c), uncond[name], c) for name, c in cond.items()}
    return cond, drop


@torch.no_grad()
def own_state(args, draw, student, teacher, grid):
    """A state of the student's own guided trajectory, after another step of the sampler in each
    row.  -> x_t (B, ...), t, t_next (B,), cond.
    """
    k = 1 + draw.spread_integer("i", args.sampling_steps - 2)
    cond, uncond = teacher.conditions.draw(draw)
    z, scale = draw.noise("z"), args.guidance_scale
    states = trajectory(student, z, grid[:-1], cond, uncond, scale)["x"]
    x_t = states[torch.arange(len(k)), k]
    cond, _ = some_unconditional(args, draw, cond, uncond)
    return x_t, times_at(grid, k, draw.device), times_at(grid, k + 1, draw.device), cond


def step_to_x_hat(args, draw, student, teacher, bank, grid):
    """Where the student's step to x_hat begins and ends, by --state.

    -> x_t (B, ...), v_t (B, ...) or None off the bank, t, s (B,), cond.
    """
    if args.state == "rollout":
        x_t, t, s, cond = own_state(args, draw, student, teacher, grid)
        return x_t, None, t, s, cond
    # the last step leads to s = 0, where Eq. 13 diverges: its weight outdoes all others'
    last_step = args.state == "jump"
    x_t, v_t, t, cond, k = bank_states(args, draw, bank, teacher, grid, last_step)
    s = times_at(grid, k + 1, draw.device)  # --state step
    if args.state == "part":
        s = part_of_step(draw, t, s, args.part)
    elif args.state == "jump":
        s = any_later_time(draw, k, args.sampling_steps, teacher.shift)
    return x_t, v_t, t, s.clamp_min(args.min_time), cond


def one_jump(args, draw, student, teacher, bank, grid):
    """What the DMD baseline takes for a sample: the student's x0 from a state of the bank.

    -> x0 (B, ...), cond.
    """
    x_t, _, t, cond, _ = bank_states(args, draw, bank, teacher, grid)
    return x_t - expand(t, x_t) * velocity(student, x_t, t, cond), cond


def noise_and_time(draw, teacher):
    """-> eps (B, ...), t (B,) of the critic and of DMD's loss, u ~ U[.02, .98] before the shift."""
    return draw.noise("eps"), shift(draw.uniform("u", 0.02, 0.98), teacher.shift)


def critic_loss(args, draw, critic, student, teacher, bank, grid):
    """The critic's loss on samples of the current student, which gets no gradient.  -> scalar."""
    with torch.no_grad():
        if args.objective == "dmd":
            x0, cond = one_jump(args, draw, student, teacher, bank, grid)
        else:
            cond, uncond = teacher.conditions.draw(draw)
            cond, _ = some_unconditional(args, draw, cond, uncond)
            coarse, z = step_grid(args.critic_steps, teacher.shift), draw.noise("z")
            # unguided, as the teacher's velocity that the critic's is compared with
            x0 = teacher.diffusion.sample(student, z, coarse, cond, uncond, 1.0, "euler")
    return flow_matching_loss(critic, x0, *noise_and_time(draw, teacher), cond)


# ---- the selection -------------------------------------------------------------------------------


def pull_on_r(run, step, selection):
    """Add the gradient of lambda (L_con + L_reg) to r's own (Eq. 14).

    The norms of the three pulls on r are noted; after the selection they are zero.
    """
    names = ("r_objective", "r_constraint", "r_regularizer")
    if selection.layers is not None:
        run.note(**dict.fromkeys(names, 0.0))
        return
    args, (first, last) = run.args, selection.alpha
    alpha = first + (last - first) * step / max(1, selection.end - 1)
    r = torch.stack(selection.r)
    count = soft_constraint if args.count == "soft" else constraint
    losses = count(r, selection.target), regularizer(r, alpha)
    pulls = [torch.stack([p.grad for p in selection.r])]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, r, retain_graph=True)
        pulls.append(args.selection_weight * gradient)
    run.note(**{name: pull.norm() for name, pull in zip(names, pulls)})
    # Eq. 14, on top of the objective's own gradient
    total = losses[0] if args.no_regularizer else losses[0] + losses[1]
    (args.selection_weight * total).backward()


@torch.no_grad()
def velocity_error(run, student, teacher, bank, grid):
    """Mean squared error of the student's velocity on 256 fixed states of the bank, which the ranks
    share.  -> float."""
    errors = torch.zeros((), device=run.device)
    for together in range(0, 256, run.parts * run.B):  # as often on all ranks
        first = together + run.part * run.B
        own = range(first, min(first + run.B, 256))
        rows = own or range(1)
        draw = Draws(run.args.seed, "check", 0, rows, run.device, teacher.shape, total=256)
        x_t, v_t, t, cond, _ = bank_states(run.args, draw, bank, teacher, grid)
        with run.autocast():
            v_hat = velocity(student, x_t, t, cond)
        errors += (v_hat - v_t).square().flatten(1).mean(1)[: len(own)].sum()
    return run.mean_over_ranks(errors * run.parts / 256)[0]  # the mean over parts, times parts


def end_selection(run, step, selection, student, teacher, bank, grid):
    """Exactly `target` layers become linear, those with the smallest r; selection.json says so."""
    r = [x.item() for x in selection.r]
    before = velocity_error(run, student, teacher, bank, grid)
    selection.fix(smallest(r, selection.target))
    found = {
        "linear_layers": selection.layers,
        "update": step,
        "r": r,
        "linear_by_rounding": sum(x < 0.5 for x in r),
        "undecided": sum(0.1 < x < 0.9 for x in r),
        "velocity_error_before": before,
        "velocity_error_after": velocity_error(run, student, teacher, bank, grid),
    }
    if run.main:
        save_json(found, os.path.join(run.folder, "selection.json"))


# ---- training ------------------------------------------------------------------------------------


def adam(args, groups, learning_rate):
    """AdamW. groups: parameter lists, of which the first has --weight_decay."""
    groups = [{"params": params, "weight_decay": 0.0} for params in groups]
    groups[0]["weight_decay"] = args.weight_decay
    return torch.optim.AdamW(groups, lr=learning_rate, betas=tuple(args.adam_betas), fused=True)


def student_optimizer(args, student, mixed):
    """AdamW with three groups: the network's weights, W of the feature maps, and r."""
    r, features = [m.r for m in mixed], [p for m in mixed for p in m.linear.parameters()]
    known = {id(p) for p in r + features}
    weights = [p for p in student.parameters() if id(p) not in known]
    return adam(args, [weights, features, r], args.learning_rate)


def set_rates(args, optimizer, warmup, decay, selecting):
    """The learning rates of an update; r's does not fall.

    While layers are mixed W has the network's rate: its gradients are small then, and Adam would
    magnify them.
    """
    features = args.learning_rate if selecting else args.learning_rate_features
    rates = args.learning_rate * warmup * decay, features * warmup * decay
    for group, rate in zip(optimizer.param_groups, (*rates, args.learning_rate_r * warmup)):
        group["lr"] = rate


def train(args):
    run = Run(args, "linvideo")
    teacher = start_teacher(run, attention=True)
    start = starting_network(run, teacher)
    refuse(wrong_networks(args, teacher, start))
    teacher.conditions = Conditions(args, teacher.base)
    grid = step_grid(args.sampling_steps, teacher.shift)  # 1 = t_0 > ... > t_K = 0, shifted
    student = trainable(run, start, "student", args.lora_rank)
    del start  # the student has a copy
    critic = None
    if args.objective in CRITICS:
        critic = trainable(run, teacher.base, "critic", args.fake_lora_rank)
    freeze_teacher(run, teacher)
    run.spread_tokens(teacher.net, student, critic)
    mixed = mix_attention(student, args.feature_map, args.r_init, args.feature_dim)
    try_network(teacher.base, teacher, run.device)
    ema = average_of(run, student)
    attend_by_adapter(ema)
    optimizer = student_optimizer(args, student, mixed)
    state = dict(student=student, ema=ema, optimizer=optimizer)
    if critic:
        optimizer_fake = adam(args, [critic.parameters()], args.learning_rate_fake)
        state |= dict(critic=critic, optimizer_fake=optimizer_fake)
    run.start(**state)  # resumed, where that is asked for
    selection = start_selection(args, mixed)
    papers_adm = (args.objective, args.weight, args.regression_weight) == ("adm", "eq13", 0)
    introduce(run, teacher, selection)
    own = None  # the student's own trajectories, with --state policy
    if (args.objective, args.state) == ("adm", "policy"):
        own = start_own_trajectories(run, teacher)
    if run.first < args.max_train_steps:
        bank = make_bank(run, teacher, grid)
    film = film_of_attention(run, teacher, student, grid)

    for step in run.steps():
        warmup, decay = run.rate(step)
        selecting = selection.layers is None and step < selection.end
        set_rates(args, optimizer, warmup, decay, selecting)
        if critic:
            optimizer_fake.param_groups[0]["lr"] = args.learning_rate_fake * warmup * decay
        if selection.layers is None and not selecting:
            end_selection(run, step, selection, student, teacher, bank, grid)

        if own:
            make_own_trajectories(run, step, own, bank, student, teacher, grid)

        # ---- the critic of the baselines: R updates, each on samples of the current student
        for inner in range(args.fake_update_ratio if critic else 0):
            for draw in run.micro_batches(step, inner, teacher):
                with run.autocast():
                    loss = critic_loss(args, draw, critic, student, teacher, bank, grid)
                (loss * run.share).backward()
                run.note(loss_fake=loss)
            run.update(optimizer_fake, "critic")

        # ---- the student: its weights, W and r by the objective; teacher and critic are constants
        for draw in run.micro_batches(step, "student", teacher):
            with run.autocast():
                if args.objective == "mse" or own:  # on the teacher's states, or the student's
                    x_t, v_t, t, cond, _ = bank_states(args, draw, own or bank, teacher, grid)
                    loss, g, v, v_hat = regression_loss(student, x_t, v_t, t, cond)
                elif args.objective == "dmd":
                    x0, cond = one_jump(args, draw, student, teacher, bank, grid)
                    eps, t = noise_and_time(draw, teacher)
                    loss, g, v, v_hat = dmd_baseline_loss(x0, teacher.net, critic, eps, t, cond)
                elif papers_adm:
                    x_t, _, t, s, cond = step_to_x_hat(args, draw, student, teacher, bank, grid)
                    loss, g, v, v_hat = adm_loss(student, teacher.net, x_t, t, s, cond)
                else:
                    places = step_to_x_hat(args, draw, student, teacher, bank, grid)
                    nets = student, teacher.net, critic or student
                    loss, g, v, v_hat = adm_variant_loss(args, *nets, *places)
            (loss * run.share).backward()
            run.note(loss=loss)
            run.note_rms(g=g)
            run.note_scores(v, v_hat)
        pull_on_r(run, step, selection)
        run.update(optimizer, "student")
        with torch.no_grad():
            for i, r in enumerate(selection.r):
                r.clamp_(0, 1)
                run.note(**{f"r_{i}": r})
        if args.ema_decay:
            run.update_ema(ema, student, step)
        film.frame(step)
        if run.end_step(step, show=("loss", "g")):  # True: time to save
            save_previews(run, teacher, ema, selection, grid, step)
            run.save(step)
    # the layers are fixed already, unless the run was cut short while it selected them
    net = convert(run, ema, selection.layers_now(), args.feature_map, args.feature_dim).eval()
    if run.first >= args.max_train_steps:  # a finished run is written out again, perhaps elsewhere
        save_student(run, teacher, net, grid)
    finish(run, teacher, net, grid)


# ---- what the run leaves behind ------------------------------------------------------------------


def introduce(run, teacher, selection):
    """Print what is trained, and a note where no layer could leave softmax attention at first."""
    args, target, (first, last) = run.args, selection.target, selection.alpha
    how = f"{target} of {len(selection.mixed)} layers linear ({args.feature_map})"
    objective = args.objective if args.objective in ("mse", "dmd") else f"adm, {args.state}"
    sampler = f"{args.sampling_steps} Euler steps"
    what = f"{how}, {' '.join(args.select)}; {objective}; {sampler}"
    report.introduce(run, teacher, teacher.base, what)
    if selection.layers is None and r_is_held(args, len(selection.mixed), target, first):
        until = "" if last >= target else f" until it has fallen below {target}"
        run.say(
            f"note: with {target} linear layer(s), --r_init {args.r_init:g} and --alpha {first:g} "
            f"the regulariser holds every r at 1{until}; lower --r_init, or give --no_regularizer"
        )
    if selection.layers is None and not selection.end:
        run.say(
            f"note: no update selects layers, and the first {target} become linear; give a larger "
            "--selection_share, or more --max_train_steps"
        )


def film_of_attention(run, teacher, student, grid):
    """ring.gif: the student's x0 against the teacher's, and its samples, as it is trained.

    So while layers are selected it is the mixture, and without the average of weights.
    """
    diffusion, scale = teacher.diffusion, run.args.guidance_scale

    def x0_of(net):
        return lambda x, t, cond, uncond: diffusion.guided_x0(net, x, t, cond, uncond, scale)

    nets, sampler = (teacher.net, student), student_sampler(run, student, teacher, grid)
    return Film(run, teacher, sampler, *map(x0_of, nets), names=("teacher", "student"), larger=5)


def save_previews(run, teacher, ema, selection, grid, step):
    """samples.png and student/ of a run that goes on: what would be linear if it ended now.

    The copy that is made for them goes when they are written: it is as large as the teacher.
    """
    args = run.args
    net = convert(run, ema, selection.layers_now(), args.feature_map, args.feature_dim)
    sampler = student_sampler(run, net, teacher, grid)
    report.save_previews(run, teacher, {f"student, step {step + 1}": sampler})
    save_student(run, teacher, net, grid)


def save_student(run, teacher, net, grid):
    """student/; sampler.json has the guidance, which this student still needs."""
    guidance_scale = run.args.guidance_scale
    report.save_student(run, teacher, net, grid[:-1], guidance_scale=guidance_scale)


def finish(run, teacher, net, grid):
    """r.png, samples.png and report.json: the student at all steps of its sampler, and at four."""
    calls = 1 if run.args.guidance_scale == 1 else 2
    own = student_sampler(run, net, teacher, grid)
    four = student_sampler(run, net, teacher, step_grid(4, teacher.shift))
    students = {"student": (calls * (len(grid) - 1), own), "student_4": (calls * 4, four)}
    extra = {"linear_layers": net.config["linear_layers"], **read_selection(run)}
    if teacher.world:  # else no row takes it, and 200 videos may take hours
        extra["paired_mse"] = paired_error(run, teacher, own, grid)
    if run.main:
        save_selection_picture(run.folder, len(net.self_attentions))
    parameters = sum(p.numel() for p in net.parameters())
    report.finish(run, teacher, grid[:-1], students, parameters, {"student": extra})


def paired_error(run, teacher, sampler, grid):
    """Mean squared distance of 200 samples to the teacher's from the same noise.

    -> float on rank 0, None on the others.
    """
    index = teacher.conditions.preview(200)

    def drawn(sampler):
        return report.many_on_all_ranks(
            run, lambda a, b: sampler(index, a, b), 200, teacher.shape, run.B
        )[0]

    x, y = drawn(sampler), drawn(report.teacher_sampler(run, teacher, grid, "euler"))
    return float((x - y).square().mean()) if run.main else None


def read_selection(run):
    """What selection.json says of the selection's end, for report.json; {} for given layers."""
    path = os.path.join(run.folder, "selection.json")
    if run.args.select != ["learned"] or not os.path.isfile(path):
        return {}
    return {name: value for name, value in load_json(path).items() if name != "linear_layers"}


def save_selection_picture(folder, layers, width=720, row=22):
    """r.png: a line of colour for each layer over the updates of log.csv.

    Red is softmax attention, white one half, blue linear attention.
    """
    with open(os.path.join(folder, "log.csv"), newline="") as f:
        lines = list(csv.DictReader(f))
    if not lines:  # a finished run that is written out again elsewhere
        return
    # r (layers, updates), then (layers, width)
    r = torch.tensor([[float(line[f"r_{i}"]) for line in lines] for i in range(layers)])
    updates = r.shape[1]
    r = r[:, (torch.arange(width) * updates / width).long()]
    softmax, linear = torch.tensor([200.0, 60, 50]), torch.tensor([40.0, 90, 190])
    far = (2 * r - 1).abs()[..., None]  # 0 at one half, 1 at both ends
    end = torch.where(r[..., None] > 0.5, softmax, linear)
    colour = (255 * (1 - far) + far * end).byte()  # (layers, width, 3)
    image = Image.new("RGB", (width + 170, row * layers + 24), "white")
    pen = ImageDraw.Draw(image)
    for i in range(layers):
        line = Image.fromarray(colour[i, None].expand(row - 2, -1, -1).numpy())
        image.paste(line, (70, row * i))
        kind = "linear" if r[i, -1] < 0.5 else "softmax"
        pen.text((4, row * i + 4), f"layer {i}", fill="black")
        pen.text((width + 78, row * i + 4), f"{kind}  r = {r[i, -1]:.2f}", fill="black")
    legend = "red = softmax attention, white = one half, blue = linear attention"
    pen.text((70, row * layers + 6), f"update 1 to {updates}: {legend}", fill="black")
    image.save(os.path.join(folder, "r.png"))


def sample_only(args):
    """--sample FOLDER: load a saved student and its sampler.json, write samples to --output_dir."""
    run = Run(args, "linvideo")
    student, saved, teacher = report.load_student(run)
    args.guidance_scale = saved["guidance_scale"]
    calls = (1 if args.guidance_scale == 1 else 2) * len(saved["times"])
    sampler = student_sampler(run, student, teacher, saved["times"] + [0.0])
    report.write_samples(run, teacher, sampler, calls)


# ---- what an update costs, for --dry_run ---------------------------------------------------------


def cost(args):
    """-> the networks, and the backward passes of one student update (models/plumbing/dry_run.py).

    While layers are selected the student computes both kinds of attention in each. student/ is a
    copy in which that is decided, without adapters.
    """

    def mixed(net):
        mix_attention(net, args.feature_map, args.r_init, args.feature_dim)

    rank = args.lora_rank
    networks = [
        Network("teacher", "teacher"),
        Network("student", "trained", rank, change=mixed),
        Network("converted", "copy", saved=True, change=mixed),
    ]
    if args.ema_decay:
        networks.append(Network("ema", "average", rank, change=mixed))
    guided, objective = 1 if args.guidance_scale == 1 else 2, args.objective
    calls, turns = {}, []
    if objective in CRITICS:
        networks.append(Network("critic", "trained", args.fake_lora_rank))
        make = {"student": 1 if objective == "dmd" else args.critic_steps}
        turns.append(Turn("critic", args.fake_update_ratio, make, {"critic": 1}))
    if (objective, args.state) == ("adm", "policy"):  # its trajectories, shared out over ranks
        ranks = args.dry_run or place_among_ranks(os.environ)[1]
        rows = args.fresh / args.fresh_every * args.sequence_ranks / ranks
        rows /= args.train_batch_size * args.gradient_accumulation_steps
        calls = dict.fromkeys(("teacher", "student"), rows * args.sampling_steps * guided)
    elif objective != "mse":
        calls = {"teacher": 1, "student" if objective == "adm" else "critic": 1}
    if args.state == "rollout" and objective.startswith("adm"):
        calls["student"] = calls.get("student", 0) + (args.sampling_steps - 1) * guided
    return networks, [*turns, Turn("student", 1, calls, {"student": 1})]


def bank_on_disk(args, shape, ranks):
    """Bytes of the teacher's trajectories and of the student's own.  -> {what: bytes}"""
    folder = args.bank or os.path.join(args.output_dir, "bank")
    size = bank_size(SimpleNamespace(args=args, parts=ranks // args.sequence_ranks), folder)
    each = bytes_of_trajectory(args, SimpleNamespace(shape=shape))
    own = {}
    if (args.objective, args.state) == ("adm", "policy"):
        own = {"the student's trajectories": OwnTrajectories(args).kept * each}
    return {"the teacher's trajectories": size * each, **own}


# ---- flags ---------------------------------------------------------------------------------------

PRESETS = {  # the flags' defaults suit small networks; what other teachers change of them
    "clips": dict(timestep_shift=2.0),
    "ring": dict(
        max_train_steps=400, train_batch_size=128, bank_size=512, sampling_steps=10,
        checkpointing_steps=200, lr_warmup_steps=10, teacher_steps=16,
    ),
    "released": dict(  # the paper's updates and lambda; docs/linvideo.md says why the rest
        max_train_steps=3000, train_batch_size=1, learning_rate=1e-5, learning_rate_features=1e-4,
        guidance_scale=5.0, sampling_steps=50, ema_decay=0.0, max_grad_norm=1.0, lr_warmup_steps=0,
        lr_decay_share=0.0, bank_size=None, bank_batch=1, preview_samples=2,
        preview_every=500, gradient_checkpointing=True, count="soft", selection_weight=0.01,
        own_trajectories=64, fresh=8, fresh_every=25,
    ),
}  # fmt: skip


# fmt: off
def add_objective_flags(p):
    add = p.method.add_argument
    add("--objective", choices=["adm", "mse", "dmd", "adm_critic"], default="mse",
        help="anytime distribution matching (paper), regression onto the teacher's velocity (Eq. "
        "7), few-step DMD with a critic, or adm with a critic for the student's score (Tab. 4)")
    add("--state", choices=["policy", "part", "step", "jump", "rollout"], default=None,
        help="what adm takes for x_hat (paper: not stated). policy: states of the student's own "
        "sampler, the limit of short steps. From a state of the bank: part, by a random part of a "
        "sampler step; step, by the whole step; jump, to any later time. rollout: by one step from "
        "a state of the student's own (default: policy; part for adm_critic)")
    add("--part", type=number(float, 0.001, 1), default=1.0,
        help="the largest share of a sampler step, for --state part")
    add("--weight", choices=["eq13", "velocity", "unit", "dmd"], default="velocity",
        help="of adm's gradient where a step leads to x_hat, at s. eq13: (1 - s) / s (paper); "
        "unit: 1; velocity: 1, without the step's length; dmd: that of x0 over its mean size")
    add("--own_trajectories", type=number(int, 1), default=256,
        help="how many of the student's latest trajectories --state policy reads")
    add("--fresh", type=number(int, 1), default=2,
        help="how many new ones are made at a time, by all ranks together")
    add("--fresh_every", type=number(int, 1), default=1, help="updates between two such times")
    add("--regression_weight", type=number(float, 0), default=0.0,
        help="weight of Eq. 7 beside adm (paper: 0)")
    add("--min_time", type=number(float, 0.001, 0.5), default=0.02,
        help="smallest time of x_hat; at 0 Eq. 13 diverges")
    add("--sampling_steps", type=number(int, 2), default=20, help="K, Euler steps (Wan: 50)")
    add("--uncond_share", type=number(float, 0, 1), default=0.1,
        help="share of samples without condition, where there is guidance")
    add("--critic_steps", type=number(int, 1), default=8,
        help="Euler steps of the samples that adm_critic's critic sees")


def add_selection_flags(p):
    add = p.method.add_argument
    add("--target_layers", type=number(int, 1), default=None,
        help="how many layers become linear (default: half; paper: 16 of 30, 22 of 40)")
    add("--select", nargs="+", default=["learned"], metavar="HOW",
        help="learned (paper), first, last, uniform, random, or a list of layers from 0")
    add("--feature_map", choices=FEATURE_MAPS[:-1], default="hedgehog",
        help="phi of linear attention (paper: hedgehog, Eq. 6)")
    add("--feature_dim", type=number(int, 1), default=None,
        help="columns of hedgehog's projections W (default: the head size, as in the paper; half "
        "of it gives as many features as the head size in all, and half the arithmetic)")
    add("--count", choices=["round", "soft"], default="round",
        help="how the constraint counts linear layers: rounded, with a gradient straight through "
        "(paper), or as the sum of 1 - r")
    add("--selection_weight", type=number(float, 0), default=0.001,
        help="lambda of constraint and regulariser (paper: .01, its reduction is not stated)")
    add("--alpha", type=number(float, above=1), nargs=2, default=None, metavar=("FIRST", "LAST"),
        help="the regulariser's exponent, which falls linearly while layers are selected (paper: "
        "20 2; default: 4 2, or 20 2 where so few layers are wanted that 4 would hold every r)")
    add("--r_init", type=number(float, 0, 1), default=0.9,
        help="r of every layer at the start (paper: not stated)")
    add("--selection_share", type=number(float, 0, 1), default=0.3,
        help="share of the run in which r is trained; then the layers are fixed (paper: 1)")
    p.ablations.add_argument("--no_regularizer", action="store_true",
        help="the constraint alone (Tab. 3)")


def parse_args(argv=None):
    p = distillation_parser("Turn some of a video model's softmax self-attention layers into "
                            "linear attention, without data (LinVideo 2510.08318).", reuse=False)
    p.set_defaults(teacher="clips", max_train_steps=1200, learning_rate=1e-3, lr_warmup_steps=20,
                   ema_decay=0.98, lr_decay_share=0.4, adam_betas=[0.9, 0.99], preview_samples=12,
                   fake_update_ratio=1, learning_rate_fake=1e-3)
    critic = "not stated; the fake is the critic of adm_critic and dmd"
    paper_values(p, fake_update_ratio=critic, learning_rate_fake=critic)
    add_selection_flags(p)
    add_objective_flags(p)
    add = p.optimiser.add_argument
    add("--learning_rate_features", type=number(float, above=0), default=1e-2,
        help="learning rate of phi's W once the layers are fixed; before, it is --learning_rate "
        "(paper: not stated)")
    add("--learning_rate_r", type=number(float, above=0), default=1e-2,
        help="learning rate of r, constant (paper: not stated)")
    add = p.run.add_argument
    add("--bank", default=None, metavar="FOLDER", help="the teacher's trajectories: written there "
        "once, read where they are there already (default: OUTPUT_DIR/bank)")
    add("--bank_size", type=number(int, 1), default=2560,
        help="trajectories of K states each (paper: 50,000 states; None: those of a bank that is "
        "there, else as many as the run reads, at most 50,000)")
    add("--bank_batch", type=number(int, 1), default=64, help="trajectories in a file of the bank")
    args = parse(p, argv, "linvideo", PRESETS, wrong_flags, ignored_flags)
    if args.objective not in CRITICS:
        args.learning_rate_fake = None  # no rate to lower where a run fails
    if layers_listed(args) and "target_layers" not in given_flags(p, argv):
        args.target_layers = None  # the paper's number is of layers that are learned
    args.state = args.state or STATES.get(args.objective, "part")
    return args


STATES = {"adm": "policy"}  # --state, by --objective
CRITICS = ("adm_critic", "dmd")  # objectives with a critic


def ignored_flags(a):
    """Flags that this objective would not read: see `flags.unread`."""
    state, adm = a.state or STATES.get(a.objective, "part"), a.objective.startswith("adm")
    part, policy = adm and state == "part", (a.objective, state) == ("adm", "policy")
    yield "learning_rate_fake fake_update_ratio fake_lora_rank", a.objective not in CRITICS, (
        f"--objective {a.objective} has no critic, {' and '.join(CRITICS)} have")
    yield "critic_steps", a.objective != "adm_critic", (
        "only --objective adm_critic makes samples for a critic")
    yield "part", not part, "it is for --state part of --objective adm and adm_critic"
    yield "own_trajectories fresh fresh_every", not policy, (
        "it is for --state policy of --objective adm")


def wrong_flags(a):
    """Flags that do not go together: pairs (wrong, why)."""
    state = a.state or STATES.get(a.objective, "part")
    rollout, beside, policy = state == "rollout", a.regression_weight > 0, state == "policy"
    adm = a.objective.startswith("adm")
    yield rollout and a.sampling_steps < 3, \
        "--state rollout needs --sampling_steps of at least 3"
    yield beside and not adm, "--regression_weight is for --objective adm or adm_critic"
    yield beside and (rollout or policy), (f"--regression_weight needs states of the bank, not "
                                           f"--state {state}: give --state part")
    yield policy and a.objective != "adm", (f"--state policy is for --objective adm, not "
                                            f"{a.objective}: leave --state out")
    for flag, unread in (("state", a.state), ("weight", a.weight != "velocity")):
        yield unread and not adm, (f"--{flag} {getattr(a, flag)} is for --objective adm or "
                                   f"adm_critic, not {a.objective}: leave --{flag} out")
    yield a.objective == "dmd" and a.guidance_scale != 1, (
        "--objective dmd: the bank's states are of guided samples, and its jumps and scores are "
        "not: give --guidance_scale 1")
    yield a.select == ["learned"] and a.selection_weight == 0, (
        "--selection_weight 0: nothing leads r to 0 and chooses layers: give more, or --select")
    yield a.feature_dim is not None and a.feature_map != "hedgehog", \
        f"--feature_dim is for --feature_map hedgehog: {a.feature_map} has no projections"
    yield policy and a.weight != "velocity", (f"--weight {a.weight} is for a step to x_hat, which "
                                              "--state policy does not take: give --state part")


def wrong_networks(a, teacher, start):
    """What the networks rule out: pairs (wrong, why). start: what the student is a copy of."""
    net, name = teacher.base, f"--teacher {a.teacher}"
    replaceable = hasattr(net, "self_attentions")
    flow = isinstance(teacher.schedule, Flow) and teacher.prediction == "flow_v"
    yield not flow, (f"{name} predicts {teacher.prediction}; the score of Eq. 13 is a flow's: "
                     "give a teacher that predicts a flow's velocity, eps - x0, such as Wan")
    grid = step_grid(a.sampling_steps, teacher.shift)  # the last states that a step starts from:
    least = grid[-2] if a.state == "jump" else grid[-3]
    backwards = a.objective.startswith("adm") and a.state in ("part", "step", "jump", "rollout")
    yield backwards and a.min_time >= least, (
        f"--min_time {a.min_time:g}: --state {a.state} steps on from t = {least:.3g} too, and "
        "would lead up in noise: give less")
    yield not replaceable, (f"{name}: a {type(net).__name__} has no self-attention that can be "
                            "replaced; DiT and Wan have")
    yield "linear_layers" in net.config, (f"{name} has linear attention already: give the network "
                                          "that it was made from")
    yield "linear_layers" in start.config, (f"--student_init {a.student_init} has linear attention "
                                            "already: give the network that it was made from")
    yield replaceable and (a.feature_dim or 0) > net.head_dim, (
        f"--feature_dim {a.feature_dim} is wider than {name}'s heads: give at most {net.head_dim}")
    yield from wrong_selection(a, len(net.self_attentions))


def wrong_selection(a, count):
    """--select and --target_layers in a network of `count` layers: pairs (wrong, why)."""
    select, listed, n = f"--select {' '.join(a.select)}", layers_listed(a), len(a.select)
    valid = all(s.isdecimal() and int(s) < count for s in a.select)
    distinct = valid and len(set(map(int, a.select))) == n
    yield listed and not distinct, (f"{select}: give one of {', '.join(RULES)}, or different "
                                    f"layers of 0 to {count - 1}")
    yield listed and a.target_layers not in (None, n), (
        f"{select} names {n} layer(s), --target_layers says {a.target_layers}: leave one of them "
        "out")
    target, _ = chosen_layers(a, count)
    yield not 1 <= target <= count, (f"--target_layers {target}: this network has {count} "
                                     f"self-attention layer(s): give 1 to {count}")
# fmt: on


def main(argv=None):
    args = parse_args(argv)

    def check(args, teacher):  # --dry_run reads nothing of --student_init
        refuse(wrong_networks(args, teacher, teacher.base))

    if args.sample:
        sample_only(args)
    elif not dry_run(args, *cost(args), attention=True, disk=bank_on_disk, check=check):
        train(args)
        work_done(args, *cost(args), attention=True)


if __name__ == "__main__":
    run_main(main)
