"""models/plumbing/allocator.py: what a run on a CPU frees is there for its next update."""

import pytest
import torch

import dmd
from models.plumbing import run
from models.plumbing.allocator import keep_freed_memory


def test_freed_memory_is_not_got_again_from_the_system(monkeypatch):
    """128 MB are 32,000 pages. Freed and made again some times, none is new."""
    resource = pytest.importorskip("resource")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    if not keep_freed_memory():
        pytest.skip("this C library has no such setting")

    def new_pages():
        before, blocks = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
        for _ in range(64):
            blocks.append(torch.zeros(2**19))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert [new_pages() for _ in range(5)][-1] < 100


def test_the_environment_comes_first(monkeypatch):
    """Whoever measures memory lets the C library give it back."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert not keep_freed_memory()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_run_asks_for_it_on_a_cpu_alone(monkeypatch, device):
    asked = []
    monkeypatch.setattr(run, "own_device", lambda local_rank: torch.device(device))
    monkeypatch.setattr(run, "keep_freed_memory", lambda: asked.append(1))
    run.Run(dmd.parse_args(["--teacher", "ring"]), "dmd")
    assert asked == [1] * (device == "cpu")
