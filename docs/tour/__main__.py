"""The pictures of docs/tour.md: one idea of few-step generation at a time, in the plane.

    python -m docs.tour score                 # runs/tour/score.png
    python -m docs.tour arrows --seed 1       # runs/tour/arrows.gif

Each trains what it shows, in seconds, by the losses and samplers of the scripts. The loops around
them are the scripts' without their plumbing: no ranks, no checkpoints, no averages.
"""

import argparse
import os

import torch

from docs.tour import decoupled_dmd, dmd, linvideo, mdt_dist, phased_dmd, tdm, teacher

IDEAS = {  # in the order of the page: what draws it, the kind of file
    "score": (teacher.score, "png"),
    "few-steps": (teacher.few_steps, "png"),
    "arrows": (dmd.arrows, "gif"),
    "collapse": (dmd.collapse, "gif"),
    "gan": (dmd.gan, "png"),
    "mixture": (dmd.mixture, "png"),
    "phases": (phased_dmd.phases, "png"),
    "guidance": (decoupled_dmd.guidance, "gif"),
    "trajectories": (tdm.trajectories, "png"),
    "attention": (linvideo.attention, "png"),
    "transport": (mdt_dist.transport, "png"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("idea", choices=IDEAS, help="a stop of docs/tour.md")
    parser.add_argument("--seed", type=int, default=0, help="of noise and data")
    parser.add_argument("--folder", default="runs/tour", help="where the picture goes")
    args = parser.parse_args(argv)
    try:
        os.makedirs(args.folder, exist_ok=True)
    except OSError as error:
        parser.error(f"--folder {args.folder}: {error.strerror}: give a folder that can be written")
    draw, kind = IDEAS[args.idea]
    path = os.path.join(args.folder, f"{args.idea}.{kind}")
    torch.manual_seed(args.seed)
    draw(path)
    print(path)


if __name__ == "__main__":
    main()
