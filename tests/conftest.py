"""Tests run on one thread, from any folder."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


def pytest_addoption(parser):
    help = "run every documented command that takes less than 90 seconds (tests/test_commands.py)"
    parser.addoption("--commands", action="store_true", help=help)
