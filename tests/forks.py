"""Processes for tests: as `python FILE` or torchrun start them, but with torch already imported.

    done = launch(ROOT / "dmd.py", flags, ranks=2, cwd=folder)  # .returncode, .stdout, .stderr

An interpreter that imports torch and a script takes three to four seconds, for every rank and for
torchrun beside them, and most tests of two ranks train for less. So each test worker has one
process that has imported all of it and trained nothing (this file, run as a program); it forks what
a test asks for. Peak memory of such a process is not its own: tests of memory start theirs with
subprocess. tests/test_runs.py has runs by torchrun itself.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "dmd phased_dmd decoupled_dmd tdm linvideo latent_fm mdt_dist".split()
GRACE = 10  # seconds that the other ranks have when one has failed
server = None


def launch(file, flags=(), ranks=None, env=None, cwd=None, timeout=600):
    """Run a Python file with these flags and wait for it.  -> returncode, stdout, stderr

    ranks: as torchrun does, so many processes on this machine; None: one process without ranks. The
    code is that of the first rank that failed, -9 after `timeout` seconds, which stderr then says:
    many times what an idle machine takes, for ranks that wait for ever. env: further variables.
    """
    global server
    if server is None:
        given = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        server = subprocess.Popen([sys.executable, __file__], env=given, **pipes)
        atexit.register(server.kill)
    with tempfile.TemporaryDirectory() as folder:
        job = dict(file=str(file), flags=list(map(str, flags)), ranks=ranks, env=env or {})
        job |= dict(cwd=str(cwd or os.getcwd()), timeout=timeout, folder=folder)
        print(json.dumps(job), file=server.stdin, flush=True)
        code = json.loads(server.stdout.readline())
        texts = [Path(folder, name).read_text(errors="replace") for name in ("out", "err")]
    return SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


def serve():
    """Fork and wait, job by job, until whoever asks is gone."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    for script in SCRIPTS:
        importlib.import_module(script)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(wait(job, fork(job))), flush=True)


def fork(job):
    """-> process numbers of the ranks."""
    variables = [{}]
    if job["ranks"]:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        world = {"WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        world |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        variables = [{**world, "RANK": r, "LOCAL_RANK": r} for r in range(job["ranks"])]
    processes = []
    for own in variables:
        processes.append(os.fork())
        if processes[-1] == 0:
            become(job, own)
    return processes


def become(job, variables):
    """Be the program, in a process that has just been forked. Does not return."""
    code = 1
    try:
        os.environ.update({name: str(v) for name, v in {**job["env"], **variables}.items()})
        os.chdir(job["cwd"])
        sys.stdin = open(os.devnull)
        for number, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(os.path.join(job["folder"], name), flags), number)
        sys.argv = [job["file"], *job["flags"]]
        sys.path.insert(0, str(ROOT / "tests"))
        runpy.run_path(job["file"], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(job, processes):
    """-> the exit code of all: 0, or that of the first that failed; negative for a signal."""
    left, code, deadline = set(processes), 0, time.monotonic() + job["timeout"]
    for name in ("out", "err"):
        Path(job["folder"], name).touch()
    while left:
        for process in list(left):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                left.remove(process)
                own = os.waitstatus_to_exitcode(status)
                if own and not code:
                    code, deadline = own, min(deadline, time.monotonic() + GRACE)
        if left and time.monotonic() > deadline:
            if not code:
                with open(Path(job["folder"], "err"), "a") as err:
                    err.write(f"ended by tests/forks.py after {job['timeout']} s\n")
            code = code or -signal.SIGKILL
            for process in left:
                os.kill(process, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.02)
    return code


if __name__ == "__main__":
    serve()
