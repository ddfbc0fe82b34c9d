"""Command-line flags: the ones that mean the same in every script, and how they are parsed.

Defaults depend on the teacher. A script names them in one table, {teacher: {flag: value}}, what a
released teacher prescribes to every method is a row of models/plumbing/releases.py, and `parse`
reads the command line twice: once to learn the teacher, once with that teacher's defaults.
"""

import argparse
import os
import re
import sys
import textwrap

from models.diffusion import RESCALES
from models.files import UserError
from models.plumbing import papers, releases
from models.plumbing.dry_run import H100
from models.plumbing.loading import WORKERS
from models.plumbing.run import is_within
from models.plumbing.teachers import is_small
from models.worlds import WORLDS, refuse_ambiguous


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags, and the lines at the end as they are."""


class Parser(argparse.ArgumentParser):
    """argparse with five groups, defaults in --help, no abbreviations, one line for a wrong flag.

    p.method, p.ablations, p.optimiser, p.run and p.shown are the groups, in the order of --help.
    """

    def __init__(self, **kwargs):
        super().__init__(
            formatter_class=Help,
            allow_abbrev=False,
            usage=kwargs.pop("usage", "%(prog)s [flags]"),
            description=textwrap.fill(kwargs.pop("description", ""), 100),
            **kwargs,
        )
        titles = ("method", "ablations", "optimiser", "run", "what is shown")
        groups = [self.add_argument_group(title) for title in titles]
        self.method, self.ablations, self.optimiser, self.run, self.shown = groups

    def error(self, message):
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def number(kind, low=None, high=None, above=None):
    """An argparse type: kind (int or float) within [low, high], or greater than `above`.

    NaN and infinity never pass.
    """

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        bounds = {
            f">= {low}": low is None or value >= low,
            f"> {above}": above is None or value > above,
            f"<= {high}": high is None or value <= high,
        }
        if value - value != 0 or not all(bounds.values()):
            limits = zip(bounds, (low, above, high))
            asked = " and ".join(text for text, limit in limits if limit is not None)
            raise argparse.ArgumentTypeError(f"must be {asked or 'finite'}, got {text}")
        return value

    return parse


LONG = 7  # times the default's updates: --preset long


# fmt: off
def add_set_flags(add):
    """Flags of sets of images. add: of the group of --sample."""
    add("--samples", type=number(int, 2), default=None, metavar="N", help="with --sample: N images "
        "for models/metrics.py and other programs, instead of samples.png; the same command goes "
        "on with an interrupted one")
    add("--format", choices=["npz", "png", "jpg"], default=None, help="of --samples: samples.npz "
        "(also where this is left out), as guided-diffusion's evaluator reads it, or a file each")
    add("--labels", choices=["balanced", "random"], default=None, help="of --samples: each class "
        "or prompt equally often (also where this is left out), or drawn at random")


def add_run_flags(p):
    """Flags that mean the same in every script: where things go, how long, how much memory."""
    add = p.run.add_argument
    add("--output_dir", default=None, help="where everything is written (default: "
        "runs/<method>-<teacher>); an existing one is renamed DIR.1")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of every draw")
    add("--max_train_steps", type=number(int, 1), default=1000, help="student updates")
    add("--preset", choices=["default", "long"], default="default",
        help=f"of small networks: long is {LONG} times the updates, half an hour on two cores")
    add("--train_batch_size", type=number(int, 1), default=64,
        help="samples per rank and micro-batch")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1,
        help="micro-batches per update")
    add("--mixed_precision", choices=["no", "bf16"], default="no",
        help="bf16: networks under autocast")
    add("--sequence_ranks", type=number(int, 1), default=1, metavar="N",
        help="N ranks share the tokens of each sample, for activations that fill one GPU; "
        "--train_batch_size is then of these N together")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="recompute blocks in the backward pass: less memory")
    add("--compile", action="store_true",
        help="torch.compile every block of the networks, which pays on a GPU: the first updates "
        "take minutes, and every new shape of a batch again")
    add("--checkpointing_steps", type=number(int, 1), default=100,
        help="student updates between saves")
    add("--max_minutes", type=number(float, above=0), default=None, metavar="N",
        help="end well after the update in which the run has taken so long, with its state saved, "
        "as before the time limit of a cluster; SIGTERM, Ctrl-C and a closed terminal do the "
        "same")
    add("--resume_from_checkpoint", default=None, metavar="latest|PATH",
        help="continue from OUTPUT_DIR/state")
    add("--shard_ranks", type=number(int, 1), default=None, metavar="N",
        help="under torchrun, networks are shared out over N neighbouring ranks and are the same "
        "in every such group; None: over the ranks of a node")
    add("--sample", default=None, metavar="FOLDER",
        help="do not train: load this saved student and write samples")
    add_set_flags(add)
    add("--dry_run", type=number(int, 1), nargs="?", const=0, default=None, metavar="RANKS",
        help="load nothing: print what a rank of a GPU needs on so many ranks (those of torchrun, "
        "or 1), and FLOPs and seconds of an update")
    add("--device_memory", type=number(float, above=0), default=None, metavar="GB",
        help="a run that needs more on a rank is refused before it loads anything; None: what the "
        "GPU has")
    add("--device_tflops", type=number(float, above=0), default=H100,
        help="peak of a GPU, TFLOP/s, for the seconds of --dry_run (H100: 989)")
    p.shown.add_argument("--preview_every", type=number(int, 0), default=None, metavar="N",
        help="student updates between pictures of a run that goes on, which are made when it "
        "saves; None: at every save, 0: none before the end")
    add = p.optimiser.add_argument
    add("--learning_rate", type=number(float, above=0), default=1e-3, help="learning rate")
    add("--lr_warmup_steps", type=number(int, 0), default=0, help="updates of linear warm-up")
    add("--max_grad_norm", type=number(float, 0), default=10.0,
        help="the gradient norm is clipped to this; 0 = off")
    add("--ema_decay", type=number(float, 0, 0.999999), default=0.0,
        help="decay of the student's moving average of weights; 0 = off")
    add = p.method.add_argument
    add("--guidance_scale", type=number(float, 0), default=1.0,
        help="uncond + scale (cond - uncond); 1 = off")
    add("--timestep_shift", type=number(float, above=0), default=None,
        help="t = s u / (1 + (s-1) u) in training and grids; None: the teacher's own")


def add_distillation_flags(p):
    """Flags that mean the same wherever a teacher is distilled."""
    add = p.run.add_argument
    add("--teacher", default="glyphs", help="a world (ring, glyphs, clips, voxels), a component "
        "folder, a pipeline root with model_index.json, or a run folder of ours")
    add("--teacher_lora", default=None, nargs="+", metavar="FILE", help="LoRA files (kohya's, "
        "peft's, ComfyUI's names) that are merged into the teacher; of two networks high noise "
        "first")
    add("--student_init", default=None, metavar="FOLDER|FILE", help="start the student here "
        "instead of from the teacher: a network, or a LoRA file on the teacher")
    add("--prompts", default=None, metavar="FILE", help="for text teachers: safetensors with "
        "cond.NAME and uncond.NAME, or a set of shards by its name, see models/encode.py")
    add("--sample_shape", type=number(int, 1), nargs="+", default=None,
        help="C H W or C T H W of a sample (default: the network's)")
    add("--save_dtype", choices=["float32", "bf16"], default=None,
        help="of the saved student's weights; None: bf16 where the teacher's files are, else "
        "float32")
    add = p.optimiser.add_argument
    add("--lr_decay_share", type=number(float, 0, 1), default=1.0, help="last share of the run "
        "in which the rates fall linearly to 0; 0 = constant")
    add("--adam_betas", type=number(float, 0, 0.99999), nargs=2, default=[0.8, 0.99],
        help="AdamW betas")
    add("--weight_decay", type=number(float, 0), default=0.0, help="AdamW weight decay")
    add = p.shown.add_argument
    add("--teacher_steps", type=number(int, 0), default=32,
        help="steps of the many-step teacher; 0 leaves it out")
    add("--preview_samples", type=number(int, 1), default=20, help="columns of samples.png")
    add("--remeasure_teacher", action="store_true",
        help="measure the many-step teacher again, from this seed's noise, instead of copying its "
        "row, which is of seed 0's")


def add_picture_flags(p):
    """Flags of scripts whose --data may be pictures."""
    add = p.run.add_argument
    add("--workers", type=number(int, 1), default=WORKERS,
        help="threads of a rank that decode the pictures of --data, one update ahead")
    add("--class_in_name", action="store_true", default=None, help="the class of a picture of "
        "--data is what stands in its file's name before the first _, as guided-diffusion reads "
        "class_name.png; None: its folder, or what the set says")


def add_fake_score_flags(p, reuse):
    """Flags of the network that learns the score of the student's samples."""
    p.method.add_argument("--fake_update_ratio", type=number(int, 1), default=2,
        help="R, fake updates per student update")
    if reuse:
        p.method.add_argument("--reuse_samples", action=argparse.BooleanOptionalAction,
            default=True, help="the first fake update sees the samples of the student's update "
            "before it (as the papers' code), the others fresh ones; or all fresh ones")
    p.optimiser.add_argument("--learning_rate_fake", type=number(float, above=0), default=1.6e-3,
        help="learning rate of the fake score")


def add_step_flag(p):
    """Whether the samples of a batch have one step of the student in common."""
    p.method.add_argument("--one_step", action=argparse.BooleanOptionalAction, default=False,
        help="all samples of a batch are made by the same step of the student (as the papers' "
        "code), or each by its own")


def add_adapter_flags(p, fake_score=True):
    """Flags of training adapters on the teacher's network. fake_score: also the fake's."""
    add = p.method.add_argument
    add("--lora_rank", type=number(int, 0), default=0,
        help="rank of the student's adapter, which shares the teacher's frozen network and saves "
        f"memory; --learning_rate is then {ADAPTER_RATE:g} for released teachers, at lower rates "
        "adapters hardly move; 0 = full weights")
    add("--lora_alpha", type=number(float, above=0), default=8.0,
        help="alpha of all adapters, their scale is alpha / rank")
    add("--lora_dtype", choices=["float32", "bf16"], default="float32",
        help="of the adapter files in student/; bf16 halves them")
    if fake_score:
        add("--fake_lora_rank", type=number(int, 0), default=0,
            help="the same for the fake, which is then not conditioned on the step, and for "
            "--learning_rate_fake; 0 = full weights")


def add_guidance_rescale_flag(p):
    """A flag of methods whose guided predictions all come from Diffusion.guided_x0."""
    p.method.add_argument("--guidance_rescale", choices=["none", *RESCALES], default=None,
        help="guided predictions of the teacher get the norms of the conditional ones: of each "
        "2 x 2 patch, as QwenImagePipeline does, or of each row, as Lumina2Pipeline; None: none")
# fmt: on

ADAPTER_RATE = 5e-5  # Phased DMD's for adapters (2510.27684)


def adapter_rates(known):
    """Default rates {flag: value} of what a released teacher's adapters are trained with.

    known: a first reading of the command line.
    """
    ranks = {"learning_rate": "lora_rank", "learning_rate_fake": "fake_lora_rank"}
    return {flag: ADAPTER_RATE for flag, rank in ranks.items() if getattr(known, rank, 0)}


def distillation_parser(description, fake_score=True, reuse=True):
    """A Parser with all flags that the distillation scripts share.

    fake_score: also the fake's; reuse: also whether it learns from the student's own batch.
    """
    p = Parser(description=f"{description} Defaults shown suit the given --teacher.")
    add_run_flags(p)
    add_distillation_flags(p)
    add_adapter_flags(p, fake_score)
    if fake_score:
        add_fake_score_flags(p, reuse)
    return p


def paper_values(p, **values):
    """Append "(paper: VALUE)" to the help of flags that several scripts share."""
    for action in p._actions:
        if action.dest in values:
            action.help += f" (paper: {values[action.dest]})"


def default_output_dir(method, source, sampled):
    """runs/<method>-<teacher or data>, or runs/<run>-samples for what --sample draws from a run."""
    if sampled is None:
        return os.path.join("runs", f"{method}-{os.path.basename(os.path.abspath(source))}")
    path = os.path.abspath(sampled)
    is_student = os.path.basename(path) == "student"  # runs/dmd-glyphs/student -> dmd-glyphs
    run = os.path.dirname(path) if is_student else path
    return os.path.join("runs", os.path.basename(run) + "-samples")


# What --sample takes from the saved student's sampler.json, so that a flag would be ignored, as are
# those of the optimiser; and what some scripts read all the same, or refuse in words of their own.
OF_SAVED = set(
    "student_steps student_times sampling_steps renoise timestep_shift max_time guidance_scale "
    "guidance_rescale student_guidance".split()
)
READ_BY = {
    "tdm": {"student_steps"},
    "mdt_dist": {"student_steps"},
    "phased_dmd": {"student_steps", "timestep_shift"},
    "latent_fm": {"timestep_shift", "guidance_scale"},
}


def parse(p, argv, method, presets, refusals=lambda args: (), ignored=lambda args: ()):
    """Read argv (None: the command line) with the defaults that suit its teacher.  -> namespace.

    method: the script's name, for runs/<method>-<teacher>. refusals: see `refuse`; ignored: see
    `unread`.
    presets: {key: {flag: default}}, or a function that gives such a table, of a first reading of
    argv, where other flags matter too. A key that is the teacher's name stands alone. Our own small
    networks keep the flags' own defaults, but for "small". For other teachers the following add up,
    the later the stronger: "released", the teacher's row in releases.py, its network's class, its
    release's name, the method's row in papers.py, and the rates of adapters where a rank is given.
    "sample" holds where --sample is given (None: the saved student decides).
    args.settings says in words what a released teacher prescribes. Wrong input ends in one line on
    stderr and exit code 2.
    """
    argv = words(argv)
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    presets = presets(known) if callable(presets) else presets
    p.epilog = papers.help_of(method)
    start, taken = known.sample or known.teacher, {}
    if start in presets and (start in WORLDS or known.sample):  # no folder of a release's name
        p.set_defaults(**presets[start])
    elif not is_small(start):
        taken, rates = release_defaults(p, start, presets, method), adapter_rates(known)
        taken |= {flag: rate for flag, rate in rates.items() if flag in taken}
        p.set_defaults(**{**presets["released"], **taken, **rates})
    else:
        p.set_defaults(**presets.get("small", {}))
    lengthen(p, known, is_small(start))
    if known.sample:  # the saved student names its teacher
        p.set_defaults(**{"teacher": None, **presets.get("sample", {})})
    args = p.parse_args(argv)
    given = given_flags(p, argv)
    for flag in ("teacher", "data"):
        refuse_ambiguous(f"--{flag}", given.get(flag))
    args.settings = "" if known.sample else describe_settings(given, start, taken)
    args.output_dir = args.output_dir or default_output_dir(method, args.teacher, args.sample)
    unused = unread(p, args, method, argv, ignored(args))
    for wrong, why in (*wrong_output(args), *unused, *refusals(args)):
        if wrong:
            p.error(why)
    return args


def unread(p, a, method, argv, ignored=()):
    """Flags that are given and would be ignored: pairs (wrong, why). argv: see `given_flags`.

    With --sample many are. ignored: of a run that trains, triples (flags, whether the other flags
    leave nothing for them to do, why).
    """
    given = given_flags(p, argv)
    for flags, idle, reason in ignored:
        for flag in flags.split():
            yield idle and not a.sample and flag in given, f"--{flag}: {reason}: leave it out"
    for flag in sorted(OF_SAVED - READ_BY.get(method, set())):
        why = f"--{flag}: with --sample the saved student decides: leave it out"
        yield a.sample and flag in given, why
    groups = [g for g in p._action_groups if g.title in ("optimiser", "network")]
    for action in [action for g in groups for action in g._group_actions]:
        why = f"--{action.dest}: --sample trains nothing: leave it out"
        yield a.sample and action.dest in given, why


def lengthen(p, known, small):
    """--preset long: more updates than the default. small: the run's networks are small ones.

    known: a first reading of the command line.
    """
    if known.preset == "long" and not small:
        p.error("--preset long is for small networks: give --max_train_steps N instead")
    if known.preset == "long":
        p.set_defaults(max_train_steps=LONG * p.get_default("max_train_steps"))


def words(argv):
    """The words of a command line (None: this process's), with ~ where bash leaves it alone.

    That is in --data=~/x. Raises UserError for an empty value, as a variable that is not set gives,
    and where the folder is gone in which the command was given.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder is not there any more: cd into another") from None
    for before, word in zip(["", *argv], argv):
        flag = word[:-1] if re.fullmatch(r"--\w+=", word) else before if word == "" else None
        if flag is not None:
            raise UserError(
                f"{flag} is empty, as a variable of the shell that is not set: give it a value, or "
                "leave it out"
            )
    home = os.path.expanduser("~")
    return [re.sub(r"^(--\w+=)?~(?=/|$)", lambda m: (m[1] or "") + home, word) for word in argv]


def wrong_output(a):
    """Folders that are two things, and flags of sets of images that do not go together: pairs
    (wrong, why)."""
    planned = a.sample and a.dry_run is not None
    yield planned, "--dry_run plans a training run: leave out --sample or --dry_run"
    new = not a.sample and not a.resume_from_checkpoint
    read = (
        "data maps map_names prompts teacher autoencoder teacher_lora student_init fake_init init "
        "bank dinov2"
    )
    for flag in [*read.split(), "cache_latents"]:
        names = getattr(a, flag, None) or []
        for name in [names] if isinstance(names, str) else names:
            there = os.path.exists(name) or flag == "cache_latents"  # which the run makes
            yield (
                new and there and is_within(name, a.output_dir),
                f"--{flag} {name} is in --output_dir {a.output_dir}, which a new run renames: give "
                "another --output_dir",
            )
    for flag in ("samples", "reconstruct"):
        yield (
            getattr(a, flag, None) and not a.sample,
            (f"--{flag} is for a saved network: give --sample FOLDER with it"),
        )
    made = {"format": a.samples or getattr(a, "reconstruct", False), "labels": a.samples}
    for flag, sets in made.items():
        yield (
            getattr(a, flag) and not sets,
            (f"--{flag} is for sets of images: give --samples N with it, or leave it out"),
        )


def release_defaults(p, teacher, presets, method):
    """What releases.py, a script's presets and papers.py say of a teacher, of flags that p has."""
    name, settings = releases.settings_of(teacher)
    known = {action.dest for action in p._actions}
    settings = {flag: value for flag, value in settings.items() if flag in known}
    network = releases.facts_of(teacher)[0]
    own = {**presets.get(network, {}), **presets.get(name, {})}
    return {**settings, **own, **papers.settings(method, name)}


def given_flags(p, argv):
    """What the command line itself says, {flag: value}; argv is without -h."""
    unset = object()
    args = argparse.Namespace(**{action.dest: unset for action in p._actions})
    return {k: v for k, v in vars(p.parse_args(argv, args)).items() if v is not unset}


def describe_settings(given, teacher, taken):
    """The teacher's release, its settings {flag: default} and what is given, in one line.

    A further line warns of a distilled teacher. Nothing of either: "".
    """
    name = releases.settings_of(teacher)[0] or releases.facts_of(teacher)[0]
    parts = []
    for flag, value in taken.items():
        over = f" (command line: {as_text(given[flag])})" if flag in given else ""
        parts.append(f"{flag} {as_text(value)}{over}")
    lines = [f"settings: {name}: {', '.join(parts)}"] if parts else []
    warning = releases.warning(teacher, given.get("teacher_lora") or ())
    return "\n".join([*lines, *filter(None, [warning])])


def as_text(value):
    """A flag's value as one would type it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse(rules):
    """rules: pairs (wrong, why). Raises UserError with the reason of the first that is wrong."""
    for wrong, why in rules:
        if wrong:
            raise UserError(why)
