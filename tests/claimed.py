"""The claims of tests/claims.py: what a paper says, where, what would refute it, its numbers.

Runs are those of tests/orderings.py, on the ring with --quick and on images, clips and solids
without. Two runs that are compared have the same student, seed, rates and number of student
updates, but where `equal` says otherwise. `why` repeats what docs/results/ has found; the verdict
does not read it.
"""

import argparse
import contextlib
import csv
import functools
import io
import os
import shutil
import statistics
from dataclasses import dataclass
from typing import Callable
from unittest import mock

import closed_forms as exact
import latent_claims
import linvideo_ring
import orderings
import phased_fig2
from helpers import fitted_once

import latent_fm
from models.plumbing import teachers
from models.worlds.ring import fit_ring_network

PAPERS = {  # which editions the sources below are of
    "dmd": "DMD, arXiv 2311.18828 v4 (v1 below), and DMD2, arXiv 2405.14867 v2 (DMD2 below)",
    "phased_dmd": "Phased DMD, arXiv 2510.27684 v3",
    "decoupled_dmd": "Decoupled DMD, arXiv 2511.22677 v1",
    "tdm": "TDM, arXiv 2503.06674 v2",
    "linvideo": "LinVideo, arXiv 2510.08318 v2, with its linear attention",
    "mdt_dist": "MDT-dist, arXiv 2509.04406 v1",
    "latent_fm": "LFM, arXiv 2307.08698 v1",
}


@dataclass
class Claim:
    """One row of the table.

    id, paper, source  what it is called; a key of PAPERS; where that paper makes it
    says, refuted      the claim in one sentence; what would refute it
    numbers            what stands left and right of the <, in words
    measure            (store, seeds) -> [(left, right), ...]; raises claims.NotRun
    equal              what the two sides have alike, or where the numbers are from
    quick              whether --quick measures it
    why                where it does not come out: the reason found, or what excludes reasons
    """

    id: str
    paper: str
    source: str
    says: str
    refuted: str
    numbers: str
    measure: Callable
    equal: str
    quick: bool = True
    why: str = ""


# ---- how numbers are measured --------------------------------------------------------------------

SETTINGS = {  # flags of every run of a paper on a world
    ("dmd", "ring"): "--max_train_steps 100",
    ("phased_dmd", "ring"): "--max_train_steps 120",
    ("decoupled_dmd", "ring"): "--max_train_steps 120",
    ("tdm", "ring"): "--max_train_steps 120",
    ("mdt_dist", "ring"): "--max_train_steps 400",
    ("dmd", "glyphs"): "--max_train_steps 300",
    ("phased_dmd", "clips"): "--max_train_steps 250",
    ("decoupled_dmd", "glyphs"): "--max_train_steps 200",
    ("tdm", "glyphs"): "--max_train_steps 250",
    ("linvideo", "clips"): "--max_train_steps 200 --selection_share 0.5 --bank_size 512",
    ("mdt_dist", "voxels"): "--max_train_steps 120 --guidance_vd 1",
}


def trained(store, paper, world, method, seed):
    """One run of tests/orderings.py, or its stored numbers.  -> {column: value}.

    Of its log.csv also "wobble", how much the mean of all samples moves in its second half, and
    "cos" and "cos(1/4)", DM against CA in the last and first quarter where a fake looks on.
    """
    given = [*SETTINGS[paper, world].split(), "--preview_every", "0"]
    runs = os.path.join(store.folder, "runs")
    args = argparse.Namespace(script=paper, world=world, output_dir=runs)
    folder = orderings.folder_of(args, method, given, seed)

    def measure():
        if not os.path.isfile(os.path.join(folder, "curve.json")):  # the last file of a run
            shutil.rmtree(folder, ignore_errors=True)  # what a killed one left
        quiet = contextlib.redirect_stdout(io.StringIO())
        start = functools.partial(fitted_once, fit_ring_network)
        with quiet, mock.patch.object(teachers, "fit_ring_network", start):
            cells, *_ = orderings.measured(args, method, given, seed)
        return cells | of_log(os.path.join(folder, "log.csv"))

    settings = "".join(given[:-2]).replace("--", "-")
    return store.get(f"{paper}-{world}-{method}-{seed}{settings}", measure)


def of_log(path):
    """The numbers "wobble", "cos" and "cos(1/4)" of a log.csv, where it has their columns."""
    found = {}
    with open(path) as f:
        rows = list(csv.DictReader(f))
    if rows and rows[0].get("mean"):
        half = [float(row["mean"]) for row in rows[len(rows) // 2 :]]
        found["wobble"] = statistics.pstdev(half)
    if rows and rows[0].get("cos_dm_ca"):
        cos, quarter = [float(row["cos_dm_ca"]) for row in rows], len(rows) // 4
        found["cos"] = statistics.mean(cos[-quarter:])
        found["cos(1/4)"] = statistics.mean(cos[:quarter])
    return found


def value(cells, column):
    """A column, or "1 - column", "1 + column", "-column"."""
    for sign, start, factor in (("1 - ", 1, -1), ("1 + ", 1, 1), ("-", 0, -1)):
        if column.startswith(sign):
            return start + factor * cells[column[len(sign) :]]
    return cells[column]


def below(paper, world, low, high, column="fd", other=None, factor=1.0, floor=0.0):
    """The method `low` has less than `factor` times the method `high`, seed by seed.

    column: of both, or of `low` where `other` is that of `high`; values under `floor`, the
    measure's own noise, count as that much.  -> Claim.measure
    """

    def measure(store, seeds):
        pairs = []
        for seed in seeds:
            left = value(trained(store, paper, world, low, seed), column)
            right = value(trained(store, paper, world, high, seed), other or column)
            pairs.append((max(left, floor), factor * max(right, floor)))
        return pairs

    return measure


def form(function):
    """A function of tests/closed_forms.py.  -> Claim.measure"""

    def measure(store, seeds):
        return store.get(f"form-{function.__name__}", lambda: {"pairs": function()})["pairs"]

    return measure


def figure_2(low, high, factor=1.0):
    """Phased DMD's Fig. 2: root mean square errors of two of its models.  -> Claim.measure"""

    def measure(store, seeds):
        found = [
            store.get(f"fig2-{s}", lambda s=s: phased_fig2.experiment(s, 1500)[0]) for s in seeds
        ]
        return [(rmse[low], factor * rmse[high]) for rmse in found]

    return measure


def on_the_ring(low, high):
    """Two rows of tests/linvideo_ring.py: energy distance x 1000.  -> Claim.measure"""

    def of(store, row, seed):
        def measure():
            energy, paired = linvideo_ring.run(seed, *linvideo_ring.ROWS[row])
            return {"energy": energy, "paired": paired}

        name = "-".join(str(part) for part in linvideo_ring.ROWS[row])
        return store.get(f"linvideo_ring-{name}-{seed}", measure)["energy"]

    return lambda store, seeds: [(of(store, low, s), of(store, high, s)) for s in seeds]


def of_shapes(low, high, column="fd", factor=1.0):
    """Two ways to sample one network that latent_fm.py trained on shapes, with each seed's noise.

    low, high: keywords of latent_fm.sample.  -> Claim.measure
    """

    def of(store, how, seed):
        folder = os.path.join(store.folder, "runs", "shapes")

        def measure():
            if not os.path.isfile(os.path.join(folder, "report.json")):
                shutil.rmtree(folder, ignore_errors=True)
                flags = "--data shapes --max_train_steps 1500 --output_dir".split()
                latent_fm.main([*flags, folder])
            return latent_claims.measured(latent_claims.load(folder), how, 600, seed)

        name = "-".join(f"{k}-{v}" for k, v in how.items())
        return value(store.get(f"shapes-{name}-{seed}", measure), column)

    return lambda store, seeds: [(of(store, low, s), factor * of(store, high, s)) for s in seeds]


# ---- the list ------------------------------------------------------------------------------------

CLOSED, RING = "closed form", "the ring, equal student updates"
GLYPHS, CLIPS = "glyphs, equal student updates", "clips, equal student updates"
VOXELS = "voxels, equal student updates"
SHAPES = "one network of 1,500 updates on shapes, equal noise"

# fmt: off
DMD = [
    Claim("dmd-kl", "dmd", "v1 Sec. 3.2, Eq. 1 to 7",
          "The difference of the two scores is the gradient of the KL divergence.",
          "a relative error above 1e-6 on a Gaussian student", "error < bound",
          form(exact.kl_gradient), CLOSED),
    Claim("dmd-levels", "dmd", "v1 Sec. 3.2, Eq. 8, and Tab. 2",
          "Eq. 8's weight evens out how strongly noise levels pull, better than sigma / alpha and "
          "sigma^3 / alpha do.",
          "a larger ratio of the strongest level to the weakest than with either",
          "ratio with Eq. 8 < with the other", form(exact.pull_by_level), CLOSED),
    Claim("dmd-collapse", "dmd", "v1 Fig. 3a",
          "With the real score alone a student collapses to the modes.",
          "a student that keeps a tenth of its spread", "spread without fake < a tenth of with",
          lambda store, seeds: [(a, b / 10) for a, b in form(exact.collapse)(store, seeds)],
          CLOSED),
    Claim("dmd-collapse-ring", "dmd", "v1 Fig. 3a",
          "With the real score alone a network on eight modes loses its diversity.",
          "as much diversity without the fake score as half of that with it",
          "diversity without fake < half of with",
          below("dmd", "ring", "no-fake", "default", "diversity", factor=0.5), RING),
    Claim("dmd-one-step", "dmd", "v1 Tab. 1, 2.62 against 2.32",
          "One call comes near to the teacher's many.",
          "twice the fd of the teacher's 63 calls", "fd of 1 call < twice the teacher's",
          below("dmd", "ring", "default", "teacher", factor=2.0), "the ring, as many samples"),
    Claim("dmd-one-step-worse", "dmd", "v1 Tab. 1, 2.62 against 2.32",
          "Without a GAN one call stays behind the teacher's many.",
          "a smaller fd than the teacher's", "fd of the teacher's 63 calls < of 1 call",
          below("dmd", "ring", "teacher", "default"), "the ring, as many samples",
          why="The ring's teacher row is one set of 2,000 samples; fd differs by half between sets "
              "(docs/results/dmd.md)."),
    Claim("dmd-regression", "dmd", "v1 Tab. 2, 2.62 against 5.61",
          "With one update of the fake for one of the student the regression helps.",
          "an fd no smaller with it", "fd with regression < without",
          below("dmd", "ring", "regression", "one-to-one"), RING,
          why="On this easy world one update each does not break, and the regression brings it to "
              "par at most (docs/results/dmd.md)."),
    Claim("dmd-ttur", "dmd", "DMD2 Tab. 3, 2.61 against 3.48",
          "Five updates of the fake for each of the student's make up for the regression.",
          "an fd no smaller than with one", "fd at 5 < at 1",
          below("dmd", "ring", "default", "one-to-one"), f"{RING}, not equal calls",
          why="One update each scatters more, but does not break on the ring."),
    Claim("dmd-brightness", "dmd", "DMD2 App. C and Fig. 9",
          "With one update of the fake the mean of all samples swings; with five it is steady.",
          "the mean's standard deviation over the second half no smaller at five",
          "wobble at 5 < at 1", below("dmd", "ring", "default", "one-to-one", "wobble"),
          f"{RING}, not equal calls",
          why="Not looked into; these are a hundred updates of an easy world."),
    Claim("dmd-gan", "dmd", "DMD2 Tab. 3, 1.51 against 2.61",
          "A GAN on the fake's features brings samples nearer to the data.",
          "an fd no smaller with it", "fd with GAN < without",
          below("dmd", "ring", "gan", "default"), f"{RING}, not equal calls",
          why="The teacher is exact here, so that the GAN has no error of it to mend; on glyphs "
              "the discriminator's loss stays at chance (docs/results/dmd.md)."),
    Claim("dmd-gan-alone", "dmd", "DMD2 Tab. 3, 1.51 against 2.56",
          "A GAN without distribution matching is worse than both together.",
          "an fd no larger", "fd of both < of the GAN alone",
          below("dmd", "ring", "gan", "gan-alone"), RING, quick=False),
    Claim("dmd-own-inputs", "dmd", "DMD2 Sec. 4.5 and Tab. 4",
          "Students of four steps are better trained on inputs that they make themselves than on "
          "noised data.",
          "an fd no smaller", "fd with own inputs < with noised data",
          below("dmd", "ring", "four", "four-real"), RING,
          why="In the plane a student's own states and noised data hardly differ."),
    Claim("dmd-four-steps", "dmd", "DMD2 Tab. 4 and Sec. 4.4",
          "Four steps of a student beat the teacher's own four.",
          "an fd no smaller", "fd of the student < of the teacher",
          below("dmd", "ring", "four", "teacher-at-4"), "the ring, equal calls in sampling",
          why="Each of four steps has a quarter of a hundred updates; after 400 updates fd is "
              "2.3, 0.7 and 5.4 (docs/results/dmd.md)."),
    Claim("dmd-one-step-glyphs", "dmd", "v1 Tab. 1",
          "One call comes near to the teacher's many, on images.",
          "twice the fd of the teacher's 63 calls", "fd of 1 call < twice the teacher's",
          below("dmd", "glyphs", "default", "teacher", factor=2.0), "glyphs, as many samples",
          quick=False),
    Claim("dmd-collapse-glyphs", "dmd", "v1 Fig. 3a",
          "With the real score alone samples lose their diversity, on images.",
          "as much diversity as half of that with the fake", "diversity without < half of with",
          below("dmd", "glyphs", "no-fake", "default", "diversity", factor=0.5), GLYPHS,
          quick=False),
]

PHASED = [
    Claim("phased-target", "phased_dmd", "Sec. 2.2.2, Eq. 11, and App. A",
          "The subinterval target teaches the fake the score of x_t in the teacher's terms, "
          "whatever the law of x_s.",
          "a relative error of its optimum above 1e-6", "error < bound",
          form(exact.unbiased_target), CLOSED),
    Claim("phased-naive", "phased_dmd", "Sec. 2.2.2 and Fig. 2c",
          "The target that takes x_s for data is biased.",
          "an error below a thousandth", "a thousandth < error of eps - x_s",
          form(exact.naive_target), CLOSED),
    Claim("phased-rest", "phased_dmd", "Sec. 2.2.2, assumptions A1 and A2",
          "A student that has the data's law at the end of its phase is at rest, and with the "
          "naive target it is pushed away.",
          "a gradient as large as the naive target's", "largest |g|, Eq. 11 < naive",
          form(exact.rests_at_the_data), CLOSED),
    Claim("phased-kl", "phased_dmd", "Eq. 10",
          "The weighted difference of velocities is the gradient of the KL at t in x_s.",
          "a relative error above 1e-5 on a Gaussian student", "error < bound",
          form(exact.subinterval_kl), CLOSED),
    Claim("phased-clamp", "phased_dmd", "Eq. 13",
          "Clamping the weight takes away the singularity of the loss at s.",
          "an expected loss that is as large near s as without the clamp",
          "largest expected loss, clamped < not", form(exact.clamped_loss), CLOSED),
    Claim("phased-fig2", "phased_dmd", "Fig. 2b",
          "A network trained on x_s alone with Eq. 13 follows the flow of clean data.",
          "half of the naive target's error at t = s", "error, Eq. 13 < half of naive",
          figure_2("unbiased", "naive", 0.5), "four points, equal updates from scratch"),
    Claim("phased-marginals-4", "phased_dmd", "Sec. 2.1.3 and 2.2",
          "Four phases keep the states on the way at the diffusion's marginals, which DMD with "
          "truncation leaves.",
          "as large an energy distance at t = .75", "x_.75 of 4 phases < of truncation",
          below("phased_dmd", "ring", "phased-4", "truncated", "x_0.75", floor=3), RING),
    Claim("phased-marginals-2", "phased_dmd", "Sec. 2.2, Fig. 1d",
          "Two phases keep the state at the end of the first at the diffusion's marginal.",
          "as large an energy distance at t = .75", "x_.75 of 2 phases < of truncation",
          below("phased_dmd", "ring", "phased-2", "truncated", "x_0.75", floor=3), RING),
    Claim("phased-naive-ring", "phased_dmd", "Sec. 2.2.2",
          "With the naive target a student of four phases leaves the marginals.",
          "as small an energy distance at t = .75", "x_.75 with Eq. 11 < naive",
          below("phased_dmd", "ring", "phased-4", "phased-4-naive", "x_0.75", floor=3), RING),
    Claim("phased-final", "phased_dmd", "Tab. 2, FID 47.2 against 55.7",
          "Two phases end nearer to the data than DMD with truncation.",
          "an fd no smaller", "fd of 2 phases < of truncation",
          below("phased_dmd", "ring", "phased-2", "truncated"), RING,
          why="One fake for two steps pins down only the mixture of their outputs; with the fake "
              "conditioned on the step two phases are level with four "
              "(docs/results/phased_dmd.md)."),
    Claim("phased-final-4", "phased_dmd", "Tab. 6, FID 45.4 against 47.2",
          "Four phases end nearer to the data than two.",
          "an fd no smaller", "fd of 4 phases < of 2",
          below("phased_dmd", "ring", "phased-4", "phased-2"), RING,
          why="Each expert of four has half as many updates here."),
    Claim("phased-diversity", "phased_dmd", "Tab. 3",
          "Truncation costs diversity, phases keep it.",
          "as much diversity with truncation", "diversity of truncation < of 2 phases",
          below("phased_dmd", "ring", "truncated", "phased-2", "diversity"), RING,
          why="After 120 updates all students are too wide; after 600 truncation is at .96 "
              "and two phases at .98 (docs/results/phased_dmd.md)."),
    Claim("phased-final-clips", "phased_dmd", "Tab. 2",
          "Two phases end nearer to the data than DMD with truncation, on clips.",
          "an fd no smaller", "fd of 2 phases < of truncation",
          below("phased_dmd", "clips", "phased-2", "truncated"), CLIPS, quick=False),
    Claim("phased-motion-clips", "phased_dmd", "Tab. 2, optical flow 9.30 against 3.23",
          "Truncation costs motion, two phases keep it.",
          "as much motion with truncation", "motion of truncation < of 2 phases",
          below("phased_dmd", "clips", "truncated", "phased-2", "motion"), CLIPS, quick=False,
          why="No method loses much motion: these clips have one object, whose speed one look at "
              "the noise decides (docs/results/phased_dmd.md)."),
]

DECOUPLED = [
    Claim("decoupled-terms", "decoupled_dmd", "Eq. 5 and 6",
          "DMD's guided gradient is the sum of distribution matching (DM) and CFG augmentation "
          "(CA).",
          "a relative difference above 1e-6", "difference < bound",
          form(exact.two_terms), CLOSED),
    Claim("decoupled-ca-runs-away", "decoupled_dmd", "Sec. 3.1.1 and Fig. 2, 3",
          "CA alone has no rest: the spread of samples grows without end.",
          "a spread no larger than twice that of CA + DM",
          "std of CA + DM < half of CA alone",
          below("decoupled_dmd", "ring", "hybrid", "ca", "std", factor=0.5), RING),
    Claim("decoupled-ca-sharpens", "decoupled_dmd", "Sec. 3.1.1 and Fig. 2",
          "CA is what makes samples sharper than DM alone does.",
          "-log p(c | x) no smaller with CA", "-log p(c | x) of CA + DM < of DM alone",
          below("decoupled_dmd", "ring", "shared", "dm", "-log_p"), RING),
    Claim("decoupled-dm-holds", "decoupled_dmd", "Sec. 3.2",
          "DM is the shield: with it CA stays.",
          "a distance to the guided teacher no smaller with it",
          "fd_teacher of CA + DM < of CA alone",
          below("decoupled_dmd", "ring", "shared", "ca", "fd_teacher"), RING),
    Claim("decoupled-both-best", "decoupled_dmd", "Fig. 2",
          "Both together are better than DM alone.",
          "a distance to the guided teacher no smaller", "fd_teacher of CA + DM (DMD's) < of DM",
          below("decoupled_dmd", "ring", "shared", "dm", "fd_teacher"), RING,
          why="At one level for both, CA overshoots the guided teacher threefold in closed form; "
              "the paper measures human preference (docs/results/decoupled_dmd.md)."),
    Claim("decoupled-full-is-shared", "decoupled_dmd", "Tab. 1, rows 1 and 2",
          "Drawing the two levels apart over the same range changes nothing.",
          "means of free students that differ by a hundredth", "difference < a hundredth",
          form(exact.full_rests_like_shared), CLOSED),
    Claim("decoupled-hybrid-shared", "decoupled_dmd", "Tab. 1, rows 1 and 4",
          "Free students under the hybrid schedule rest nearer to the guided teacher than under "
          "DMD's shared levels.",
          "a last mean no nearer to the teacher's", "distance, hybrid < shared",
          form(exact.hybrid_beats_shared), CLOSED),
    Claim("decoupled-constrained-shared", "decoupled_dmd", "Tab. 1, rows 1 and 3",
          "Free students under the constrained schedule rest nearer to the guided teacher than "
          "under shared levels.",
          "a last mean no nearer to the teacher's", "distance, constrained < shared",
          form(exact.constrained_beats_shared), CLOSED),
    Claim("decoupled-hybrid-constrained", "decoupled_dmd", "Tab. 1, rows 3 and 4",
          "Hybrid is better than constrained.",
          "a last mean no nearer to the guided teacher's", "distance, hybrid < constrained",
          form(exact.hybrid_beats_constrained), CLOSED,
          why="The last step's CA acts at clean levels, where it is small, and under hybrid its DM "
              "at all levels towards the unguided teacher: it keeps 38 % of the guidance, "
              "constrained 67 % (docs/results/decoupled_dmd.md)."),
    Claim("decoupled-hybrid-saturation", "decoupled_dmd", "Fig. 5 and user study",
          "Constrained saturates more than hybrid does.",
          "a last mean no larger", "last mean, hybrid < constrained",
          form(exact.hybrid_saturates_less), CLOSED),
    Claim("decoupled-printed", "decoupled_dmd", "Alg. 1",
          "The hybrid schedule with Algorithm 1 as printed keeps guidance at the last step.",
          "a last mean no larger than the unguided data's, 1", "1 < last mean",
          form(exact.printed_hybrid_keeps_guidance), CLOSED,
          why="One fake for all steps asks only their mixture to be right: what early steps "
              "overshoot the last one undershoots. With a fake that knows the step it is 1.15."),
    Claim("decoupled-hybrid-ring", "decoupled_dmd", "Tab. 1",
          "A network under hybrid ends nearer to the guided teacher than under shared levels.",
          "a distance no smaller", "fd_teacher, hybrid < shared",
          below("decoupled_dmd", "ring", "hybrid", "shared", "fd_teacher"),
          f"{RING}; the fake knows the step"),
    Claim("decoupled-moments", "decoupled_dmd", "Sec. 3.2, Eq. 7, and Fig. 3",
          "Holding mean and variance is enough to keep CA from running away.",
          "more than half the spread of CA alone", "std with Eq. 7 < half of CA alone",
          below("decoupled_dmd", "ring", "ca-mean-variance", "ca", "std", factor=0.5), RING),
    Claim("decoupled-moments-worse", "decoupled_dmd", "Sec. 3.2 and Fig. 6",
          "Samples held by mean and variance alone are worse than those held by DM.",
          "a distance to the guided teacher no larger", "fd_teacher with DM < with Eq. 7",
          below("decoupled_dmd", "ring", "hybrid", "ca-mean-variance", "fd_teacher"), RING),
    Claim("decoupled-gan", "decoupled_dmd", "Sec. 3.2 and Fig. 3",
          "A GAN keeps CA from running away, too.",
          "more than half the spread of CA alone", "std with GAN < half of CA alone",
          below("decoupled_dmd", "ring", "ca-gan", "ca", "std", factor=0.5), RING,
          why="On the ring it slows CA only, at weight .1 and these rates; on glyphs it holds for "
              "200 updates (docs/results/decoupled_dmd.md)."),
    Claim("decoupled-levels", "decoupled_dmd", "Sec. 4.1 and Fig. 4a",
          "CA at noisy levels moves composition and colour, at clean ones details.",
          "as large a spread with clean levels alone", "std, u < .3 < std, u > .95",
          below("decoupled_dmd", "ring", "ca-clean", "ca-noisy", "std"), RING,
          why="After 120 updates both have only begun to grow; after 400 the spread is 4.9 "
              "with clean levels and 2 million with noisy ones "
              "(docs/results/decoupled_dmd.md)."),
    Claim("decoupled-observer", "decoupled_dmd", "Sec. 4.2 and Fig. 4b",
          "DM turns against CA as samples drift.",
          "1 + cosine of DM and CA no smaller at the end", "last quarter < first quarter",
          below("decoupled_dmd", "ring", "observer", "observer", "1 + cos", "1 + cos(1/4)"),
          "the ring, one run, a fake looks on"),
    Claim("decoupled-ca-glyphs", "decoupled_dmd", "Fig. 2, 3", "CA alone runs away, on images.",
          "a spread no larger than twice that of CA + DM", "std of CA + DM < half of CA alone",
          below("decoupled_dmd", "glyphs", "hybrid", "ca", "std", factor=0.5), GLYPHS,
          quick=False),
    Claim("decoupled-hybrid-glyphs", "decoupled_dmd", "Tab. 1, rows 1 and 4",
          "Hybrid is nearer to the guided teacher than shared levels, on images.",
          "a distance no smaller", "fd_teacher, hybrid < shared",
          below("decoupled_dmd", "glyphs", "hybrid", "shared", "fd_teacher"), GLYPHS, quick=False,
          why="Both are as far away: hybrid's last step keeps little of the guidance, and shared "
              "levels overshoot it (docs/results/decoupled_dmd.md)."),
]

TDM = [
    Claim("tdm-one-step", "tdm", "Sec. 4.1, K = 1",
          "With one step TDM is DMD: the same difference of scores at the same x_tau.",
          "a relative difference above 1e-6", "difference < bound",
          form(exact.one_step_is_dmd), CLOSED),
    Claim("tdm-score", "tdm", "Sec. 4.1, Eq. 7",
          "The importance-sampled fake learns the score of x_tau at every step.",
          "a gain that is off by 1 % before the last step", "relative error < 1 %",
          form(exact.fake_is_the_score), CLOSED,
          why="Its target is the student's own x, whose noise in x_s is not fresh: it learns "
              "E[x | x_tau]. The exact target has the score at every step "
              "(tests/test_tdm_math.py); at the last step the two agree."),
    Claim("tdm-importance", "tdm", "Sec. 4.1, Eq. 7, and Tab. 5",
          "Importance sampling brings the fake nearer to the score than training at noised x does.",
          "an error no smaller with it", "error with < without",
          form(exact.importance_sampling_helps), CLOSED),
    Claim("tdm-last-step", "tdm", "Sec. 4.1, Eq. 5",
          "At its end the trajectory has the data's distribution.",
          "a variance that is off by 2 %", "error of the variance < 2 %",
          form(exact.last_step_is_right), CLOSED),
    Claim("tdm-mixture", "tdm", "Eq. 9",
          "A fake that is not conditioned on K learns a mixture that is wrong for every K.",
          "an answer within a tenth of either score", "a tenth < its distance from a score",
          form(exact.shared_fake_is_a_mixture), CLOSED),
    Claim("tdm-teacher", "tdm", "Tab. 1 and 4",
          "Four steps are nearer to the data than the teacher's own four.",
          "an fd no smaller", "fd of TDM < of the teacher's 4 Euler steps",
          below("tdm", "ring", "tdm-4", "teacher-4"), "the ring, equal calls in sampling"),
    Claim("tdm-dmd2", "tdm", "Tab. 1, 31.3 against 29.5, and Fig. 9",
          "Better than DMD2 in as many updates.",
          "an fd no smaller", "fd of TDM < of DMD2",
          below("tdm", "ring", "tdm-4", "dmd-4-no-step"), f"{RING}; DMD2 as printed",
          why="After 120 updates DMD2 is level at one seed; after 300 the means are 3.3 and "
              "21 (docs/results/tdm.md)."),
    Claim("tdm-early", "tdm", "Fig. 9, 25 times as fast",
          "Far ahead of DMD2 at the beginning.",
          "an fd no smaller than half of DMD2's after a twentieth of the updates",
          "fd of TDM < half of DMD2",
          below("tdm", "ring", "early-tdm", "early-dmd-no-step", factor=0.5), RING,
          why="A twentieth is six updates here, after which TDM is ahead at every seed, but "
              "not twofold; after 15 it is 9.4 against 24 (docs/results/tdm.md)."),
    Claim("tdm-consistency", "tdm", "Tab. 1 (LCM)",
          "Better than consistency distillation, sampled with fresh noise, its own way.",
          "an fd no smaller", "fd of TDM < of consistency distillation",
          below("tdm", "ring", "tdm-4", "cd-4-sto"), f"{RING}, not equal calls",
          why="Consistency distillation sees data, which TDM does not; on glyphs TDM is ahead at "
              "equal updates (docs/results/tdm.md)."),
    Claim("tdm-deterministic", "tdm", "Fig. 8",
          "A TDM student wants deterministic sampling.",
          "no fewer samples off the modes", "share off the modes, deterministic < fresh noise",
          below("tdm", "ring", "tdm-4", "tdm-4-sto", "1 - hit"), "the ring, the same student"),
    Claim("tdm-consistency-stochastic", "tdm", "Fig. 8, 25.8 against 24.4",
          "A consistency model wants fresh noise.",
          "an fd no smaller", "fd, fresh noise < deterministic",
          below("tdm", "ring", "cd-4-sto", "cd-4"), "the ring, the same student",
          why="After 120 updates one seed goes the other way; after 300 fresh noise is ahead, "
              "2.2 against 6.4 (docs/results/tdm.md)."),
    Claim("tdm-noisy", "tdm", "Tab. 7, 31.4 against 24.6",
          "Matching x_s is better than matching x.",
          "an fd no smaller", "fd, x_s < x", below("tdm", "ring", "tdm-4", "clean"), RING,
          why="On the ring matching x is ahead, after 300 updates too (2.8 against 3.3); on "
              "glyphs x_s is, 2.1 against 3.3 (docs/results/tdm.md)."),
    Claim("tdm-importance-ring", "tdm", "Tab. 5, 31.4 against 29.3",
          "Importance sampling improves the student.",
          "an fd no smaller", "fd with < without", below("tdm", "ring", "tdm-4", "no-is"), RING,
          why="After 120 updates nothing shows yet; after 300 it is 3.3 against 31.7 "
              "(docs/results/tdm.md)."),
    Claim("tdm-surrogate", "tdm", "Tab. 5, Eq. 11, 31.3 against 30.9",
          "The surrogate metric is better than squares.",
          "an fd no smaller", "fd, pseudo-Huber < squares",
          below("tdm", "ring", "tdm-4", "l2"), RING,
          why="After 120 updates the seeds disagree; after 300 it is 3.3 against 9.3 "
              "(docs/results/tdm.md)."),
    Claim("tdm-unify", "tdm", "Tab. 5, 28.9 against 20.8",
          "One student for 1, 2 and 4 steps is better in one step than one of four steps.",
          "an fd no smaller in one step", "fd in 1 step, unified < of four",
          below("tdm", "ring", "with-K-at-1", "only4-at-1"), RING),
    Claim("tdm-aware", "tdm", "Eq. 8 and Tab. 5, 28.9 against 26.1",
          "The networks must be conditioned on K.",
          "an fd no smaller in one step", "fd in 1 step, with K < without",
          below("tdm", "ring", "with-K-at-1", "without-K-at-1"), RING),
    Claim("tdm-unify-four", "tdm", "Tab. 5, 31.31 against 31.35",
          "Training for 1 and 2 steps as well costs four steps nothing.",
          "an fd 1.25 times as large in four steps", "fd in 4 steps, unified < 1.25 of four",
          below("tdm", "ring", "with-K-at-4", "tdm-4", factor=1.25), RING,
          why="A third of the updates goes to each count of steps: in a small network and few "
              "updates that shows (docs/results/tdm.md)."),
    Claim("tdm-teacher-glyphs", "tdm", "Tab. 1", "Four steps beat the teacher's four, on images.",
          "an fd no smaller", "fd of TDM < of the teacher's 4 Euler steps",
          below("tdm", "glyphs", "tdm-4", "teacher-4"), "glyphs, equal calls in sampling",
          quick=False),
    Claim("tdm-dmd2-glyphs", "tdm", "Tab. 1", "Better than DMD2 in as many updates, on images.",
          "an fd no smaller", "fd of TDM < of DMD2",
          below("tdm", "glyphs", "tdm-4", "dmd-4"),
          f"{GLYPHS} and calls, a step for every sample, each at the rates of its own script",
          quick=False),
    Claim("tdm-consistency-glyphs", "tdm", "Tab. 1",
          "Better than consistency distillation at equal network calls, on images.",
          "an fd no smaller", "fd of TDM < of consistency distillation",
          below("tdm", "glyphs", "tdm-4", "cd-4-calls-sto"), "glyphs, equal network calls",
          quick=False),
    Claim("tdm-importance-glyphs", "tdm", "Tab. 5", "Importance sampling matters, on images.",
          "an fd no smaller", "fd with < without", below("tdm", "glyphs", "tdm-4", "no-is"), GLYPHS,
          quick=False),
]

LINVIDEO = [
    Claim("linvideo-cost", "linvideo", "Sec. 3, Eq. 4 and 5",
          "Linear attention costs in proportion to the tokens, softmax attention to their square.",
          "as large a ratio at twice the tokens", "FLOPs at 2 N over N, linear < softmax",
          form(exact.linear_in_tokens), "counted operations"),
    Claim("linvideo-score", "linvideo", "Sec. 4.2, Eq. 13",
          "Velocities give the difference of the two scores.",
          "a relative error above 1e-6 on Gaussians", "error < bound",
          form(exact.difference_of_scores), CLOSED),
    Claim("linvideo-not-regression", "linvideo", "Sec. 4.2, Eq. 7 against 11",
          "Matching distributions at every time is another objective than regressing velocities.",
          "a KL divergence that is an integral of velocity errors", "a thousandth < their distance",
          form(exact.kl_is_a_regression), CLOSED,
          why="KL(q_s | p_s) is int (1 - t) / t E |v_hat - v|^2 dt at the student's own states: a "
              "regression at other states, with another weight (docs/linvideo.md)."),
    Claim("linvideo-adm", "linvideo", "Tab. 4, 66.1 against 61.6",
          "ADM as printed is better than MSE.",
          "an energy distance no smaller", "energy distance, ADM (Eq. 13) < MSE",
          on_the_ring("ADM, part of a step, Eq. 13's weight, 3e-3", "MSE (Eq. 7), 3e-3"),
          "the ring, equal updates and rates",
          why="Without the weight (1 - t) / t and the random length of the step the two are level; "
              "with them nearly all of the gradient is on few levels (docs/results/linvideo.md)."),
    Claim("linvideo-adm-policy", "linvideo", "Sec. 4.2, Eq. 11",
          "Matching at the student's own states is better than MSE at the teacher's.",
          "an energy distance no smaller", "energy distance, own states < MSE",
          on_the_ring("ADM at the student's own states, 3e-3", "MSE (Eq. 7), 3e-3"),
          "the ring, equal updates and rates",
          why="The same regression at other states; they differ little here."),
    Claim("linvideo-regulariser", "linvideo", "Tab. 3 and Fig. 3, Eq. 10",
          "The regulariser makes every r decide.",
          "as many undecided r without it", "undecided + 1/2 of 30, with < without",
          form(exact.regulariser_decides), "a simulation of the selection, equal updates",
          why="Rounding gives the count one gradient for all r; they go to one half together, "
              "where Eq. 10 has no slope. A count without rounding decides "
              "(docs/results/linvideo.md)."),
    *[Claim(f"linvideo-layers-{name}", "linvideo", "Tab. 3",
            f"The layers that learning finds are better than {words}.",
            "an fd no smaller", "fd, learned < these",
            below("linvideo", "clips", "learned", name), CLIPS, quick=False,
            why="A hundred updates of selection found 0 1 2 6, 0 2 6 7 and 0 2 5 6, of which the "
                "second is far ahead; in longer selections nearly every seed finds it "
                "(docs/results/linvideo.md).")
      for name, words in (("random", "random ones"), ("first", "the first"))],
    Claim("linvideo-progressive", "linvideo", "Tab. 3, 66.1 against 63.0",
          "Moving there step by step is better than the same layers from the start.",
          "an fd no smaller", "fd, learned < fixed from the start",
          below("linvideo", "clips", "learned", "fixed"), CLIPS, quick=False,
          why="Most r are undecided when the selection ends, so that fixing them is a jump "
              "(docs/results/linvideo.md)."),
    Claim("linvideo-count", "linvideo", "Tab. 2",
          "More linear layers cost quality: six of eight more than four.",
          "an fd no larger of six", "fd of 4 layers < of 6",
          below("linvideo", "clips", "learned", "target-6"), CLIPS, quick=False),
]

MDT = [
    Claim("mdt-transport", "mdt_dist", "Eq. 11 and 12",
          "The average velocity to the data satisfies phi + t dphi/dt = v along the trajectory.",
          "a relative error above 1e-6 on a Gaussian", "error < bound",
          form(exact.transport_identity), CLOSED),
    Claim("mdt-difference", "mdt_dist", "Eq. 14 and Sec. 5",
          "A backward difference of .01 stands for the derivative.",
          "an error above 1 % of the velocity", "error < 1 % of the velocity",
          form(exact.finite_difference), CLOSED),
    Claim("mdt-theorem", "mdt_dist", "Theorem 1 and App. A.1",
          "The transport's error is at most the largest velocity error times t squared.",
          "one student whose error is larger", "transport's error < bound",
          form(exact.transport_error_is_bounded), CLOSED),
    Claim("mdt-uniform", "mdt_dist", "Alg. 1, t uniform",
          "Velocity matching moves every error of the student back.",
          "an error that grows", "0 < least share by which an error shrinks",
          form(exact.errors_shrink_uniform), CLOSED),
    Claim("mdt-logit-normal", "mdt_dist", "released configuration, t logit-normal",
          "Velocity matching moves every error back under the released code's law of t, too.",
          "an error that grows", "0 < least share by which an error shrinks",
          form(exact.errors_shrink_logit_normal), CLOSED,
          why="By parts the share is half of w - t w', which is negative below t = .8 for this law "
              "(docs/mdt_dist.md)."),
    Claim("mdt-unlike-cm", "mdt_dist", "Sec. 4.5",
          "Velocity matching is essentially different from consistency distillation.",
          "gradients of one direction", "a hundredth < 1 - cosine of the gradients",
          form(exact.unlike_consistency), CLOSED,
          why="At one t the gradients are the same but for the weight t dt "
              "(tests/test_mdt_math.py)."),
    Claim("mdt-kl", "mdt_dist", "Sec. 4.3, Eq. 15 to 17",
          "Velocity distillation follows the gradient of a KL divergence, where the student's u is "
          "the velocity of its own samples.",
          "another direction on a Gaussian", "1 - cosine < bound",
          form(exact.distillation_is_the_kl), CLOSED),
    Claim("mdt-vm", "mdt_dist", "Tab. 3, 20.3 to 18.4", "Velocity matching helps in one step.",
          "an fd no smaller than the teacher's", "fd of VM < of the teacher, 1 step",
          below("mdt_dist", "ring", "vm-at-1", "teacher-at-1"),
          "the ring, equal calls in sampling"),
    Claim("mdt-vd", "mdt_dist", "Tab. 3, 18.4 to 18.1",
          "Velocity distillation adds to velocity matching.",
          "an fd no smaller", "fd of VM + VD < of VM, 1 step",
          below("mdt_dist", "ring", "mdt-at-1", "vm-at-1"), RING),
    Claim("mdt-cm", "mdt_dist", "abstract; FD 18.1 against 20.1",
          "VM and VD are better than consistency distillation in one step.",
          "an fd no smaller", "fd of VM + VD < of CM, 1 step",
          below("mdt_dist", "ring", "mdt-at-1", "cm-at-1"), RING),
    Claim("mdt-cm-calls", "mdt_dist", "abstract; FD 18.1 against 20.1",
          "VM and VD are better than consistency distillation at equal network calls, too.",
          "an fd no smaller", "fd of VM + VD < of CM with 7/3 of the updates, 1 step",
          below("mdt_dist", "ring", "mdt-at-1", "cm-calls-at-1"), "the ring, equal network calls"),
    Claim("mdt-scm", "mdt_dist", "abstract; FD 18.1 against 19.3",
          "VM and VD are better than sCM in one step.",
          "an fd no smaller", "fd of VM + VD < of sCM, 1 step",
          below("mdt_dist", "ring", "mdt-at-1", "scm-at-1"), RING,
          why="sCM normalises its whole tangent and warms it up; VM's derivative comes as it is "
              "(docs/results/mdt_dist.md)."),
    Claim("mdt-two-steps", "mdt_dist", "Tab. 1, 14.2 against 18.1",
          "A second step helps.",
          "an fd no smaller in two steps", "fd in 2 steps < in 1",
          below("mdt_dist", "ring", "mdt", "mdt-at-1"), "the ring, the same student",
          why="Two Euler steps of an exact transport widen a Gaussian by (1 + s) / sqrt(1 + s^2) "
              "(docs/mdt_dist.md)."),
    *[Claim(f"mdt-{name}-voxels", "mdt_dist", source, f"{words}, on solids.",
            "an fd no smaller", numbers, below("mdt_dist", "voxels", low, high), VOXELS,
            quick=False, why=why)
      for name, source, words, numbers, low, high, why in (
          ("vm", "Tab. 3", "Velocity matching helps in one step", "fd of VM < of the teacher",
           "vm-at-1", "teacher-at-1", ""),
          ("vd", "Tab. 3", "Velocity distillation adds to velocity matching",
           "fd of VM + VD < of VM", "mdt-at-1", "vm-at-1",
           "In two steps of the same runs it does, 21.7, 20.2, 19.0 against 23.7, 24.9, 23.0; in "
           "one step 120 updates do not show it."),
          ("cm", "abstract", "VM and VD are better than consistency distillation",
           "fd of VM + VD < of CM", "mdt-at-1", "cm-at-1",
           "In two steps of the same runs they are, 21.7, 20.2, 19.0 against 53.4, 72.1, 52.4; in "
           "one step the seeds disagree."),
          ("two-steps", "Tab. 1", "A second step helps", "fd in 2 steps < in 1",
           "mdt", "mdt-at-1", ""))],
]

LFM = [
    Claim("lfm-bound", "latent_fm", "Theorem, Eq. 18",
          "The Wasserstein distance of samples is bounded by the autoencoder's error and the "
          "velocity's.",
          "a distance above the bound, for a PCA", "W2^2 < right side",
          form(exact.bound_of_pca), CLOSED),
    Claim("lfm-bound-any", "latent_fm", "Theorem, Eq. 18",
          "That bound holds for any decoder.",
          "a distance above the bound, for a decoder that is off by 1", "W2^2 < right side",
          form(exact.bound_of_biased_decoder), CLOSED,
          why="The product of the decoder's error and the velocity's is missing: it vanishes only "
              "where they are orthogonal. Twice the right side always holds."),
    Claim("lfm-guidance-space", "latent_fm", "Alg. 3 and 4",
          "Guidance of velocities is guidance: that of noise, x0 or scores in other variables.",
          "a relative difference above 1e-6", "difference < bound",
          form(exact.guided_velocity_is_guided_noise), CLOSED),
    Claim("lfm-guidance-narrows", "latent_fm", "Alg. 4",
          "More guidance makes the samples of a class more alike.",
          "a spread that grows with gamma", "spread at more < at less",
          form(exact.guidance_narrows), "closed form, gamma 0, 1, 1.5, 2"),
    Claim("lfm-guidance-nearer", "latent_fm", "Alg. 4, and gamma 1.5 of the released ImageNet runs",
          "Guidance above 1 brings the samples of a class nearer to the data.",
          "a distance no smaller than at gamma 1", "W2^2 at gamma 1.5, 2 < at 1",
          form(exact.guidance_comes_nearer), CLOSED,
          why="With the exact velocity nothing is left to mend at gamma = 1: guidance can only "
              "help a network that is wrong."),
    Claim("lfm-cheaper", "latent_fm", "abstract",
          "Latents cost a fraction of pixels.",
          "more than a tenth of the operations", "ten times the FLOPs of latents < of pixels",
          form(exact.latents_are_cheaper), "the same network, counted operations"),
    Claim("lfm-fewer-calls", "latent_fm", "abstract: too many function evaluations in pixels",
          "Latents need fewer evaluations of the solver.",
          "as many", "evaluations in latents < in pixels",
          form(exact.latents_need_fewer_calls), "the Gaussian with the data's moments, equal noise",
          why="Both spaces have thin directions, and these set the steps "
              "(docs/results/latent_fm.md)."),
    Claim("lfm-accuracy", "latent_fm", "Alg. 4",
          "Guidance makes classes surer.",
          "as many samples of another class", "1 - accuracy at gamma 1.5 < at 1",
          of_shapes({"steps": 8, "guidance_scale": 1.5}, {"steps": 8}, "1 - accuracy"), SHAPES,
          quick=False),
    Claim("lfm-guidance-shapes", "latent_fm", "Alg. 4, and gamma 1.5 of the released ImageNet runs",
          "Guidance above 1 brings samples nearer to the data, on shapes.",
          "an fd no smaller", "fd at gamma 1.5 < at 1",
          of_shapes({"steps": 8, "guidance_scale": 1.5}, {"steps": 8}), SHAPES, quick=False),
]
# fmt: on
CLAIMS = [*DMD, *PHASED, *DECOUPLED, *TDM, *LINVIDEO, *MDT, *LFM]
