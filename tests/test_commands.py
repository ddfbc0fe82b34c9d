"""The commands of README and docs: each parses, runs here or is known to need more, and has a time.

python -m pytest tests/test_commands.py --commands -n 0      # runs those below 90 seconds
"""

import importlib
import re
import shlex
import shutil
import subprocess

import commands as book
import pytest
from helpers import ROOT

COMMANDS = {c: pages for c, pages in book.commands().items() if not re.search("venv|&&", c)}
TIMES = book.times()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    """Flags exist and values are accepted, also where weights are needed to run it."""
    words = shlex.split(command)
    script = next((w for w in words if w.endswith(".py")), None)
    if words[0] in ("diff", "pip") or "--help" in words or "pytest" in words:
        return
    if script and (ROOT / script).is_file() and (ROOT / script).parent == ROOT:
        flags = words[words.index(script) + 1 :]
        importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        return
    module = words[words.index("-m") + 1] if "-m" in words else script.removesuffix(".py")
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.is_file() else ROOT / module.replace(".", "/") / "__main__.py"
    assert path.is_file(), command
    text = path.read_text()
    for flag in re.findall(r"--\w+", command):
        assert f'"{flag}"' in text or flag in text, f"{path.name} has no {flag}"


def test_every_command_that_takes_seconds_has_been_run():
    """Its seconds are in docs/commands.md: `python -m tests.commands --measure` adds new ones."""
    missing = [c for c in COMMANDS if not (book.own(c) or book.long(c)) and c not in TIMES]
    assert not missing, "\n".join(missing)
    page = (ROOT / "docs" / "commands.md").read_text()
    assert all(f"`{c}`" in page for c in COMMANDS if not book.own(c))
    gone = [c for c in TIMES if c not in COMMANDS]
    assert not gone, "\n".join(gone)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """A copy of what is tracked, in which runs/ is shared by all commands."""
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if TIMES.get(c, 999) < 90])
def test_command_runs_as_written(command, fresh, request):
    """Those of three seconds always, those below 90 with --commands."""
    if TIMES[command] > 3 and not request.config.getoption("--commands"):
        pytest.skip("only with --commands")
    for needed in re.findall(r"(runs/[\w.-]+)(?:/student)?(?= |$)", command):
        if "--output_dir" not in command and not (fresh / needed).exists():
            pytest.skip(f"{needed} comes from a longer command")
    _, done = book.execute(command, fresh, threads=2 if TIMES[command] > 4 else 1, limit=600)
    assert done.returncode in ((0, 1) if command.startswith("diff") else (0,)), done.stderr[-800:]
