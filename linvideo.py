"""LinVideo (arXiv 2510.08318 v2): turn softmax attention into linear attention, layer by layer, without data.

The idea. Self-attention over all tokens of a video costs O(n^2), linear attention O(n), but a whole network that was trained with the first does
not survive the change. So change a given number of layers only, and let training choose which: every layer computes a mixture of both kinds,
weighted by one number r, which a constraint on the count and a regulariser drive to 1 (stay) or 0 (linear). What keeps the network a good
sampler meanwhile is distribution matching at any time t of the teacher's own trajectory: the states the student reaches shall be as likely
under the teacher. Student and teacher are both flow models, so both scores are known: the student is its own fake score. No data, only a bank
of states that the teacher's sampler passes through.

    paper             here                  meaning                                                              shape
    r^(l)             r                     weight of softmax attention in layer l, 1 = softmax, 0 = linear      (layers,)
    phi               features of LinearAttention  softmax(x W) and softmax(-x W), after q/k norm and rotation   (B, N, H, 2 D)
    target            target_layers         how many layers become linear                                        int
    x_t, u_t          x_t, v                state and velocity on the teacher's trajectory, from the bank        (B, ...)
    x-hat_t           x_hat                 state the student reaches from x_t, at time s < t                    (B, ...)
    u, u-hat          v_teacher, v_student  velocities of teacher and student at x-hat                           (B, ...)

Launch.
    laptop      python linvideo.py                               # clips, 4 of 8 layers linear, under eight minutes on two cores
                python linvideo.py --objective adm --weight unit --learning_rate 1e-4    # Eq. 11 to 13 without a weight; the default is Eq. 7
                python dmd.py --teacher clips --student_init runs/linvideo-clips/student --student_steps 4
    one GPU     python linvideo.py --teacher Wan2.1-T2V-1.3B-Diffusers --prompts prompts.safetensors --mixed_precision bf16
    one node    torchrun --nproc-per-node 8 linvideo.py (the same flags; --train_batch_size is per rank, each rank makes its share of the bank)
    many nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 linvideo.py ... (output_dir on a shared disk)
    ablations   python linvideo.py --no_regularizer              # Tab. 3
                python linvideo.py --select first                # or last, uniform, random, or layers from 0: --select 1 2 5 6
                python linvideo.py --objective adm_critic        # Tab. 4: the score of a separately trained network
                python linvideo.py --objective dmd               # Tab. 4: few-step distillation at the same time
    sampling    python linvideo.py --sample runs/linvideo-clips/student

Deviations, and why. No code of the authors exists; what the paper leaves open is chosen and measured in docs/linvideo.md: how x-hat is reached
(--state), the sign of the constraint, the straight-through rounding, start and rate of r, and a last phase with exactly the wanted number of
layers fixed. The default objective is regression (Eq. 7): the paper's is stable only at small rates and
without the weight (1 - t) / t, costs 1.7 times as much, and stayed behind at equal updates.
"""
import copy
import csv
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from tqdm import tqdm

from kernels.linear_attention import FEATURE_MAPS, LinearAttention, use_linear_attention
from models import io, report
from models.diffusion import Flow, add_noise, expand, guide, sample_teacher, shift, step_grid
from models.toy import WORLDS, load_world

# ---- the method: selective transfer (Sec. 4.1) -----------------------------------------------------------------------


class MixedAttention(nn.Module):
    """r softmax attention + (1 - r) linear attention of the same q, k, v (Eq. 8), r one trained number; once `only` is set, that branch alone.

    q, k, v (B, N, H, D) after norm and rotation -> (B, N, H, D). At r = 1 this is the softmax attention, bit for bit.
    """

    def __init__(self, softmax, heads, head_dim, feature_map, r):
        super().__init__()
        self.softmax, self.linear, self.only = softmax, LinearAttention(heads, head_dim, feature_map), None
        self.r = nn.Parameter(torch.tensor(float(r)))
        self.register_buffer("decided", torch.tensor(False))  # so that a resumed run knows

    def forward(self, q, k, v):
        if self.only:
            return self.softmax(q, k, v) if self.only == "softmax" else self.linear(q, k, v)
        return (self.r * self.softmax(q, k, v) + (1 - self.r) * self.linear(q, k, v)).to(v.dtype)

    def fix(self, linear):
        """From now on exactly one branch: linear, or softmax."""
        self.only = "linear" if linear else "softmax"
        self.r.requires_grad_(False).fill_(0.0 if linear else 1.0)
        self.r.grad = None
        self.decided.fill_(True)


def mix_attention(net, feature_map, r):
    """Put a MixedAttention into every self-attention layer of net.  -> the list of them."""
    for place in net.self_attentions:
        place.attend = MixedAttention(place.attend, net.heads, net.head_dim, feature_map, r)
    return [place.attend for place in net.self_attentions]


def constraint(r, target):
    """(number of linear layers - target)^2 with the layers counted by rounding, straight through (Eq. 9).  r (layers,) -> scalar.

    The paper prints sum round(r) - target; with r = 1 for softmax that would count the layers that stay. Gradient: -2 (count - target), for all.
    """
    rounded = r + (r.round() - r).detach()
    return ((1 - rounded).sum() - target) ** 2


def regularizer(r, alpha):
    """sum 1 - |2 r - 1|^alpha (Eq. 10): 0 at r = 0 and 1, 1 each at r = 1/2; a large alpha is flat in between.  r (layers,) -> scalar."""
    return (1 - (2 * r - 1).abs() ** alpha).sum()


def smallest(r, target):
    """The `target` layers with the smallest r, of equal ones the first.  -> sorted list of indices."""
    return sorted(sorted(range(len(r)), key=lambda i: (float(r[i]), i))[:target])


def convert(net, layers, feature_map):
    """A copy of a network of MixedAttention layers with one branch each: the trained LinearAttention in `layers`, softmax attention elsewhere.

    The other branches are gone, weights and all, and the config names the linear layers."""
    net = copy.deepcopy(net)
    mixed = [place.attend for place in net.self_attentions]
    use_linear_attention(net, layers, feature_map)
    for i, (place, m) in enumerate(zip(net.self_attentions, mixed)):
        del place.attend  # a module's attribute that becomes a plain function
        place.attend = m.linear if i in layers else m.softmax
    return net


# ---- the method: anytime distribution matching (Sec. 4.2) ---------------------------------------------------------------


def matching_gradient(x_hat, v_teacher, v_student, t, weight="eq13"):
    """s-hat - s, the gradient of KL(q_t || p_t) at x_hat, from the velocities there, without gradient (Eq. 12 and 13).

    For a flow the score is -(x + (1 - t) v) / t, so the difference is (1 - t) / t (v_teacher - v_student). weight "eq13": that; "unit": the
    bare difference of velocities; "dmd": of x0, over the mean distance of x_hat's x0 to the teacher's, as in DMD.  (B, ...), t (B,) -> (B, ...).
    """
    difference = (v_teacher - v_student).detach()
    if weight == "eq13":
        return expand((1 - t) / t, difference) * difference
    if weight == "dmd":
        x0_distance = (expand(t, difference) * difference).abs().flatten(1).mean(1)  # mean |x0_student - x0_teacher|
        return expand(t / x0_distance.clamp_min(1e-8), difference) * difference
    return difference


def matching_loss(x_hat, g):
    """1/2 |x_hat - sg(x_hat - g)|^2, mean over all elements: its gradient is g in x_hat, whatever x_hat.  (B, ...) -> scalar."""
    return 0.5 * (x_hat - (x_hat - g).detach()).square().mean()


def flow_matching_loss(net, x0, eps, t, cond):
    """|v - (eps - x0)|^2 at x_t = (1 - t) x0 + t eps: trains the score of given samples x0.  (B, ...), t (B,) -> scalar."""
    x_t = add_noise(Flow(), x0, eps, t)
    return (net(x_t, t, **cond).to(x_t.dtype) - (eps - x0)).square().mean()


# ---- the bank of states (data-free) --------------------------------------------------------------------------------------


@torch.no_grad()
def trajectory(teacher, z, grid, cond, uncond, guidance_scale):
    """Euler from noise along grid, guided.  z (B, ...) -> states x_t (B, K, ...), the conditional and, if guided, unconditional velocity
    at each (B, K, ...): the pairs (x_t, u_t) of the paper."""
    x, states, velocity, plain = z, [], [], []
    for t, s in zip(grid[:-1], grid[1:]):
        v = v_guided = teacher(x, z.new_full((len(z),), t), **cond).to(x.dtype)
        if guidance_scale != 1:
            plain.append(teacher(x, z.new_full((len(z),), t), **uncond).to(x.dtype))
            v_guided = guide(v, plain[-1], guidance_scale)
        states.append(x)
        velocity.append(v)
        x = x + (s - t) * v_guided
    return {"x": torch.stack(states, 1), "v": torch.stack(velocity, 1), **({"v_uncond": torch.stack(plain, 1)} if plain else {})}


# ---- plumbing: identical in every script ---------------------------------------------------------------------------


def start_ranks():
    """-> rank, world_size, device. Under torchrun joins the process group (nccl on GPUs, gloo on the CPU)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))  # rank 0 may sample for long
    return rank, world_size, device


def mean_over_ranks(*values):
    """Scalars averaged over ranks, as floats; also where ranks wait for one another."""
    v = torch.stack([torch.as_tensor(x).detach().float().cpu() for x in values])
    if dist.is_initialized():
        v = v.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(v)
        v = v.cpu() / dist.get_world_size()
    return v.tolist()


def update(optimizers, max_grad_norm, what, loss):
    """Average gradients over ranks, clip, check that all ranks are finite, step. -> gradient norm before clipping."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
    if dist.is_initialized():
        for p in parameters:  # every rank has the same parameters in the same order; FSDP2 does this in its backward
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not all(abs(v) < float("inf") for v in mean_over_ranks(loss, norm)):  # NaN compares false; same verdict on all ranks
        raise io.TrainingError(f"{what} loss or gradient is not finite ({float(loss):.4g}, norm {float(norm):.4g}); the last "
                               "checkpoint under state/ is intact; start again with a lower learning rate or max_grad_norm")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(norm)


@torch.no_grad()
def update_ema(ema, net, decay):
    for a, b in zip(ema.parameters(), net.parameters()):
        a.lerp_(b, 1 - decay)


# ---- training ------------------------------------------------------------------------------------------------------


def chosen_layers(args, count):
    """--target_layers and --select for a network of `count` layers -> number of linear layers, list of them or None: learned.  Raises UserError."""
    names, select = ("learned", "first", "last", "uniform", "random"), args.select
    listed = len(select) > 1 or select[0] not in names
    if listed and (not all(s.isdecimal() and int(s) < count for s in select) or len(set(map(int, select))) < len(select)):
        raise io.UserError(f"--select {' '.join(select)}: give one of {', '.join(names)}, or different layers of 0 to {count - 1}")
    if listed and args.target_layers not in (None, len(select)):
        raise io.UserError(f"--select {' '.join(select)} names {len(select)} layer(s), --target_layers says {args.target_layers}: leave one of them out")
    target = len(select) if listed else max(1, count // 2) if args.target_layers is None else args.target_layers
    if not 1 <= target <= count:
        raise io.UserError(f"--target_layers {target}: this network has {count} self-attention layer(s): give 1 to {count}")
    if listed:
        return target, sorted(map(int, select))
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed)).tolist()
    return target, {"learned": None, "first": list(range(target)), "last": list(range(count - target, count)), "random": sorted(shuffled[:target]),
                    "uniform": [int((i + 0.5) * count / target) for i in range(target)]}[select[0]]


def make_bank(args, teacher, conditions, shape, grid, rank, world_size, device):
    """The teacher's trajectories, written once: every rank makes its share, those already there are kept.  -> an open io.Bank."""
    about = {"teacher": io.weights_hash(teacher.folder), "trajectories": args.bank_size, "grid": grid, "guidance_scale": args.guidance_scale,
             "seed": args.seed, "shape": list(shape), "prompts": conditions.prompts and conditions.prompts.fingerprint()}
    bank = io.Bank(args.bank or os.path.join(args.output_dir, "bank"), about, args.bank_size, args.bank_batch, create=rank == 0)
    mean_over_ranks(0.0)  # nobody goes on before the folder is ready
    mine = [part for part in bank.missing() if part % world_size == rank]  # by number: others' files may appear while this rank looks
    for part in tqdm(mine, desc="bank", disable=rank > 0 or not mine):
        rows = bank.rows_of(part)
        draw = io.Draws(args.seed, "bank", 0, rows, device)
        index = conditions.index(draw)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            tensors = trajectory(teacher.net, draw.normal("z", shape), grid, *conditions.pick(index, device), args.guidance_scale)
        bank.write(part, {"index": index, **{k: v.half() for k, v in tensors.items()}})
    mean_over_ranks(0.0)
    return bank.open()


def train(args):
    rank, world_size, device = start_ranks()
    main_rank, B, K = rank == 0, args.train_batch_size, args.sampling_steps
    teacher = io.start_teacher(args, WORLDS)
    if not hasattr(teacher.base, "self_attentions"):
        raise io.UserError(f"--teacher {args.teacher}: a {type(teacher.base).__name__} has no self-attention that can be replaced; DiT and Wan have")
    if not isinstance(teacher.schedule, Flow) or teacher.prediction != "flow_v":
        raise io.UserError(f"--teacher {args.teacher} predicts {teacher.prediction}; the score of Eq. 13 is a flow's: give a teacher that predicts its velocity")
    if "linear_layers" in teacher.base.config:
        raise io.UserError(f"--teacher {args.teacher} has linear attention already: give the network that it was made from")
    target, fixed = chosen_layers(args, len(teacher.base.self_attentions))
    alpha_first, alpha_last = args.alpha or (min(4.0, max(2.0, target)), 2.0)
    shape, grid = tuple(args.sample_shape or teacher.base.latent_shape), step_grid(K, teacher.shift)
    world = load_world(teacher.world_name) if teacher.world_name in WORLDS else None
    student = copy.deepcopy(teacher.base)
    mixed = mix_attention(student, args.feature_map, args.r_init)
    student.to(device).requires_grad_(True).train()
    student.gradient_checkpointing = args.gradient_checkpointing
    critic = copy.deepcopy(teacher.base).to(device).requires_grad_(True).train() if args.objective in ("adm_critic", "dmd") else None
    io.freeze_teacher(args, teacher, device)
    conditions = io.Conditions(args, teacher.base)
    io.try_network(teacher.base, conditions, shape, device)
    ema = copy.deepcopy(student).requires_grad_(False).eval() if args.ema_decay else student

    r_all, features = [m.r for m in mixed], [p for m in mixed for p in m.linear.parameters()]
    known = {id(p) for p in r_all + features}
    weights = [p for p in student.parameters() if id(p) not in known]
    adam = dict(betas=tuple(args.adam_betas), fused=True)
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": args.weight_decay}, {"params": features, "weight_decay": 0.0},
                                   {"params": r_all, "weight_decay": 0.0}], lr=args.learning_rate, **adam)
    modules, optimizers = {"student": student, **({"ema": ema} if args.ema_decay else {})}, {"optimizer": optimizer}
    if critic:
        optimizer_fake = torch.optim.AdamW(critic.parameters(), lr=args.learning_rate_fake, weight_decay=args.weight_decay, **adam)
        modules["critic"], optimizers["optimizer_fake"] = critic, optimizer_fake
    start, spent_before = io.resume(args, modules, optimizers)
    if main_rank:
        io.prepare_output_dir(args.output_dir, args.resume_from_checkpoint)
    mean_over_ranks(0.0)  # nobody goes on before the folder is ready

    def fix_layers(layers):
        """The end of the selection: from here on every layer has one branch, and its r is 0 or 1."""
        for i, m in enumerate(mixed):
            m.fix(linear=i in layers)
        return layers

    hard_step = min(int(args.max_train_steps * args.selection_share), args.max_train_steps - 1)  # the selection ends before this update
    if fixed is not None or mixed[0].decided:
        fixed = fix_layers([i for i, r in enumerate(r_all) if r == 0] if fixed is None else fixed)
    bank = make_bank(args, teacher, conditions, shape, grid, rank, world_size, device) if start < args.max_train_steps else None
    log = io.Log(args.output_dir, start) if main_rank else None
    if main_rank:
        print(f"teacher {args.teacher}: {type(student).__name__}, {sum(p.numel() for p in weights):,} parameters, shift {teacher.shift:g}, guidance "
              f"{args.guidance_scale:g}; {device} x {world_size}\nstudent: {target} of {len(mixed)} layers linear ({args.feature_map}), {' '.join(args.select)}; "
              f"{args.objective}; bank of {args.bank_size} trajectories of {K} states")
        up = 0.0 if args.no_regularizer or args.r_init <= 0.5 else alpha_first * (2 * args.r_init - 1) ** (alpha_first - 1)  # half the pulls on r at the start
        if fixed is None and up >= target:
            print(f"note: with {target} linear layer(s), --r_init {args.r_init:g} and --alpha {alpha_first:g} the regulariser holds every r at 1; lower one of the two")
    times = torch.tensor(grid, device=device)

    def from_bank(draw):
        """A state of each of these rows' trajectories, and now and then without condition.  -> i (B,), x_t, v (B, ...), cond."""
        last = K - 1 if args.objective.startswith("adm") and args.state in ("step", "rollout") else K  # their steps do not land at s = 0
        i = torch.minimum((draw.spread("state") * last).long(), torch.tensor(last - 1, device=device))
        rows = bank.rows(draw.integer("trajectory", args.bank_size), i)
        cond, uncond = conditions.pick(rows["index"], device)
        x_t, v = rows["x"].to(device), rows["v"].to(device)
        if args.guidance_scale != 1:
            drop = draw.uniform("drop") < args.uncond_share
            cond = {k: torch.where(expand(drop, c), uncond[k], c) for k, c in cond.items()}
            v = torch.where(expand(drop, v), rows["v_uncond"].to(device), v)
        return i, x_t, v, cond

    @torch.no_grad()
    def roll_out(draw, cond, uncond, levels):
        """The student's own trajectory from noise along these levels, guided as the teacher's.  -> x at the last level (B, ...)."""
        return sample_teacher(student, teacher.schedule, teacher.prediction, draw.normal("z", shape), levels, cond, uncond, args.guidance_scale, "euler")

    def student_state(draw):
        """x_hat, a state that the student reaches by one step of its own with gradient, from where --state says (Eq. 12 needs dx_hat / dv_student).
        -> x_hat (B, ...), its time s (B,), cond, and, where it is asked for, the regression (Eq. 7) of that step's velocity, which needs the bank."""
        if args.state == "rollout":
            i = 1 + draw.agreed("i", K - 2)
            cond, uncond = conditions.draw(draw, device)
            x_t, t, s = roll_out(draw, cond, uncond, grid[:i + 1]), times[i].expand(B), times[i + 1].expand(B)
        else:
            i, x_t, v, cond = from_bank(draw)
            t, s = times[i], times[i + 1]
            if args.state == "part":
                s = t + args.part * draw.uniform("part") * (s - t)
            if args.state == "jump":
                s = shift(draw.uniform("jump") * (1 - i / K), teacher.shift)  # uniform in raw time
            s = torch.maximum(s, torch.full_like(s, args.min_time))
        v_student = student(x_t, t, **cond).to(x_t.dtype)
        regression = 0.5 * (v_student - v).square().mean() if args.regression_weight else 0.0
        return x_t + expand(s - t, x_t) * v_student, s, cond, regression

    def one_jump(draw):
        """x0 of the student from a state of the bank: what --objective dmd makes a sample.  -> x0 (B, ...), cond."""
        i, x_t, _, cond = from_bank(draw)
        return x_t - expand(times[i], x_t) * student(x_t, times[i], **cond).to(x_t.dtype), cond

    @torch.no_grad()
    def velocity_error():
        """Mean squared error of the student's velocity on 256 fixed states of the bank."""
        errors = []
        for first in range(0, 256, B):
            i, x_t, v, cond = from_bank(io.Draws(args.seed, "check", 0, range(first, first + B), device))
            errors.append((student(x_t, times[i], **cond).float() - v).square().flatten(1).mean(1))
        return float(torch.cat(errors).mean())

    began = time.time()
    lap, progress = io.Stopwatch(device), tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, disable=not main_rank)
    for step in progress:
        warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
        decay = min(1.0, (1 - step / args.max_train_steps) / max(args.lr_decay_share, 1e-9))
        rate_features = args.learning_rate if fixed is None and step < hard_step else args.learning_rate_features  # mixed: small gradients, which Adam would magnify
        for group, lr, falls in zip(optimizer.param_groups, (args.learning_rate, rate_features, args.learning_rate_r), (decay, decay, 1.0)):
            group["lr"] = lr * warmup * falls
        lap.restart()
        sums = dict.fromkeys(("loss", "loss_fake", "g"), 0.0)
        share = 1 / args.gradient_accumulation_steps

        # ---- the selection ends: exactly `target` layers become linear
        if fixed is None and step >= hard_step:
            r = [x.item() for x in r_all]
            before = velocity_error()
            fixed = fix_layers(smallest(r, target))
            found = {"linear_layers": fixed, "update": step, "r": r, "linear_by_rounding": sum(x < 0.5 for x in r), "undecided": sum(0.1 < x < 0.9 for x in r),
                     "velocity_error_before": before, "velocity_error_after": velocity_error()}
            if main_rank:
                io.save_json(found, os.path.join(args.output_dir, "selection.json"))

        # ---- critic of --objective adm_critic and dmd: R updates on samples of the current student
        for inner in range(args.fake_update_ratio if critic else 0):
            fake_loss = 0.0
            for micro in range(args.gradient_accumulation_steps):
                row = (micro * world_size + rank) * B
                draw = io.Draws(args.seed, step, inner, range(row, row + B), device)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    with torch.no_grad():  # no gradient into the student here
                        if args.objective == "dmd":
                            x0, cond = one_jump(draw)
                        else:
                            cond, uncond = conditions.draw(draw, device)
                            x0 = roll_out(draw, cond, uncond, step_grid(args.critic_steps, teacher.shift))
                    lap("student")
                    loss = flow_matching_loss(critic, x0, draw.normal("eps", shape), shift(draw.uniform("u", 0.02, 0.98), teacher.shift), cond)
                (loss * share).backward()
                fake_loss += loss.detach() * share
                sums["loss_fake"] += loss.item() * share / args.fake_update_ratio
            for group in optimizer_fake.param_groups:
                group["lr"] = args.learning_rate_fake * warmup * decay
            update([optimizer_fake], args.max_grad_norm, "critic", fake_loss)
            lap("fake")

        # ---- student: weights, features and r by the objective
        student_loss = 0.0
        for micro in range(args.gradient_accumulation_steps):
            row = (micro * world_size + rank) * B
            draw = io.Draws(args.seed, step, "student", range(row, row + B), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                if args.objective == "mse":  # Eq. 7
                    i, x_t, v, cond = from_bank(draw)
                    lap("data")
                    g = student(x_t, times[i], **cond).to(x_t.dtype) - v
                    loss = 0.5 * g.square().mean()
                elif args.objective == "dmd":
                    x0, cond = one_jump(draw)
                    t, eps = shift(draw.uniform("u", 0.02, 0.98), teacher.shift), draw.normal("eps", shape)
                    with torch.no_grad():
                        x_t = add_noise(teacher.schedule, x0, eps, t)
                        v_teacher, v_critic = teacher.net(x_t, t, **cond).to(x_t.dtype), critic(x_t, t, **cond).to(x_t.dtype)
                        distance = (x0 - x_t + expand(t, x_t) * v_teacher).abs().flatten(1).mean(1)  # mean |x0 - x0_real|
                        g = expand(t / distance.clamp_min(1e-8), x_t) * (v_teacher - v_critic)
                    loss = matching_loss(x0, g)
                else:  # Eq. 11 to 13
                    x_hat, s, cond, regression = student_state(draw)
                    lap("student")
                    with torch.no_grad():
                        v_teacher = teacher.net(x_hat, s, **cond).to(x_hat.dtype)
                        lap("teacher")
                        v_student = (critic or student)(x_hat, s, **cond).to(x_hat.dtype)  # the student is its own score
                    g = matching_gradient(x_hat, v_teacher, v_student, s, args.weight)
                    loss = matching_loss(x_hat, g) + args.regression_weight * regression
            (loss * share).backward()
            student_loss += loss.detach() * share
            sums["loss"] += loss.item() * share
            sums["g"] += g.square().mean().item() * share
        pull = dict.fromkeys(("r_objective", "r_constraint", "r_regularizer"), 0.0)  # norms of the three gradients on r
        if fixed is None:
            r = torch.stack(r_all)
            alpha = alpha_first + (alpha_last - alpha_first) * step / max(1, hard_step - 1)
            count, spread = constraint(r, target), regularizer(r, alpha)
            parts = [torch.stack([p.grad for p in r_all]), *(args.selection_weight * torch.autograd.grad(c, r, retain_graph=True)[0] for c in (count, spread))]
            pull = {name: part.norm().item() for name, part in zip(pull, parts)}
            (args.selection_weight * (count + (0.0 if args.no_regularizer else spread))).backward()
        norm = update([optimizer], args.max_grad_norm, "student", student_loss)
        with torch.no_grad():
            for r in r_all:
                r.clamp_(0, 1)
        if args.ema_decay:
            update_ema(ema, student, min(args.ema_decay, (1 + step) / (4 + step)))  # warm-up: a window of step / 3
        lap("student")

        done = step + 1
        sums = dict(zip(sums, mean_over_ranks(*sums.values())))
        sums["g"] **= 0.5
        if main_rank:
            log.write({"step": done, **sums, "norm_student": norm, **pull, **{f"r_{i}": r.item() for i, r in enumerate(r_all)}, **lap.columns(),
                       "peak_memory_mb": io.peak_memory_mb(device)})
            progress.set_postfix(loss=f"{sums['loss']:.5f}", g=f"{sums['g']:.4f}", linear=sum(r.item() < 0.5 for r in r_all), refresh=False)
        if main_rank and (done % args.checkpointing_steps == 0 or done == args.max_train_steps):
            net = convert(ema, smallest([r.item() for r in r_all], target), args.feature_map)
            report.save_samples(args.output_dir, [(f"student, update {done}", report.preview(args, world, conditions, student_sampler(
                args, net, teacher, conditions, shape, grid, device)))], world)
            save_student(args, net, teacher, grid, shape)
            io.save_for_resume(args, done, modules, optimizers, spent_before + time.time() - began)
    if main_rank:
        fixed = smallest([r.item() for r in r_all], target)  # the same again, but for a run that was cut short while it selected
        net = convert(ema, fixed, args.feature_map).eval()
        if start >= args.max_train_steps:  # a finished run is written out again, perhaps to another folder
            save_student(args, net, teacher, grid, shape)
        calls, short = 1 if args.guidance_scale == 1 else 2, step_grid(4, teacher.shift)
        own, few = (student_sampler(args, net, teacher, conditions, shape, levels, device) for levels in (grid, short))
        coarse = report.teacher_sampler(args, teacher, conditions, shape, device, grid, "euler")
        extra = {"linear_layers": fixed, **read_selection(args)}
        if world:  # else there is no row to put it in, and 200 videos of a released model take hours
            index = conditions.preview(200)
            pairs = [report.many(lambda a, b: f(index, a, b), len(index), B)[0] for f in (own, coarse)]
            extra["paired_mse"] = float((pairs[0] - pairs[1]).square().mean())
        save_selection_picture(args.output_dir, len(mixed))
        report.finish(args, "linvideo", teacher, world, conditions, shape, grid[:-1], {"student": (calls * K, own), "student_4": (calls * 4, few)},
                      sum(p.numel() for p in net.parameters()), spent_before + time.time() - began, device, {"student": extra})
    mean_over_ranks(0.0)

# ---- what the run leaves behind ------------------------------------------------------------------------------------


def student_sampler(args, net, teacher, conditions, shape, grid, device):
    """-> a function (index, first, last) -> those samples: the teacher's sampler, Euler, guided as in training."""
    return lambda index, a, b: sample_teacher(net, teacher.schedule, teacher.prediction, report.evaluation_noise(args, shape, device, a, b), grid,
                                              *conditions.pick(index[a:b], device), args.guidance_scale, "euler")


def save_student(args, net, teacher, grid, shape):
    """student/ as every script's; config.json names the linear layers, sampler.json has guidance, which this student keeps."""
    report.save_student(args, "linvideo", net, teacher, grid[:-1], shape, guidance_scale=args.guidance_scale)


def read_selection(args):
    """What selection.json says of the end of the selection, for report.json; nothing where the layers were given."""
    path = os.path.join(args.output_dir, "selection.json")
    return {k: v for k, v in io.load_json(path).items() if k != "linear_layers"} if args.select == ["learned"] and os.path.isfile(path) else {}


def save_selection_picture(folder, layers, width=720, row=22):
    """r.png: one line of colour per layer over the updates of log.csv, red = softmax, white = one half, blue = linear."""
    with open(os.path.join(folder, "log.csv"), newline="") as f:
        lines = list(csv.DictReader(f))
    if not lines:  # a finished run that is written out again elsewhere
        return
    r = torch.tensor([[float(line[f"r_{i}"]) for line in lines] for i in range(layers)])  # (layers, updates)
    updates = r.shape[1]
    r = r[:, (torch.arange(width) * updates / width).long()]  # (layers, width)
    softmax, linear = torch.tensor([200.0, 60, 50]), torch.tensor([40.0, 90, 190])
    far = (2 * r - 1).abs()[..., None]  # 0 at one half, 1 at both ends
    colour = (255 * (1 - far) + far * torch.where(r[..., None] > 0.5, softmax, linear)).byte()  # (layers, width, 3)
    image = Image.new("RGB", (width + 170, row * layers + 24), "white")
    pen = ImageDraw.Draw(image)
    for i in range(layers):
        image.paste(Image.fromarray(colour[i, None].expand(row - 2, -1, -1).numpy()), (70, row * i))
        pen.text((4, row * i + 4), f"layer {i}", fill="black")
        pen.text((width + 78, row * i + 4), f"{'linear' if r[i, -1] < 0.5 else 'softmax'}  r = {r[i, -1]:.2f}", fill="black")
    pen.text((70, row * layers + 6), f"update 1 to {updates}: red = softmax attention, white = one half, blue = linear attention", fill="black")
    image.save(os.path.join(folder, "r.png"))


def sample_only(args):
    """--sample FOLDER: load a saved student, read its sampler.json, write samples.png (GIF for videos) and latents to --output_dir."""
    _, _, device = start_ranks()
    net, sampler, teacher, world, conditions, shape = report.load_student(args, "linvideo", device)
    args.guidance_scale = sampler["guidance_scale"]
    grid = sampler["times"] + [0.0]
    draw = student_sampler(args, net, teacher, conditions, shape, grid, device)
    report.write_samples(args, world, conditions, shape, draw, (1 if args.guidance_scale == 1 else 2) * (len(grid) - 1), device)


# ---- flags ---------------------------------------------------------------------------------------------------------

# The flags' defaults suit the clips teacher. What released models change of them: the paper's values where it gives them.
CLIPS = dict(timestep_shift=2.0)  # other small teachers: their own shift
RELEASED = dict(max_train_steps=3000, train_batch_size=1, learning_rate=1e-5, learning_rate_features=1e-4, guidance_scale=5.0, sampling_steps=50,
                ema_decay=0.0, max_grad_norm=1.0, lr_warmup_steps=0, lr_decay_share=0.0, alpha=[20.0, 2.0], bank_size=1000, bank_batch=1, preview_samples=2,
                gradient_checkpointing=True, objective="adm", selection_weight=0.01)


def parse_args(argv=None):
    p = io.Parser(description="Turn some of a video model's softmax self-attention layers into linear attention (LinVideo, 2510.08318), without data. Defaults "
                  "shown are those of the given --teacher: clips, other small networks of ours, or a released model.")
    io.add_run_flags(p)
    p.set_defaults(max_train_steps=1200, learning_rate=1e-3, lr_warmup_steps=20, ema_decay=0.98)
    p.add_argument("--teacher", default="clips", help="clips, glyphs, a component folder, a pipeline root with model_index.json, or a run folder of ours")
    p.add_argument("--prompts", default=None, metavar="FILE", help="safetensors with cond.NAME (N, ...) and uncond.NAME (1, ...), for text teachers")
    p.add_argument("--sample_shape", type=io.number(int, 1), nargs="+", default=None, help="C H W or C T H W of a sample (default: the network's)")
    p.add_argument("--target_layers", type=io.number(int, 1), default=None, help="how many layers become linear (default: half; paper: 16 of 30, 22 of 40)")
    p.add_argument("--select", nargs="+", default=["learned"], metavar="HOW", help="learned (paper), first, last, uniform, random, or a list of layers from 0")
    p.add_argument("--feature_map", choices=FEATURE_MAPS[:-1], default="hedgehog", help="phi of linear attention (paper: hedgehog, Eq. 6)")
    p.add_argument("--objective", choices=["adm", "mse", "dmd", "adm_critic"], default="mse", help="anytime distribution matching (paper), regression onto the "
                   "teacher's velocity (Eq. 7, stable here), few-step DMD with a critic, or adm with a trained critic instead of the student's own score (Tab. 4)")
    p.add_argument("--state", choices=["part", "step", "jump", "rollout"], default="part", help="how adm's state is reached: a random part of a sampler step from a "
                   "state of the bank, the whole step, a jump to any later time, or one step at the end of the student's own trajectory")
    p.add_argument("--part", type=io.number(float, 0.001, 1), default=1.0, help="of --state part: the largest share of a sampler step")
    p.add_argument("--weight", choices=["eq13", "unit", "dmd"], default="eq13", help="of adm's gradient: (1 - t) / t (paper), 1, or of x0 over its mean size")
    p.add_argument("--regression_weight", type=io.number(float, 0), default=0.0, help="of regression (Eq. 7) beside adm (paper: 0)")
    p.add_argument("--min_time", type=io.number(float, 0.001, 0.5), default=0.02, help="smallest t of adm's states, where eq13 diverges")
    p.add_argument("--selection_weight", type=io.number(float, 0), default=0.001, help="lambda, of constraint and regulariser (paper: .01, of another reduction)")
    p.add_argument("--alpha", type=io.number(float, above=1), nargs=2, default=None, metavar=("FIRST", "LAST"), help="exponent of the regulariser, falls linearly "
                   "while layers are selected (paper: 20 to 2; default: the number of linear layers, at least 2 and at most 4, to 2; with "
                   "a larger FIRST an r at 1 cannot leave)")
    p.add_argument("--no_regularizer", action="store_true", help="ablation: the constraint alone (Tab. 3)")
    p.add_argument("--r_init", type=io.number(float, 0, 1), default=0.9, help="r of all layers at the start (paper: not stated)")
    p.add_argument("--selection_share", type=io.number(float, 0, 1), default=0.3, help="share of the run in which r is trained; then the layers are fixed")
    p.add_argument("--learning_rate_features", type=io.number(float, above=0), default=1e-2, help="AdamW learning rate of phi's W once the layers are fixed; "
                   "before, W has --learning_rate (paper: not stated)")
    p.add_argument("--learning_rate_r", type=io.number(float, above=0), default=1e-2, help="AdamW learning rate of r, constant")
    p.add_argument("--learning_rate_fake", type=io.number(float, above=0), default=1e-3, help="AdamW learning rate of the critic (adm_critic, dmd)")
    p.add_argument("--fake_update_ratio", type=io.number(int, 1), default=1, help="R, critic updates per student update (adm_critic, dmd)")
    p.add_argument("--critic_steps", type=io.number(int, 1), default=8, help="Euler steps of the roll-outs that adm_critic's critic sees")
    p.add_argument("--lr_decay_share", type=io.number(float, 0, 1), default=0.4, help="last share of the run with the rates, but r's, falling linearly to 0")
    p.add_argument("--adam_betas", type=io.number(float, 0, 0.99999), nargs=2, default=[0.9, 0.99], help="AdamW betas (paper: not stated)")
    p.add_argument("--weight_decay", type=io.number(float, 0), default=0.0, help="AdamW weight decay of the network's weights (paper: not stated)")
    p.add_argument("--sampling_steps", type=io.number(int, 2), default=20, help="K, Euler steps of teacher and student (Wan: 50)")
    p.add_argument("--uncond_share", type=io.number(float, 0, 1), default=0.1, help="share of samples without condition, where there is guidance")
    p.add_argument("--bank", default=None, metavar="FOLDER", help="the teacher's trajectories: made there once, read if they are there (default: OUTPUT_DIR/bank)")
    p.add_argument("--bank_size", type=io.number(int, 1), default=2560, help="trajectories of K states each (paper: 50,000 states)")
    p.add_argument("--bank_batch", type=io.number(int, 1), default=64, help="trajectories per file of the bank")
    p.add_argument("--teacher_steps", type=io.number(int, 0), default=32, help="Heun steps of the many-step teacher; 0 leaves it out")
    p.add_argument("--preview_samples", type=io.number(int, 1), default=12, help="columns of samples.png")
    p.add_argument("--remeasure_teacher", action="store_true", help="measure the many-step teacher again instead of copying its row")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    start = known.sample or known.teacher
    p.set_defaults(**(CLIPS if start == "clips" else {} if io.is_small(start, WORLDS) else RELEASED))
    args = p.parse_args(argv)
    if args.state == "rollout" and args.sampling_steps < 3:
        p.error("argument --state: rollout needs --sampling_steps of at least 3")
    if args.regression_weight and (args.state == "rollout" or not args.objective.startswith("adm")):
        p.error("argument --regression_weight: is for --objective adm or adm_critic with states of the bank, not --state rollout; leave it out")
    if args.output_dir is None:
        args.output_dir = io.default_output_dir("linvideo", args.teacher, args.sample)
    return args


def main(argv=None):
    args = parse_args(argv)
    sample_only(args) if args.sample else train(args)


if __name__ == "__main__":
    io.run(main)
