"""Runs of scripts on gloo ranks, one after the other, for one start of the ranks.

The ranks run tests/ranks.py FOLDER, where FOLDER/runs.json is [[name, script, flags], ...]. What a
run raises is left in FOLDER/failed/NAME, and the next one begins.
"""

import functools
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from forks import launch

import latent_fm
from models.networks.dit_imagenet import DIT_B_2

NAME = "DiT-B/2"  # of latent_fm.py --network, two tiny blocks here
TINY = {**DIT_B_2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}
# AdamW divides by |g| + eps: with 1e-8 a gradient that is zero up to rounding moves its weight as
# far as any other, and no two orders of summation would agree.
ADAM = functools.partial(torch.optim.AdamW, eps=1e-3)


def start(ranks, folder, runs, seconds=3000):
    """All of these runs, [(name, script, flags), ...], on so many ranks.  -> what `launch` does"""
    (folder / "runs.json").write_text(json.dumps(runs))
    return launch(__file__, [folder], ranks, timeout=seconds)


def all_runs(folder):
    """On every rank."""
    torch.optim.AdamW, latent_fm.PAPER_NETWORKS[NAME] = ADAM, TINY
    for name, script, flags in json.loads((folder / "runs.json").read_text()):
        try:
            importlib.import_module(script).main(flags)
        except (Exception, SystemExit):
            (folder / "failed").mkdir(exist_ok=True)
            (folder / "failed" / name).write_text(traceback.format_exc())
            raise  # the other rank may be waiting


if __name__ == "__main__":
    torch.set_num_threads(1)
    all_runs(Path(sys.argv[1]))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
