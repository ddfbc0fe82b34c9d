"""tdm.py with a fake score of its own for every K: is one for all of them what costs four steps?

    python -m tests.tdm_fakes --preset long

The flags are tdm.py's, the run is its run but for the fake. Each fake sees the rows of its K alone,
so an update costs as much as with one. The answer is in docs/results/tdm.md.
"""

import os
import sys
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tdm  # noqa: E402
from models.files import UserError  # noqa: E402
from models.plumbing.run import run_main  # noqa: E402


class FakePerCount(nn.Module):
    """Networks that are called as one: each row goes to that of its K.

    fakes: {K: network}. In `steps` (B,), of tdm.fake_steps_input, K is the remainder by the
    largest K + 1.
    """

    def __init__(self, fakes):
        super().__init__()
        self.fakes = nn.ModuleDict({str(K): net for K, net in fakes.items()})
        self.base = max(fakes) + 1

    def forward(self, x, t, steps, **cond):
        K, out = steps.round().long() % self.base, torch.zeros_like(x)
        for count, fake in self.fakes.items():
            rows = (K == int(count)).nonzero()[:, 0]
            if len(rows):
                own = {name: value[rows] for name, value in cond.items()}
                v = fake(x[rows], t[rows], steps=steps[rows], **own)
                out = out.index_copy(0, rows, v.to(out.dtype))
        return out


def main(argv=None):
    args = tdm.parse_args(argv)
    counts = sorted(set(args.student_steps or ()))
    if args.sample or args.dry_run is not None or args.no_steps_cond or len(counts) < 2:
        raise UserError(
            "a fake for every K needs training and several --student_steps that it sees"
        )

    def trainable(run, net, name, *how):
        if name != "fake":
            return as_it_is(run, net, name, *how)
        return FakePerCount({K: as_it_is(run, net, name, *how) for K in counts})

    as_it_is = tdm.trainable
    with mock.patch.object(tdm, "trainable", trainable):
        tdm.train(args)


if __name__ == "__main__":
    run_main(main)
