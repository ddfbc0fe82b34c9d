"""What a run needs before it loads anything: bytes of a rank, FLOPs and seconds of an update.

    python dmd.py --teacher FOLDER --dry_run 8            # on 8 ranks; prints a table and ends

A script states its networks and its backward passes in a function `cost`, and its main hands both
to `dry_run`. That prints them for --dry_run, and otherwise refuses a run that the device cannot
hold. Of the teacher it reads config.json, of prompts and data the header. The networks are measured
by models/plumbing/footprint.py, with the batch and the sample's shape of the run.

What is reckoned with:

* Weights that are trained, their gradients and averages are float32, AdamW's two moments too. The
  teacher is bfloat16 on a GPU with --mixed_precision bf16, and with it the base of adapters.
* Networks, gradients and moments are shared out evenly over the ranks of a node (--shard_ranks).
  Two blocks of one network at a time are whole, one of them with its gradient. Adapters are whole.
* With --sequence_ranks N a rank has 1 / N of the tokens, and so of all activations.
* Gradients appear while activations go, so without accumulation on one rank the larger of the two
  counts, else their sum.
* 3 % of a device stay free, for its context, for communication and for what the allocator loses.
* Model FLOPs are those of one forward pass and of the backward pass that it needs, and of an
  optimiser that multiplies matrices (Muon), which every rank does for all of them; what
  checkpointing computes again is stated apart. A device is taken to reach 45 % of its peak.

Small things are left out: the GAN's head, the input for the step, samples and prompts of a batch.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.files import UserError, load_json, open_tensors
from models.networks import config_file, network_from_config, to_dtype
from models.networks.ring_dit import RingDiT
from models.networks.ring_mlp import RingMLP
from models.networks.sequence import refuse_spreading
from models.plumbing.footprint import Call, Cost, adapted, measure, on_meta
from models.plumbing.run import own_device, place_among_ranks
from models.plumbing.sharding import refuse_groups, refuse_shares
from models.plumbing.teachers import (
    as_flags_say,
    find_folder,
    load_teacher,
    merge_loras,
    network_folder,
)
from models.prompts import open_prompts

GB = 1e9
FREE = 0.03  # of a device's memory, what stays free
REACHED = 0.45  # of a device's peak
H100 = 989.0  # its dense peak in bfloat16, TFLOP/s
NODE = 8  # ranks of a node, where torchrun does not say


# ---- what a script states ------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """One network of a method.

    role     "teacher": frozen, in the teacher's dtype; "frozen", "trained", "average", "copy":
             float32; a copy is made for every save and sampled from, and is gone after it
    rank     of its adapter on the teacher's weights; 0: weights of its own
    pair     it is two networks of the teacher's size, for high and for low noise
    saved    it is what student/ holds
    change   function(net) that the script applies to it first, in place
    moments  bytes of the optimiser for each trained number
    update   function(net) -> FLOPs of one step of its optimiser, if that multiplies matrices
    """

    name: str
    role: str
    rank: int = 0
    pair: bool = False
    saved: bool = False
    change: Callable | None = None
    moments: int = 8
    update: Callable | None = None


@dataclass(frozen=True)
class Turn:
    """One backward pass, with what leads to it, for one micro-batch.

    trains   the network that gets a gradient
    times    how often it takes place in one student update
    calls    {network: calls without gradient}; averages, for what is drawn
    graphs   {network: calls whose graphs are alive at the same time}; half a call goes to the
             middle features alone
    """

    trains: str
    times: float
    calls: dict
    graphs: dict


# ---- the plan ------------------------------------------------------------------------------------


class Plan:
    """Bytes of one rank and FLOPs of one student update. args: a script's flags.

    net: the network of the teacher's architecture, on the meta device. ranks: how many there are;
    device: "cuda" or "cpu". costs: {network: Cost}. measured: of another plan with the same net,
    so that nothing is measured twice. Raises UserError for shapes that do not fit.
    """

    def __init__(self, args, net, networks, turns, ranks=1, device="cuda", measured=None):
        self.args, self.net, self.networks, self.turns = args, net, networks, turns
        self.ranks, self.device, self.B = ranks, device, args.train_batch_size
        self.sequence = getattr(args, "sequence_ranks", 1) or 1
        launched = "RANK" in os.environ  # by torchrun, which says how many ranks a node has
        node = int(os.environ.get("LOCAL_WORLD_SIZE", NODE)) if launched else NODE
        self.shards = min(ranks, getattr(args, "shard_ranks", None) or node)
        self.bf16 = args.mixed_precision == "bf16"
        self.call = call_of(args, net)
        self.measured, self.costs = {} if measured is None else measured, {}
        for network in networks:
            gradient = network.role == "trained"
            key = gradient, network.rank, network.change, network.role == "teacher"
            key += self.call, args.gradient_checkpointing, self.bf16, device
            if key not in self.measured:
                self.measured[key] = self.measure(network, gradient)
            self.costs[network.name] = self.measured[key]

    def measure(self, network, gradient):
        """-> Cost of a network of the script."""
        args, net = self.args, copy.deepcopy(self.net)
        if network.role == "teacher" and args.__dict__.get("teacher") == "ring":
            if not isinstance(net, RingDiT):
                return Cost()  # a closed form
        if (network.role == "teacher" or network.rank) and self.bf16 and self.device == "cuda":
            to_dtype(net, torch.bfloat16)
        name = "adapter" if network.rank else None
        if name:
            adapted(net, network.rank, name)
        if network.change:  # what it adds is trained beside an adapter
            with torch.device("meta"):
                network.change(net)
        try:
            how = self.bf16, args.gradient_checkpointing, name, gradient
            return measure(net, self.call, *how)
        except ValueError as e:
            raise UserError(str(e)) from None

    def numbers(self, network):
        """How many numbers belong to this network alone."""
        cost = self.costs[network.name]
        return (2 if network.pair else 1) * (cost.trained if network.rank else cost.parameters)

    def per_rank(self, network, bytes_each):
        """Bytes of this rank for so many bytes a number: adapters whole, all else shared out."""
        return self.numbers(network) * bytes_each / (1 if network.rank else self.shards)

    def weights(self, network):
        """Bytes of its weights on a rank."""
        if network.role != "teacher":
            return self.per_rank(network, 4)
        return self.costs[network.name].weights * (2 if network.pair else 1) / self.shards

    def trained(self):
        return [network for network in self.networks if network.role == "trained"]

    def static(self):
        """{part: bytes} of what a rank holds all the time."""
        of_role = {"average": "moving average"}
        found = {"weights": 0.0, "optimiser": 0.0, "moving average": 0.0, "gathered blocks": 0.0}
        for network in self.networks:
            if network.role != "copy":
                found[of_role.get(network.role, "weights")] += self.weights(network)
            if network.role == "trained":
                found["optimiser"] += self.per_rank(network, network.moments)
        if self.shards > 1:
            found["gathered blocks"] = max(map(self.gathered, self.networks))
        return found

    def gathered(self, network):
        """Bytes of a sharded network that are whole while it computes."""
        if network.role in ("average", "copy"):
            return 0.0
        cost = self.costs[network.name]
        blocks = 3 if network.role == "trained" and not network.rank else 2
        return blocks * cost.block + cost.outside

    def of_turn(self, turn, batch=None):
        """-> gradients, saved activations, temporaries of a turn, in bytes."""
        share = (batch or self.B) / self.B / self.sequence
        network = next(n for n in self.networks if n.name == turn.trains)
        saved = sum(count * self.costs[name].saved for name, count in turn.graphs.items())
        work = [self.costs[name].backward - self.costs[name].saved for name in turn.graphs]
        work += [self.costs[name].forward for name, count in turn.calls.items() if count]
        return self.per_rank(network, 4), saved * share, max(work) * share

    def peak_of(self, turn, batch=None):
        """Bytes of a turn beside what is static."""
        gradients, saved, work = self.of_turn(turn, batch)
        passes = self.args.gradient_accumulation_steps
        passes *= sum(other.trains == turn.trains for other in self.turns)
        kept = self.shards > 1 or passes > 1  # gradients are there before the pass begins
        return (gradients + saved if kept else max(gradients, saved)) + work

    def largest_turn(self, batch=None):
        return max(self.turns, key=lambda turn: self.peak_of(turn, batch))

    def of_save(self, batch=None):
        """Bytes of a save beside what is static: of its copies, and of a call of each."""
        share = (batch or self.B) / self.B / self.sequence
        copies = [network for network in self.networks if network.role == "copy"]
        return sum(self.weights(n) + self.costs[n.name].forward * share for n in copies)

    def peak(self, batch=None):
        """Bytes of a rank at its worst."""
        turn = self.peak_of(self.largest_turn(batch), batch)
        return sum(self.static().values()) + max(turn, self.of_save(batch))

    def fits(self, memory, batch=None):
        """Whether a device of so many bytes can hold it."""
        return self.peak(batch) <= (1 - FREE) * memory

    def largest_batch(self, memory):
        """The largest --train_batch_size that fits; 0: none."""
        if not self.fits(memory, 1):
            return 0
        low, high = 1, 2
        while self.fits(memory, high) and high < 2**20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(memory, middle) else (low, middle)
        return low

    def flops(self):
        """FLOPs of one update on a rank, and those of what is computed again."""
        model = again = 0.0
        for turn in self.turns:
            here = sum(count * self.costs[name].flops for name, count in turn.calls.items())
            for name, count in turn.graphs.items():
                cost = self.costs[name]
                backward = cost.flops_backward if name == turn.trains else cost.flops
                here += count * (cost.flops + backward)
                again += turn.times * count * cost.flops_again
            model += turn.times * here
        passes = self.args.gradient_accumulation_steps / self.sequence
        update = sum(n.update(self.net) for n in self.trained() if n.update)
        return model * passes + update, again * passes

    def seconds(self, tflops):
        """Of one update, on a device of this peak."""
        return sum(self.flops()) / (tflops * 1e12 * REACHED)

    def disk(self):
        """{what: bytes} of state/ and student/, of all ranks together."""
        kept = [n for n in self.networks if n.role not in ("teacher", "copy")]
        moments = sum(n.moments * self.numbers(n) for n in self.trained())
        each = 2 if getattr(self.args, "save_dtype", None) in ("bf16", "bfloat16", "fp16") else 4
        student = sum(each * self.numbers(n) for n in self.networks if n.saved)
        state = moments + sum(4 * self.numbers(n) for n in kept)
        return {"a state (two are kept)": state, "student": student}


# ---- what is read of the files -------------------------------------------------------------------


def teacher_network(args, attention=False):
    """The architecture of --teacher on the meta device. Raises UserError.

    attention: of a closed form, a transformer, for a method that replaces attention.
    """
    if args.teacher == "ring":
        return on_meta(RingDiT if attention else RingMLP)
    described = config_file(network_folder(find_folder(args.teacher)))
    config = load_json(described)
    return on_meta(lambda: network_from_config(config, described))


def planned_teacher(args, two_networks=False, attention=False):
    """What `start_teacher` gives, but on the meta device: it needs no weights. Raises UserError."""
    how = dict(two_networks=two_networks, shape=args.sample_shape, weights=False)
    teacher = load_teacher(args.teacher, **how)
    if args.teacher_lora and not teacher.config:
        merge_loras(teacher, args.teacher_lora)  # which refuses a closed form
    teacher.base = teacher.net if teacher.config else teacher_network(args, attention)
    return as_flags_say(teacher, args)


def is_pair(teacher):
    """Whether a --teacher has two networks, for high and for low noise."""
    return os.path.isdir(os.path.join(teacher, "transformer_2"))


def call_of(args, net):
    """What a network is called on: the run's batch and shape, and lengths of --prompts, --data."""
    shape = tuple(getattr(args, "sample_shape", None) or net.latent_shape)
    known = {}
    for path in (getattr(args, "prompts", None), getattr(args, "data", None)):
        if not str(path).endswith(".safetensors"):
            continue
        file = open_prompts(path) if path == getattr(args, "prompts", None) else open_tensors(path)
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        for key in ("cond.text", "cond.tokens"):
            if len(shapes.get(key, ())) == 3:
                known["text"] = shapes[key][1]
        if {"coords", "offsets"} <= set(shapes):
            known["points"] = -(-shapes["coords"][0] // max(1, shapes["offsets"][0] - 1))
    return Call(args.train_batch_size, shape, **known)


# ---- the report and the refusal ------------------------------------------------------------------


def dry_run(
    args, networks, turns, attention=False, build=None, disk=None, two_networks=False, check=None
):
    """--dry_run: print what the run needs, and say True: nothing is left to do.

    Otherwise False, unless the device cannot hold the run: raises UserError. attention: see
    teacher_network; build(args) -> the network, where it is not the teacher's. disk(args, shape,
    ranks) -> {what: bytes} that a script writes beside its state. two_networks: see load_teacher.
    check(args, teacher): raises UserError for a teacher that does not suit the flags.
    """
    rank, _, local_rank = place_among_ranks(os.environ)
    memory = GB * args.device_memory if args.device_memory else own_memory(local_rank)
    if args.dry_run is None and memory is None:
        return False

    def refuse_flags(args):
        if not build:
            teacher = planned_teacher(args, two_networks, attention)
            if check:
                check(args, teacher)

    if args.dry_run is not None:
        refuse_flags(args)
    plan = planned(args, networks, turns, attention, build)
    if args.dry_run is None:
        refuse_too_large(plan, memory, refuse_flags)
        return False
    refuse_shares(args.shard_ranks or 1, plan.ranks)
    refuse_sequence(plan.net, plan.sequence, plan.ranks)
    if rank == 0:
        more = disk(args, plan.call.shape, plan.ranks) if disk else {}
        print("\n".join(report_lines(plan, memory or 80 * GB, more)))
    return True


def planned(args, networks, turns, attention=False, build=None, **_):
    """The Plan of --dry_run, or of this run. The arguments are those of `dry_run`."""
    _, world, _ = place_among_ranks(os.environ)
    net = on_meta(lambda: build(args)) if build else teacher_network(args, attention)
    device = "cuda" if args.dry_run is not None or torch.cuda.is_available() else "cpu"
    return Plan(args, net, networks, turns, args.dry_run or world, device)


def own_memory(local_rank):
    """Bytes of this rank's GPU, or None without one. Raises UserError for a rank too many."""
    device = own_device(local_rank)
    if device.type == "cpu":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def refuse_sequence(net, n, ranks):
    """Raises UserError where groups of n of these ranks cannot share the tokens of net."""
    refuse_groups(n, ranks)
    try:
        if n > 1:
            refuse_spreading(net, n)
    except ValueError as error:
        raise UserError(f"--sequence_ranks {n}: {error}") from None


def refuse_too_large(plan, memory, refuse_flags=None):
    """Raises UserError for a run that does not fit, with the flags that would make it smaller.

    refuse_flags(args): raises UserError for flags that the script does not take.
    """
    if plan.fits(memory):
        return
    turn, static = plan.largest_turn(), plan.static()
    gradients, saved, work = plan.of_turn(turn)
    parts = {**static, "gradients": gradients, "activations": saved, "temporaries": work}
    parts["a save's copy"] = plan.of_save()
    least = min(1e6, max(parts.values()))
    said = ", ".join(f"{name} {size / GB:.3g}" for name, size in parts.items() if size >= least)
    found = remedies(plan, refuse_flags)
    enough = [(what, peak) for what, peak in found if peak <= (1 - FREE) * memory]
    helps = [f"{what} ({peak / GB:.3g})" for what, peak in enough or found]
    how = "give more ranks or a smaller --sample_shape"
    if helps:
        how = f"give {', or '.join(helps)}"
    if helps and not enough:
        how = f"none of these is enough alone: {', '.join(helps)}; try them together, more ranks, "
        how += "or a smaller --sample_shape"
    raise UserError(
        f"this run needs {plan.peak() / GB:.3g} GB a rank and the device has {memory / GB:.3g}, of "
        f"which {100 * FREE:g} % stay free ({said}; in {turn.trains}'s turn): {how}; --dry_run "
        "prints all of it, and --device_memory GB says what there is"
    )


def remedies(plan, refuse_flags=None):
    """Flags that make a run smaller and that its script takes, and its bytes with each.

    refuse_flags(args): raises UserError for flags that it does not take.  -> [(flags, bytes)]
    """
    args, found = plan.args, []

    def taken(other):
        try:
            if refuse_flags:
                refuse_flags(other)
        except UserError:
            return False
        return True

    changes = {"--gradient_checkpointing": dict(gradient_checkpointing=True)}
    if args.train_batch_size > 1:
        changes["--train_batch_size 1"] = dict(train_batch_size=1)
    for what, change in changes.items():
        if any(getattr(args, name) != value for name, value in change.items()):
            other = copy.copy(args)
            other.__dict__.update(change)
            if taken(other):
                found.append((what, with_flags(plan, other).peak()))
    ranks = [n for n in (2, 4, 8) if n > plan.shards]
    found += [(f"{n} ranks", with_flags(plan, args, n).peak()) for n in ranks[-1:]]
    if hasattr(args, "sequence_ranks"):
        other = copy.copy(args)
        other.sequence_ranks = n = 2 * plan.sequence
        ranks = max(plan.ranks, n)
        try:
            refuse_sequence(plan.net, n, ranks)
            at = f"--sequence_ranks {n}" + (f" on {ranks} ranks" if ranks > plan.ranks else "")
            found.append((at, with_flags(plan, other, ranks).peak()))
        except UserError:
            pass  # a network or a number of heads that ranks cannot share
    if hasattr(args, "lora_rank") and not all(n.rank for n in plan.trained()):
        other = copy.copy(args)
        several = len(plan.trained()) > 1  # one of them is a fake
        flags = ["lora_rank", *(["fake_lora_rank"] if several else [])]
        other.__dict__.update({flag: getattr(args, flag) or 64 for flag in flags})
        adapters = [as_adapter(network) for network in plan.networks]
        if taken(other):
            how = plan.turns, plan.ranks, plan.device, plan.measured
            at = " ".join(f"--{flag} {getattr(other, flag)}" for flag in flags)
            found.append((at, Plan(args, plan.net, adapters, *how).peak()))
    least = 0.98 * plan.peak()
    return sorted(((what, n) for what, n in found if n < least), key=lambda pair: pair[1])


def with_flags(plan, args, ranks=None):
    """The same plan with other flags, or on another number of ranks."""
    how = plan.networks, plan.turns, ranks or plan.ranks, plan.device, plan.measured
    return Plan(args, plan.net, *how)


def as_adapter(network, rank=64):
    """The network as an adapter on the teacher, if it is not the teacher nor a copy for a save."""
    if network.role in ("teacher", "copy"):
        return network
    about = {**network.__dict__, "rank": network.rank or rank}
    return Network(**about)


def report_lines(plan, memory, disk):
    """The report of --dry_run, line by line."""
    args, lines = plan.args, [table_of_networks(plan), "", table_of_turns(plan), ""]
    static = {name: size for name, size in plan.static().items() if size}
    turn = plan.largest_turn()
    gradients, saved, work = plan.of_turn(turn)
    at = f"of {turn.trains}"
    parts = {**static, f"gradients {at}": gradients, f"activations {at}": saved}
    parts |= {f"temporaries {at}": work}
    parts |= {"copy for a save": plan.of_save()} if plan.of_save() else {}
    parts |= {"peak": plan.peak()}
    split = f"{plan.ranks} rank(s), networks in {plan.shards} part(s)"
    split += f", tokens in {plan.sequence}" if plan.sequence > 1 else ""
    lines.append(f"GB on a rank, {split}, {plan.device}, batch {plan.B}, {shape_text(plan)}:")
    lines += [f"    {name:28s} {size / GB:10.3f}" for name, size in parts.items()]
    batch, fit = plan.largest_batch(memory), "fits" if plan.fits(memory) else "does not fit"
    lines.append(
        f"    {fit} {memory / GB:.4g} GB with {100 * FREE:g} % left free; largest "
        f"--train_batch_size {batch or 'none'}"
    )
    model, again = plan.flops()
    tflops, seconds = args.device_tflops, plan.seconds(args.device_tflops)
    lines += [
        "",
        f"an update: {model / 1e12:.5g} model TFLOP and {again / 1e12:.5g} recomputed; "
        f"{seconds:.4g} seconds at {100 * REACHED:g} % of {tflops:g} TFLOP/s",
    ]
    lines += ["", "GB on disk:"]
    for name, size in {**plan.disk(), **prompts_on_disk(args), **disk}.items():
        lines.append(f"    {name:28s} {size / GB:10.3f}")
    return lines


def shape_text(plan):
    call = plan.call
    points = f", {call.points} points" if getattr(plan.net, "sparse", False) else ""
    return f"samples of {' x '.join(map(str, call.shape))}{points}"


def prompts_on_disk(args):
    """Size of the file of --prompts, of which a run reads the rows of one batch at a time."""
    path = getattr(args, "prompts", None)
    return {"prompts": os.path.getsize(path)} if path and os.path.isfile(path) else {}


def table_of_networks(plan):
    """Parameters and saved activations of each network."""
    head = f"{'network':12s} {'role':10s} {'parameters':>16s}   GB that a call with gradient keeps"
    rows = [head]
    for network in plan.networks:
        cost = plan.costs[network.name]
        role = f"rank {network.rank}" if network.rank else network.role
        row = f"{network.name:12s} {role:10s} {plan.numbers(network):16,d}"
        if cost.saved_all:
            row += f"   {cost.saved_all / GB:.3f} without checkpointing"
            row += f", {cost.saved / GB:.3f} with" if plan.args.gradient_checkpointing else ""
        rows.append(row)
    return "\n".join(rows)


def table_of_turns(plan):
    """What is called in one student update, for one micro-batch."""

    def said(counts):
        return ", ".join(f"{name} {count:g}" for name, count in counts.items() if count)

    rows = [f"{'turn of':12s} {'times':>6s}   calls without gradient; with"]
    for turn in plan.turns:
        calls = f"{said(turn.calls) or 'none'}; {said(turn.graphs)}"
        rows.append(f"{turn.trains:12s} {turn.times:6g}   {calls}")
    return "\n".join(rows)
