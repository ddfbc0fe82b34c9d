"""A device "gpu" that computes on the CPU, and refuses what a real GPU would refuse.

    python tests/pretend_gpu.py FOLDER "tdm plain" "dmd gan"        # settings of tests/checksums.py
    python tests/pretend_gpu.py FOLDER --every                      # all of them, half an hour
    python tests/pretend_gpu.py --pytest tests/test_end_to_end.py --long        # those tests on it

Whoever develops on a machine without a GPU writes `x + torch.zeros(3)` and learns on another one
that two devices met. Inside `device()` tensors of the device "gpu:0" are wrapped tensors of the
CPU. Every operation is looked at: one that is given tensors of both devices, or draws on the device
from a generator of the CPU, raises RuntimeError, as CUDA does. Autocast casts what it casts on
CUDA, which is not what it casts on the CPU: the lists are those of torch's header. Numbers are
those of the CPU; a setting trains on both devices, and its losses are compared.

What it does not show: whatever asks for the name "cuda" (pinned memory, kernels of Triton, nccl),
time and memory. It renames a device of the whole process.
"""

import argparse
import contextlib
import functools
import importlib
import math
import os
import re
import shutil
import sys
import traceback
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
NAME = "gpu"
aten = torch.ops.aten
# What takes tensors of both devices on CUDA too: copies, and indices that lie on the CPU.
ACROSS = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_}
ACROSS |= {aten._index_put_impl_, aten._unsafe_index}
SET_DATA = torch.Tensor.data.__set__
KEPT = []  # registrations, which end with their objects
TOGETHER = {aten.cat, aten.stack, aten.where}  # not even with a single number of the CPU


class OnGpu(torch.Tensor):
    """A tensor of the device: `inner` is the tensor of the CPU that it is computed with."""

    @staticmethod
    def __new__(cls, inner):
        like = dict(strides=inner.stride(), storage_offset=inner.storage_offset())
        like |= dict(dtype=inner.dtype, device=torch.device(NAME, 0))
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)
        self.inner = inner
        return self

    def __repr__(self, **_):
        return f"OnGpu({self.inner})"

    def tolist(self):
        return self.inner.tolist()

    def __deepcopy__(self, memo):
        with torch.no_grad():
            copied = OnGpu(self.inner.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            done = func(*args, **(kwargs or {}))
        if func == SET_DATA:  # x.data = y is no operation
            args[0].inner = args[1].inner
        return done

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return operate(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Also operations that make tensors of nothing come by."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return operate(func, args, kwargs or {})


def refuse(func, tensors):
    """Raises RuntimeError for what CUDA would not do with these."""
    here = [x for x in tensors if isinstance(x, OnGpu)]
    there = [x for x in tensors if not isinstance(x, OnGpu)]
    kind = func.overloadpacket
    if here and kind not in ACROSS and any(x.dim() or kind in TOGETHER for x in there):
        shapes = [tuple(x.shape) for x in there]
        raise RuntimeError(f"{func}: tensors on {NAME}:0, and on the CPU of shapes {shapes}")


def operate(func, args, kwargs):
    """The operation on the CPU, its result wrapped where a GPU would have it."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    refuse(func, tensors)
    if func.overloadpacket in (aten.copy_, aten.set_, aten.resize_):
        on = isinstance(args[0], OnGpu)
    else:
        on = any(isinstance(x, OnGpu) for x in tensors)
    if kwargs.get("device") is not None:
        on = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": "cpu"} if on else kwargs
    if on and any(isinstance(x, torch.Generator) for x in flat):
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor on {NAME}:0")
    inner, more = tree_map_only(OnGpu, lambda x: x.inner, (args, kwargs))
    out = func(*inner, **more)
    if not on:
        return out
    own = {id(x.inner): x for x in tensors if isinstance(x, OnGpu)}  # what is written in place

    def wrapped(x):
        return own[id(x)] if id(x) in own else OnGpu(x)

    return tree_map_only(torch.Tensor, wrapped, out)


# ---- what torch asks of a device -----------------------------------------------------------------


class Backend(_DummyBackendModule):
    """As torch.cuda."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=0):
        return torch.empty(0, dtype=torch.uint8)  # nothing is ever drawn on the device

    def set_rng_state(self, state, device=0):
        pass

    @contextlib.contextmanager
    def device(self, index):
        yield


def cuda_casts():
    """What autocast does on CUDA.  -> {"AT_FORALL_...": [operator, ...]}"""
    header = os.path.join(os.path.dirname(torch.__file__), "include", "ATen", "autocast_mode.h")
    with open(header) as f:
        text = f.read().replace("\\\n", " ")
    lists = {}
    for name in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        line = re.search(rf"#define AT_FORALL_{name}\(_\)(.*)", text)[1]
        named = re.findall(r"_\((\w+)(?:, *(\w+))?\)", line)
        found = [getattr(getattr(aten, op, None), over or "default", None) for op, over in named]
        lists[name] = [op for op in found if op is not None]
    lists["PROMOTE"] += [aten.cat.default, aten.stack.default]
    return lists


def casting(op, dtype):
    """An operator with its floating tensors cast: to dtype(they) where they are on the device."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args, **kwargs):
        flat, _ = tree_flatten((args, kwargs))
        meant = [x for x in flat if isinstance(x, OnGpu) and x.is_floating_point()]
        meant = {id(x) for x in meant if x.dtype != torch.float64}
        to = dtype([x.dtype for x in flat if id(x) in meant])

        def cast(x):
            return x.to(to) if id(x) in meant else x

        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
            return op(*args, **kwargs)

    return call


def register_casts():
    """Autocast of this device.  -> what keeps it registered"""
    every, named = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    dtypes = {
        "LOWER_PRECISION_FP": lambda has: torch.get_autocast_dtype(NAME),
        "PROMOTE": lambda has: functools.reduce(torch.promote_types, has) if has else None,
    }
    for name, ops in cuda_casts().items():
        dtype = dtypes.get(name, lambda has: torch.float32)
        for op in dict.fromkeys(ops):
            named.impl(op.name().removeprefix("aten::"), casting(op, dtype), "AutocastPrivateUse1")
    return every, named


@contextlib.contextmanager
def device():
    """Inside, torch.device("gpu", 0) exists, and scripts and tools take it for their GPU."""
    from models import libraries
    from models.plumbing import run

    if not KEPT:
        _setup_privateuseone_for_python_backend(NAME, Backend())
        KEPT.extend(register_casts())
    old, lifting = libraries.device, torch._C._only_lift_cpu_tensors()
    tools = [module for name, module in sys.modules.items() if name.startswith("models.")]
    with contextlib.ExitStack() as patches:
        own = mock.patch.object(run, "own_device", lambda rank: torch.device(NAME, 0))
        patches.enter_context(own)
        for module in tools:
            if getattr(module, "device", None) is old:
                patches.enter_context(mock.patch.object(module, "device", lambda: NAME))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(3, device=...) comes by as a copy
        patches.callback(torch._C._set_only_lift_cpu_tensors, lifting)
        with Device():
            yield


# ---- settings of tests/checksums.py --------------------------------------------------------------


def losses(folder):
    """{column: its values} of a log.csv that are the same on every device up to roundings."""
    from helpers import read_log

    rows = read_log(folder)
    named = [name for name in rows[0] if name.startswith(("loss", "norm"))]
    return {name: [float(row[name] or 0) for row in rows] for name in named}


def train(setting, fixtures, out, resumed=False):
    """A run of a setting; resumed: its last update once more, from a state.  -> losses"""
    import checksums

    shutil.rmtree(out, ignore_errors=True)
    script, flags = checksums.flags_of(setting, fixtures, out)
    main, every = importlib.import_module(script).main, ["--checkpointing_steps", "2"]
    with sdpa_kernel(SDPBackend.MATH), contextlib.redirect_stdout(None):  # on both devices alike
        main([*flags, *every])
        if resumed:
            states = os.path.join(out, "state")
            shutil.rmtree(os.path.join(states, max(os.listdir(states))))
            main([*flags, *every, "--resume_from_checkpoint", "latest"])
    return losses(out)


def difference(setting, fixtures, out, short):
    """The largest difference of a loss or norm between the devices, by its largest value.

    short: only on the device, and not resumed; how much is not finite.
    """
    with device():
        here = train(setting, fixtures, out, resumed=not short)
    if short:
        return sum(not math.isfinite(x) for values in here.values() for x in values)
    there = train(setting, fixtures, out)
    assert here.keys() == there.keys() and here, (list(here), list(there))
    worst = 0.0
    for name, of_cpu in there.items():  # by the column's largest: a loss may begin at 0
        largest = max(map(abs, of_cpu), default=0) or 1.0
        apart = [abs(a - b) for a, b in zip(here[name], of_cpu, strict=True)]
        worst = max(worst, *(gap / largest for gap in apart))
    return worst


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", nargs="?", help="for the fixtures of tests/checksums.py, and for runs")
    p.add_argument("settings", nargs="*", help="such as 'tdm plain'")
    p.add_argument("--every", action="store_true", help="all settings")
    p.add_argument("--short", action="store_true", help="not on the CPU for comparison")
    p.add_argument("--pytest", nargs=argparse.REMAINDER, help="arguments of pytest")
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.pytest is not None:
        import pytest

        with device():
            sys.exit(pytest.main([*args.pytest, "-n", "0"]))
    import checksums

    fixtures, out = (os.path.join(args.folder, name) for name in ("fixtures", "run"))
    if not os.path.isdir(fixtures):
        checksums.make_fixtures(fixtures, ROOT)
    failed = []
    for setting in checksums.setting_names(1) if args.every else args.settings:
        try:
            worst = difference(setting, fixtures, out, args.short)
            said = f"not finite: {worst}" if args.short else f"differ by {worst:.1e}"
            print(f"{setting}: losses {said}", flush=True)
            if worst > (0.3 if "bf16" in setting else 1e-3):
                failed.append(setting)
        except (Exception, SystemExit):
            traceback.print_exc()
            failed.append(setting)
            print(f"{setting}: failed", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
