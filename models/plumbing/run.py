"""Where a run stands: ranks, output folder, log, checkpoints, draws, averages.

Nothing in this file calls a network or computes a loss, and nothing calls back into a script: the
training loop stands in the script, straight down, and asks a `Run` for what no paper mentions.

    run = Run(args, "dmd")
    run.start(student=student, optimizer=optimizer)      # resumes them where that is asked for
    for step in run.steps():
        for draw in run.micro_batches(step, "student", teacher):
            with run.autocast():
                loss = ...
                run.note(loss=loss)                      # averaged, also over ranks
            (loss * run.share).backward()
        run.update(optimizer, "student")
        if run.end_step(step, show=("loss",)):           # one row of log.csv; True: time to save
            run.save(step)
"""

import contextlib
import csv
import datetime
import errno
import os
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from models.draws import Draws
from models.files import TrainingError, UserError, replacing
from models.networks import lora
from models.networks.sequence import Sequence, use_sequence
from models.plumbing.allocator import keep_freed_memory
from models.plumbing.sharding import (
    average_whole,
    blocks_of,
    clip,
    copy_of,
    make_mesh,
    move_average,
    place,
    refuse_groups,
)
from models.plumbing.state import (
    INPUTS,
    SavedState,
    batch_flags,
    changes_on_resume,
    complete_states,
    find_state,
    flags_to_save,
    inputs_of,
    keep_batch,
    read_info,
    remove_later_states,
    resumable,
    same_inputs,
    save_state,
    unpack,
    unpack_optimizer,
)
from models.progress import progress

try:
    import resource
except ModuleNotFoundError:  # there is none on Windows
    resource = None

# How long ranks wait for each other: rank 0 may draw samples, or write them, while others wait.
PATIENCE = datetime.timedelta(hours=12)

# What the system says of a disk, a quota or a file that is full.
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
# What it says of a disk that is gone or may not be written to any more, and of too many open files.
LOST = {getattr(errno, name, errno.EIO) for name in ("EROFS", "EACCES", "ESTALE", "ENOTCONN")}
LOST |= {errno.EIO, errno.EMFILE, errno.ENFILE}
# What it says of a pipe that nobody reads any more, and of a terminal that was closed.
UNREAD = {errno.EPIPE, errno.EIO}
# What it says of a folder that it does not rename: a mount point, one of a container's image, or
# of another user.
NOT_RENAMED = {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES}


class Stopped(SystemExit):
    """A run that has saved its state and ends as it was asked to; code: the exit code."""


def run_main(main, again=None):
    """Call main(); what ends it early becomes one line on stderr and an exit code.

    again: how a command that trains nothing is resumed, in words.

    Exit codes: 2 for UserError; 1 for TrainingError, a lack of memory, and a disk that is full or
    lost; 130 for Ctrl-C; a run that `Run.end_step` stopped has its own. A rank that is done ends at
    once: the threads of its process group are still running, and now and then one of them aborts a
    process whose interpreter is being torn down.
    """
    print_anything()
    code, own, line = 0, False, ""  # own: perhaps of one node alone
    try:
        main()
    except Stopped as stop:
        code = stop.code
    except KeyboardInterrupt:
        code, line = 130, f"interrupted; {again or newest_state()}"
    except (UserError, TrainingError) as e:
        code, line = 2 if isinstance(e, UserError) else 1, str(e)
    except OSError as e:
        if e.errno not in FULL | LOST:
            raise
        code, own, line = 1, True, f"{what_to_do(e)}; {again or newest_state()}"
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        code, own, line = 1, True, f"{no_memory(e, again)}; {again or newest_state()}"
    if line:
        say_why(" ".join(line.split()), own, code)
    if dist.is_initialized() and not line:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code or line:
        raise SystemExit(code) from None


def say_why(line, own, code):
    """Print what ended this rank: at once on rank 0, and where it may be of one node alone (own).

    Any other rank waits first. Where all ranks meet the same, torchrun ends it in that time, since
    rank 0, which has said it, has ended; so it is said once. What one rank alone meets is said by
    that one. The ranks of a node wait for different times.
    """
    rank, local = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if rank == "0" or own:
        print(f"error: {line}", file=sys.stderr)
    elif code != 130:  # Ctrl-C is for all
        with contextlib.suppress(ValueError):  # they are no longer requests to save
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.sleep(3 + (int(local) if local.isdecimal() else 0))
        print(f"error (rank {rank}): {line}", file=sys.stderr)


@contextlib.contextmanager
def writing(output, remedy):
    """Inside, an OSError is about --output, and becomes a UserError with this remedy; those of a
    disk that is full or gone are left to `run_main`, which knows how to go on."""
    try:
        yield
    except OSError as e:
        if e.errno in FULL | LOST:
            raise
        raise UserError(f"cannot write --output {output}: {e}; {remedy}") from None


def what_to_do(e):
    """An OSError of FULL or LOST in words."""
    if e.errno in FULL:
        return f"the disk is full ({e}): make room"
    if e.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open ({e}): raise the limit, as by ulimit -n 65536"
    return f"a file can be read or written no more ({e}): see to its disk and permissions"


def is_out_of_memory(e):
    """Whether an error is the GPU's or the host's memory, which torch has no class for."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(e, known) or "can't allocate memory" in str(e)


def no_memory(e, again=None):
    """The same in words."""
    first = (str(e).splitlines() or [""])[0] or type(e).__name__
    if again:
        return f"out of memory ({first}): end other programs on this device, or take a larger one"
    return (
        f"out of memory ({first}): a lower --train_batch_size with more "
        "--gradient_accumulation_steps trains the same, and --gradient_checkpointing, or more "
        "ranks, take less on each"
    )


def print_anything():
    """Names that the terminal's encoding lacks are printed with backslashes instead of failing.

    And what is printed when nobody reads it any more is no reason to end a run.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(AttributeError, ValueError):  # no file, as in a notebook
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and not isinstance(stream, Output):
            setattr(sys, name, Output(stream))


class Output:
    """stdout or stderr, from which writing to a reader that is gone raises nothing.

    That is a program behind a pipe that has ended, or a connection that was dropped: what follows
    goes nowhere. Everything else behaves as in the stream itself.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.call(self.stream.write, text)

    def flush(self):
        return self.call(self.stream.flush)

    def call(self, do, *args):
        try:
            return do(*args)
        except OSError as e:
            if e.errno not in UNREAD:
                raise
            discard(self.stream.fileno())
        return do(*args)


def discard(number):
    """What is written to this file descriptor from now on goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def newest_state():
    """How the run of this process is resumed, in words."""
    run, state = Run.current, None
    if run:
        state, how = resumable(run.folder, run.args.resume_from_checkpoint, run.saved)
    if not state:
        return "no state is saved yet"
    return f"{state} is intact: go on with --resume_from_checkpoint {how}"


def tell(text):
    """Write bytes to stderr; where nobody reads it any more, what follows goes nowhere.

    A terminal that was closed refuses every write, and the last words of a run are writes.
    """
    try:
        os.write(2, text)
    except OSError:
        if os.path.samestat(os.fstat(1), os.fstat(2)):
            discard(1)
        discard(2)


class Run:
    """One run of a script. args: its flags; method: the script's name.

    Attributes: rank, world_size, main (whether this is rank 0), device, mesh (of the ranks that
    share networks out, None for one rank), B (rows per micro-batch and part), share (what one
    micro-batch's loss counts in an update), folder, changes (of flags, where the run was resumed
    with others; see `changes_on_resume`). Rows are shared out among `parts`, of which this rank
    belongs to number `part`: single ranks, or with --sequence_ranks the groups that share the
    tokens of their rows. `writes`: whether this rank writes what its part has made. `saved`: how
    many updates this run's newest state is of.
    """

    current = None  # the one of this process, for the line that ends it early

    def __init__(self, args, method):
        if os.path.islink(os.path.normpath(args.output_dir)):  # folders are renamed where they are
            args.output_dir = os.path.realpath(args.output_dir)
        self.args, self.method, self.folder = args, method, args.output_dir
        latest = getattr(args, "resume_from_checkpoint", None) == "latest"
        self.saved = float("inf") if latest else 0
        self.began, self.spent, self.changes = None, 0.0, []
        self.started, self.asked, self.stopping = time.monotonic(), None, False
        self.rank, self.world_size, local_rank = place_among_ranks(os.environ)
        self.main, self.B = self.rank == 0, args.train_batch_size
        self.share = 1 / args.gradient_accumulation_steps
        self.device = own_device(local_rank)
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.world_size > 1 and not dist.is_initialized():
            meet_ranks(self.device)
        self.mesh = make_mesh(self.device, args.shard_ranks) if self.world_size > 1 else None
        self.group_ranks(args.sequence_ranks)
        self.sums, self.counts, self.roots = {}, {}, set()
        self.command = batch_flags(args)
        Run.current = self

    # ---- ranks

    def place(self, net, whole=False):
        """Memory for a network on this run's device; over several ranks each has a part of it.

        A network on the meta device gets memory without values, another keeps its values. whole:
        every rank keeps all of it, as it does adapters, which share its optimiser.  -> net
        """
        return place(net, self.device, None if whole else self.mesh)

    def compile_blocks(self, net):
        """With --compile each block of net is compiled when it is first called. -> net

        All blocks of a class share one cache, whose 8 entries a U-Net's widths alone would fill:
        what comes later, adapters among it, would silently run as it is.
        """
        for block in blocks_of(net) if self.args.compile else ():
            torch._dynamo.config.recompile_limit = 256
            block.compile()
        return net

    def copy_of(self, net, dtype=None, change=None):
        """A network with net's weights, without its adapters, in memory of its own, shared out
        alike. dtype, change: see `sharding.copy_of`."""
        return copy_of(net, self.device, self.mesh, dtype, change)

    def group_ranks(self, n):
        """Make a part of every n consecutive ranks. Raises UserError."""
        refuse_groups(n, self.world_size)
        self.parts, self.part = self.world_size // n, self.rank // n
        self.writes = self.rank % n == 0
        self.sequence = None
        if n > 1:
            self.sequence = Sequence(dist.new_subgroups(n, timeout=PATIENCE)[0])

    def describe_ranks(self):
        """Devices in words."""
        groups = f", {self.sequence.ranks} of them a sample" if self.sequence else ""
        return f"{self.device} x {self.world_size}{groups}"

    def spread_tokens(self, *nets):
        """With --sequence_ranks these networks share the tokens of each sample among the ranks of
        their group, and so do copies of them. None and closed forms are passed over.

        Raises UserError.
        """
        for net in nets if self.sequence else ():
            net = net.net if isinstance(net, lora.Adapted) else net
            if isinstance(net, nn.Module) and next(net.parameters(), None) is not None:
                try:
                    use_sequence(net, self.sequence)
                except ValueError as error:
                    raise UserError(f"--sequence_ranks {self.sequence.ranks}: {error}") from None

    def mean_over_ranks(self, *values):
        """Scalars (tensors or numbers) averaged over ranks.  -> floats, all read at once."""
        v = torch.stack([torch.as_tensor(x, device=self.device).detach().float() for x in values])
        if dist.is_initialized():
            dist.all_reduce(v)
            v = v / dist.get_world_size()
        return v.tolist()

    def sum_over_ranks(self, x):
        """A tensor summed over ranks, in place; nothing waits for the device.  -> x"""
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    def wait_for_all(self):
        """No rank goes on before all are here."""
        self.mean_over_ranks(0.0)

    # ---- beginning and end

    def start(self, **state):
        """Resume networks and optimisers by name, prepare the output folder, open the log.

        state: {name: network, lora.Adapted or optimiser}; what a checkpoint holds. The first is the
        network whose average is called ema. Raises UserError.
        """
        first, self.spent = self.resume(**state)
        self.open_folder(first)

    def resume(self, **state):
        """Fill modules and optimisers from the checkpoint that is asked for.

        A module that is given twice (an average that is off) is stored once. An average that was
        off before starts as the network that it averages.  -> the checkpoint's step, seconds spent.
        Raises UserError.
        """
        first_name = {id(v): k for k, v in reversed(state.items())}
        self.state = {k: v for k, v in state.items() if first_name[id(v)] == k}
        info, saved = self.read_state()
        if info is None:
            return 0, 0.0
        averaged = next(iter(self.state))
        for name, thing in self.state.items():
            new_average = name == "ema" and not saved.has(name)
            if isinstance(thing, torch.optim.Optimizer):
                unpack_optimizer(thing, name, saved)
            else:
                unpack(thing, averaged if new_average else name, saved)
        return info["step"], info["seconds"]

    def read_state(self):
        """The checkpoint that --resume_from_checkpoint names: its state.json and its tensors.

        Says which flags this run changes, and keeps them for its own checkpoints.  -> dict,
        SavedState; None, None for a fresh start. Raises UserError.
        """
        args = self.args
        self.inputs = inputs_of(args) if self.main else {}
        folder = find_state(args.output_dir, args.resume_from_checkpoint)
        if folder is None:
            if args.resume_from_checkpoint:
                self.say(f"no complete checkpoint under {args.output_dir}: starting fresh")
            return None, None
        info = read_info(folder, self.method)
        keep_batch(info, args, self.world_size)
        self.share = 1 / args.gradient_accumulation_steps
        same = same_inputs(info, self.inputs, args) if self.main else set()
        known = self.mean_over_ranks(*(float(flag in same) for flag in INPUTS))  # on rank 0
        same = {flag for flag, is_same in zip(INPUTS, known) if is_same}
        changes = changes_on_resume(info, args, self.world_size, same)
        saved = SavedState(folder, info.get("world_size", 1))
        self.changes = info.get("changes", []) + changes
        for c in changes:
            self.say(f"{c['what']} was {c['was']} and is {c['is']} from update {c['update']} on")
        return info, saved

    def open_folder(self, first):
        """Prepare the output folder of a run that goes on after `first` updates.

        Until an update is done nothing changes in a folder with a run in it: a new run writes in
        another one beside it until then (see `settle`). Raises UserError.
        """
        self.first, self.saved, self.log, self.settled = first, first, None, False
        if self.args.mixed_precision == "bf16" and self.device.type == "cpu" and not has_bfloat16():
            self.say(
                "--mixed_precision bf16: this processor has no instructions for bfloat16 and only "
                "imitates it; without the flag the run is several times faster"
            )
        refuse_output_dir(self.folder)
        resumed = self.args.resume_from_checkpoint
        waits = self.main and holds_another_run(self.folder, resumed)
        if any(self.mean_over_ranks(float(waits))):  # as rank 0 sees it
            refuse_mount_point(self.folder)
            self.folder = starting_folder(self.folder)
        if self.main:
            make_output_dir(self.folder, fresh=waits)
        self.wait_for_all()
        if first >= self.args.max_train_steps:
            self.settle()

    def settle(self):
        """The first update is done, or none is left to do: the output folder is this run's now."""
        path = self.args.output_dir
        if self.main:
            take_output_dir(self.folder, path)
            for name in remove_later_states(path, self.first):
                print(f"{name} is removed: this run has gone on from update {self.first}")
            self.log = Log(path, self.first)
        self.folder, self.settled = path, True
        self.wait_for_all()

    def say(self, text):
        """Print on rank 0."""
        if self.main:
            print(text)

    def seconds(self):
        """What training has taken so far, with what it had taken before it was resumed."""
        return self.spent + (time.monotonic() - self.began if self.began else 0.0)

    def save(self, step):
        """state/: everything that `start` was given, after the update of this step."""
        self.save_state(step, self.state)

    def save_state(self, step, things, **more):
        """state/: these networks, adapters and optimisers, {name: thing}, after the update of this
        step, on all ranks. more: further entries of state.json."""
        info = {"flags": flags_to_save(self.args), "world_size": self.world_size}
        info |= {"method": self.method, "command": self.command, "inputs": self.inputs}
        info |= {"changes": self.changes, "seconds": self.seconds(), **more}
        save_state(self.folder, step + 1, things, info, self.rank, self.wait_for_all)
        self.saved = step + 1

    # ---- a step

    def steps(self, first=None, last=None, text=None):
        """The steps that are left, or first ... last - 1, with a progress bar that text names."""
        self.began = self.began or time.monotonic()
        first = self.first if first is None else first
        last = self.args.max_train_steps if last is None else last
        total, quiet = self.args.max_train_steps, not self.main
        left = range(first, last)
        self.bar = progress(left, text, initial=first, total=total, disable=quiet)
        with self.listening():
            for step in self.bar:
                self.sums, self.counts, self.roots = {}, {}, set()
                self.clock, self.step = time.perf_counter(), step
                yield step
                if self.stopping:
                    self.bar.close()
                    self.say(f"stopped after update {step + 1}; {newest_state()}")
                    raise Stopped(self.exit_code)

    @contextlib.contextmanager
    def listening(self):
        """SIGTERM, Ctrl-C, a closed terminal end the run after this update, a second one at once.

        torchrun passes a signal on that the ranks may have had already: one within a second of the
        first is the same one. Where SIGHUP is ignored, as under nohup, a terminal may close.
        """

        def ask(number, frame):
            if self.asked is None:
                self.asked, self.asked_at = number, time.monotonic()
                tell(b"\nstopping after this update, with its state saved\n")
            elif time.monotonic() > self.asked_at + 1:
                os._exit(128 + number)

        numbers, before = [signal.SIGTERM, signal.SIGINT], {}
        hangup = getattr(signal, "SIGHUP", None)  # there is none on Windows
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        with contextlib.suppress(ValueError):  # only the main thread gets signals
            for number in numbers:
                before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wants_to_stop(self):
        """Whether this rank was asked to stop or is past --max_minutes, and whether by Ctrl-C.

        -> two floats, 0 or 1, to be averaged over ranks, which all have to stop together.
        """
        over = time.monotonic() - self.started >= 60 * (self.args.max_minutes or float("inf"))
        return float(over or self.asked is not None), float(self.asked == signal.SIGINT)

    def rate(self, step, left=None):
        """Factors of the learning rate: linear warm-up, and linear fall in the run's last part.

        left: share of the run that is still to come, 1 at its start.  -> two floats in (0, 1].
        """
        left = 1 - step / self.args.max_train_steps if left is None else left
        warmup = min(1.0, (step + 1) / max(1, self.args.lr_warmup_steps))
        return warmup, min(1.0, left / max(self.args.lr_decay_share, 1e-9))

    def micro_batches(self, step, inner, teacher):
        """The draws of every micro-batch of this rank. inner: which update of the step, part of the
        draws' key. teacher: its shape and shift are those of the draws.  -> Draws, one a
        micro-batch."""
        micro_batches, per_micro = self.args.gradient_accumulation_steps, self.parts * self.B
        for micro in range(micro_batches):
            row = micro * per_micro + self.part * self.B
            key = self.args.seed, step, inner, range(row, row + self.B)
            like = teacher.shape, teacher.shift, micro_batches * per_micro
            yield Draws(*key, self.device, *like)

    def autocast(self):
        """Networks run in bfloat16 inside, where --mixed_precision says so.

        The cache of bfloat16 weights is off: it costs 2 bytes a parameter. PyTorch 2.10 and older
        also lose gradients by it: weights that were cached under no_grad get none in a later call
        of the same context (pytorch #112583, fixed by #165068, in 2.11).
        """
        enabled = self.args.mixed_precision == "bf16"
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def update(self, optimizers, what):
        """Average gradients over ranks, clip them together, step. optimizers: one, or a list.

        The norm before clipping is noted as norm_<what>. Nothing here waits for the device:
        `end_step` looks whether all norms and losses are finite.
        """
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        average_whole(parameters)
        norm = clip(parameters, self.args.max_grad_norm or float("inf"))  # 0 = off
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.note(**{f"norm_{what}": norm})

    @torch.no_grad()
    def update_ema(self, ema, net, step, start=4):
        """Moving average of weights; its decay grows from 1 / start to --ema_decay.

        So early steps average over about the last third of the run so far.
        """
        decay = min(self.args.ema_decay, (1 + step) / (start + step))
        move_average(ema.parameters(), net.parameters(), 1 - decay)

    # ---- the log

    def note(self, **values):
        """Scalars of this step for log.csv; what is noted several times is averaged.

        They stay on the device: nothing waits for them before the step ends.
        """
        for name, value in values.items():
            value = value.detach().float() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def note_rms(self, **values):
        """Root mean squares of tensors, over all that is noted in this step on all ranks."""
        self.roots |= set(values)
        self.note(**{name: value.detach().square().mean() for name, value in values.items()})

    def note_samples(self, x):
        """Mean and standard deviation of all samples noted in this step, on all ranks."""
        self.note(mean=x.detach().mean(), std=x.detach().square().mean())  # until end_step

    def note_scores(self, mu_real, mu_fake):
        """How far apart teacher and fake are (B, ...): dm_cos, dm_rel_gap, averaged over samples.

        dm_cos is the cosine of their clean predictions, dm_rel_gap |mu_fake - mu_real| / |mu_real|.
        A healthy run has a gap that shrinks, but not to nothing.
        """
        real, fake = mu_real.detach().flatten(1).float(), mu_fake.detach().flatten(1).float()
        gap = (fake - real).norm(dim=1) / real.norm(dim=1).clamp_min(1e-8)
        self.note(dm_cos=F.cosine_similarity(real, fake).mean(), dm_rel_gap=gap.mean())

    def end_step(self, step, show=(), **more):
        """Average what was noted over ranks, log it, refuse what is not finite.  -> True: time to
        save.

        show: names for the progress bar. more: further columns, the same on all ranks.
        This is the only place in a step where the processor waits for the device, and where all
        ranks agree to stop, if one has been asked to. Raises TrainingError.
        """
        names, asked = list(self.sums), self.wants_to_stop()
        means = (self.sums[n] / self.counts[n] for n in names)
        *means, stop, interrupted = self.mean_over_ranks(*means, *asked)
        row = dict(zip(names, means))
        self.refuse_not_finite(step, row)
        self.stopping, self.exit_code = stop > 0, 130 if interrupted else 0
        if not self.settled:
            self.settle()
        for name in self.roots:
            row[name] **= 0.5
        if {"mean", "std"} <= set(row):
            row["std"] = max(0.0, row["std"] - row["mean"] ** 2) ** 0.5
        if self.main:
            seconds, memory = time.perf_counter() - self.clock, peak_memory_mb(self.device)
            row = {**more, **row, "seconds": seconds, "peak_memory_mb": memory}
            self.log.write({"step": step + 1, **row})
            shown = {n: f"{row[n]:.4g}" for n in show if n in row}
            self.bar.set_postfix(shown, refresh=False)
        last = step + 1 == self.args.max_train_steps
        return last or self.stopping or (step + 1) % self.args.checkpointing_steps == 0

    def refuse_not_finite(self, step, row):
        """row: {name: value averaged over ranks}, the same on all of them. Raises TrainingError."""
        wrong = [f"{name} = {v:.4g}" for name, v in row.items() if not abs(v) < float("inf")]
        if wrong:
            where = f"not finite at update {step + 1}: {', '.join(wrong)}"
            advice = advice_after(step, self.args, self.folder, self.saved)
            raise TrainingError(f"{where}; {advice}")


def advice_after(step, args, folder, saved):
    """What to do after an update that was not finite: flags that can be added to the command.

    In the first update the inputs come first. Later on the rates do; but since draws do not depend
    on them, a row of the inputs that is not finite stops the run at the same update again. folder:
    where this run has written so far. saved: how many updates its newest state is of.
    """
    halved = [name for name in vars(args) if name.startswith("learning_rate")]
    names = [name for name in [*halved, "max_grad_norm"] if getattr(args, name)]
    lower = [f"--{name} {getattr(args, name) / 2:g}" for name in names]
    named = [f"--{name}" for name in ("prompts", "data", "teacher") if getattr(args, name, None)]
    look = f"look for numbers that are not finite behind {' and '.join(named)}"
    state, newest = resumable(folder, args.resume_from_checkpoint, saved)
    if state:
        how = f"{state} is intact: resume with --resume_from_checkpoint {newest}"
    else:
        how = "no state is saved yet: start again with"
    how += f" {' '.join(lower)}"
    return f"{look}, or {how}" if step == 0 else f"{how}; if update {step + 1} fails again, {look}"


def has_bfloat16():
    """Whether the processor multiplies bfloat16 matrices by instructions of its own."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


# ---- ranks and devices ---------------------------------------------------------------------------


# How many tasks there are, in the words of Slurm, OpenMPI, MPICH and Intel MPI, and MVAPICH.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
OF_A_NODE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


def place_among_ranks(environ):
    """Rank, number of ranks and rank on this node, as torchrun writes them there. Raises UserError.

    Tasks that something else has started would each train a run of their own in one folder.
    """
    there = {name: environ[name] for name in ("RANK", "WORLD_SIZE", *OF_A_NODE) if name in environ}
    if not {"RANK", "WORLD_SIZE"} <= there.keys():
        for name in OF_A_NODE:
            there.pop(name, None)  # left in a shell, it would move a single run
    wrong = [f"{name}={value}" for name, value in there.items() if not value.isdecimal()]
    if wrong:
        raise UserError(f"the environment has {wrong[0]}, which is no number: unset it")
    rank, ranks = int(there.get("RANK", 0)), int(there.get("WORLD_SIZE", 1))
    if (rank or ranks > 1) and not {"RANK", "WORLD_SIZE"} <= there.keys():
        (left,) = {"RANK", "WORLD_SIZE"} & there.keys()
        raise UserError(
            f"the environment has {left}={there[left]} alone, which torchrun sets with others: "
            "unset it, or start with torchrun"
        )
    if not rank < ranks:
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={ranks}: unset both")
    for name in TASKS:
        tasks = environ.get(name, "1")
        if "RANK" not in there and tasks.isdecimal() and int(tasks) > 1:
            raise UserError(
                f"{name}={tasks}: each of these tasks would train a run of its own in the same "
                "folder: start one task a node, and in it torchrun, which starts the ranks"
            )
    return rank, ranks, int(there.get("LOCAL_RANK", 0))


def own_device(local_rank):
    """This rank's GPU, or the CPU where there is none. Raises UserError."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this node has no GPU, there are {torch.cuda.device_count()}: "
            "start at most as many ranks with torchrun"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as e:  # of a card that is older than what this torch is built for
        raise UserError(
            f"{torch.cuda.get_device_name(device)} cannot be used ({str(e).splitlines()[0]}): set "
            "CUDA_VISIBLE_DEVICES='' for the CPU, or install a torch that supports it"
        ) from None
    return device


def meet_ranks(device):
    """Join the other ranks. Raises UserError where that fails, as at a port that is taken."""
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as e:
        at = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"the ranks cannot meet at {at} ({str(e).splitlines()[0]}): start them with torchrun, "
            "or give MASTER_ADDR and a MASTER_PORT that is free"
        ) from None


# ---- the output folder ---------------------------------------------------------------------------


def is_within(path, folder):
    """Whether a path is a folder or lies in it; links are followed."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def nearest(path):
    """What is there already of a path: itself, or the first folder above it.

    The root of a drive that is missing is not there either.
    """
    there = os.path.abspath(path)
    while not os.path.exists(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    return there


def refuse_output_dir(path, sampling=False):
    """Raises UserError where nothing can be written, or samples would replace a run's own."""
    there = nearest(path)
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise UserError(f"--output_dir {path}: {there} is not a folder that can be written to")
    longest = max(len(os.fsencode(name)) for name in path.split(os.sep))
    if longest > 240:  # of 255; a run that is set aside is called PATH.1
        raise UserError(f"--output_dir has a name of {longest} bytes: give one of at most 240")
    if is_within(os.getcwd(), path):
        raise UserError(f"--output_dir {path} holds the current folder: name a folder of its own")
    if sampling and os.path.exists(os.path.join(path, "report.json")):
        raise UserError(
            f"--output_dir {path} is a run with samples of its own: name another folder for "
            "those of --sample"
        )


def holds_another_run(path, resumed):
    """Whether an output folder has something in it that is not of this run. resumed: see --help.

    What a start has made that was killed before its first save is this run's; but a run whose
    states were deleted, to save room, cannot be resumed.
    """
    names = set(os.listdir(path)) - {"lost+found", ".DS_Store"} if os.path.isdir(path) else set()
    if not names or not resumed:
        return bool(names)
    trained, states = names & {"student", "report.json"}, complete_states(path)
    if resumed == "latest":
        return bool(trained) and not states
    return not is_within(resumed, path) and bool(trained or states or "log.csv" in names)


def starting_folder(path):
    """Where a new run writes until its first update is done: beside the folder of another one."""
    return f"{os.path.normpath(path)}.starting"


def refuse_mount_point(path):
    """Raises UserError for a folder of another run that cannot be renamed, as of Docker's -v."""
    if os.path.ismount(path):
        raise UserError(
            f"--output_dir {path} has files of another run, is a mount point and cannot be "
            "renamed: name a folder in it"
        )


def make_output_dir(folder, fresh):
    """Create a run's folder. fresh: what a start that failed left there goes. Raises UserError."""
    if fresh and os.path.isdir(folder):
        shutil.rmtree(folder)
    try:
        os.makedirs(os.path.join(folder, "state"), exist_ok=True)
    except OSError as e:
        raise UserError(f"--output_dir: {folder} cannot be made ({e}): name another") from None


def take_output_dir(folder, path):
    """The folder of a run that has begun becomes PATH; another one there PATH.1, PATH.2, ...

    What a killed run left half-written is removed. Raises UserError where that one stays.
    """
    path = os.path.normpath(path)  # "runs/x/" could not be renamed to "runs/x/.1"
    if not os.path.exists(path):  # it was deleted meanwhile
        os.rename(folder, path)
    elif os.path.normpath(folder) != path:
        n = 1
        while os.path.exists(f"{path}.{n}"):
            n += 1
        exchange(folder, path, f"{path}.{n}")
        print(f"{path} existed and is now {path}.{n}")
    for where, folders, files in os.walk(path):
        for name in [f for f in files if ".tmp-" in f]:
            os.remove(os.path.join(where, name))
        for name in [d for d in folders if d.startswith(".tmp-")]:
            shutil.rmtree(os.path.join(where, name))


def exchange(new, path, aside):
    """Rename path to aside, and new to path: both, or neither. Raises UserError."""
    try:
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(aside, path)
            raise
    except OSError as e:
        if e.errno not in NOT_RENAMED:
            raise
        raise UserError(
            f"--output_dir {path} has files of another run, and cannot be renamed "
            f"({e.strerror}): name another"
        ) from None


# ---- log.csv -------------------------------------------------------------------------------------


class Log:
    """log.csv: one row a step, flushed; on resume it is cut back to the resumed step.

    It is read and written anew row by row, so that a million rows take no memory.
    """

    def __init__(self, output_dir, step=0):
        self.path = os.path.join(output_dir, "log.csv")
        self.replace(step)

    def rows(self, last):
        """The columns, then the rows up to this step, whole ones only.  -> lists, one by one"""
        if not last or not os.path.isfile(self.path):
            return
        with open(self.path, newline="", encoding="utf-8", errors="replace") as f:
            rows = csv.reader(line.replace("\0", "") for line in f)  # as a power cut leaves them
            columns = next(rows, None)
            if not columns:
                return
            yield columns
            for r in rows:
                if len(r) == len(columns) and r[0].isdecimal() and int(r[0]) <= last:
                    yield r

    def replace(self, last, new=()):
        """Write the file anew up to this step, with new columns, in one rename; go on behind it."""
        rows = self.rows(last)
        self.columns = [*next(rows, []), *new]
        with replacing(self.path, "w", newline="", encoding="utf-8") as f:
            if self.columns:
                csv.writer(f).writerow(self.columns)
                csv.writer(f).writerows(r + [""] * len(new) for r in rows)
        self.file = open(self.path, "a", newline="", encoding="utf-8")

    def refuse_other_run(self):
        """Raises TrainingError where another run has renamed this one's folder."""
        own = os.fstat(self.file.fileno())
        if not os.path.isfile(self.path) or not os.path.samestat(own, os.stat(self.path)):
            raise TrainingError(
                f"{self.path} is no longer this run's: another one has taken its folder, and what "
                "this one had saved was renamed; give each an --output_dir of its own"
            )

    def write(self, row):
        """row: {"step": int, name: number, ...}. A term that is off leaves its cells empty.

        Raises TrainingError.
        """
        self.refuse_other_run()
        new = [name for name in row if name not in self.columns]
        if new:  # numbers that were not logged before; earlier rows have empty cells there
            self.file.close()
            self.replace(float("inf"), new)
        cells = [row.get(c, "") for c in self.columns]
        text = [f"{v:.6g}" if isinstance(v, float) else v for v in cells]
        csv.writer(self.file).writerow(text)
        self.file.flush()


def peak_memory_mb(device):
    """Peak memory in MiB: of the GPU's allocator, or of the process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:  # Windows, where nothing in the standard library knows
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
