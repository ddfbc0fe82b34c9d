"""Flow matching in latent space (LFM, arXiv 2307.08698), with its tasks; it also trains the teachers that the other files distil.

The idea. Put an image through a frozen autoencoder and call the result z_0. Draw noise z_1 and a time t; put z_t on the straight line
between them; ask a network for the line's direction. The regression's optimum, v(z, t) = E[z_1 - z_0 | z_t = z], is the velocity field of
an ODE that carries noise (t = 1) to latents (t = 0), so sampling is any ODE solver started at noise, and the decoder at its end. The
latent is many times smaller than the image, and so is the network's work. For class-conditional models the label is dropped now and
then, so that one network also knows the unconditional field and guidance can push away from it. For inpainting and semantic synthesis
the network sees more channels beside z_t: latents of the image with holes and the mask, or a segmentation map.

    paper          here                           meaning                                                        shape
    x_0, E, D      x, space.to_latents, .to_pixels   image in [-1, 1], encoder (its posterior is sampled), decoder  (B, 3, H, W)
    z_0, z_1       x0, eps                        latent (pixels with --autoencoder identity), noise             (B, C, h, w)
    z_t            x_t = (1-t) x0 + t eps         the path, t = 0 data, t = 1 noise                              (B, C, h, w)
    v_theta        net(x_t, t, label, context)    velocity, regresses eps - x0                                   (B, C, h, w)
    p_u            label_dropout                  share of labels replaced by the null label K
    gamma          guidance_scale                 v_u + gamma (v_c - v_u); 1 = off
    m              mask                           1 = hole, 0 = known                                            (B, 1, H, W)

Launch.
    laptop      python latent_fm.py                                         # shapes, patch-PCA latents, classes: minutes on two cores
                python latent_fm.py --task inpaint                          # or semantic, or uncond
                python latent_fm.py --data glyphs --logit_normal --save_fp16    # the shipped teachers: docs/latent_fm.md
                python latent_fm.py --data clips --logit_normal --save_fp16
                python latent_fm.py --data voxels --logit_normal --save_fp16    # pixels: the teacher of mdt_dist.py
    own images  python latent_fm.py --data FOLDER --resolution 32           # pixels; FOLDER/<class>/*.png, then dmd.py --teacher <output_dir>
    one GPU     python latent_fm.py --data FOLDER --resolution 256 --autoencoder sd-vae-ft-mse --network DiT-B/2 --hflip --mixed_precision bf16
    one node    torchrun --nproc-per-node 8 latent_fm.py (the same flags; --train_batch_size is per rank)

Deviations, and why. The network sees 1000 t (paper's code: raw t, where all but two of the sinusoids are constant; --t_scale 1). EMA is
on (the official scripts leave it off and the authors advise it). sigma_min = 0 as in the paper (code: 1e-5). The learning rate decays
linearly over the last --lr_decay_share of the run, and Muon trains the blocks' matrices; --optimizer adamw --lr_decay_share 0 is the
paper's choice. A mask reaches the latent grid by its maximum (code: nearest pixel, which loses thin strokes), is never empty, and the
image with holes is encoded by the posterior's mean. The 1x1 projection of segmentation maps is trained (in the official code it sits
under no_grad and keeps its random start). The networks are DiTs; the paper's ADM is not here. Euler ends at t = 0 (code: 1e-5).
"""

import argparse
import datetime
import os
import sys
import time
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from models.diffusion import (
    Flow,
    expand,
    guide,
    logit_normal,
    ode_calls,
    sample_ode,
    shift,
    step_grid,
    to_x0_eps,
)
from models.draws import Draws, stable_hash
from models.files import TrainingError, UserError, open_tensors, save_json, save_tensors
from models.networks import load_network, network_config, save_network, weights_hash
from models.networks.autoencoders import Identity, PatchPCA
from models.networks.dit import DiT
from models.networks.dit_imagenet import DIT_B_2, DIT_L_2, DIT_XL_2, DiTTransformer2DModel
from models.networks.latent_space import LatentSpace, load_space, space_beside
from models.networks.ring_mlp import RingMLP
from models.plumbing import report
from models.plumbing.data import Rows, load_data, to_unit
from models.plumbing.flags import Parser, add_run_flags, number
from models.plumbing.report import print_table
from models.plumbing.run import (
    Log,
    default_output_dir,
    prepare_output_dir,
    refuse_output_dir,
    resume,
    run_main,
    save_for_resume,
)
from models.plumbing.teachers import read_own_sampler
from models.worlds import WORLDS, load_world
from models.worlds.masks import draw_masks
from models.worlds.measures import balanced_labels
from models.worlds.shapes import overlap

# ---- the method --------------------------------------------------------------------------------------------------


def flow_matching_loss(net, x0, eps, t, cond, sigma_min=0.0):
    """E |v_theta(x_t, t) - (eps - x0)|^2, mean over all dimensions (Alg. 1).  x0, eps (B, ...), t (B,) -> scalar, (B,).

    sigma_min (official code: 1e-5) stops the path a little before the data: x_t = (1-t) x0 + (s + (1-s) t) eps, whose slope is (1-s) eps - x0.
    """
    level = sigma_min + (1 - sigma_min) * t
    x_t = (1 - expand(t, x0)) * x0 + expand(level, x0) * eps
    error = (
        (net(x_t, t, **cond).float() - ((1 - sigma_min) * eps - x0)).square().flatten(1).mean(1)
    )  # (B,)
    return error.mean(), error.detach()


def drop_labels(label, coin, p_u, null):
    """Replace a label by the null label with probability p_u (Alg. 3).  label (B,), coin (B,) uniform -> (B,)."""
    return torch.where(coin < p_u, null, label)


def guided_velocity(net, x, t, label, null, guidance_scale):
    """v_u + gamma (v_c - v_u) (Alg. 4); gamma = 1 and 0 cost one call, others one call on twice the batch.  -> (B, ...)."""
    if guidance_scale == 1:
        return net(x, t, label=label)
    if guidance_scale == 0:
        return net(x, t, label=torch.full_like(label, null))
    both = torch.cat([label, torch.full_like(label, null)])
    v_c, v_u = net(torch.cat([x, x]), torch.cat([t, t]), label=both).chunk(2)
    return guide(v_c, v_u, guidance_scale)


def inpainting_context(space, x, mask):
    """What an inpainting network sees beside x_t: latents of the image whose holes are black, and the mask in {-1, 1} at their size, a cell
    being a hole if any of its pixels is.  x (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) in {0, 1} -> (B, C + 1, h, w)."""
    black = (1 - mask) * (x + 1) - 1  # x where known, -1 in holes
    return torch.cat([space.to_latents(black), 2 * F.max_pool2d(mask, space.factor) - 1], 1)


def composite(x, known, mask):
    """The sample in the holes, the known pixels themselves elsewhere.  x, known (B, 3, H, W), mask (B, 1, H, W)."""
    return torch.where(mask > 0, x, known)


def semantic_context(maps, classes, factor):
    """Share of each class in each latent cell: a one-hot map, averaged.  maps (B, H, W) of 0 .. classes - 1, 255 = none -> (B, classes, h, w).
    The network's own 1x1 convolution follows, with gradient; it is linear, so averaging first is the same and cheaper."""
    one_hot = (
        maps[:, None] == torch.arange(classes, device=maps.device)[:, None, None]
    ).float()  # (B, classes, H, W)
    return F.avg_pool2d(one_hot, factor)


# ---- the sampler ---------------------------------------------------------------------------------------------------

# Dormand and Prince 1980: nodes, stages, and the difference of the solutions of order 5 and 4. The last stage is the next step's first.
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
    """Integrate dx/dt = v(x, t) with steps chosen so that the estimated error of each, the root mean square over the whole batch of
    e / (atol + rtol |x|), is at most 1 (the paper's solver, at 1e-5).  v: x (B, ...), t float -> (B, ...).  -> x at `end`, calls of v: 2, and
    6 a step tried. Raises ValueError where steps become so small that x's precision cannot show the error asked for."""
    sign, t, k1 = (1 if end > start else -1), start, v(x, start)
    rms = lambda a, scale: float((a / scale).square().mean().sqrt())  # noqa: E731
    scale = atol + rtol * x.abs()  # first step: Hairer, Norsett and Wanner, Solving ODEs I, II.4
    d0, d1 = rms(x, scale), rms(k1, scale)
    h0 = 0.01 * d0 / d1 if min(d0, d1) > 1e-5 else 1e-6
    d2 = rms(v(x + sign * h0 * k1, start + sign * h0) - k1, scale) / h0
    h = min(100 * h0, max(1e-6, 1e-3 * h0) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2)
    calls, rejected = 2, False
    while sign * (end - t) > 1e-12:
        if not h > 1e-7:
            raise ValueError(
                f"at t = {t:.4g} the steps come down to {h:.1g}, below what x can show; raise atol {atol:g} and rtol {rtol:g}"
            )
        h = min(h, sign * (end - t))
        k = [k1]
        for node, weights in zip(NODES, STAGES):
            x_new = x + sign * h * sum(w * k_i for w, k_i in zip(weights, k) if w)
            k.append(v(x_new, t + sign * node * h))
        calls += 6
        error = rms(
            h * sum(w * k_i for w, k_i in zip(DIFFERENCE, k) if w),
            atol + rtol * torch.maximum(x.abs(), x_new.abs()),
        )
        if not error < float("inf"):
            raise ValueError(f"at t = {t:.4g} the velocity is not finite")
        if error <= 1:
            t, x, k1 = t + sign * h, x_new, k[-1]
        growth = min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        h, rejected = h * (min(1.0, growth) if rejected else growth), error > 1
    return x, calls


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
    """Integrate dx/dt = v from noise to data (Alg. 2: Euler).  noise (B, ...), label (B,) or None -> x0 (B, ...), in noise's dtype: float32.

    solver: euler, heun (two calls a step but one in the last), or dopri5, which chooses its own steps. Guidance only acts at t within
    interval. calls: a list that the number of velocity evaluations is appended to; a guided one is two network calls.
    """
    flow, field = (
        Flow(),
        net if context is None else lambda x, t, label: net(x, t, label=label, context=context),
    )

    def velocity(x, t):
        scale = guidance_scale if interval[0] <= float(t[0]) <= interval[1] else 1
        return guided_velocity(field, x, t, label, net.num_classes, scale).to(
            x.dtype
        )  # a bf16 network's output joins the float32 state

    if solver == "dopri5":
        x, n = dormand_prince(
            lambda x, t: velocity(x, torch.full((len(x),), t, device=x.device, dtype=x.dtype)),
            noise,
            atol,
            rtol,
        )
    else:
        n = ode_calls(steps, solver)
        x = sample_ode(
            lambda x, t: to_x0_eps(velocity(x, t), "flow_v", x, flow.alpha(t), flow.sigma(t)),
            flow,
            noise,
            step_grid(steps, timestep_shift),
            solver,
        )
    if calls is not None:
        calls.append(n)
    return x


# ---- plumbing: identical in every script ---------------------------------------------------------------------------


def start_ranks():
    """-> rank, world_size, device. Under torchrun joins the process group (nccl on GPUs, gloo on the CPU)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12)
        )  # rank 0 may sample for long
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
    parameters = [
        p
        for o in optimizers
        for group in o.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    if dist.is_initialized():
        for p in (
            parameters
        ):  # every rank has the same parameters in the same order; FSDP2 does this in its backward
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not all(
        abs(v) < float("inf") for v in mean_over_ranks(loss, norm)
    ):  # NaN compares false; same verdict on all ranks
        raise TrainingError(
            f"{what} loss or gradient is not finite ({float(loss):.4g}, norm {float(norm):.4g}); the last "
            "checkpoint under state/ is intact; start again with a lower learning rate or max_grad_norm"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(norm)


@torch.no_grad()
def update_ema(ema, net, decay):
    for a, b in zip(ema.parameters(), net.parameters()):
        a.lerp_(b, 1 - decay)


# ---- data, autoencoder, network ----------------------------------------------------------------------------------


def refuse_guidance(args):
    """Raises UserError for guidance without labels."""
    if args.task != "class" and args.guidance_scale != 1:
        raise UserError(
            f"--guidance_scale {args.guidance_scale:g}: --task {args.task} has no labels to guide by; leave it out"
        )


def load_training_data(args, world):
    """--data and --maps -> namespace x (N, ...) pixels, label (N,), maps (N, H, W) or None, class_names, num_classes (0: no labels), map_classes.
    Raises UserError for what this task cannot train on."""
    where, classes = f"--data {args.data}", args.task == "class"
    if args.task == "semantic" and world and not hasattr(world, "scenes"):
        raise UserError(f"{where}: that world has no segmentation maps; shapes has")
    if args.task == "semantic" and os.path.isdir(args.data) and not args.maps:
        raise UserError(
            f"{where}: --task semantic needs --maps FOLDER with a PNG of class numbers for each image"
        )
    if args.maps and (
        args.task != "semantic" or not os.path.isdir(args.data) or not os.path.isdir(args.maps)
    ):
        raise UserError(
            f"--maps {args.maps}: a folder of maps goes with --task semantic and --data FOLDER of images"
        )
    maps = (args.maps or bool(world)) if args.task == "semantic" else None
    x, cond, class_names = load_data(
        args.data, args.resolution, args.pool, args.seed, not classes, maps
    )
    label, maps = cond.get("label"), cond.get("map")
    if classes and label is None:
        raise UserError(
            f"{where}: no cond.label tensor, which --task class needs; --task uncond does without"
        )
    num_classes = 0 if not classes else world.num_classes if world else int(label.max()) + 1
    if x.dim() != 4 and (not world or args.task in ("inpaint", "semantic")):
        raise UserError(f"{where}: x0 is {tuple(x.shape)}; wanted images (N, C, H, W)")
    if classes and (int(label.min()) < 0 or len(label.unique()) < num_classes):
        raise UserError(
            f"{where}: cond.label must use every class from 0 to its largest, {num_classes - 1}; renumber the classes"
        )
    map_classes = 0
    if args.task == "semantic":
        if maps is None or tuple(maps.shape) != (len(x), *x.shape[2:]):
            raise UserError(
                f"{where}: --task semantic needs cond.map, class numbers (N, H, W) = {(len(x), *x.shape[2:])}"
            )
        maps = (
            maps if torch.is_tensor(maps) else maps[torch.arange(len(maps))]
        )  # a file's are read whole: one byte a pixel
        if maps.is_floating_point() or int(maps.min()) < 0 or int(maps.max()) > 255:
            raise UserError(f"{where}: cond.map must hold integers, 0 to 254, or 255 for none")
        known = maps[maps != 255]
        map_classes = getattr(world, "map_classes", None) or (
            1 + int(known.max()) if len(known) else 0
        )
        if not map_classes:
            raise UserError(
                f"{where}: every map is 255, no class, everywhere: give maps with classes"
            )
    return types.SimpleNamespace(
        x=x,
        label=label,
        maps=maps,
        class_names=class_names if classes else None,
        num_classes=num_classes,
        map_classes=map_classes,
    )


def build_space(args, world, data):
    """--autoencoder -> LatentSpace; --latent_norm is measured later, except for the space that a world ships. Raises UserError."""
    shape = tuple(data.x.shape[1:])
    if args.autoencoder == "identity":
        return LatentSpace(Identity(shape[0]))
    if len(shape) != 3:
        raise UserError(
            f"--autoencoder {args.autoencoder}: it encodes images, and --data {args.data} has items of shape {shape}: use identity"
        )
    if own_space(args, world):
        return world.space
    try:
        if args.autoencoder == "pca":
            some = to_unit(data.x[torch.arange(min(len(data.x), 4000))])
            space = LatentSpace(PatchPCA(shape[0], args.pca_patch, args.pca_channels).fit(some))
        else:
            space = load_space(args.autoencoder)
        space.own_moments(torch.zeros(1, *shape))
    except ValueError as e:
        raise UserError(
            f"--autoencoder {args.autoencoder}: {e}; change --resolution, --pca_patch or --pca_channels"
        ) from None
    return space


def own_space(args, world):
    """Whether the flags ask for exactly the space that the world ships, so that the world can read what the network makes."""
    c = (
        world.space.autoencoder.config
        if hasattr(world, "space") and args.autoencoder == "pca"
        else {}
    )
    return (args.pca_patch, args.pca_channels, args.latent_norm) == (
        c.get("patch"),
        c.get("latent_channels"),
        "scale",
    )


def cache_latents(args, data, space, device):
    """--cache_latents: posterior means and deviations of every item, of the mirrored ones too with --hflip, made once.
    -> the open file's tensors "mean" and "std" (N, 1 or 2, C, h, w), read row by row.  Raises UserError for another data set's."""
    path, about = (
        args.cache_latents,
        {
            k: str(getattr(args, k))
            for k in ("data", "resolution", "hflip", "pca_patch", "pca_channels")
        },
    )
    about["autoencoder"] = args.autoencoder if space.folder is None else weights_hash(space.folder)
    if not os.path.isfile(path):
        means, stds = [], []
        for first in tqdm(range(0, len(data.x), args.train_batch_size), desc="latents"):
            x = to_unit(
                data.x[torch.arange(first, min(first + args.train_batch_size, len(data.x)))]
            ).to(device)
            moments = [space.own_moments(v) for v in ([x, x.flip(-1)] if args.hflip else [x])]
            (
                means.append(torch.stack([m for m, _ in moments], 1).cpu()),
                stds.append(torch.stack([s for _, s in moments], 1).cpu()),
            )
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        save_tensors({"mean": torch.cat(means), "std": torch.cat(stds)}, path, about)
    file = open_tensors(path)
    if (
        (file.metadata() or {}) != about
        or not {"mean", "std"} <= set(file.keys())
        or file.get_slice("mean").get_shape()[0] != len(data.x)
    ):
        raise UserError(
            f"--cache_latents {path} was made for other data, flags or autoencoder: name another file, or remove this one"
        )
    return Rows(file, "mean"), Rows(file, "std")


PAPER = {"DiT-B/2": DIT_B_2, "DiT-L/2": DIT_L_2, "DiT-XL/2": DIT_XL_2}


def build_network(args, data, shape, world_name):
    """A DiT for images and videos of this shape, a RingMLP for points, or one of the paper's DiTs; its seed is --seed."""
    torch.manual_seed(stable_hash(args.seed, "init"))
    if len(shape) == 1:
        return RingMLP(num_classes=data.num_classes, world=world_name)
    context = {"inpaint": (shape[0] + 1, None), "semantic": (data.map_classes, shape[0])}.get(
        args.task, (0, None)
    )
    try:
        if args.network in PAPER:
            if (
                context[0]
                or len(shape) != 3
                or shape[1] != shape[2]
                or args.t_scale not in (1, 1000)
            ):
                raise UserError(
                    f"--network {args.network}: for square images, --task class or uncond, and --t_scale 1 or 1000; use --network small"
                )
            return DiTTransformer2DModel(
                **{
                    **PAPER[args.network],
                    "in_channels": shape[0],
                    "out_channels": shape[0],
                    "sample_size": shape[1],
                    "num_embeds_ada_norm": data.num_classes,
                    "convention": "lfm" if args.t_scale == 1 else "flow",
                }
            )
        patch = args.patch_size or [max(1, shape[-1] // 4)]
        if len(patch) not in (1, len(shape) - 1):
            raise UserError(
                f"--patch_size {' '.join(map(str, patch))}: give one number, or one for each of the {len(shape) - 1} axes of {shape}"
            )
        return DiT(
            size=shape[1:],
            patch=patch * (len(shape) - 1) if len(patch) == 1 else patch,
            channels=shape[0],
            dim=args.width,
            depth=args.depth,
            num_classes=data.num_classes,
            cond_dim=args.cond_dim,
            world=world_name,
            class_names=data.class_names,
            context_channels=context[0],
            context_width=context[1],
            t_scale=args.t_scale,
        )
    except ValueError as e:
        raise UserError(f"{e}: change --patch_size, --resolution or --width") from None


def task_context(args, data, space, device, x, maps, mask_seeds):
    """What the network sees beside x_t: --task inpaint reads pixels x and the masks' seeds, semantic reads maps.
    -> context (B, c, h, w), mask (B, 1, H, W) or None."""
    if args.task == "inpaint":
        mask = draw_masks(x.shape[-1], mask_seeds).to(device)
        return inpainting_context(space, x.to(device), mask), mask
    return semantic_context(maps.to(device), data.map_classes, space.factor), None


# ---- training ------------------------------------------------------------------------------------------------------


def build_optimizers(args, net):
    """AdamW for everything (paper), or Muon (orthogonalised momentum) for the weight matrices inside the blocks and AdamW for the
    rest, which reaches a given loss in about half the steps here.  -> optimizers, their learning rates."""
    inside = [
        p
        for name, p in net.named_parameters()
        if name.startswith(("blocks.", "hidden.", "transformer_blocks."))
        and p.ndim == 2
        and "modulation" not in name
        and ".norm1." not in name
    ]
    muon = {id(p) for p in inside} if args.optimizer == "muon" else set()
    rest = [p for p in net.parameters() if id(p) not in muon]
    optimizers = [
        torch.optim.AdamW(
            rest,
            lr=args.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=args.weight_decay,
            fused=True,
        )
    ]
    if muon:
        optimizers.append(
            torch.optim.Muon(inside, lr=args.learning_rate_muon, weight_decay=args.weight_decay)
        )
    return optimizers, [args.learning_rate, args.learning_rate_muon]


def train(args):
    rank, world_size, device = start_ranks()
    main_rank, B = rank == 0, args.train_batch_size
    world = load_world(args.data) if args.data in WORLDS else None
    refuse_guidance(args)
    if args.task == "inpaint" and args.data.endswith(".safetensors"):
        raise UserError(
            "--task inpaint encodes images with holes at every step: give --data FOLDER of images or a world"
        )
    data = load_training_data(args, world)
    space = build_space(args, world, data).to(device)
    shape = tuple(
        space.own_moments(to_unit(data.x[torch.arange(1)]).to(device))[0].shape[1:]
    )  # of one item's latent
    world_name = (
        args.data
        if world
        and (space.trivial and args.latent_norm == "none" or space is getattr(world, "space", None))
        else None
    )
    net, ema = (build_network(args, data, shape, world_name).to(device) for _ in range(2))
    net.gradient_checkpointing = args.gradient_checkpointing
    ema.requires_grad_(False).load_state_dict(net.state_dict())
    optimizers, rates = build_optimizers(args, net)
    forward = torch.compile(net) if args.compile else net

    modules, to_resume = (
        {"net": net, "ema": ema},
        {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)},
    )
    start, spent_before = resume(args, modules, to_resume)
    if main_rank:
        prepare_output_dir(args.output_dir, args.resume_from_checkpoint)
        if args.cache_latents:
            cache_latents(args, data, space, device)
    mean_over_ranks(
        0.0
    )  # nobody writes before the folder is ready, nor reads latents before they are
    cache = cache_latents(args, data, space, device) if args.cache_latents else None
    if args.latent_norm != "none" and space is not getattr(world, "space", None):
        some = torch.arange(min(len(data.x), 4000)).split(100)
        space.measure_norm(
            (
                tuple(c[i][:, 0] for c in cache)
                if cache
                else space.own_moments(to_unit(data.x[i]).to(device))
                for i in some
            ),
            args.latent_norm,
        )
    log = Log(args.output_dir, start) if main_rank else None
    if main_rank:
        print(
            f"data {args.data}: {len(data.x)} items of shape {tuple(data.x.shape[1:])}, {data.num_classes} classes; {space.describe()}; "
            f"{type(net).__name__} on {shape} with {sum(p.numel() for p in net.parameters()):,} parameters on {device} x {world_size}"
        )

    def save_student():
        student = {
            k: v.to(torch.float16 if args.save_fp16 else v.dtype)
            for k, v in ema.state_dict().items()
        }
        folder = os.path.join(args.output_dir, "student")
        save_network(ema, network_config(ema), folder, student)
        if not space.trivial:
            space.save(os.path.join(args.output_dir, "autoencoder"))
        save_json(
            {
                "method": "latent_fm",
                "prediction": "flow_v",
                "schedule": {"type": "flow"},
                "times": step_grid(args.sample_steps, args.timestep_shift)[:-1],
                "timestep_shift": args.timestep_shift,
                "rule": args.solver,
                "atol": args.atol,
                "rtol": args.rtol,
                "guidance_scale": args.guidance_scale,
                "guidance_interval": args.guidance_interval,
                "task": args.task,
                "data": args.data,
                "maps": args.maps,
                "resolution": args.resolution,
            },
            os.path.join(folder, "sampler.json"),
        )

    began = time.time()
    for step in tqdm(
        range(start, args.max_train_steps),
        initial=start,
        total=args.max_train_steps,
        disable=not main_rank,
    ):
        warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
        decay = min(1.0, (1 - step / args.max_train_steps) / max(args.lr_decay_share, 1e-9))
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * warmup * decay

        step_loss, by_t = 0.0, torch.zeros(4, 2)
        for micro in range(args.gradient_accumulation_steps):
            row = (micro * world_size + rank) * B
            draw = Draws(args.seed, step, 0, range(row, row + B))
            i, cond = draw.integer("item", len(data.x)), {}
            flip = draw.uniform("flip") < 0.5 if args.hflip else torch.zeros(B, dtype=torch.bool)
            if cache is None or args.task == "inpaint":
                x = to_unit(data.x[i]).to(device)  # (B, 3, H, W)
                x = torch.where(expand(flip, x).to(device), x.flip(-1), x) if args.hflip else x
            if cache is None:
                z, std = space.moments(x)  # (B, C, h, w)
            else:
                z, std = space.normed(
                    *(c[i][torch.arange(B), flip.long()].to(device) for c in cache)
                )
            x0 = (
                z
                if isinstance(space.autoencoder, (Identity, PatchPCA))
                else z + std * draw.normal("posterior", shape).to(device)
            )
            if args.task == "class":
                cond["label"] = drop_labels(
                    data.label[i], draw.uniform("coin"), args.label_dropout, data.num_classes
                ).to(device)
            elif args.task != "uncond":
                maps = (
                    None
                    if data.maps is None
                    else torch.where(flip[:, None, None], data.maps[i].flip(-1), data.maps[i])
                )
                seeds = draw.integer("mask", 2**62) if args.task == "inpaint" else None
                cond["context"] = task_context(
                    args, data, space, device, x if args.task == "inpaint" else None, maps, seeds
                )[0]
            u = logit_normal(draw.normal("u", ())) if args.logit_normal else draw.uniform("u")
            t = shift(u, args.timestep_shift).to(device)
            eps = draw.normal("eps", shape).to(device)
            with torch.autocast(
                device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"
            ):
                loss, error = flow_matching_loss(forward, x0, eps, t, cond, args.sigma_min)
            (loss / args.gradient_accumulation_steps).backward()
            step_loss += loss.detach() / args.gradient_accumulation_steps
            by_t.index_add_(
                0, (t.cpu() * 4).long().clamp(0, 3), torch.stack([error.cpu(), torch.ones(B)], 1)
            )
        norm = update(optimizers, args.max_grad_norm, "flow-matching", step_loss)
        update_ema(ema, net, min(args.ema_decay, (1 + step) / (10 + step)))

        done = step + 1
        (mean_loss,) = mean_over_ranks(step_loss)
        if main_rank:
            quarters = (by_t[:, 0] / by_t[:, 1].clamp_min(1)).tolist()
            log.write(
                {
                    "step": done,
                    "loss": mean_loss,
                    "grad_norm": norm,
                    "lr": args.learning_rate * warmup * decay,
                    **{f"loss_t{q}": quarters[q] for q in range(4)},
                    "seconds": spent_before + time.time() - began,
                }
            )
        if main_rank and (done % args.checkpointing_steps == 0 or done == args.max_train_steps):
            save_student()
            save_for_resume(args, done, modules, to_resume, spent_before + time.time() - began)
    if main_rank:
        folder = os.path.join(args.output_dir, "student")
        if not os.path.isdir(folder):
            save_student()
        finish(
            args,
            load_network(folder)[0].to(device),
            world,
            data,
            space,
            args.output_dir,
            spent_before + time.time() - began,
        )
    mean_over_ranks(0.0)


# ---- what the run leaves behind ------------------------------------------------------------------------------------


@torch.no_grad()
def finish(args, net, world, data, space, folder, seconds):
    """Measure what was saved, draw samples.png and, for a run, report.json, print the table. data None: --sample without data."""
    device = next(net.parameters()).device
    settings = dict(
        steps=args.sample_steps,
        solver=args.solver,
        timestep_shift=args.timestep_shift,
        interval=args.guidance_interval,
        atol=args.atol,
        rtol=args.rtol,
    )

    def draw(n, seed, label=None, context=None, **changes):
        """n samples from this seed's noise.  -> pixels on the CPU, ms each, velocity evaluations."""
        z, calls = (
            torch.randn(n, *net.latent_shape, generator=torch.Generator().manual_seed(seed)),
            [],
        )
        part = lambda v, a, b: None if v is None else v[a:b].to(device)  # noqa: E731
        try:
            x, ms = report.many(
                lambda a, b: space.to_pixels(
                    sample(
                        net,
                        part(z, a, b),
                        part(label, a, b),
                        context=part(context, a, b),
                        calls=calls,
                        **{**settings, **changes},
                    )
                ),
                n,
                500 if isinstance(space.autoencoder, (Identity, PatchPCA)) else 16,
            )
        except ValueError as e:
            raise UserError(f"--solver {args.solver}: {e}") from None
        return x, ms, sum(calls) / len(calls)

    results, rows = (evaluate_context if args.task in ("inpaint", "semantic") else evaluate)(
        args, net, world, data, space, draw
    )
    report.save_samples(folder, rows, world)
    if args.sample is None:
        report.save_report(
            folder,
            args,
            "latent_fm",
            None,
            sum(p.numel() for p in net.parameters()),
            seconds,
            device,
            results,
            data=args.data,
            task=args.task,
        )
    print_table(results)
    print(f"samples: {os.path.join(folder, 'samples.png')}")


def evaluate(args, net, world, data, space, draw):
    """--task class and uncond: the measures of worlds with features, and labelled rows of pictures.  -> results, rows."""
    results, scales, classes = (
        [],
        dict.fromkeys((1.0, args.guidance_scale)),
        max(1, net.num_classes),
    )
    unlabelled = (
        (lambda r: r)
        if net.num_classes
        else lambda r: {k: v for k, v in r.items() if k not in ("accuracy", "log_p", "diversity")}
    )
    if world:
        label = balanced_labels(2000, world.num_classes)
        asked = label if net.num_classes else None
        x = world.data(2000, 777, label)[0]
        results.append(unlabelled({"name": "data", "nfe": 0, **world.measure(x, label)}))
        if not space.trivial:
            results.append(
                unlabelled(
                    {
                        "name": "reconstruction",
                        "nfe": 0,
                        **world.measure(
                            report.many(
                                lambda a, b: space.to_pixels(
                                    space.to_latents(x[a:b].to(next(net.parameters()).device))
                                ),
                                2000,
                            )[0],
                            label,
                        ),
                    }
                )
            )
        for name, scale, changes in (
            ("teacher", 1.0, {}),
            ("guided", args.guidance_scale, {}),
            ("euler_4", 1.0, dict(solver="euler", steps=4)),
            ("euler_1", 1.0, dict(solver="euler", steps=1)),
        ):
            if name == "guided" and scale == 1:
                continue
            x, ms, nfe = draw(2000, args.seed, asked, guidance_scale=scale, **changes)
            results.append(
                unlabelled(
                    {
                        "name": name,
                        "nfe": nfe * (1 if scale in (0, 1) else 2),
                        "guidance_scale": scale,
                        "ms_per_sample": ms,
                        **world.measure(x, label),
                    }
                )
            )
        for r in results:
            r["fd_excess"] = r["fd"] - results[0]["fd"]
    label, rows = balanced_labels(400 if world and world.name == "ring" else 20, classes), []
    if data is not None:
        of_class = (
            [(data.label == k).nonzero()[:, 0] for k in range(classes)]
            if net.num_classes
            else [torch.arange(len(data.x))]
        )
        index = torch.stack(
            [of_class[k][i // classes % len(of_class[k])] for i, k in enumerate(label)]
        )
        rows.append(("data", to_unit(data.x[index])))
    steps = (
        "dopri5"
        if args.solver == "dopri5"
        else f"{args.sample_steps} {args.solver.capitalize()} steps"
    )
    for scale in scales:
        x, _, nfe = draw(
            len(label), args.seed + 1, label if net.num_classes else None, guidance_scale=scale
        )
        rows.append(
            (
                f"{steps}, {nfe:g} evaluations"
                + (f", guidance {scale:g}" if net.num_classes else ""),
                x,
            )
        )
    return results, rows


def evaluate_context(args, net, world, data, space, draw):
    """--task inpaint and semantic: how well the holes are filled, or the map is followed; "shuffled": with another item's condition, the
    measure of a network that does not look.  Folders are measured on training items, worlds on fresh ones.  -> results, rows."""
    device = next(net.parameters()).device
    if world:
        label = balanced_labels(1000, world.num_classes)
        x, maps = (
            world.scenes(1000, 779, label)[::2]
            if args.task == "semantic"
            else (world.data(1000, 779, label)[0], None)
        )
    else:
        index = torch.linspace(0, len(data.x) - 1, min(64, len(data.x))).long()
        x, maps = to_unit(data.x[index]), None if data.maps is None else data.maps[index]
    seeds = Draws(args.seed, "evaluation", 0, range(len(x))).integer("mask", 2**62)
    parts = [
        task_context(args, data, space, device, x[i], None if maps is None else maps[i], seeds[i])
        for i in torch.arange(len(x)).split(100)
    ]
    context = torch.cat([c for c, _ in parts]).cpu()
    mask = torch.cat([m for _, m in parts]).cpu() if args.task == "inpaint" else None
    made, ms, nfe = draw(len(x), args.seed, context=context)
    other = draw(len(x), args.seed, context=context.roll(1, 0))[
        0
    ]  # each with its neighbour's condition; the neighbour has another class
    row = {"name": "teacher", "nfe": nfe, "ms_per_sample": ms}
    if args.task == "inpaint":
        known = (1 - mask).sum((2, 3), keepdim=True).clamp_min(1)
        mean = ((1 - mask) * x).sum(
            (2, 3), keepdim=True
        ) / known  # of the known pixels, (n, 3, 1, 1)
        hole = lambda guess: float((mask * (guess - x).square()).sum() / (3 * mask.sum()))  # noqa: E731
        x_out = composite(made, x, mask)
        row |= {
            "hole_mse": hole(x_out),
            "mean_fill": hole(mean.expand_as(x)),
            "shuffled": hole(other),
            "known_error": float(((x_out - x) * (1 - mask)).abs().max()),
            "known_mse_before": float(((1 - mask) * (made - x).square()).sum() / (3 * known.sum())),
        }
        rows = [
            ("image", x),
            ("holes", composite(torch.zeros_like(x), x, mask)),
            (f"filled, {nfe:g} evaluations", x_out),
        ]
    else:
        x_out = made
        shades = (
            maps[:, None].expand(-1, x.shape[1], -1, -1).float().clamp_max(data.map_classes)
            / data.map_classes
            * 2
            - 1
        )
        rows = [("map", shades), ("image of that map", x), (f"sample, {nfe:g} evaluations", made)]
    results = [row]
    if world and hasattr(world, "foreground"):
        if args.task == "semantic":
            row |= {
                "iou": float(overlap(world.foreground(made), maps > 0).mean()),
                "iou_shuffled": float(overlap(world.foreground(other), maps > 0).mean()),
            }
        ceiling = {"name": "data", "nfe": 0, **world.measure(x, label)}
        if args.task == "semantic":
            ceiling["iou"] = float(overlap(world.foreground(x), maps > 0).mean())
        results = [ceiling, {**row, **world.measure(x_out, label)}]
        for r in results:
            r["fd_excess"] = r["fd"] - results[0]["fd"]
    return results, [(text, a[:20]) for text, a in rows]


def sample_only(args):
    """--sample FOLDER: load a saved model, read its sampler.json, print its measures, write samples.png to --output_dir. Flags given win."""
    folder, sampler, *_ = read_own_sampler(args.sample, "latent_fm")
    net, config = load_network(folder)
    given = {
        name
        for name in (
            "sample_steps",
            "solver",
            "guidance_scale",
            "guidance_interval",
            "timestep_shift",
            "atol",
            "rtol",
        )
        if getattr(args, name) is not None
    }
    saved = {
        "sample_steps": len(sampler["times"]),
        "solver": sampler["rule"],
        "guidance_interval": [0.0, 1.0],
        **sampler,
    }
    for name in (*SAMPLER, "task"):
        if name not in given:
            setattr(args, name, saved.get(name, SAMPLER.get(name, "class")))
    refuse_guidance(args)
    args.data, args.maps, args.resolution = (
        args.data or sampler.get("data"),
        args.maps or sampler.get("maps"),
        sampler.get("resolution", args.resolution),
    )
    name, args.pool = (
        config.get("world") or args.data,
        1000,
    )  # of a world's training items only the number of map classes is wanted
    world = load_world(name) if name in WORLDS else None
    _, _, device = start_ranks()
    refuse_output_dir(args.output_dir, sampling=True)
    space = (space_beside(folder) or LatentSpace(Identity())).to(device)
    data = load_training_data(args, world) if args.task in ("inpaint", "semantic") else None
    os.makedirs(args.output_dir, exist_ok=True)
    finish(args, net.to(device), world, data, space, args.output_dir, 0.0)


# ---- flags ---------------------------------------------------------------------------------------------------------

# What each world and the paper's networks change of the defaults, and what the flags of the sampler are unless given (None: --sample can tell).
CLIPS = dict(patch_size=[2, 4, 4], width=64, depth=8, pool=40000)  # 64 tokens
VOXELS = dict(max_train_steps=6000, width=96, depth=6, pool=40000)  # 64 tokens of 4x4x4 voxels
SHAPES = dict(
    max_train_steps=3500,
    learning_rate=3e-3,
    learning_rate_muon=0.06,
    pool=20000,
    logit_normal=True,
    autoencoder="pca",
    patch_size=[2],
    latent_norm="scale",
)
SHAPES_MAPS = dict(
    SHAPES, max_train_steps=1200
)  # --task semantic: a map says most of what there is to learn
SIZED = dict(
    optimizer="adamw",
    learning_rate=1e-4,
    lr_warmup_steps=0,
    weight_decay=0.0,
    lr_decay_share=0.0,
    ema_decay=0.9999,
    max_train_steps=400000,
)
SAMPLER = dict(
    sample_steps=32,
    solver="heun",
    guidance_scale=1.5,
    guidance_interval=[0.0, 1.0],
    timestep_shift=1.0,
    atol=1e-5,
    rtol=1e-5,
)


def parse_args(argv=None):
    p = Parser(
        description="Train a flow-matching model in latent space (arXiv 2307.08698). Defaults shown are those of the given --data: "
        "shapes, clips, voxels or any other, and --network: small or not. Flags of the sampler have none here, so that --sample can read the saved model's."
    )
    add_run_flags(p)
    p.set_defaults(
        max_train_steps=8000,
        train_batch_size=64,
        learning_rate=2e-3,
        lr_warmup_steps=200,
        max_grad_norm=1.0,
        ema_decay=0.999,
        guidance_scale=None,
        checkpointing_steps=1000,
    )
    p.add_argument(
        "--data",
        default=None,
        help="an embedded world (shapes, which is the default, glyphs, clips, voxels, ring), a folder of images in class "
        "subfolders (for tasks without classes also flat), or FILE.safetensors with x0 and cond.label or cond.map",
    )
    p.add_argument(
        "--task",
        choices=["class", "uncond", "inpaint", "semantic"],
        default="class",
        help="what the network is told: the class, nothing, an "
        "image with holes, or a segmentation map",
    )
    p.add_argument(
        "--maps",
        default=None,
        metavar="FOLDER",
        help="--task semantic: a PNG of class numbers for each image of --data, same relative name; 255 = none",
    )
    p.add_argument(
        "--resolution",
        type=number(int, 4),
        default=32,
        help="pixels a side; only for image folders (paper: 256, 512, 1024)",
    )
    p.add_argument(
        "--pool", type=number(int, 100), default=100000, help="items drawn from a world to train on"
    )
    p.add_argument(
        "--hflip", action="store_true", help="mirror half of the items (paper: on, for all data)"
    )
    p.add_argument(
        "--autoencoder",
        default="identity",
        help="identity (pixels), pca, or the folder of an AutoencoderKL or of a pipeline with vae/ (paper: "
        "stabilityai/sd-vae-ft-mse, f = 8)",
    )
    p.add_argument(
        "--pca_patch",
        type=number(int, 1),
        default=4,
        help="f of --autoencoder pca, pixels a patch side",
    )
    p.add_argument(
        "--pca_channels",
        type=number(int, 1),
        default=12,
        help="components kept of each patch by --autoencoder pca",
    )
    p.add_argument(
        "--latent_norm",
        choices=["none", "scale", "channel"],
        default="none",
        help="none: as the autoencoder scales (paper: its scaling_factor "
        "0.18215); scale: one factor measured on the data; channel: mean and std of each channel",
    )
    p.add_argument(
        "--cache_latents",
        default=None,
        metavar="FILE",
        help="encode the data once into this safetensors file (posterior means and stds, mirrored "
        "items too) instead of in every step (paper's code: every step)",
    )
    p.add_argument(
        "--network",
        choices=["small", *PAPER],
        default="small",
        help="small: models/dit.py with the four flags below; else a DiT of the paper's size",
    )
    p.add_argument(
        "--patch_size",
        type=number(int, 1),
        nargs="+",
        default=None,
        help="latent pixels a patch side, or T H W (default: latent side / 4; paper: 2)",
    )
    p.add_argument(
        "--width",
        type=number(int, 32),
        default=128,
        help="DiT width, a multiple of 32 (paper: 768 to 1152)",
    )
    p.add_argument("--depth", type=number(int, 1), default=4, help="DiT blocks (paper: 12 to 28)")
    p.add_argument(
        "--cond_dim", type=number(int, 8), default=48, help="width of the time and class embedding"
    )
    p.add_argument(
        "--t_scale",
        type=number(float, above=0),
        default=1000.0,
        help="the sinusoids see t times this (paper's code: 1)",
    )
    p.add_argument("--compile", action="store_true", help="torch.compile the network for training")
    p.add_argument(
        "--optimizer",
        choices=["muon", "adamw"],
        default="muon",
        help="muon: for the blocks' matrices, AdamW for the rest (paper: adamw)",
    )
    p.add_argument(
        "--learning_rate_muon",
        type=number(float, above=0),
        default=0.02,
        help="Muon's learning rate",
    )
    p.add_argument(
        "--label_dropout",
        type=number(float, 0, 1),
        default=0.1,
        help="p_u, share of labels dropped (paper: 0.1)",
    )
    p.add_argument(
        "--logit_normal",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="draw t logit-normal (SD3) instead of uniform (paper)",
    )
    p.add_argument(
        "--sigma_min",
        type=number(float, 0, 0.5),
        default=0.0,
        help="noise left at t = 0 (paper: 0; its code: 1e-5)",
    )
    p.add_argument(
        "--weight_decay", type=number(float, 0), default=0.01, help="AdamW weight decay (paper: 0)"
    )
    p.add_argument(
        "--lr_decay_share",
        type=number(float, 0, 1),
        default=1.0,
        help="last share of the run with a linear decay to 0; 0 = constant",
    )
    p.add_argument(
        "--solver",
        choices=["euler", "heun", "dopri5"],
        default=None,
        help="of the samples at the end; heun unless given (paper: dopri5)",
    )
    p.add_argument(
        "--sample_steps",
        type=number(int, 1),
        default=None,
        help="steps of euler and heun; 32 unless given, shapes 8",
    )
    p.add_argument(
        "--atol",
        type=number(float, 1e-8),
        default=None,
        help="absolute tolerance of dopri5; 1e-5 unless given (paper: 1e-5)",
    )
    p.add_argument(
        "--rtol",
        type=number(float, 1e-8),
        default=None,
        help="relative tolerance of dopri5; 1e-5 unless given (paper: 1e-5)",
    )
    p.add_argument(
        "--guidance_interval",
        type=number(float, 0, 1),
        nargs=2,
        default=None,
        metavar=("LO", "HI"),
        help="guidance acts at t in [LO, HI] only; 0 1 unless given (paper: everywhere)",
    )
    p.add_argument(
        "--save_fp16", action="store_true", help="store student/ in float16 (what ships is)"
    )
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    world = known.data or ("shapes" if known.sample is None else None)
    p.set_defaults(
        **{
            "clips": CLIPS,
            "voxels": VOXELS,
            "shapes": SHAPES_MAPS if known.task == "semantic" else SHAPES,
        }.get(world, {})
    )
    if known.network != "small":
        p.set_defaults(**SIZED)
    args = p.parse_args(argv)
    if args.guidance_interval and args.guidance_interval[0] > args.guidance_interval[1]:
        p.error(
            f"argument --guidance_interval: LO must not be above HI, got {args.guidance_interval[0]:g} {args.guidance_interval[1]:g}"
        )
    if args.output_dir is None:
        name = "" if args.task == "class" else f"-{args.task}"
        args.output_dir = default_output_dir("latent_fm" + name, world or "", args.sample)
    if args.sample is None:
        args.data = world
        own = dict(
            SAMPLER,
            **(dict(sample_steps=8) if world == "shapes" else {}),
            **({} if args.task == "class" else dict(guidance_scale=1.0)),
        )
        for k, v in own.items():
            if getattr(args, k) is None:
                setattr(args, k, v)
    return args


def main(argv=None):
    args = parse_args(argv)
    sample_only(args) if args.sample else train(args)


if __name__ == "__main__":
    run_main(main)
