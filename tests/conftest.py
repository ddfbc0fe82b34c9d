"""Tests run on one thread, from any folder."""

import functools
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # helpers stand beside the tests
torch.set_num_threads(1)

from helpers import fitted_once  # noqa: E402

from models.plumbing import teachers  # noqa: E402

# Files that start processes or train for long: each is done by one worker, so they begin first.
FIRST = "released_pairs sharding unet sequence report dry_run linear_attention".split()
FIRST += ["tdm_orderings", "resume"]


def pytest_collection_modifyitems(config, items):
    names = [f"test_{name}.py" for name in FIRST]
    items.sort(key=lambda i: names.index(i.path.name) if i.path.name in names else len(names))
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="long: give --long"))


def pytest_addoption(parser):
    help = "run every documented command that takes less than 90 seconds (tests/test_commands.py)"
    parser.addoption("--commands", action="store_true", help=help)
    help = "also tests of several ranks and of claims that together take fifteen minutes more"
    parser.addoption("--long", action="store_true", help=help)


# ---- the ring's networks -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ring_networks_fitted_once(monkeypatch):
    for name in ("fit_ring_network", "fit_ring_transformer"):
        once = functools.partial(fitted_once, getattr(teachers, name))
        monkeypatch.setattr(teachers, name, once)
