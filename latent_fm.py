"""Flow matching in latent space (LFM, 2307.08698), with its four tasks.

The idea. Encode an image with a frozen autoencoder and call the result z_0. Draw noise z_1 and a
time t, take the point z_t on the straight line between them, and ask a network for the direction of
the line. The best answer, E[z_1 - z_0 | z_t], is the velocity of an ODE that carries noise (t = 1)
to latents (t = 0): to sample, integrate it from noise with any solver, and decode. A latent is many
times smaller than its image, and so is the network's work. For classes the label is dropped now and
then, so that one network also knows the unconditional velocity and guidance can push away from it.
For inpainting and semantic synthesis the network sees more channels beside z_t: latents of the
image with holes and the mask, or a map. This script also trains the others' teachers.

    paper       here                    meaning                                      shape
    x_0         x                       image in [-1, 1]                             (B, 3, H, W)
    E, D        moments, to_pixels      encoder (mean and std of z_0), decoder
    z_0, z_1    x0, eps                 latent (or pixels) and noise                 (B, C, h, w)
    z_t         x_t                     (1 - t) x0 + t eps                           (B, C, h, w)
    v_theta     net(x_t, t, **cond)     velocity, regresses eps - x0                 (B, C, h, w)
    p_u         label_dropout           share of labels that become the null label, K
    gamma       guidance_scale          v_u + gamma (v_c - v_u), 1 = off
    m           mask                    1 = hole, 0 = known                          (B, 1, H, W)

Launch.
    laptop      python latent_fm.py    # shapes, minutes on two cores; --task inpaint, semantic ...
    teachers    python latent_fm.py --data glyphs --logit_normal --save_fp16  # or clips, voxels
    own images  python latent_fm.py --data FOLDER --resolution 32       # FOLDER/<class>/*.png
    paper       python latent_fm.py --data FOLDER --resolution 256 --autoencoder sd-vae-ft-mse \
                    --network DiT-B/2 --hflip --t_scale 1 --ema_decay 0 --solver dopri5 \
                    --train_batch_size 160
    torchrun    torchrun --nproc-per-node 8 latent_fm.py --data FOLDER --resolution 256 \
                    --autoencoder sd-vae-ft-mse --network DiT-L/2 --mixed_precision bf16 --compile
    sampling    python latent_fm.py --sample runs/latent_fm-shapes/student --solver dopri5

Deviations; the reasons are in docs/latent_fm.md. The network sees 1000 t, weights are averaged, the
learning rate falls, Muon trains the blocks of small networks. A mask reaches the latents by its
maximum and is never empty; holes are encoded by the posterior's mean; maps' projection is trained.
"""

import argparse
import math
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from models.diffusion import (
    Diffusion,
    Flow,
    expand,
    guide,
    logit_normal,
    ode_calls,
    sample_ode,
    shift,
    step_grid,
)
from models.draws import Draws, stable_hash
from models.files import UserError, open_tensors, save_json
from models.muon import Muon, flops_of
from models.networks import load_network, network_config, network_of, save_network, weights_hash
from models.networks.adm import LFM_NETWORKS, UNetModel
from models.networks.as_flow import AsFlow
from models.networks.autoencoders import Identity, PatchPCA
from models.networks.dit import DiT
from models.networks.dit_imagenet import DIT_B_2, DIT_L_2, DIT_XL_2, DiTTransformer2DModel
from models.networks.latent_space import BUILT_IN, LatentSpace, load_space, shape_in, space_beside
from models.networks.ring_mlp import RingMLP
from models.plumbing import report, teachers
from models.plumbing.data import Conditions, spread_rows, to_unit
from models.plumbing.dry_run import Network, Turn, dry_run
from models.plumbing.film import Film
from models.plumbing.flags import (
    Parser,
    add_picture_flags,
    add_run_flags,
    default_output_dir,
    lengthen,
    number,
    paper_values,
    refuse,
    unread,
    words,
    wrong_output,
)
from models.plumbing.image_sets import write_set
from models.plumbing.images import CROPS
from models.plumbing.latents import Posteriors, cache_latents, contents_of, is_posteriors
from models.plumbing.loading import drawn, tell_waiting
from models.plumbing.run import Run, refuse_output_dir, run_main
from models.plumbing.sets import is_set
from models.plumbing.sharding import largest_over_ranks
from models.plumbing.teachers import describe_schedule, is_small, network_folder, read_own_sampler
from models.plumbing.training_data import load_training_data
from models.plumbing.work import work_done
from models.worlds import WORLDS, load_world, refuse_ambiguous
from models.worlds.masks import draw_masks
from models.worlds.measures import balanced_labels, compared
from models.worlds.shapes import overlap

# ---- the loss, and what a network is conditioned on. x0, eps (B, ...), t (B,) --------------------

FLOW = Diffusion(Flow(), "flow_v")  # x_t = (1 - t) x0 + t eps; networks predict v = eps - x0


def flow_matching_loss(net, x0, eps, t, cond):
    """E |v_theta(x_t, t) - (eps - x0)|^2 (Alg. 1).  -> scalar; the same for each sample (B,).

    The mean is over all dimensions. net is called as net(x_t, t, **cond).
    """
    x_t = (1 - expand(t, x0)) * x0 + expand(t, x0) * eps
    error = (net(x_t, t, **cond).float() - (eps - x0)).square().flatten(1).mean(1)  # (B,)
    return error.mean(), error.detach()


def drop_labels(label, coin, p_u, null):
    """Replace a label by the null label with probability p_u (Alg. 3).  -> (B,).

    label (B,) int64; coin (B,), uniform in [0, 1); null: the number of the null label.
    """
    return torch.where(coin < p_u, null, label)


def inpainting_context(space, x, mask):
    """What an inpainting network sees beside x_t: the image with holes, and the holes.

    x (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) of 0 and 1 (hole) -> (B, C + 1, h, w): latents of
    the image whose holes are black, and the mask as -1 and 1. A latent cell is a hole if any of its
    pixels is one.
    """
    black = (1 - mask) * (x + 1) - 1  # x where it is known, -1 in holes
    return torch.cat([space.to_latents(black), 2 * F.max_pool2d(mask, space.factor) - 1], 1)


def composite(x, known, mask):
    """An inpainted image: the sample in the holes, elsewhere the known pixels themselves.

    x, known (B, 3, H, W), mask (B, 1, H, W) -> (B, 3, H, W).
    """
    return torch.where(mask > 0, x, known)


def semantic_context(maps, classes, factor):
    """What a semantic synthesis network sees beside x_t: the share of each class in each cell.

    maps (B, H, W) of 0 to classes - 1, or 255 for none -> (B, classes, h, w), a one-hot map that is
    averaged. The network's own 1x1 convolution follows, and is trained. It is linear, so averaging
    before it gives the same as after it, and is cheaper.
    """
    numbers = torch.arange(classes, device=maps.device)[:, None, None]
    one_hot = (maps[:, None] == numbers).float()  # (B, classes, H, W)
    return F.avg_pool2d(one_hot, factor)


def flow_matching_loss_sigma_min(net, x0, eps, t, cond, sigma_min):
    """The official code's path, which keeps noise of size sigma_min in the data (code: 1e-5).

    x_t = (1 - t) x0 + (s + (1 - s) t) eps, whose slope is (1 - s) eps - x0, with s = sigma_min.
    """
    level = sigma_min + (1 - sigma_min) * t
    x_t = (1 - expand(t, x0)) * x0 + expand(level, x0) * eps
    slope = (1 - sigma_min) * eps - x0
    error = (net(x_t, t, **cond).float() - slope).square().flatten(1).mean(1)  # (B,)
    return error.mean(), error.detach()


# ---- the sampler ---------------------------------------------------------------------------------


def guided_velocity(net, x, t, label, null, guidance_scale):
    """v_u + gamma (v_c - v_u) (Alg. 4).  x (B, ...), t (B,), label (B,) -> (B, ...).

    gamma = 1 and gamma = 0 cost one call, others one call on twice the batch.
    """
    if guidance_scale == 1:
        return net(x, t, label=label)
    if guidance_scale == 0:
        return net(x, t, label=torch.full_like(label, null))
    both = torch.cat([label, torch.full_like(label, null)])
    v_c, v_u = net(torch.cat([x, x]), torch.cat([t, t]), label=both).chunk(2)
    return guide(v_c, v_u, guidance_scale)


@torch.no_grad()
def euler(v, x, times):
    """From each time t to the next, s, along the velocity: x + (s - t) v(x, t) (Alg. 2).

    v: x (B, ...), t (B,) -> (B, ...). times: descending floats from 1 to 0. -> x at the last.
    """
    for t, s in zip(times[:-1], times[1:]):
        x0, eps = FLOW.x0_eps(v, x, t)  # where the line through x with slope v begins and ends
        x = FLOW.add_noise(x0, eps, s)
    return x


def heun(v, x, times):
    """The same, along the mean of the velocities at both ends; the last step is Euler's."""
    return sample_ode(lambda x, t: FLOW.x0_eps(v, x, t), FLOW.schedule, x, times, "heun")


# Dormand and Prince 1980: nodes, stages, and the difference of the solutions of order 5 and 4. The
# last stage is the next step's first.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DIFFERENCE = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@torch.no_grad()
def dormand_prince(v, x, atol=1e-5, rtol=1e-5, start=1.0, end=0.0):
    """Integrate dx/dt = v(x, t) with steps that suit the error: the paper's solver, at 1e-5.

    The estimated error e of each step, the root mean square over the whole batch of
    e / (atol + rtol |x|), is at most 1. v: x (B, ...), t a float -> (B, ...).
    -> x at `end`; the number of calls of v, which is 2, and 6 for each step that was tried. Raises
    ValueError where steps become so small that x's precision cannot show the error asked for.
    """
    sign = 1 if end > start else -1
    t, k1 = start, v(x, start)
    h = first_step(v, x, k1, t, sign, atol, rtol)
    calls, rejected = 2, False
    while sign * (end - t) > 1e-12:
        if not h > 1e-7:
            raise ValueError(
                f"at t = {t:.4g} the steps come down to {h:.1g}, below what x can show; "
                f"raise atol {atol:g} and rtol {rtol:g}"
            )
        h = min(h, sign * (end - t))
        k = [k1]
        for node, weights in zip(NODES, STAGES):
            x_new = x + sign * h * weighted_sum(weights, k)
            k.append(v(x_new, t + sign * node * h))
        calls += 6
        scale = atol + rtol * torch.maximum(x.abs(), x_new.abs())
        error = rms(h * weighted_sum(DIFFERENCE, k), scale)
        if not error < float("inf"):
            raise ValueError(f"at t = {t:.4g} the velocity is not finite")
        if error <= 1:
            t, x, k1 = t + sign * h, x_new, k[-1]
        growth = min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        if rejected:  # the step before was too long: this one's success says little
            growth = min(1.0, growth)
        h, rejected = h * growth, error > 1
    return x, calls


def first_step(v, x, k1, t, sign, atol, rtol):
    """A length for the first step (Hairer, Norsett and Wanner, Solving ODEs I, II.4).  -> float.

    k1: v(x, t). One call of v.
    """
    scale = atol + rtol * x.abs()
    d0, d1 = rms(x, scale), rms(k1, scale)
    h0 = 0.01 * d0 / d1 if min(d0, d1) > 1e-5 else 1e-6
    d2 = rms(v(x + sign * h0 * k1, t + sign * h0) - k1, scale) / h0
    if max(d1, d2) <= 1e-15:
        return min(100 * h0, max(1e-6, 1e-3 * h0))
    return min(100 * h0, (0.01 / max(d1, d2)) ** 0.2)


def weighted_sum(weights, k):
    """The sum of weights[i] k[i], without the terms of weight 0."""
    return sum(w * k_i for w, k_i in zip(weights, k) if w)


def rms(x, scale):
    """The root mean square of x / scale, the largest of all ranks, which step alike.  -> float"""
    return largest_over_ranks((x / scale).square().mean().sqrt(), x.device)


@torch.no_grad()
def sample(
    net,
    noise,
    label,
    steps=32,
    guidance_scale=1.0,
    solver="heun",
    timestep_shift=1.0,
    context=None,
    interval=(0.0, 1.0),
    atol=1e-5,
    rtol=1e-5,
    calls=None,
):
    """Integrate the guided velocity from noise to data.  -> x0 (B, ...), in noise's dtype.

    noise (B, ...), float32; label (B,), or None for a network without classes; context (B, C', h,
    w), what the network sees beside x_t. solver: euler, heun (two calls a step, one in the last) or
    dopri5, which chooses its own steps. Guidance acts at t within interval only. calls: a list to
    which the number of network calls is appended, two for a guided evaluation of the velocity.
    """
    more, twice = {} if context is None else {"context": context}, []

    def field(x, t, label):
        given = more if label is None else {**more, "label": label}
        if context is not None and len(x) == 2 * len(context):  # guided
            given = {**given, "context": torch.cat([context, context])}
        return net(x, t, **given)

    def velocity(x, t):
        guided = interval[0] - 1e-6 <= float(t[0]) <= interval[1] + 1e-6  # t is a float32
        scale = guidance_scale if guided else 1
        if scale not in (0, 1):
            twice.append(t)
        v = guided_velocity(field, x, t, label, getattr(net, "num_classes", None), scale)
        return v.to(x.dtype)  # the output of a bf16 network joins the float32 state

    def velocity_at(x, t):  # t a float
        return velocity(x, x.new_full((len(x),), t))

    if solver == "dopri5":
        x, n = dormand_prince(velocity_at, noise, atol, rtol)
    else:
        solve = euler if solver == "euler" else heun
        x, n = solve(velocity, noise, step_grid(steps, timestep_shift)), ode_calls(steps, solver)
    if calls is not None:
        calls.append(n + len(twice))
    return x


# ---- training ------------------------------------------------------------------------------------


def lr_decay(args, left):
    """What share of its learning rate a network trains with.  -> factor within [0, 1].

    left: falls from 1 to 0 in the last part of the run, as `Run.rate` gives it. The factor falls
    with it, in a straight line or along half a cosine, from 1 to --lr_final / --learning_rate.
    """
    floor = args.lr_final / args.learning_rate
    height = left if args.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
    return floor + (1 - floor) * height


def mirrored(x, flip):
    """x (B, ..., W), with the items that flip (B,) says mirrored; flip None: x itself."""
    return x if flip is None else torch.where(expand(flip, x), x.flip(-1), x)


def mirrored_maps(maps, flip, mirror):
    """maps (B, H, W) of class numbers, mirrored where flip (B,) says so; flip None: maps itself.

    mirror (256,): the class that each class is in a mirror, where left and right change places.
    """
    if flip is None:
        return maps
    theirs = mirror.to(maps.device)[maps.long()].to(maps.dtype).flip(-1)
    return torch.where(expand(flip, maps), theirs, maps)


def condition(args, draw, data, space, i, flip, x):
    """What the network sees beside x_t and t, by task.  -> {} or {"label"} or {"context"}.

    i (B,): numbers of the items; x (B, 3, H, W): their pixels, mirrored already where flip says so.
    """
    if args.task == "class":
        label, coin = data.label[i].to(draw.device), draw.uniform("coin")
        return {"label": drop_labels(label, coin, args.label_dropout, data.num_classes)}
    if args.task == "inpaint":
        mask = draw_masks(x.shape[-1], draw.integer("mask", 2**62)).to(draw.device)
        return {"context": inpainting_context(space, x, mask)}
    if args.task == "semantic":
        maps = drawn(data.maps, draw, "item", i)  # (B, H, W)
        maps = mirrored_maps(maps, flip, data.map_mirror)
        return {"context": semantic_context(maps, data.map_classes, space.factor)}
    return {}


def training_batch(args, draw, data, space, cache):
    """Latents of items drawn from the data, and their conditions.  -> x0 (B, C, h, w), cond."""
    i, x = draw.integer("item", len(data.x)), None
    flip = draw.uniform("flip") < 0.5 if args.hflip else None
    if cache is None or args.task == "inpaint":
        x = mirrored(to_unit(drawn(data.x, draw, "item", i)), flip)  # (B, 3, H, W)
    if cache is None:
        mean, std = space.moments(x)  # of the encoder's posterior, each (B, C, h, w)
    else:
        mean, std = space.normed(*cache.rows(i, flip, draw.device))
    x0 = mean if is_exact(space) else mean + std * draw.noise("posterior")
    return x0, condition(args, draw, data, space, i, flip, x)


def draw_times(args, draw):
    """t ~ U[0, 1] (Alg. 1), or logit-normal, then shifted.  (B,)"""
    u = logit_normal(draw.normal("u", ())) if args.logit_normal else draw.uniform("u")
    return shift(u, args.timestep_shift)


def add_by_quarter(totals, t, error):
    """Add the errors of a batch to the quarters of time that they belong to, clean to noisy.

    totals (4, 2): sum and number of the errors in [0, 1/4), ..., [3/4, 1]. t, error (B,).
    """
    both = torch.stack([error, torch.ones_like(error)], 1)  # (B, 2)
    totals.index_add_(0, (t * 4).long().clamp(0, 3), both)


def train(args):
    world = load_world(args.data) if args.data in WORLDS else None
    refuse(wrong_flags(args, world))
    run = Run(args, "latent_fm")
    data = load_training_data(args, world)
    space = build_space(args, world, data).to(run.device)
    shape = latent_shape(data, space, run.device)
    world_name = args.data if is_readable(args, world, space) else None
    net = first_network(run, data, shape, world_name)
    ema = run.copy_of(net)
    run.spread_tokens(net, ema)
    net.gradient_checkpointing = args.gradient_checkpointing
    ema.requires_grad_(False)
    optimizers, rates = build_optimizers(args, net)
    state = {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
    run.start(net=net, ema=ema, **state)  # resumed, where that is asked for
    cache = data.x if isinstance(data.x, Posteriors) else None
    if args.cache_latents:
        cache = cache_latents(run, data.x, space, describe_encoder(args, space))
    if args.latent_norm != "none" and space is not getattr(world, "space", None):
        measure_norm(args, data, space, cache, run.device)
    run.compile_blocks(net)
    latents = SimpleNamespace(shape=shape, shift=args.timestep_shift)  # micro_batches' teacher
    introduce(run, data, space, net, shape)
    film = ring_film(run, world_name, ema)

    for step in run.steps():
        warmup, left = run.rate(step)
        lr_factor = warmup * lr_decay(args, left)
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * lr_factor

        totals = torch.zeros(4, 2, device=run.device)
        for draw in run.micro_batches(step, 0, latents):
            x0, cond = training_batch(args, draw, data, space, cache)
            eps, t = draw.noise("eps"), draw_times(args, draw)
            with run.autocast():
                batch = x0, eps, t, cond
                if args.sigma_min:
                    loss, error = flow_matching_loss_sigma_min(net, *batch, args.sigma_min)
                else:
                    loss, error = flow_matching_loss(net, *batch)
            (loss * run.share).backward()
            run.note(loss=loss)
            add_by_quarter(totals, t, error)
        run.update(optimizers, "net")
        run.update_ema(ema, net, step, start=10)
        film.frame(step)
        totals = run.sum_over_ranks(totals)
        by_t = totals[:, 0] / totals[:, 1].clamp_min(1)  # 0 in a quarter that no t fell into
        run.note(**{f"loss_t{quarter}": by_t[quarter] for quarter in range(4)})
        if run.end_step(step, show=("loss",), lr=args.learning_rate * lr_factor):  # True: save
            save_student(run, ema, space)
            run.save(step)
    if run.first >= args.max_train_steps:  # a finished run is written out again, perhaps elsewhere
        save_student(run, ema, space)
    tell_waiting(run, data.x)
    finish(run, as_saved(args, ema), world, data, space)
    run.wait_for_all()


# ---- setup: data, autoencoder, network, optimisers -----------------------------------------------


def build_space(args, world, data):
    """--autoencoder -> LatentSpace. Raises UserError.

    --latent_norm is measured later, except for the space that a world ships.
    """
    shape = tuple(data.x.shape[1:])
    if args.autoencoder == "identity":
        return LatentSpace(Identity(shape[0]))
    refuse_to_encode(args, shape)
    if asks_for_own_space(args, world):
        return world.space
    try:
        if args.autoencoder == "pca":
            some = to_unit(data.x[spread_rows(len(data.x), 4000)])
            space = LatentSpace(PatchPCA(shape[0], args.pca_patch, args.pca_channels).fit(some))
        else:
            space = load_space(args.autoencoder)
        space.own_moments(torch.zeros(1, *shape))
    except ValueError as e:
        raise UserError(
            f"--autoencoder {args.autoencoder}: {e}; "
            "change --resolution, --pca_patch or --pca_channels"
        ) from None
    return space


def refuse_to_encode(args, shape):
    """Raises UserError for items of a shape that no --autoencoder encodes."""
    if len(shape) != 3:
        raise UserError(
            f"--autoencoder {args.autoencoder}: it encodes images, and --data {args.data} has "
            f"items of shape {shape}: use identity"
        )


def asks_for_own_space(args, world):
    """Whether the flags describe exactly the space that the world ships."""
    if args.autoencoder != "pca" or not hasattr(world, "space"):
        return False
    own = world.space.autoencoder.config
    asked = (args.pca_patch, args.pca_channels, args.latent_norm)
    return asked == (own["patch"], own["latent_channels"], "scale")


def is_readable(args, world, space):
    """Whether the world can measure and show what a network in this space makes."""
    pixels = space.trivial and args.latent_norm == "none"
    return bool(world) and (pixels or space is getattr(world, "space", None))


def is_exact(space):
    """Whether the encoder's posterior is a point, so that there is nothing to sample from it."""
    return isinstance(space.autoencoder, (Identity, PatchPCA))


def latent_shape(data, space, device):
    """The shape of one item's latent, (C, h, w)."""
    mean, _ = space.own_moments(torch.zeros(1, *data.x.shape[1:], device=device))
    return tuple(mean.shape[1:])


def describe_encoder(args, space):
    """What cached latents depend on beside the items, {name: text}."""
    about = {name: str(getattr(args, name)) for name in ("pca_patch", "pca_channels")}
    about["autoencoder"] = args.autoencoder
    if args.autoencoder == "pca":  # a world's, or fitted to the data
        about["pca"] = space.digest(norm=False)
    if args.autoencoder not in BUILT_IN:
        about["autoencoder"] = weights_hash(space.folder or args.autoencoder)
        config = space.autoencoder.config
        about["scaling"] = f"{config.get('scaling_factor')} {config.get('shift_factor')}"
    return about


def measure_norm(args, data, space, cache, device):
    """Measure --latent_norm on up to 4,000 items of all and put it into the space."""
    some = spread_rows(len(data.x), 4000).split(100)
    if cache:
        moments = (cache.rows(i, None, "cpu") for i in some)
    else:
        moments = (space.own_moments(to_unit(data.x[i]).to(device)) for i in some)
    space.measure_norm(moments, args.latent_norm)


PAPER_NETWORKS = {"DiT-B/2": DIT_B_2, "DiT-L/2": DIT_L_2, "DiT-XL/2": DIT_XL_2, **LFM_NETWORKS}


def first_network(run, data, shape, world_name):
    """What training starts from: a new network, or that of --init. Raises UserError."""
    args = run.args
    if not args.init:
        return run.place(build_network(args, data, shape, world_name))
    net, _ = load_network(network_folder(args.init), place=run.place)
    refuse(wrong_start(args, net, data, shape))
    return net.requires_grad_(True).train()


def wrong_kind(a, net):
    """Why no data could train the network of --init: pairs (wrong, why)."""
    kind, where = getattr(net, "prediction", "nothing"), f"--init {a.init}"
    yield (
        kind != "flow_v",
        (
            f"{where} predicts {kind}, and this script trains velocities: give a network of a flow "
            "(SiT, LFM, EDM, or a run of latent_fm.py)"
        ),
    )
    labelled = hasattr(net, "num_classes")
    yield not labelled, f"{where} is a {type(net).__name__}, which this script does not train"


def wrong_start(a, net, data, shape):
    """Why training cannot go on from the network of --init: pairs (wrong, why)."""
    yield from wrong_kind(a, net)
    where = f"--init {a.init}"
    own, shape, classes = tuple(net.latent_shape), tuple(shape), net.num_classes
    why = f"{where} takes samples of {own}, and --data gives {shape}: change --resolution or "
    yield own != shape, why + "--autoencoder"
    why = f"{where} has {classes} classes, and the data have {data.num_classes}: "
    other = classes != data.num_classes
    yield other and classes, why + "give data with as many"
    yield other and not classes, why + "give data with as many, or --task uncond for none"
    want = context_of(a, data, shape).get("context_channels", 0)
    has = getattr(net, "context_channels", 0)
    why = f"{where} sees {has} channels beside a sample, and --task {a.task} gives {want}: "
    yield has != want, why + "give a network of that task"


def build_network(args, data, shape, world_name):
    """A network for latents of this shape; its weights are a function of --seed.

    A RingMLP for points, one of the paper's DiTs for --network, else a small DiT for images, videos
    and voxels. Raises UserError.
    """
    torch.manual_seed(stable_hash(args.seed, "init"))
    if len(shape) == 1:
        return RingMLP(num_classes=data.num_classes, world=world_name)
    try:
        if args.network in PAPER_NETWORKS:
            return paper_network(args, data, shape)
        return small_network(args, data, shape, world_name)
    except ValueError as e:
        raise UserError(f"{e}: change --patch_size, --resolution or --width") from None


def paper_network(args, data, shape):
    """--network DiT-B/2 and larger, as diffusers' class, or ADM's U-Net. Raises UserError."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UserError(f"--network {args.network}: for square images only; use --network small")
    config, context = PAPER_NETWORKS[args.network], context_of(args, data, shape)
    beside = context.get("context_width") or context.get("context_channels", 0)
    config = {
        **config,
        **context,
        "in_channels": shape[0] + beside,
        "out_channels": shape[0],
        "convention": "lfm" if args.t_scale == 1 else "flow",  # which clock it sees
    }
    if "image_size" in config:
        return UNetModel(**{**config, "image_size": shape[1], "num_classes": data.num_classes})
    sizes = {"sample_size": shape[1], "num_embeds_ada_norm": data.num_classes}
    return DiTTransformer2DModel(**{**config, **sizes})


def context_of(args, data, shape):
    """What a network of --task sees beside x_t, as arguments of its class.

    shape: of a latent, (C, h, w). A map is projected to as many channels as a latent has.
    """
    if args.task == "inpaint":
        return dict(context_channels=shape[0] + 1)
    if args.task == "semantic":
        return dict(context_channels=data.map_classes, context_width=shape[0])
    return {}


def small_network(args, data, shape, world_name):
    """--network small. Raises UserError, and ValueError for sizes that do not fit."""
    axes = len(shape) - 1
    patch = args.patch_size or [max(1, shape[-1] // 4)]
    if len(patch) not in (1, axes):
        given = " ".join(map(str, patch))
        raise UserError(
            f"--patch_size {given}: give one number, or one for each of the {axes} axes of {shape}"
        )
    return DiT(
        size=shape[1:],
        patch=patch * axes if len(patch) == 1 else patch,
        channels=shape[0],
        dim=args.width,
        depth=args.depth,
        num_classes=data.num_classes,
        cond_dim=args.cond_dim,
        world=world_name,
        class_names=data.class_names,
        t_scale=args.t_scale,
        **context_of(args, data, shape),
    )


def block_matrices(net):
    """The weight matrices inside the blocks of net, which Muon trains."""
    blocks = ("blocks.", "hidden.", "transformer_blocks.")
    return [
        p
        for name, p in net.named_parameters()
        if name.startswith(blocks)
        and p.ndim == 2
        and "modulation" not in name
        and ".norm1." not in name
    ]


def refuse_muon(args, net):
    """Raises UserError where Muon would have nothing to train."""
    if args.optimizer == "muon" and not block_matrices(net):
        raise UserError(
            f"--optimizer muon: it trains matrices inside blocks, and a {type(net).__name__} has "
            "none: give --optimizer adamw"
        )


def build_optimizers(args, net):
    """AdamW for everything (paper), or Muon for the weight matrices inside the blocks.

    Muon (orthogonalised momentum) reaches a given loss in about half the steps here; AdamW trains
    the rest. -> the optimisers, and the learning rate of each.
    """
    refuse_muon(args, net)
    inside = block_matrices(net)
    muon = {id(p) for p in inside} if args.optimizer == "muon" else set()
    rest = [p for p in net.parameters() if id(p) not in muon]
    adam = dict(betas=args.adam_betas, weight_decay=args.weight_decay, fused=True)
    optimizers = [torch.optim.AdamW(rest, lr=args.learning_rate, **adam)]
    if muon:
        decay = args.weight_decay
        optimizers.append(Muon(inside, lr=args.learning_rate_muon, weight_decay=decay))
    return optimizers, [args.learning_rate, args.learning_rate_muon]


# ---- what the run leaves behind ------------------------------------------------------------------


def introduce(run, data, space, net, shape):
    """Print what is trained on what."""
    parameters = sum(p.numel() for p in net.parameters())
    run.say(
        f"data {run.args.data}: {len(data.x)} items of shape {tuple(data.x.shape[1:])}, "
        f"{data.num_classes} classes; {space.describe()}; {type(net).__name__} on {shape} with "
        f"{parameters:,} parameters on {run.describe_ranks()}"
    )


def ring_film(run, world_name, net):
    """ring.gif of --data ring: x0 in closed form, the network's x0, and samples by 16 Heun steps.

    A network without labels is compared with the x0 of all modes together.
    """
    like = SimpleNamespace(world_name=world_name, world=load_world("ring"), shape=(2,))
    like.conditions = Conditions(SimpleNamespace(prompts=None), net)  # labels, no file of prompts
    like.schedule = FLOW.schedule

    def sampler(index, first, last):
        noise = report.evaluation_noise(run, like.shape, first, last)()
        return sample(net, noise, index[first:last].to(run.device), 16)

    def exact(x_t, t, cond, uncond):
        label = cond["label"] if net.num_classes else None
        return like.world.exact.posterior(x_t, 1 - t, t, label)[1]

    def network(x_t, t, cond, uncond):
        return FLOW.x0(net, x_t, t, **cond)

    return Film(run, like, sampler, exact, network, names=("exact", "network"))


@torch.no_grad()
def as_saved(args, net):
    """The network that student/ holds: in eval mode, and with --save_fp16 rounded."""
    if args.save_fp16:
        for p in net.parameters():
            p.copy_(p.half())
    return net.eval()


def save_student(run, net, space):
    """student/: the network and how it samples; autoencoder/ beside it, except for pixels.

    All ranks call it, and rank 0 writes.
    """
    args, folder = run.args, os.path.join(run.folder, "student")
    dtype = torch.float16 if args.save_fp16 else None
    save_network(net, network_config(net), folder, dtype=dtype, write=run.main)
    if not run.main:
        return
    if not space.trivial:
        space.save(os.path.join(run.folder, "autoencoder"))
    sampler = {
        "method": run.method,
        "prediction": FLOW.prediction,
        "schedule": describe_schedule(FLOW.schedule),
        "times": step_grid(args.sample_steps, args.timestep_shift)[:-1],
        "timestep_shift": args.timestep_shift,
        "rule": args.solver,
        "atol": args.atol,
        "rtol": args.rtol,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": args.guidance_interval,
        "task": args.task,
        "label_dropout": args.label_dropout,
        "data": args.data,
        "maps": args.maps,
        "resolution": args.resolution,
        "crop": args.crop,
    }
    save_json(sampler, os.path.join(folder, "sampler.json"))


@torch.no_grad()
def finish(run, net, world, data, space):
    """Measure a saved network, write samples.png and, after training, report.json; print a table.

    All ranks call it and share out the samples, in the precision that networks train in. data: what
    the run trained on, or None for --sample of a task that needs none.
    """
    args = run.args
    evaluate = evaluate_context if args.task in ("inpaint", "semantic") else evaluate_classes
    results, rows = evaluate(run, net, world, data, space)
    if not run.main:
        return
    report.save_samples(run.folder, rows, world)
    if args.sample is None:
        parameters = sum(p.numel() for p in net.parameters())
        report.save_report(run, None, parameters, results, data=args.data, task=args.task)
    report.print_table(results)
    print(f"samples: {os.path.join(run.folder, 'samples.png')}")


def sampler_settings(args):
    """Arguments of `sample` as the flags say."""
    return dict(
        steps=args.sample_steps,
        guidance_scale=args.guidance_scale,
        solver=args.solver,
        timestep_shift=args.timestep_shift,
        interval=args.guidance_interval,
        atol=args.atol,
        rtol=args.rtol,
    )


def draw_samples(run, net, space, n, seed, label=None, context=None, **changes):
    """n samples from this seed's noise, with the solver and guidance of the flags.

    label (n,), context (n, C', h, w): on the CPU. changes: arguments of `sample` in place of the
    flags. -> pixels (n, ...) on the CPU of rank 0, None on the others; milliseconds a sample and
    network calls of this rank's share.
    """
    args, calls = run.args, []
    noise = torch.randn(n, *net.latent_shape, generator=torch.Generator().manual_seed(seed))
    settings = sampler_settings(args) | changes

    def part(first, last):
        z, its_label, its_context = (
            None if v is None else v[first:last].to(run.device) for v in (noise, label, context)
        )
        z = sample(net, z, its_label, context=its_context, calls=calls, **settings)
        with torch.autocast(run.device.type, enabled=False):  # the autoencoder in float32
            return space.to_pixels(z)

    shape, batch = space.pixel_shape(net.latent_shape), 500 if is_exact(space) else 16
    try:
        x, ms = report.many_on_all_ranks(run, part, n, shape, batch)
    except ValueError as e:
        raise UserError(f"--solver {args.solver}: {e}") from None
    return x, ms, sum(calls) / max(1, len(calls))


def add_excess(results):
    """Give every row of the report its Frechet distance beyond that of the first, the data's."""
    for row in results:
        row["fd_excess"] = row["fd"] - results[0]["fd"]


def evaluate_classes(run, net, world, data, space):
    """--task class and uncond.  -> rows of report.json, rows of samples.png.

    A world measures; images of a folder are compared with what samples.png shows of it.
    """
    args, results = run.args, measure_world(run, net, world, space) if world else []
    classes, classless = max(1, net.num_classes), not net.num_classes
    n = 400 if world and world.name == "ring" else 20
    label, rows, items = balanced_labels(n, classes), [], None
    if data is not None:
        items = data_items(data, label, classless)
        rows.append(("data", items))
    steps = f"{args.sample_steps} {args.solver.capitalize()} steps"
    if args.solver == "dopri5":
        steps = "dopri5"
    for scale in dict.fromkeys((1.0, args.guidance_scale)):
        asked = None if classless else label
        x, _, nfe = draw_samples(run, net, space, n, args.seed + 1, asked, guidance_scale=scale)
        guidance = "" if classless else f", guidance {scale:g}"
        rows.append((f"{steps}, {nfe:g} calls{guidance}", x))
        if run.main and not world and items is not None and x.dim() > 3:
            row = {"name": "teacher" if scale == 1 else "guided", "guidance_scale": scale}
            results.append({**row, "nfe": nfe, "samples": n, **compared(x, items)})
    return results, rows


def data_items(data, label, classless):
    """Random items of the data with these labels, each once while there are others.

    -> (n, ...) pixels; the first ones by name would often be alike.
    """
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))
    of_class = [order]
    if not classless:
        of_class = [order[data.label[order] == k] for k in range(data.num_classes)]
    classes, index = len(of_class), []
    for i, k in enumerate(label.tolist()):
        index.append(of_class[k][i // classes % len(of_class[k])])
    return to_unit(data.x[torch.stack(index)])


def measure_world(run, net, world, space):
    """2,000 samples of a world each: data, through the autoencoder, and by several solvers.

    Rows without measures on ranks other than 0.
    """
    args, label = run.args, balanced_labels(2000, world.num_classes)

    def row(name, nfe, x, **more):
        measures = world.measure(x, label if net.num_classes else None) if run.main else {}
        return {"name": name, "nfe": nfe, **more, **measures}

    def reconstruct(first, last):
        with torch.autocast(run.device.type, enabled=False):
            return space.to_pixels(space.to_latents(x[first:last].to(run.device)))

    x = world.data(2000, 777, label)[0]
    results = [row("data", 0, x)]
    if not space.trivial:
        again, _ = report.many_on_all_ranks(run, reconstruct, 2000, x.shape[1:])
        results.append(row("reconstruction", 0, again))
    runs = [
        ("teacher", 1.0, {}),
        ("guided", args.guidance_scale, {}),
        ("euler_4", 1.0, dict(solver="euler", steps=4)),
        ("euler_1", 1.0, dict(solver="euler", steps=1)),
    ]
    for name, scale, changes in runs:
        if name == "guided" and scale == 1:
            continue
        asked = label if net.num_classes else None
        changes |= dict(guidance_scale=scale)
        x, ms, nfe = draw_samples(run, net, space, 2000, args.seed, asked, **changes)
        results.append(row(name, nfe, x, guidance_scale=scale, ms_per_sample=ms))
    if run.main:
        add_excess(results)
    return results


def evaluate_context(run, net, world, data, space):
    """--task inpaint and semantic: how well holes are filled, or the map is followed.

    "shuffled" is with another item's condition, the measure of a network that does not look at it.
    Worlds are measured on fresh items, folders on items of the training set. -> rows of
    report.json, rows of samples.png.
    """
    args = run.args
    x, maps, label = evaluation_items(args, world, data)
    context, mask = evaluation_context(args, net, data, space, x, maps)
    n = len(x)
    made, ms, nfe = draw_samples(run, net, space, n, args.seed, context=context)
    # each item with its neighbour's condition; the neighbour has another class
    other, _, _ = draw_samples(run, net, space, n, args.seed, context=context.roll(1, 0))
    if not run.main:
        return [], []
    row = {"name": "teacher", "nfe": nfe, "ms_per_sample": ms}
    if args.task == "inpaint":
        x_out = composite(made, x, mask)
        row |= measure_holes(x, mask, made, other)
        holes = composite(torch.zeros_like(x), x, mask)
        rows = [("image", x), ("holes", holes), (f"filled, {nfe:g} calls", x_out)]
    else:
        x_out = made
        shades = maps[:, None].expand(-1, x.shape[1], -1, -1).float()
        shades = shades.clamp_max(data.map_classes) / data.map_classes * 2 - 1
        made_row = f"sample, {nfe:g} calls"
        rows = [("map", shades), ("image of that map", x), (made_row, made)]
    results = [row]
    if world and hasattr(world, "foreground"):
        data_row = {"name": "data", "nfe": 0, **world.measure(x, label)}
        if args.task == "semantic":
            row["iou"] = agreement(world, made, maps)
            row["iou_shuffled"] = agreement(world, other, maps)
            data_row["iou"] = agreement(world, x, maps)
        results = [data_row, {**row, **world.measure(x_out, label)}]
        add_excess(results)
    return results, [(text, images[:20]) for text, images in rows]


def evaluation_items(args, world, data):
    """-> pixels x (n, C, H, W), maps (n, H, W) or None, label (n,) or None, on the CPU."""
    if world:
        label = balanced_labels(1000, world.num_classes)
        if args.task == "semantic":
            x, _, maps = world.scenes(1000, 779, label)
            return x, maps, label
        return world.data(1000, 779, label)[0], None, label
    index = torch.linspace(0, len(data.x) - 1, min(64, len(data.x))).long()
    maps = None if data.maps is None else data.maps[index]
    return to_unit(data.x[index]), maps, None


def evaluation_context(args, net, data, space, x, maps):
    """-> context (n, c, h, w), and for inpainting the mask (n, 1, H, W), else None; on the CPU."""
    device, mask, parts = next(net.parameters()).device, None, []
    if args.task == "inpaint":
        draw = Draws(args.seed, "evaluation", 0, range(len(x)))
        mask = draw_masks(x.shape[-1], draw.integer("mask", 2**62))
    for i in torch.arange(len(x)).split(100):
        if args.task == "inpaint":
            parts.append(inpainting_context(space, x[i].to(device), mask[i].to(device)))
        else:
            parts.append(semantic_context(maps[i].to(device), data.map_classes, space.factor))
    return torch.cat([part.cpu() for part in parts]), mask


def measure_holes(x, mask, made, other):
    """Mean squared errors of filled holes. x, made, other (n, 3, H, W), mask (n, 1, H, W).

    made, other: samples with the right context, and with another item's.
    """
    known = (1 - mask).sum((2, 3), keepdim=True).clamp_min(1)
    mean = ((1 - mask) * x).sum((2, 3), keepdim=True) / known  # of the known pixels, (n, 3, 1, 1)
    x_out = composite(made, x, mask)

    def in_holes(guess):
        return float((mask * (guess - x).square()).sum() / (3 * mask.sum()))

    return {
        "hole_mse": in_holes(x_out),
        "mean_fill": in_holes(mean.expand_as(x)),
        "shuffled": in_holes(other),
        "known_error": float(((x_out - x) * (1 - mask)).abs().max()),
        "known_mse_before": float(((1 - mask) * (made - x).square()).sum() / (3 * known.sum())),
    }


def agreement(world, x, maps):
    """Mean intersection over union of the foregrounds of pictures and of maps.  -> float"""
    return float(overlap(world.foreground(x), maps > 0).mean())


def sample_only(args):
    """--sample FOLDER: load a saved network, print its measures, write samples to --output_dir.

    It samples as its sampler.json says; flags that are given win. With --samples or --reconstruct
    it writes a set of images instead.
    """
    run = Run(args, "latent_fm")
    folder, saved, schedule, prediction, _ = read_own_sampler(args.sample, run.method)
    folder = network_folder(folder)  # of what models.convert wrote, transformer/
    net, config = load_network(folder, place=run.place)
    run.spread_tokens(net)
    if prediction != "flow_v":  # DiT's
        net = AsFlow(net, Diffusion(schedule, prediction)).eval()
    saved = {"sample_steps": len(saved["times"]), "solver": saved["rule"], **saved}
    for name, default in SAMPLER.items():
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name, default))
    args.task = saved.get("task", "class")
    args.data, args.maps = args.data or saved.get("data"), args.maps or saved.get("maps")
    # of a world's training items only the number of map classes is wanted, or what to reconstruct
    args.pool = max(1000, args.samples or 0)
    name = config.get("world") or args.data
    world = load_world(name) if name in WORLDS else None
    refuse(wrong_flags(args, world))
    if args.task == "class" and args.guidance_scale != 1:
        never = teachers.keeps_labels(config, saved)
        why = f"--guidance_scale {args.guidance_scale:g}: this network was trained with every label"
        refuse([(never, f"{why}, and its null label is random: give --guidance_scale 1")])
    refuse_output_dir(run.folder, sampling=True)
    space = saved_space(args, folder).to(run.device)
    args.resolution = args.resolution or space.pixel_shape(net.latent_shape)[-1]
    args.crop = args.crop or saved.get("crop", "lanczos")
    with_context = args.task in ("inpaint", "semantic")
    wants_data = with_context or args.reconstruct
    refuse(wrong_pictures(args, wants_data, world))
    data = load_training_data(args, world) if wants_data else None
    if args.samples or args.reconstruct:
        return write_images(run, net, data, space, folder)
    os.makedirs(run.folder, exist_ok=True)
    finish(run, net, world, data, space)
    run.wait_for_all()


def saved_space(args, folder):
    """The latent space of a saved network: autoencoder/ beside it, or --autoencoder's.

    Raises UserError.
    """
    space, named = space_beside(folder), args.autoencoder
    if named == "identity":
        return space or LatentSpace(Identity())
    if space or named == "pca":
        raise UserError(
            f"--autoencoder {named}: with --sample it is for folders of models.convert that have "
            "none, and names a VAE: leave it out"
        )
    return load_space(named)


def write_images(run, net, data, space, folder):
    """--samples N images of a saved network, or with --reconstruct of its autoencoder.

    All ranks call it. folder: the network's. Raises UserError.
    """
    args = run.args
    report.refuse_no_images(space.pixel_shape(net.latent_shape), "without it samples.png is drawn")
    if args.reconstruct:
        refuse(wrong_reconstruction(args, data, space))
        n, label = args.samples or len(data.x), data.label
        about = {"reconstructed": contents_of(data.x)}
        label = None if label is None else label[torch.arange(n)]
    else:
        n, label = args.samples, report.chosen_labels(args, max(1, net.num_classes))
        label = label if net.num_classes else None
        about = sampler_settings(args)

    def draw(first, last):
        """Samples, or decode(encode(x)) at the posterior's mean."""
        if args.reconstruct:
            z = to_unit(data.x[torch.arange(first, last)]).to(run.device)
        else:
            z = Draws(args.seed, "evaluation", 0, range(first, last), run.device)
            z = z.normal("z", net.latent_shape)
            its = None if label is None else label[first:last].to(run.device)
            z = sample(net, z, its, **about)
        with torch.autocast(run.device.type, enabled=False):  # the autoencoder in float32
            return space.to_pixels(space.to_latents(z) if args.reconstruct else z)

    try:
        write_set(run, draw, n, label, **about, **report.made_with(args, folder, space))
    except ValueError as e:
        raise UserError(f"--solver {args.solver}: {e}") from None


def wrong_pictures(a, wanted, world):
    """Why --data of --sample has no pictures: pairs (wrong, why). wanted: whether any are."""
    what = "--reconstruct" if a.reconstruct else f"--task {a.task}"
    yield wanted and not a.data, f"--data: {what} needs pictures: give a folder of them"
    latents = wanted and a.data and not world and is_posteriors(a.data)
    yield latents, f"{what}: --data {a.data} has latents: give pictures"


def wrong_reconstruction(a, data, space):
    """Why there is nothing to reconstruct: pairs (wrong, why)."""
    n = len(data.x)
    yield (space.trivial, "--reconstruct: this run has no autoencoder: leave it out")
    yield (a.samples or 0) > n, f"--samples {a.samples}: --data {a.data} has {n} images: name fewer"


# ---- what an update costs, for --dry_run ---------------------------------------------------------


def cost(args):
    """-> the networks, and the backward passes of one student update (models/plumbing/dry_run.py).

    The autoencoder is left out, which --cache_latents takes out of the loop. Muon keeps one number
    for each weight where AdamW keeps two, and multiplies matrices where AdamW does not.
    """
    muon = args.optimizer == "muon"
    optimizer = dict(moments=4, update=muon_flops) if muon else {}
    networks = [Network("net", "trained", saved=True, **optimizer), Network("ema", "average")]
    return networks, [Turn("net", 1, {}, {"net": 1})]


def muon_flops(net):
    """FLOPs of one of Muon's updates of net."""
    return flops_of(block_matrices(net))


def planned_network(args):
    """The network that `train` builds, as far as flags and a file's header say it.

    A folder's images have 1,000 classes here, and maps of 19. Raises UserError.
    """
    refuse(wrong_flags(args, load_world(args.data) if args.data in WORLDS else None))
    shape, classes, maps = (3, args.resolution, args.resolution), 1000, 19
    if args.data in WORLDS:
        world = load_world(args.data)
        shape, classes = world.shape, world.num_classes
        maps = getattr(world, "map_classes", maps)
    elif args.data.endswith(".safetensors") and not is_posteriors(args.data):
        shape = shape_of_file(args)
    shape = planned_shape(args, shape)
    classes = classes if args.task == "class" else 0
    data = SimpleNamespace(num_classes=classes, class_names=None, map_classes=maps)
    if args.init:
        net = network_of(network_folder(args.init))
        refuse(wrong_kind(args, net))
        if args.data in WORLDS:  # shapes and classes of other data are known once they are read
            refuse(wrong_start(args, net, data, shape))
    else:
        net = build_network(args, data, shape, None)
    refuse_muon(args, net)
    return net


def planned_shape(args, shape):
    """The shape of a latent. shape: of an item of --data, unless that has latents already."""
    if args.data not in WORLDS and is_posteriors(args.data):
        shape = Posteriors.shape_of_one(args.data, args.autoencoder)
        return (shape_in(args.autoencoder, shape)[0], *shape[1:])
    if args.autoencoder == "identity":
        return shape
    refuse_to_encode(args, shape)
    if args.autoencoder != "pca":
        return shape_in(args.autoencoder, shape)
    if any(side % args.pca_patch for side in shape[1:]):
        raise UserError(
            f"--pca_patch {args.pca_patch}: it does not divide {shape[1:]}: change "
            "--resolution or --pca_patch"
        )
    return (args.pca_channels, *(side // args.pca_patch for side in shape[1:]))


def shape_of_file(args):
    """The shape of an item of FILE.safetensors. Raises UserError."""
    file = open_tensors(args.data)
    if "x0" not in file.keys():
        raise UserError(f"--data {args.data}: no tensor x0, nor mean and std: give one that has")
    return tuple(file.get_slice("x0").get_shape()[1:])


# ---- flags ---------------------------------------------------------------------------------------

# What worlds and the paper's networks change of the flags' defaults.
SHAPES = dict(
    max_train_steps=3500, learning_rate=3e-3, learning_rate_muon=0.06, pool=20000,
    logit_normal=True, autoencoder="pca", patch_size=[2], latent_norm="scale",
)  # fmt: skip
PRESETS = {
    "ring": dict(max_train_steps=2000, pool=20000),
    "shapes": SHAPES,
    "clips": dict(patch_size=[2, 4, 4], width=64, depth=8, pool=40000),  # 64 tokens
    "voxels": dict(max_train_steps=6000, width=96, depth=6, pool=40000),  # 64 tokens of 4x4x4
}
MAPS = dict(max_train_steps=1200)  # --task semantic: a map says most of what there is to learn
SIZED = dict(
    max_train_steps=400000, optimizer="adamw", learning_rate=1e-4, lr_warmup_steps=0,
    lr_decay_share=0.0, lr_schedule="cosine", weight_decay=0.0, ema_decay=0.9999,
    adam_betas=[0.9, 0.999], max_grad_norm=0.0, crop="adm", gradient_checkpointing=True,
)  # fmt: skip
# The sampler's flags where they are not given. They are None until then, so that --sample knows
# which ones to read from sampler.json.
SAMPLER = dict(
    sample_steps=32, solver="heun", guidance_scale=1.5, guidance_interval=[0.0, 1.0],
    timestep_shift=1.0, atol=1e-5, rtol=1e-5,
)  # fmt: skip


# fmt: off
def add_data_flags(p):
    add = p.add_argument_group("data and autoencoder").add_argument
    add("--data", default=None, help="an embedded world (shapes, which is the default, glyphs, "
        "clips, voxels, ring), pictures (a folder with class subfolders, for tasks without "
        "classes also flat; dataset.json in it; a .zip, .tar or a folder of tars, LSUN's LMDB, "
        "parquet, .npz), latents (.npy of mean and std, or mean and std in FILE.safetensors), or "
        "FILE.safetensors with x0 and cond.label or cond.map")
    add("--maps", default=None, metavar="FOLDER", help="--task semantic: a PNG of class numbers "
        "for each image of --data, same relative name; 255 = none")
    add("--resolution", type=number(int, 4), default=32,
        help="pixels a side; only for sets of pictures (paper: 256, 512, 1024)")
    add("--pool", type=number(int, 100), default=100000,
        help="items drawn from a world to train on")
    add("--crop", choices=CROPS, default="lanczos", help="how an image of a folder becomes a "
        "square: our own way, ADM's (paper: ImageNet), or torchvision's Resize (paper: LSUN)")
    add("--hflip", action="store_true", help="mirror half of the items (paper: on for classes and "
        "uncond; its code for inpainting and maps does not)")
    add("--map_names", default=None, metavar="FILE", help="--hflip with --task semantic: JSON "
        "list of the maps' classes, so that l_brow and r_brow change places in a mirror image")
    add("--autoencoder", default="identity", help="identity (pixels), pca, or the folder of an "
        "AutoencoderKL or of a pipeline with vae/ (paper: stabilityai/sd-vae-ft-mse, f = 8)")
    add("--pca_patch", type=number(int, 1), default=4,
        help="f of --autoencoder pca, pixels a patch side")
    add("--pca_channels", type=number(int, 1), default=12,
        help="components kept of each patch by --autoencoder pca")
    add("--latent_norm", choices=["none", "scale", "channel"], default="none",
        help="none: as the autoencoder scales (paper: its scaling_factor 0.18215); scale: one "
        "factor measured on the data; channel: mean and std of each channel")
    add("--cache_latents", default=None, metavar="FOLDER", help="encode the data once into this "
        "folder (posterior means and stds in half precision, mirrored items too) instead of in "
        "every step (paper's code: every step)")
    add_picture_flags(p)


def add_network_flags(p):
    add = p.add_argument_group("network").add_argument
    add("--network", choices=["small", *PAPER_NETWORKS], default="small",
        help="small: models/networks/dit.py with the flags below; else a DiT or ADM's U-Net of the "
        "paper's size")
    add("--init", default=None, metavar="FOLDER", help="begin with the weights of a flow: a run of "
        "this script, or a folder that models.convert wrote (LFM, SiT, EDM). The other flags here "
        "have no effect then")
    add("--patch_size", type=number(int, 1), nargs="+", default=None,
        help="latent pixels a patch side, or T H W (default: latent side / 4; paper: 2)")
    add("--width", type=number(int, 32), default=128,
        help="DiT width, a multiple of 32 (paper: 768 to 1152)")
    add("--depth", type=number(int, 1), default=4, help="DiT blocks (paper: 12 to 28)")
    add("--cond_dim", type=number(int, 8), default=48, help="width of the time and class embedding")
    add("--t_scale", type=number(float, above=0), default=1000.0,
        help="the sinusoids see t times this (paper's code: 1)")
    p.run.add_argument("--save_fp16", action="store_true",
        help="store student/ in float16, as the shipped teachers are")


def add_training_flags(p):
    add = p.method.add_argument
    add("--task", choices=["class", "uncond", "inpaint", "semantic"], default="class",
        help="what the network is conditioned on: the class, nothing, an image with holes, or a "
        "segmentation map")
    add("--label_dropout", type=number(float, 0, 1), default=0.1,
        help="p_u, share of labels dropped (paper: 0.1)")
    add("--logit_normal", action=argparse.BooleanOptionalAction, default=False,
        help="draw t logit-normal (SD3) instead of uniform (paper)")
    add("--sigma_min", type=number(float, 0, 0.01), default=0.0,
        help="noise left at t = 0 (paper: 0; its code: 1e-5)")
    add = p.optimiser.add_argument
    add("--optimizer", choices=["muon", "adamw"], default="muon",
        help="muon: for the blocks' matrices, AdamW for the rest (paper: adamw)")
    add("--learning_rate_muon", type=number(float, above=0), default=0.02,
        help="Muon's learning rate")
    add("--weight_decay", type=number(float, 0), default=0.01, help="AdamW weight decay (paper: 0)")
    add("--adam_betas", type=number(float, 0, 0.99999), nargs=2, default=[0.9, 0.99],
        help="AdamW betas (paper: 0.9 0.999)")
    add("--lr_decay_share", type=number(float, 0, 1), default=1.0, help="last share of the run "
        "in which the rates fall; 0 = constant (paper: 0 for LSUN and ImageNet, 1 for faces)")
    add("--lr_schedule", choices=["linear", "cosine"], default="linear",
        help="how they fall: in a straight line, or along half a cosine (paper)")
    add("--lr_final", type=number(float, 0), default=0.0,
        help="what --learning_rate falls to, and Muon's in proportion (paper: 1e-5)")


def add_sampler_flags(p):
    p.run.add_argument("--reconstruct", action="store_true", help="with --sample: write "
        "--data (all of it, or --samples N images) through the run's autoencoder, for rFID")
    add = p.shown.add_argument
    add("--solver", choices=["euler", "heun", "dopri5"], default=None,
        help="of the samples at the end; heun unless given (paper: dopri5)")
    add("--sample_steps", type=number(int, 1), default=None,
        help="steps of euler and heun; 32 unless given, shapes 8")
    add("--atol", type=number(float, 1e-8), default=None,
        help="absolute tolerance of dopri5; 1e-5 unless given (paper: 1e-5)")
    add("--rtol", type=number(float, 1e-8), default=None,
        help="relative tolerance of dopri5; 1e-5 unless given (paper: 1e-5)")
    add("--guidance_interval", type=number(float, 0, 1), nargs=2, default=None,
        metavar=("LO", "HI"),
        help="guidance acts at t in [LO, HI] only; 0 1 unless given (paper: everywhere)")
# fmt: on


def parse_args(argv=None):
    """argv (None: the command line), with the defaults that suit --data, --task and --network."""
    p = Parser(
        description="Train a flow-matching model in latent space (arXiv 2307.08698). Defaults "
        "shown suit the given --data and --network. Flags of the sampler show none, since "
        "--sample takes them from the saved model."
    )
    add_run_flags(p)
    add_data_flags(p)
    add_network_flags(p)
    add_training_flags(p)
    add_sampler_flags(p)
    paper_values(p, learning_rate="1e-4 or 2e-4", lr_warmup_steps="0", ema_decay="0")
    p.set_defaults(max_train_steps=8000, learning_rate=2e-3, lr_warmup_steps=200, ema_decay=0.999)
    p.set_defaults(max_grad_norm=1.0, checkpointing_steps=1000, guidance_scale=None)
    argv = words(argv)
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    refuse_ambiguous("--data", known.data)
    refuse_ambiguous("--autoencoder", known.autoencoder, BUILT_IN, "autoencoder")
    source = known.data or (None if known.sample else "shapes")
    if known.sample:  # the saved network decides
        p.set_defaults(resolution=None, crop=None)
    else:
        p.set_defaults(**PRESETS.get(source, {}))
    if source == "shapes" and known.task == "semantic":
        p.set_defaults(**MAPS)
    if known.network != "small" or known.init and not is_small(known.init):
        p.set_defaults(**SIZED)
    lengthen(p, known, known.network == "small")
    args = p.parse_args(argv)
    refuse(unread(p, args, "latent_fm", argv, ignored_flags(args)))
    if args.optimizer != "muon":
        args.learning_rate_muon = None  # no rate to lower where a run fails
    if args.output_dir is None:
        method = "latent_fm" if args.task == "class" else f"latent_fm-{args.task}"
        args.output_dir = default_output_dir(method, source or "", args.sample)
    if args.sample is None:  # otherwise sample_only does this, with what was saved
        args.data = source
        fill_sampler(args)
    return args


def ignored_flags(a):
    """Flags without effect beside the others: see `unread`. --preview_every 0 makes no film."""
    sized = a.network in PAPER_NETWORKS
    yield "patch_size width depth cond_dim", sized, f"--network {a.network} has sizes of its own"
    points, why = a.data == "ring", "points have a small network of their own"
    yield "network patch_size width depth cond_dim t_scale", points, why
    yield "learning_rate_muon", a.optimizer != "muon", f"--optimizer {a.optimizer} has one rate"
    yield "lr_schedule", not a.lr_decay_share, "rates do not fall"
    yield "pca_patch pca_channels", a.autoencoder != "pca", "there is no PCA"
    yield "preview_every", bool(a.preview_every), "pictures are drawn at the end alone"


def fill_sampler(args):
    """Set the sampler's flags that are not given, for a run that trains."""
    defaults = dict(SAMPLER)
    if args.data == "shapes":
        defaults["sample_steps"] = 8
    if args.task != "class" or args.label_dropout == 0:  # no null label is learned
        defaults["guidance_scale"] = 1.0
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


# fmt: off
def wrong_flags(a, world):
    """Flags that do not go together: pairs (wrong, why). world: --data's, None without one."""
    low, high = a.guidance_interval or (0.0, 1.0)
    scale, semantic, data = a.guidance_scale, a.task == "semantic", f"--data {a.data}"
    guided = a.task != "class" and scale not in (None, 1)
    inpaint_file = not a.sample and a.task == "inpaint" and a.data.endswith(".safetensors")
    no_maps = semantic and world and not hasattr(world, "scenes")
    images = bool(a.data) and is_set(a.data)
    misplaced = a.maps and not (semantic and images and os.path.isdir(a.maps))
    with_context = a.task in ("inpaint", "semantic")
    sized = a.network in PAPER_NETWORKS and a.t_scale not in (1, 1000)
    sides = a.hflip and semantic and not world
    yield from wrong_output(a)
    yield a.samples and with_context, (
        f"--samples {a.samples}: --task {a.task} fills pictures in: leave it out")
    yield low > high, f"--guidance_interval: LO must not be above HI, got {low:g} {high:g}"
    yield guided, f"--guidance_scale {scale}: --task {a.task} has no labels to guide by"
    undropped = not a.sample and not a.label_dropout and scale not in (None, 1)
    yield undropped, (f"--guidance_scale {scale}: with --label_dropout 0 no null label is learned "
                      "to guide by: give --guidance_scale 1 or some --label_dropout")
    points = a.hflip and world and len(world.shape) == 1
    yield points, f"--hflip: {data} has points, whose axes it would exchange: leave it out"
    constant = a.lr_final and not a.lr_decay_share
    yield constant, ("--lr_final: rates fall within --lr_decay_share: give --lr_decay_share 1 with "
                     "it")
    yield inpaint_file, "--task inpaint encodes images in every step: give --data FOLDER or a world"
    yield no_maps, f"{data}: that world has no segmentation maps; shapes has"
    yield semantic and images and not a.maps, (
        f"{data}: --task semantic needs --maps FOLDER, a PNG of class numbers for each image")
    yield misplaced, (
        f"--maps {a.maps}: a folder of maps goes with --task semantic and --data FOLDER of images")
    yield sides and not a.map_names, (
        "--hflip: a mirror exchanges left and right classes: give --map_names FILE, a JSON list of "
        "the maps' class names, or leave --hflip out")
    yield a.map_names and not sides, (
        f"--map_names {a.map_names}: has an effect only with --task semantic --hflip on maps of "
        "your own: leave it out")
    yield a.lr_final > a.learning_rate, (
        f"--lr_final {a.lr_final:g} is above --learning_rate {a.learning_rate:g}: lower it")
    yield sized, (
        f"--network {a.network}: for --t_scale 1 or 1000; use --network small")
    yield a.init and a.network != "small", (
        f"--network {a.network}: --init {a.init} has a network of its own: leave one of them out")
# fmt: on


def main(argv=None):
    args = parse_args(argv)
    if args.sample:
        sample_only(args)
    elif not dry_run(args, *cost(args), build=planned_network):
        train(args)
        work_done(args, *cost(args), build=planned_network)


if __name__ == "__main__":
    run_main(main)
