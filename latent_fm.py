"""Flow matching, after "Flow Matching in Latent Space" (arXiv 2307.08698): trains the teachers that the other files distil.

The idea. Draw a data item x0, a noise eps and a time t; put x_t on the straight line between them; ask a network for the
line's direction. The regression's optimum, v(x, t) = E[eps - x0 | x_t = x], is the velocity field of an ODE that carries
noise (t = 1) to data (t = 0), so sampling is any ODE solver started at noise. For class-conditional models the label is
dropped now and then, so that one network also knows the unconditional field and guidance can push away from it.

    paper          here                      meaning
    z_0, z_1       x0, eps                   data (here: pixels; latents of an autoencoder in a later version), noise
    z_t            x_t = (1-t) x0 + t eps    the path, t = 0 data, t = 1 noise
    v_theta        net(x_t, t, label=...)    velocity, regresses eps - x0
    p_u            label_dropout             share of labels replaced by the null label K
    gamma          guidance_scale            v_u + gamma (v_c - v_u); 1 = off

Launch.
    laptop      python latent_fm.py --data glyphs --logit_normal --save_fp16    # the shipped teachers: docs/latent_fm.md
                python latent_fm.py --data clips --logit_normal --save_fp16
                python latent_fm.py --data voxels --logit_normal --save_fp16
    own images  python latent_fm.py --data FOLDER --resolution 32       # FOLDER/<class>/*.png, then dmd.py --teacher <output_dir>
    one GPU     the same
    one node    torchrun --nproc-per-node 8 latent_fm.py --data FOLDER --mixed_precision bf16

Deviations. Pixels instead of latents for now. The network sees 1000 t (the official code feeds raw t, where all but two of
the sinusoids are constant). EMA is on (the official scripts leave it off and the authors advise it). sigma_min = 0 as in the
paper (code: 1e-5). The learning rate decays linearly over the last --lr_decay_share of the run, and Muon
trains the blocks' matrices; --optimizer adamw --lr_decay_share 0 is the paper's choice.
"""
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from models import io, report
from models.diffusion import Flow, expand, guide, logit_normal, ode_calls, sample_ode, shift, step_grid, to_x0_eps
from models.dit import DiT
from models.toy import WORLDS, RingMLP, balanced_labels, load_world

# ---- the method --------------------------------------------------------------------------------------------------


def flow_matching_loss(net, x0, eps, t, cond):
    """E |v_theta(x_t, t) - (eps - x0)|^2, mean over all dimensions (Alg. 1).  x0, eps (B, ...), t (B,) -> scalar, (B,)."""
    x_t = (1 - expand(t, x0)) * x0 + expand(t, x0) * eps
    error = (net(x_t, t, **cond).float() - (eps - x0)).square().flatten(1).mean(1)  # (B,)
    return error.mean(), error.detach()


def drop_labels(label, coin, p_u, null):
    """Replace a label by the null label with probability p_u (Alg. 3).  label (B,), coin (B,) uniform -> (B,)."""
    return torch.where(coin < p_u, null, label)


def guided_velocity(net, x, t, label, null, guidance_scale):
    """v_u + gamma (v_c - v_u) (Alg. 4); gamma = 1 costs one call, else one call on twice the batch.  -> (B, ...)."""
    if guidance_scale == 1:
        return net(x, t, label=label)
    both = torch.cat([label, torch.full_like(label, null)])
    v_c, v_u = net(torch.cat([x, x]), torch.cat([t, t]), label=both).chunk(2)
    return guide(v_c, v_u, guidance_scale)


# ---- sampler -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(net, noise, label, steps=32, guidance_scale=1.0, solver="heun", timestep_shift=1.0):
    """Integrate dx/dt = v from noise to data (Alg. 2).  noise (B, ...), label (B,) -> x0 (B, ...) float32."""
    flow = Flow()

    def predict(x, t):
        v = guided_velocity(net, x, t, label, net.num_classes, guidance_scale).float()
        return to_x0_eps(v, "flow_v", x, flow.alpha(t), flow.sigma(t))

    return sample_ode(predict, flow, noise, step_grid(steps, timestep_shift), solver)


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


def build_network(args, x0, class_names, num_classes, world):
    """A DiT for images, a RingMLP for points; its seed is --seed."""
    torch.manual_seed(io.stable_hash(args.seed, "init"))
    if x0.dim() == 2:
        return RingMLP(num_classes=num_classes, world=world)
    patch = args.patch_size or [max(1, x0.shape[-1] // 4)]
    if len(patch) not in (1, x0.dim() - 2):
        raise io.UserError(f"--patch_size {' '.join(map(str, patch))}: give one number, or one for each of the {x0.dim() - 2} axes of {tuple(x0.shape[1:])}")
    try:
        return DiT(size=x0.shape[2:], patch=patch * (x0.dim() - 2) if len(patch) == 1 else patch, channels=x0.shape[1], dim=args.width, depth=args.depth,
                   num_classes=num_classes, cond_dim=args.cond_dim, world=world, class_names=class_names)
    except ValueError as e:
        raise io.UserError(f"{e}: change --patch_size, --resolution or --width") from None


def build_optimizers(args, net):
    """AdamW for everything (paper), or Muon (orthogonalised momentum) for the weight matrices inside the blocks and AdamW for the
    rest, which reaches a given loss in about half the steps here.  -> optimizers, their learning rates."""
    inside = [p for name, p in net.named_parameters() if name.startswith(("blocks.", "hidden.")) and p.ndim == 2 and "modulation" not in name]
    muon = {id(p) for p in inside} if args.optimizer == "muon" else set()
    rest = [p for p in net.parameters() if id(p) not in muon]
    optimizers = [torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(inside, lr=args.learning_rate_muon, weight_decay=args.weight_decay))
    return optimizers, [args.learning_rate, args.learning_rate_muon]


def train(args):
    rank, world_size, device = start_ranks()
    main_rank, B = rank == 0, args.train_batch_size
    world = load_world(args.data) if args.data in WORLDS else None
    x0_all, cond, class_names = io.load_data(args.data, WORLDS, args.resolution, args.pool, args.seed)
    label_all = cond.get("label")
    if label_all is None:
        raise io.UserError(f"--data {args.data}: no cond.label tensor; latent_fm.py trains class-conditional models")
    num_classes = world.num_classes if world else int(label_all.max()) + 1
    if x0_all.dim() != 4 and not world:
        raise io.UserError(f"--data {args.data}: x0 is {tuple(x0_all.shape)}; wanted images (N, C, H, W)")
    if int(label_all.min()) < 0 or len(label_all.unique()) < num_classes:
        raise io.UserError(f"--data {args.data}: cond.label must use every class from 0 to its largest, {num_classes - 1}; renumber the classes")
    net = build_network(args, x0_all, class_names, num_classes, args.data if world else None).to(device)
    net.gradient_checkpointing = args.gradient_checkpointing
    ema = build_network(args, x0_all, class_names, num_classes, args.data if world else None).to(device).requires_grad_(False)
    ema.load_state_dict(net.state_dict())
    optimizers, rates = build_optimizers(args, net)

    modules, to_resume = {"net": net, "ema": ema}, {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
    start, spent_before = io.resume(args, modules, to_resume)
    if main_rank:
        io.prepare_output_dir(args.output_dir, args.resume_from_checkpoint)
    mean_over_ranks(0.0)  # nobody writes before the folder is ready
    log = io.Log(args.output_dir, start) if main_rank else None
    if main_rank:
        print(f"data {args.data}: {len(x0_all)} items of shape {tuple(x0_all.shape[1:])}, {num_classes} classes; "
              f"{type(net).__name__} with {sum(p.numel() for p in net.parameters()):,} parameters on {device} x {world_size}")

    def save_student():
        student = {k: v.to(torch.float16 if args.save_fp16 else v.dtype) for k, v in ema.state_dict().items()}
        folder = os.path.join(args.output_dir, "student")
        io.save_network(ema, io.network_config(ema), folder, student)
        grid = step_grid(args.sample_steps, args.timestep_shift or 1.0)
        io.save_json({"method": "latent_fm", "prediction": "flow_v", "schedule": {"type": "flow"}, "times": grid[:-1],
                      "timestep_shift": args.timestep_shift or 1.0, "rule": "heun", "guidance_scale": args.guidance_scale},
                     os.path.join(folder, "sampler.json"))

    began = time.time()
    for step in tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, disable=not main_rank):
        warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
        decay = min(1.0, (1 - step / args.max_train_steps) / max(args.lr_decay_share, 1e-9))
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * warmup * decay

        step_loss, by_t = 0.0, torch.zeros(4, 2)
        for micro in range(args.gradient_accumulation_steps):
            row = (micro * world_size + rank) * B
            draw = io.Draws(args.seed, step, 0, range(row, row + B))
            i = draw.integer("item", len(x0_all))
            x0 = io.to_unit(x0_all[i]).to(device)  # (B, C, H, W)
            label = drop_labels(label_all[i], draw.uniform("coin"), args.label_dropout, num_classes).to(device)
            u = logit_normal(draw.normal("u", ())) if args.logit_normal else draw.uniform("u")
            t = shift(u, args.timestep_shift or 1.0).to(device)
            eps = draw.normal("eps", x0.shape[1:]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                loss, error = flow_matching_loss(net, x0, eps, t, {"label": label})
            (loss / args.gradient_accumulation_steps).backward()
            step_loss += loss.detach() / args.gradient_accumulation_steps
            by_t.index_add_(0, (t.cpu() * 4).long().clamp(0, 3), torch.stack([error.cpu(), torch.ones(B)], 1))
        norm = update(optimizers, args.max_grad_norm, "flow-matching", step_loss)
        update_ema(ema, net, min(args.ema_decay, (1 + step) / (10 + step)))

        done = step + 1
        mean_loss, = mean_over_ranks(step_loss)
        if main_rank:
            quarters = (by_t[:, 0] / by_t[:, 1].clamp_min(1)).tolist()
            log.write({"step": done, "loss": mean_loss, "grad_norm": norm, "lr": args.learning_rate * warmup * decay,
                       **{f"loss_t{q}": quarters[q] for q in range(4)}, "seconds": spent_before + time.time() - began})
        if main_rank and (done % args.checkpointing_steps == 0 or done == args.max_train_steps):
            save_student()
            io.save_for_resume(args, done, modules, to_resume, spent_before + time.time() - began)
    if main_rank:
        folder = os.path.join(args.output_dir, "student")
        if not os.path.isdir(folder):
            save_student()
        finish(args, io.load_network(folder)[0].to(device), world, x0_all, label_all, args.output_dir, spent_before + time.time() - began)
    mean_over_ranks(0.0)


@torch.no_grad()
def finish(args, net, world, x0_all, label_all, folder, seconds):
    """Measure what was saved (worlds only), draw samples.png and report.json, print the table."""
    device = next(net.parameters()).device
    noise = lambda n, seed: torch.randn(n, *net.latent_shape, generator=torch.Generator().manual_seed(seed)).to(device)  # noqa: E731
    results = []
    if world:
        label = balanced_labels(2000, world.num_classes)
        results.append({"name": "data", "nfe": 0, **world.measure(*world.data(2000, 777, label))})
        for name, scale, solver, steps in (("teacher", 1.0, "heun", args.sample_steps), ("guided", args.guidance_scale, "heun", args.sample_steps),
                                           ("euler_4", 1.0, "euler", 4), ("euler_1", 1.0, "euler", 1)):
            if name == "guided" and scale == 1:
                continue
            z = noise(2000, args.seed)
            x, ms = report.many(lambda a, b: sample(net, z[a:b], label[a:b].to(device), steps, scale, solver, args.timestep_shift or 1.0), 2000)
            results.append({"name": name, "nfe": ode_calls(steps, solver) * (1 if scale == 1 else 2), "guidance_scale": scale,
                            "ms_per_sample": ms, **world.measure(x, label)})
        for r in results:
            r["fd_excess"] = r["fd"] - results[0]["fd"]
    label = balanced_labels(400 if world and world.name == "ring" else 20, net.num_classes)
    rows = []
    if x0_all is not None:
        of_class = [(label_all == k).nonzero()[:, 0] for k in range(net.num_classes)]
        index = torch.stack([of_class[k][i // net.num_classes % len(of_class[k])] for i, k in enumerate(label)])
        rows.append(("data", io.to_unit(x0_all[index])))
    z = noise(len(label), args.seed + 1)
    for scale in dict.fromkeys((1.0, args.guidance_scale)):
        x = sample(net, z, label.to(device), args.sample_steps, scale, "heun", args.timestep_shift or 1.0)
        rows.append((f"{args.sample_steps} Heun steps, guidance {scale:g}", x))
    report.save_samples(folder, rows, world)
    if x0_all is not None:  # a run, not --sample
        io.save_json({"method": "latent_fm", "teacher": None, "data": args.data, "seed": args.seed, "steps": args.max_train_steps, "seconds": seconds,
                      "peak_memory_mb": io.peak_memory_mb(device), "params": sum(p.numel() for p in net.parameters()),
                      "results": results}, os.path.join(folder, "report.json"))
    io.print_table(results)
    print(f"samples: {os.path.join(folder, 'samples.png')}")


def sample_only(args):
    """--sample FOLDER: load a saved model, read its sampler.json, print its measures, write samples.png to --output_dir."""
    folder, sampler, *_ = io.read_own_sampler(args.sample, "latent_fm")
    net, config = io.load_network(folder)
    world = load_world(config["world"]) if config.get("world") else None
    args.sample_steps, args.guidance_scale, args.timestep_shift = len(sampler["times"]), sampler["guidance_scale"], sampler["timestep_shift"]
    _, _, device = start_ranks()
    io.refuse_output_dir(args.output_dir, sampling=True)
    os.makedirs(args.output_dir, exist_ok=True)
    finish(args, net.to(device), world, None, None, args.output_dir, 0.0)


CLIPS = dict(patch_size=[2, 4, 4], width=64, depth=8, pool=40000)  # 64 tokens; what the world of that name changes of the defaults
VOXELS = dict(max_train_steps=6000, width=96, depth=6, pool=40000)  # 64 tokens of 4x4x4 voxels


def parse_args(argv=None):
    p = io.Parser(description="Train a flow-matching teacher (arXiv 2307.08698). Defaults shown are those of the given --data: clips, voxels or any other.")
    io.add_run_flags(p)
    p.set_defaults(max_train_steps=8000, train_batch_size=64, learning_rate=2e-3, lr_warmup_steps=200, max_grad_norm=1.0,
                   ema_decay=0.999, guidance_scale=1.5, checkpointing_steps=1000)
    p.add_argument("--data", default="glyphs", help="an embedded world (ring, glyphs, clips, voxels), a folder of images in class subfolders, "
                   "or FILE.safetensors with x0 and cond.label")
    p.add_argument("--resolution", type=io.number(int, 4), default=32, help="pixels a side; only for image folders")
    p.add_argument("--pool", type=io.number(int, 100), default=100000, help="items drawn from a world to train on")
    p.add_argument("--patch_size", type=io.number(int, 1), nargs="+", default=None, help="pixels a patch side, or T H W (default: resolution / 4)")
    p.add_argument("--width", type=io.number(int, 32), default=128, help="DiT width, a multiple of 32")
    p.add_argument("--depth", type=io.number(int, 1), default=4, help="DiT blocks")
    p.add_argument("--cond_dim", type=io.number(int, 8), default=48, help="width of the time and class embedding")
    p.add_argument("--optimizer", choices=["muon", "adamw"], default="muon", help="muon: for the blocks' matrices, AdamW for the rest (paper: adamw)")
    p.add_argument("--learning_rate_muon", type=io.number(float, above=0), default=0.02, help="Muon's learning rate")
    p.add_argument("--label_dropout", type=io.number(float, 0, 1), default=0.1, help="p_u, share of labels dropped (paper: 0.1)")
    p.add_argument("--logit_normal", action="store_true", help="draw t logit-normal (SD3) instead of uniform (paper)")
    p.add_argument("--weight_decay", type=io.number(float, 0), default=0.01, help="AdamW weight decay (paper: 0)")
    p.add_argument("--lr_decay_share", type=io.number(float, 0, 1), default=1.0, help="last share of the run with a linear decay to 0; 0 = constant")
    p.add_argument("--sample_steps", type=io.number(int, 1), default=32, help="Heun steps of the samples at the end")
    p.add_argument("--save_fp16", action="store_true", help="store student/ in float16 (what ships is)")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    p.set_defaults(**{"clips": CLIPS, "voxels": VOXELS}.get(known.data, {}))
    args = p.parse_args(argv)
    if args.output_dir is None:
        args.output_dir = io.default_output_dir("latent_fm", args.data, args.sample)
    return args


def main(argv=None):
    args = parse_args(argv)
    sample_only(args) if args.sample else train(args)


if __name__ == "__main__":
    io.run(main)
