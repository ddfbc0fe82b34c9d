"""Linear against softmax attention: time, bandwidth, memory, registers, and where it is faster.

    # everything that this machine can run, about two minutes on a CPU
    python -m kernels.bench_linear_attention
    python -m kernels.bench_linear_attention --lengths 4096,32760 --heads 12 --dtype bf16
    # registers, spills and shared memory; needs triton, but no GPU
    python -m kernels.bench_linear_attention --compile sm_90 --every

Rows of the table are "triton" (the kernels), "torch" (the reference), "compile" (torch.compile of
the reference), "sdpa NAME" (each backend of scaled_dot_product_attention that takes the input), and
where they are installed "fla" (flash-linear-attention's chunk_linear_attn: causal) and "fbi"
(flash-bidirectional-linear-attention), both on features that PyTorch computes.

The floor of linear attention is the longest of three times, each at a rate that is measured first:
what must move, at a large copy's; the products, at a large product's; the exponentials, at those of
a tile that stays on the chip. "x floor" says how many floors a method takes.

GB/s counts what must move: in the forward q, k, v in and o out; in forward + backward these 4
tensors and then q, k, v, o, do in and dq, dk, dv out, 12 in all. Its share is of the bandwidth of a
large copy on the device, measured first. Times are medians over repeats, on a GPU by events. On a
CPU they are wall time, or with --clock cpu and one thread the processor time of this process, which
other jobs on the machine disturb less. --graph times replays of a CUDA graph: the device's time
alone, as in a network whose launches run ahead of it.
"""

import argparse
import functools
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter

# so that `python kernels/bench_linear_attention.py` finds its packages
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from kernels import linear_attention as la  # noqa: E402
from kernels import linear_attention_ops as ops  # noqa: E402
from kernels import linear_attention_triton as chip  # noqa: E402
from models.files import save_json  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# bytes of shared memory that a program may have, by compute capability; others: 99 KB
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
METHODS = ("triton", "torch", "compile", "sdpa", "fla", "fbi")


# ---- compiled figures, without a GPU -------------------------------------------------------------


def variants(feature_map, has_w):
    """The launches of one training step, [(name, kernel, flags, feature map)]."""
    keys, queries = dict(WEIGHTED=False, QUERY=False), dict(WEIGHTED=True, QUERY=True)
    writes = dict(WRITE_X=True, WRITE_U=has_w)
    steps = [
        ("reduce k", "reduce", keys, feature_map),
        ("apply", "apply", {}, feature_map),
        ("backward q", "backward", dict(queries, WRITE_Y=False, **writes), feature_map),
        ("reduce q", "reduce", queries, feature_map),
        ("backward k", "backward", dict(keys, WRITE_Y=True, **writes), feature_map),
    ]
    return steps + ([("dW", "reduce", keys, "none")] if has_w else [])


def loop_instructions(sass):
    """Instructions of the largest loop in a listing of cuobjdump.  -> Counter by name.

    It is the loop over tiles: from the target of the branch that jumps back farthest to that
    branch. What is predicated off counts too.
    """
    lines = [
        (int(at, 16), text)
        for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, re.MULTILINE)
    ]
    loops = [(0, 0)]
    for at, text in lines:
        target = re.search(r"\bBRA(?:\.\S+)?\s.*?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < at:
            loops.append((int(target.group(1), 16), at))
    first, last = max(loops, key=lambda ends: ends[1] - ends[0])
    body = [re.sub(r"^@!?U?P\w+\s+", "", text) for at, text in lines if first <= at <= last]
    return Counter(re.match(r"[A-Z0-9]+", text).group(0) for text in body)


def inspect(cubin, *flags):
    """What cuobjdump says of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, *flags, f.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiled(kernel, flags, feature_map, width, D, dtype, has_w, capability=90, E=None, tiles=None):
    """Compile a kernel with the tiles of this architecture, or others; no GPU is needed.

    width, E, D: columns of x, of xW (None: width), of y; tiles: (rows, warps, stages). Strides are
    declared as contiguous tensors (B, N, H, D) have them: the last is 1, the others are multiples
    of 16, and pointers are aligned to 16 bytes.
    -> dict of regs per thread, spills in bytes per thread, shared in bytes, warps, rows, stages,
    loop_spills (instructions for it in the loop), instructions (per thread and tile), per_row (warp
    instructions per row), most (by name).
    """
    import triton
    from triton.backends.compiler import GPUTarget

    fn = getattr(chip, f"{kernel}_kernel")
    role = kernel + ("" if kernel != "backward" else " q" if flags["QUERY"] else " k")
    sizes = width, E or width, D
    const, programs = ops.constants(
        role, feature_map, *sizes, dtype, has_w, SHARED.get(capability, 99 * 1024)
    )
    const |= flags
    if tiles:
        const |= dict(zip(("ROWS", "num_warps", "num_stages"), tiles))
    options = {name: const.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    const.update({name: 1 for name in fn.arg_names if re.fullmatch("[xy]_d", name)})
    words = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    dot = words[ops.dot_dtype(dtype)]
    types = {
        **dict.fromkeys(["X", "Y", "OUT", "DX", "DY"], "*" + words[dtype]),
        **dict.fromkeys(["W", "DU"], "*" + dot),
        **dict.fromkeys(["SUMS", "A", "COEFF", "OVER_D"], "*fp32"),
        "scale": "fp32",
        "eps": "fp32",
    }
    signature = {
        name: "constexpr" if name in const else types.get(name, "i32") for name in fn.arg_names
    }
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if signature[name][0] == "*" or re.fullmatch("[xy]_[bnh]", name)
    }
    source = triton.compiler.ASTSource(fn, signature, constexprs=const, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = inspect(binary.asm["cubin"], "--dump-resource-usage")
    regs, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")
    )
    body = loop_instructions(inspect(binary.asm["cubin"], "-sass"))
    # a launch of "reduce" runs one program per half over the same rows
    programs_per_row = const["HALVES"] if kernel == "reduce" else 1
    per_row = body.total() * options["num_warps"] / const["ROWS"] * programs_per_row
    return dict(
        regs=regs,
        spills=stack + local,
        loop_spills=body["LDL"] + body["STL"],
        shared=binary.metadata.shared,
        warps=options["num_warps"],
        rows=const["ROWS"],
        stages=options["num_stages"],
        programs=programs,
        instructions=body.total(),
        per_row=per_row,
        most=dict(body.most_common(8)),
    )


# what is compiled: feature map, head size, columns of W
DEFAULT_CASES = (("hedgehog", 128, 128), ("hedgehog", 128, 64), ("softmax", 128, None))
EVERY_CASE = (
    *DEFAULT_CASES,
    *((name, 128, None) for name in ("elu", "relu", "none")),
    *(("hedgehog", D, E) for D in (72, 80, 96) for E in (D, D // 2)),
    ("softmax", 72, None),
    ("hedgehog", 64, 64),
    ("hedgehog", 64, 32),
    *((name, 64, None) for name in ("softmax", "elu", "relu", "none")),
)


def compile_case(feature_map, D, E, arch, dtype_name="bf16"):
    """Compile every launch of a training step with the tiles that the kernels take there.

    -> a generator of dicts, empty where the kernels do not fit and torch runs.
    """
    dtype, capability = DTYPES[dtype_name], int(arch[3:])
    has_w, halves = E is not None, ops.halves_of(feature_map)
    sizes, shared = (D, E or D, D), SHARED.get(capability, 99 * 1024)
    padded = [ops.padded(size) for size in sizes]
    if any(ops.tiles(name, *padded, halves, dtype, shared) is None for name in ops.KERNELS):
        return
    for launch, kernel, flags, phi in variants(feature_map, has_w):
        _, width, y = sizes
        if launch == "dW":  # its y is du, of E columns
            width, y = D, E
        with_w = has_w and phi == feature_map
        about = dict(feature_map=feature_map, D=D, E=E, dtype=dtype_name, arch=arch)
        names = "WRITE_X", "WRITE_Y", "WRITE_U"
        parts = [{}]
        if kernel == "backward":
            parts = ops.passes([flags[name] for name in names], halves, padded[1], shared)
            parts = [dict(zip(names, part)) for part in parts]
        for part in parts:
            title = launch
            if len(parts) > 1:
                title += ": dv" if part["WRITE_Y"] else ": dk"
            found = compiled(kernel, flags | part, phi, D, y, dtype, with_w, capability, width)
            yield about | dict(launch=title) | found


def compile_table(arch, dtype_name="bf16", sass=False, cases=DEFAULT_CASES):
    """Print and return every launch of a training step in these cases.

    sass: print the most frequent instructions of each loop too. -> list of dicts.
    """
    rows = []
    for feature_map, D, E in cases:
        name = f"{feature_map} {D}" + (f", E {E}" if E not in (None, D) else "")
        found = 0
        for r in compile_case(feature_map, D, E, arch, dtype_name):
            numbers = f"{r['rows']} | {r['warps']} | {r['stages']} | {r['regs']} | {r['spills']}"
            counts = f"{r['shared'] / 1024:.0f} | {r['instructions']} | {r['per_row']:.0f}"
            print(f"| {name} | {r['launch']} | {numbers} | {counts} |", flush=True)
            if sass:
                print("    " + ", ".join(f"{k} {n}" for k, n in r["most"].items()), flush=True)
            rows.append(r)
            found += 1
        if not found:
            print(f"| {name} | does not fit: torch runs |" + " |" * 8)
    return rows


# ---- measured figures ----------------------------------------------------------------------------


def captured(run):
    """Capture run() as a CUDA graph.  -> a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capturing needs a warmed-up stream of its own
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@functools.cache
def filler_of_l2():
    """More bytes than a GPU's L2 cache has, which are allocated once."""
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")


def seconds(run, device, repeats, budget, clock="wall", graph=False):
    """Median seconds of run() after a first call that is not measured.

    On CUDA by events, with the L2 cache overwritten before each call. At most `repeats` calls, and
    none is begun after `budget` seconds. clock: "wall" or "cpu", for a CPU.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    run = captured(run) if graph else run
    run()
    times, begin = [], time.time()
    flush = filler_of_l2() if device == "cuda" else None
    while len(times) < repeats and (len(times) < 1 or time.time() - begin < budget):
        if device == "cuda":
            flush.zero_()
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            run()
            b.record()
            torch.cuda.synchronize()
            times.append(a.elapsed_time(b) / 1000)
        else:
            a = now()
            run()
            times.append(now() - a)
    return sorted(times)[len(times) // 2]


def copy_bandwidth(device, repeats, clock):
    """Bytes read plus bytes written per second by a copy that is too large for any cache."""
    x = torch.empty((2**30 if device == "cuda" else 2**26) // 4, device=device).normal_()
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / seconds(lambda: y.copy_(x), device, repeats, 2.0, clock)


def matmul_rate(device, dtype, repeats, clock):
    """FLOP/s of a product of two large matrices."""
    n = 8192 if device == "cuda" else 1024
    x = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / seconds(lambda: x @ x, device, repeats, 2.0, clock)


if ops.triton is not None:
    tl = chip.tl

    @ops.triton.jit
    def _exp_kernel(X, TIMES: tl.constexpr, SIZE: tl.constexpr):
        """x = 2^-x, again and again, without leaving the chip."""
        at = X + tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        x = tl.load(at)
        for _ in range(TIMES):
            x = tl.exp2(-x)
        tl.store(at, x)


def exp_rate(device, repeats, clock):
    """Exponentials a second of float32 numbers that stay on the chip, or in the cache of a core."""
    if device == "cpu":
        x = torch.rand(8192)

        def exps():
            for _ in range(100):
                torch.exp(x, out=x).neg_()

        return 100 * x.numel() / seconds(exps, device, repeats, 1.0, clock)
    if ops.triton is None:
        return float("inf")
    x, times = torch.rand(2**24, device=device), 256
    run = seconds(lambda: _exp_kernel[(2**14,)](x, times, 1024), device, repeats, 1.0, clock)
    return times * x.numel() / run


def floors(B, N, H, D, feature_map, size, rates):
    """Least seconds of linear attention, forward and forward + backward.

    size: bytes of a number. rates: bytes, FLOP and exponentials a second. Products of a token and
    head, in units of 2 D E and 2 f D FLOP: u of queries and keys, S and o; then u again, dx and dW
    of both, and dphi of both, dS, dv.  -> {"forward": s, "step": s}
    """
    f = 2 * D if feature_map == "hedgehog" else D
    units = (2 * D * D if feature_map == "hedgehog" else 0), 2 * f * D
    exps = 0 if feature_map == "relu" else 2 * f
    least = {}
    for name, tensors, projections, sums in (("forward", 4, 2, 2), ("step", 12, 8, 6)):
        flops = projections * units[0] + sums * units[1]
        work = tensors * D * size, flops, exps * (1 if name == "forward" else 2)
        least[name] = max(B * N * H * w / rate for w, rate in zip(work, rates))
    return least


def methods(args, device):
    """What was asked for and can run here, {name: function of (q, k, v, w_q, w_k)}."""
    found = {}
    fm = args.feature_map

    def phi(q, k, *w):  # for peers that take features
        cast = (None if p is None else p.to(q.dtype) for p in w)
        return [la.features(x, fm, p) for x, p in zip((q, k), cast, strict=True)]

    if "triton" in args.methods and device == "cuda" and ops.triton is not None:
        found["triton"] = lambda q, k, v, *w: la.linear_attention(q, k, v, fm, *w, backend="triton")
    if "torch" in args.methods:
        found["torch"] = lambda q, k, v, *w: la.linear_attention(q, k, v, fm, *w, backend="torch")
    if "compile" in args.methods:
        found["compile"] = torch.compile(
            lambda q, k, v, *w: la.linear_attention(q, k, v, fm, *w, backend="torch"), dynamic=False
        )
    if "sdpa" in args.methods:
        for name, backend in BACKENDS.items():
            if name in args.sdpa:

                def sdpa(q, k, v, *w, backend=backend):
                    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
                    with sdpa_kernel(backend):
                        o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
                    return o.transpose(1, 2)

                found[f"sdpa {name}"] = sdpa
    if "fla" in args.methods and device == "cuda":
        try:
            from fla.ops.linear_attn import chunk_linear_attn
        except ImportError:
            print("flash-linear-attention is not installed: no row for it")
        else:

            def fla(q, k, v, *w):  # causal, so another function, which is shown for its speed
                o = chunk_linear_attn(*phi(q, k, *w), v, normalize=True)
                return o[0] if isinstance(o, tuple) else o

            found["fla (causal)"] = fla
    if "fbi" in args.methods and device == "cuda":
        try:
            from fbi_la.ops.linear_attn.attention import linear_attention as bidirectional
        except ImportError:
            print("flash-bidirectional-linear-attention is not installed: no row for it")
        else:

            def fbi(q, k, v, *w):
                rows = (*phi(q, k, *w), v)
                o = bidirectional(*(x.transpose(1, 2).contiguous() for x in rows))
                return o.transpose(1, 2)

            found["fbi"] = fbi
    return found


def kernel_usage():
    """Registers and spills of the kernels that have run on this GPU, from their compiled objects.

    -> list of dicts.
    """
    rows = []
    for name in ("reduce", "apply", "backward"):
        caches = getattr(getattr(chip, f"{name}_kernel"), "device_caches", {})
        binaries = [binary for cache in caches.values() for binary in cache[0].values()]
        for binary in binaries:
            if hasattr(binary, "n_regs"):
                usage = dict(regs=binary.n_regs, spills=binary.n_spills)
                rows.append(dict(kernel=name, **usage, shared=binary.metadata.shared))
    return rows


def measure(call, N, H, args, device, rates):
    """One method at one length.

    rates: as for `floors`. -> dict of peak_mb and of _s, _gbs, _share, _floor_s and _floors for
    forward and step, or of error alone where the method refuses the input or the memory does not
    suffice.
    """
    dtype, D = DTYPES[args.dtype], args.head_dim
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    def forward():
        with torch.no_grad():
            return call(q, k, v, *w)

    def step():  # softmax attention has no W, whose gradient is then None
        return torch.autograd.grad(call(q, k, v, *w), leaves, do, allow_unused=True)

    row = dict(forward_s=None, step_s=None, peak_mb=None)
    how = (device, args.repeats, args.seconds, args.clock, args.graph)
    try:
        q, k, v, do = (draw(args.batch, N, H, D).to(device, dtype) for _ in range(4))
        w = [(torch.eye(D) + 0.1 * draw(H, D, D)).to(device, dtype) for _ in range(2)]
        w = w if args.feature_map == "hedgehog" else [None, None]
        leaves = [x.requires_grad_() for x in (q, k, v, *w) if x is not None]
        if device == "cuda":
            filler_of_l2()  # is no part of the peak
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        row["forward_s"] = seconds(forward, *how)
        if not args.forward_only:
            row["step_s"] = seconds(step, *how)
        if device == "cuda":
            row["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    except Exception as e:  # a backend that refuses the input, or memory that does not suffice
        if device == "cuda":
            torch.cuda.empty_cache()
        return dict(error=f"{type(e).__name__}: {str(e).splitlines()[0][:120]}")
    size = q.numel() * q.element_size()
    for name, tensors in (("forward", 4), ("step", 12)):
        t = row[f"{name}_s"]
        row[f"{name}_gbs"] = None if t is None else tensors * size / t / 1e9
        row[f"{name}_share"] = None if t is None else tensors * size / t / rates[0]
    least = floors(args.batch, N, H, D, args.feature_map, q.element_size(), rates)
    for name, floor in least.items():
        t = row[f"{name}_s"]
        row[f"{name}_floor_s"], row[f"{name}_floors"] = floor, None if t is None else t / floor
    return row


def crossover(rows, ours, key="forward_s"):
    """The smallest measured length from which on `ours` beats every SDPA row, or None.

    At that length and at all longer ones.
    """
    best = None
    for N in sorted({r["N"] for r in rows}, reverse=True):
        times = {r["method"]: r[key] for r in rows if r["N"] == N and r.get(key)}
        theirs = [t for name, t in times.items() if name.startswith("sdpa")]
        if not theirs:
            continue
        if ours not in times or times[ours] >= min(theirs):
            break
        best = N
    return best


# ---- the command ---------------------------------------------------------------------------------


def positive(text):
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return value


def listed(kind, allowed=None):
    """An argparse type: comma-separated values of a kind, if `allowed` is given only those."""

    def parse(text):
        values = [kind(x) for x in text.split(",") if x]
        wrong = [x for x in values if allowed and x not in allowed]
        if wrong or not values:
            what = ", ".join(allowed) if allowed else "numbers >= 1"
            raise argparse.ArgumentTypeError(
                f"expected a comma-separated list of {what}, got {text!r}"
            )
        return values

    parse.__name__ = "list"
    return parse


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        prog="bench_linear_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--lengths",
        type=listed(positive),
        help="comma-separated numbers of tokens "
        "(default: 1024 to 75,600 on a GPU, 256 to 4096 on a CPU)",
    )
    p.add_argument(
        "--heads",
        type=listed(positive),
        help="comma-separated numbers of heads (default: 12,40 on a GPU, 2 on a CPU)",
    )
    p.add_argument("--head_dim", type=positive, default=128, help="head size (default 128)")
    p.add_argument("--batch", type=positive, default=1, help="batch size (default 1)")
    p.add_argument(
        "--dtype", choices=DTYPES, help="dtype of q, k, v (default: bf16 on a GPU, fp32 on a CPU)"
    )
    p.add_argument(
        "--feature_map",
        choices=["hedgehog", "softmax", "relu", "elu"],
        default="hedgehog",
        help="feature map; hedgehog has a projection per head (default hedgehog)",
    )
    p.add_argument(
        "--methods",
        type=listed(str, METHODS),
        default=list(METHODS),
        help=f"which rows (default {','.join(METHODS)}; compile not on a CPU)",
    )
    p.add_argument(
        "--sdpa",
        type=listed(str, tuple(BACKENDS)),
        help=f"SDPA backends to try (default {','.join(BACKENDS)}; on a CPU math,flash)",
    )
    p.add_argument("--forward_only", action="store_true", help="leave the backward out")
    p.add_argument(
        "--repeats",
        type=positive,
        default=20,
        help="most measured calls of each kind; their median is shown (default 20)",
    )
    p.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="seconds after which no further call of a kind is begun (default 1)",
    )
    p.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="on a CPU: wall time, or processor time (default wall)",
    )
    p.add_argument(
        "--graph",
        action="store_true",
        help="on a GPU: time replays of a CUDA graph, without what the launches cost the CPU",
    )
    p.add_argument(
        "--device", choices=["cuda", "cpu"], help="where to run (default: cuda where there is one)"
    )
    p.add_argument(
        "--json",
        default="runs/bench_linear_attention.json",
        help="file for all figures (default %(default)s)",
    )
    p.add_argument(
        "--compile",
        choices=["sm_80", "sm_89", "sm_90", "sm_100"],
        help="compile the kernels for this architecture instead, without a GPU, and count the "
        "instructions of their loops",
    )
    p.add_argument(
        "--sass",
        action="store_true",
        help="with --compile: the most frequent instructions of each loop too",
    )
    p.add_argument(
        "--every",
        action="store_true",
        help="with --compile: all feature maps, and head sizes 64, 72, 80, 96 and 128",
    )
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: no CUDA device here")
    for flag in ("sass", "every"):
        if getattr(args, flag) and not args.compile:
            p.error(f"--{flag} needs --compile ARCHITECTURE")
    if args.compile and (ops.triton is None or ops.INTERPRET):
        p.error("--compile needs triton, and TRITON_INTERPRET unset")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    args.device = device
    args.lengths = args.lengths or (
        [1024, 2048, 4096, 8192, 16384, 32760, 75600] if gpu else [256, 512, 1024, 2048, 4096]
    )
    args.heads = args.heads or ([12, 40] if gpu else [2])
    if args.dtype is None:
        args.dtype = "bf16" if gpu or args.compile else "fp32"
    args.sdpa = args.sdpa or (list(BACKENDS) if gpu else ["math", "flash"])
    if args.graph and not gpu:
        p.error("--graph is for a GPU")
    if args.clock == "cpu" and (gpu or torch.get_num_threads() > 1):
        p.error("--clock cpu is for one thread on a CPU (OMP_NUM_THREADS=1)")
    if not gpu and args.methods == list(METHODS):
        args.methods = ["torch", "sdpa"]
    without_gpu = [m for m in args.methods if m in ("torch", "compile", "sdpa")]
    if not (gpu or without_gpu or args.compile):
        p.error(f"--methods {','.join(args.methods)}: on a CPU give torch, compile or sdpa")
    unread = "lengths heads head_dim feature_map methods batch sdpa forward_only clock".split()
    for flag in unread if args.compile else ():
        if f"--{flag}" in (sys.argv[1:] if argv is None else argv):
            p.error(f"--{flag} is for timings: --compile has its own cases, and with --every more")
    return args


def cell(x, form, width):
    """A number as right-aligned text, "-" for None."""
    return format("-" if x is None else format(x, form), f">{width}")


def save(args, result):
    """Write the figures to --json and say so."""
    os.makedirs(os.path.dirname(args.json) or ".", exist_ok=True)
    save_json(result, args.json)
    print(f"all figures: {args.json}")


def main(argv=None):
    args = parse_args(argv)
    about = dict(
        torch=torch.__version__,
        triton=getattr(ops.triton, "__version__", None),
        dtype=args.dtype,
        feature_map=args.feature_map,
        clock=args.clock,
        graph=args.graph,
    )
    if args.compile:
        print(
            f"compiled for {args.compile} by triton {ops.triton.__version__}, {args.dtype}, "
            "feature maps with their head size; spills in bytes per thread, shared memory in KB"
        )
        print(
            "| feature map | launch | rows | warps | stages | registers | spills | shared "
            "| instructions per tile | warp instructions per row |"
        )
        print("|" + "---|" * 10)
        cases = EVERY_CASE if args.every else DEFAULT_CASES
        rows = compile_table(args.compile, args.dtype, args.sass, cases)
        save(args, dict(about, compiled=rows))
        return
    device = args.device
    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth(device, args.repeats, args.clock)
    products = matmul_rate(device, DTYPES[args.dtype], args.repeats, args.clock)
    rates = bandwidth, products, exp_rate(device, args.repeats, args.clock)
    print(
        f"{name}, torch {torch.__version__}, {args.feature_map}, {args.dtype}, B {args.batch}, "
        f"D {args.head_dim}; copy {bandwidth / 1e9:.1f} GB/s, "
        f"product {products / 1e12:.3g} TFLOP/s, {rates[2] / 1e9:.3g} exponentials a nanosecond"
    )
    rows, crossings = [], []
    for H in args.heads:
        print(
            f"\n{'H':>3} {'N':>6}  {'method':14} {'forward ms':>11} {'GB/s':>8} {'of copy':>8} "
            f"{'x floor':>8} {'fwd+bwd ms':>11} {'GB/s':>8} {'of copy':>8} {'x floor':>8} "
            f"{'peak MB':>8}"
        )
        for N in args.lengths:
            for method, call in methods(args, device).items():
                row = dict(method=method, H=H, N=N, **measure(call, N, H, args, device, rates))
                rows.append(row)
                if "error" in row:
                    print(f"{H:3d} {N:6d}  {method:14} {row['error']}", flush=True)
                    continue
                step_ms = None if row["step_s"] is None else row["step_s"] * 1e3
                print(
                    f"{H:3d} {N:6d}  {method:14} {row['forward_s'] * 1e3:11.3f} "
                    f"{row['forward_gbs']:8.1f} {row['forward_share']:8.1%} "
                    f"{row['forward_floors']:8.1f} "
                    f"{cell(step_ms, '.3f', 11)} {cell(row['step_gbs'], '.1f', 8)} "
                    f"{cell(row['step_share'], '.1%', 8)} {cell(row['step_floors'], '.1f', 8)} "
                    f"{cell(row['peak_mb'], '.0f', 8)}",
                    flush=True,
                )
        for ours in ("triton", "compile", "torch"):
            for key, what in (("forward_s", "forward"), ("step_s", "forward + backward")):
                here = [r for r in rows if r["H"] == H]
                if any(r["method"] == ours and r.get(key) for r in here):
                    N = crossover(here, ours, key)
                    crossings.append(dict(method=ours, H=H, what=what, N=N))
                    where = f"from N = {N} on" if N else "at none of these lengths"
                    print(f"H {H}, {what}: {ours} beats every SDPA backend {where}")
    usage = kernel_usage() if device == "cuda" else []
    for r in usage:
        print(
            f"{r['kernel']:9} {r['regs']} registers, {r['spills']} spills, "
            f"{r['shared'] / 1024:.0f} KB shared"
        )
    about |= dict(device=name, batch=args.batch, head_dim=args.head_dim, copy_gbs=bandwidth / 1e9)
    about |= dict(product_tflops=products / 1e12, exps_per_ns=rates[2] / 1e9)
    save(args, dict(about, rows=rows, crossover=crossings, kernels=usage))


if __name__ == "__main__":
    main()
