"""Every script on a device that is not the CPU: tests/pretend_gpu.py says what that shows."""

import subprocess
import sys

import checksums
import pytest
from forks import launch
from helpers import ENV, ROOT

TOOL = ROOT / "tests" / "pretend_gpu.py"
SHORT = [  # one of each script
    "dmd gan",
    "decoupled_dmd plain",
    "tdm pixart",
    "phased_dmd plain",
    "linvideo first",
    "mdt_dist plain",
    "latent_fm vae cache",
]
MIXED = """
import torch, pretend_gpu

with pretend_gpu.device():
    gpu = torch.device("gpu", 0)
    x = torch.randn(5, 4).to(gpu)
    w = torch.nn.Linear(4, 2).to(gpu)
    w(x).square().mean().backward()
    assert w.weight.grad.device == x[torch.arange(2)].device == torch.zeros_like(x).device == gpu
    assert (x * torch.tensor(2.0)).cpu().device.type == "cpu" and len(x.tolist()) == 5
    for wrong in (
        lambda: x + torch.ones(4),
        lambda: w(torch.ones(5, 4)),
        lambda: torch.stack([x[0, 0], torch.tensor(1.0)]),
        lambda: torch.randn(3, device=gpu, generator=torch.Generator()),
        lambda: torch.empty(3, device=gpu).normal_(generator=torch.Generator()),
        lambda: x.numpy(),
    ):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit("not refused")
"""


def test_it_refuses_what_lies_elsewhere():
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{MIXED}"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(tmp_path, settings):
    done = launch(TOOL, [tmp_path, *settings], timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    names = [name for name in settings if " " in name]
    assert [
        line.partition(":")[0] for line in done.stdout.splitlines() if ": losses" in line
    ] == names


def test_scripts_train_on_it(tmp_path):
    run(tmp_path, [*SHORT, "--short"])


@pytest.mark.long
@pytest.mark.parametrize("script", checksums.SETTINGS)
def test_all_settings_train_on_it(tmp_path, script):
    run(tmp_path, [name for name in checksums.setting_names(1) if name.startswith(f"{script} ")])
