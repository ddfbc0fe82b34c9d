"""Nothing in a training step reads a number off the device: that would stop a GPU's queue.

On the CPU every such read (item(), float(tensor), `if tensor`) is the operator _local_scalar_dense,
which a dispatch mode sees. What may read is what works on the host's own tensors anyway.
"""

import importlib
import traceback

import pytest
import torch
from helpers import ROOT, save_tiny_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from models.plumbing.run import Run

OURS = {  # files whose functions are named: not the tests, nor an environment inside this folder
    str(path)
    for where in ("*.py", "models/**/*.py", "kernels/**/*.py")
    for path in ROOT.glob(where)
}
ON_THE_HOST = {
    "agreed",  # what all ranks agree on, drawn on the CPU
    "draw_segments",  # tdm: the step of every row, drawn on the CPU
    "largest_over_ranks",  # of these steps; over several ranks all have to know it
    "rows",  # linvideo: rows of the bank, read from a file
    "check_finite",  # of these rows, before they leave the host
}
ONCE = {"end_selection", "velocity_error", "layers_now"}  # linvideo: when the selection ends


class Reads(TorchDispatchMode):
    """Names of this project's functions that read a number while the mode is on."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            names = [f.name for f in traceback.extract_stack() if f.filename in OURS]
            self.found.append(next(n for n in reversed(names) if not n.startswith("<")))
        return func(*args, **(kwargs or {}))


def reads_of(monkeypatch, script, flags):
    """Who reads numbers during the steps of a run; its ends, samples and files are left out."""
    found, steps, end_step = [], Run.steps, Run.end_step
    modes = []

    def watched_steps(run, *args):
        for step in steps(run, *args):
            modes.append(Reads(found))
            modes[-1].__enter__()
            yield step

    def unwatched_end(run, *args, **kwargs):
        modes.pop().__exit__(None, None, None)
        return end_step(run, *args, **kwargs)

    monkeypatch.setattr(Run, "steps", watched_steps)
    monkeypatch.setattr(Run, "end_step", unwatched_end)
    importlib.import_module(script).main(flags)
    return found


CASES = [
    ("dmd", "--student_steps 3 --guidance_scale 2 --ema_decay 0.9"),
    ("decoupled_dmd", "--student_steps 3"),
    ("tdm", "--student_steps 1 2 4"),
    ("phased_dmd", "--student_steps 4 --phases 2"),
    ("linvideo", "--bank_size 8 --bank_batch 4 --sampling_steps 4 --objective adm"),
    ("linvideo", "--bank_size 8 --bank_batch 4 --sampling_steps 4 --guidance_scale 2"),
    ("mdt_dist", "--teacher ring"),
    ("latent_fm", "--data ring --pool 200 --optimizer adamw --lr_warmup_steps 0 --preview_every 0"),
]


@pytest.mark.parametrize("script, more", CASES, ids=[f"{s} {more}"[:40] for s, more in CASES])
def test_a_step_reads_no_number_off_the_device(monkeypatch, tmp_path, script, more):
    """Three steps, two micro-batches each: only host draws and files are read."""
    flags = ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "3"]
    flags += "--train_batch_size 4 --gradient_accumulation_steps 2".split()
    if script != "latent_fm":
        flags += "--teacher_steps 0 --preview_samples 2".split()
        flags += ["--teacher", save_tiny_teacher(tmp_path / "teacher")]
    found = reads_of(monkeypatch, script, flags + more.split())
    wrong = [name for name in found if name not in ON_THE_HOST | ONCE]
    assert not wrong, sorted(set(wrong))
    assert all(found.count(name) <= 8 for name in ONCE)


def test_the_mode_sees_a_read(monkeypatch, tmp_path):
    """A step that does read is found: here the student's update."""
    update = Run.update

    def reading(run, optimizers, what):
        update(run, optimizers, what)
        float(run.sums[f"norm_{what}"])

    monkeypatch.setattr(Run, "update", reading)
    flags = f"--output_dir {tmp_path / 'run'} --max_train_steps 2 --train_batch_size 4"
    teacher = save_tiny_teacher(tmp_path / "teacher")
    more = f"--teacher {teacher} --teacher_steps 0 --preview_samples 2"
    assert "train" in reads_of(monkeypatch, "dmd", [*flags.split(), *more.split()])
