"""What several test files share."""
import os
from pathlib import Path

import torch

from models.dit import DiT

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}  # of the processes that tests start


def perturbed(net, seed=0, std=0.1):
    """The network with noise on every weight, so that no zero-initialised layer hides anything."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += std * torch.randn(p.shape, generator=g)
    return net


def small_dit(seed=0, **changes):
    torch.manual_seed(seed)
    return DiT(**{**dict(size=(6, 4), patch=(3, 2), channels=2, dim=64, depth=3, num_classes=3), **changes})


def dit_inputs(net, n=5):
    """-> x (n, ...), t (n,) from 0.1 to 1, label (n,)."""
    x = torch.randn(n, *net.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(0.1, 1.0, n), torch.arange(n) % max(1, net.num_classes)
