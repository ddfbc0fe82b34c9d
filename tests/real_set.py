"""Pictures that nobody drew for this repository, through scripts and measures: Debian's icons.

    python -m tests.real_set                                  # /usr/share/icons/Adwaita
    python -m tests.real_set FOLDER --updates 2000 --output runs/real

The package adwaita-icon-theme has some 4,900 PNGs from 16 to 512 pixels, most of them transparent;
the folder above a picture (actions, devices, status) is its class. The command packs them as class
folders, a zip, tar shards and, with pyarrow, parquet; trains latent_fm.py a few updates on each,
whose weights have to be the same to the bit; trains it on, distils the result by dmd.py to one
step, and compares samples of both with the pictures. Look at samples.png of both runs.
"""

import argparse
import collections
import contextlib
import io
import os
import shutil
import tarfile
import zipfile

import torch
from safetensors.torch import load_file

import dmd
import latent_fm
from models import metrics
from models.networks import WEIGHTS

ICONS = "/usr/share/icons/Adwaita"
LEAST = 8  # pictures of a class


def find(root):
    """PNGs below root, each once.  -> {class: [path]}, of the folders right above them"""
    found, seen = collections.defaultdict(list), set()
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = os.path.realpath(os.path.join(folder, name))
            if name.endswith(".png") and path not in seen:
                seen.add(path)
                found[os.path.basename(folder)].append(path)
    return {name: paths for name, paths in sorted(found.items()) if len(paths) >= LEAST}


def pack(found, out):
    """The pictures in every form.  -> {form: what --data takes}

    Their order is that of the folder, on which the draws of a run depend.
    """
    members = [
        (name, f"{name}/{i:05d}.png", path)
        for name, paths in found.items()
        for i, path in enumerate(paths)
    ]
    forms = {"folder": f"{out}/folder", "zip": f"{out}/set.zip", "tar": f"{out}/shards"}
    number = {name: k for k, name in enumerate(found)}
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(forms["tar"])
    for name in found:
        os.makedirs(f"{forms['folder']}/{name}")
    with zipfile.ZipFile(forms["zip"], "w") as file:
        for _, inside, path in members:
            shutil.copyfile(path, f"{forms['folder']}/{inside}")
            file.write(path, inside)
    for first in range(0, len(members), 1000):
        with tarfile.open(f"{forms['tar']}/{first // 1000:05d}.tar", "w") as file:
            for k, (name, _, path) in enumerate(members[first : first + 1000], first):
                file.add(path, f"{k:06d}.png")
                info = tarfile.TarInfo(f"{k:06d}.cls")
                label = str(number[name]).encode()
                info.size = len(label)
                file.addfile(info, io.BytesIO(label))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        images = [{"bytes": open(path, "rb").read(), "path": name} for _, name, path in members]
        table = {"image": images, "label": [number[name] for name, *_ in members]}
        forms["parquet"] = f"{out}/set.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), forms["parquet"], row_group_size=500)
    return forms


def same_weights(forms, out, network, updates):
    """Train on each form. Raises AssertionError unless all end with the same weights."""
    first = None
    for form, data in forms.items():
        run = f"{out}/runs/{form}"
        flags = ["--data", data, "--max_train_steps", str(updates), "--output_dir", run]
        latent_fm.main([*network, *flags, "--sample_steps", "1"])
        weights = load_file(os.path.join(run, "student", WEIGHTS))
        first = first or weights
        assert all(torch.equal(v, weights[k]) for k, v in first.items()), form
        print(f"{form}: the same weights after {updates} updates")


def images_of(script, run, out, samples):
    """--samples of a run.  -> the npz"""
    flags = ["--samples", str(samples), "--format", "npz", "--output_dir", out]
    script.main(["--sample", run, *flags])
    return os.path.join(out, "samples.npz")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = p.add_argument
    add("pictures", nargs="?", default=ICONS, help="a tree of PNGs")
    add("--output", default="runs/real_set", help="folder of sets and runs; it is made anew")
    add("--updates", type=int, default=2000, help="of latent_fm.py, and half as many of dmd.py")
    add("--compared", type=int, default=4, help="updates on each form")
    add("--samples", type=int, default=1000, help="that are compared with the pictures")
    add("--resolution", type=int, default=32, help="pixels a side")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    found, out = find(args.pictures), args.output
    count = sum(map(len, found.values()))
    print(f"{args.pictures}: {count:,} pictures of {len(found)} classes: {', '.join(found)}")
    forms = pack(found, out)
    network = ["--resolution", str(args.resolution), "--logit_normal"]
    same_weights(forms, out, network, args.compared)
    if not args.updates:
        return
    teacher, student = f"{out}/runs/latent_fm", f"{out}/runs/dmd"
    updates = ["--max_train_steps", str(args.updates), "--output_dir", teacher]
    latent_fm.main([*network, "--data", forms["folder"], *updates])
    updates = ["--max_train_steps", str(args.updates // 2), "--output_dir", student]
    dmd.main(["--teacher", teacher, "--student_steps", "1", *updates])
    for script, run in ((latent_fm, teacher), (dmd, student)):
        images = images_of(script, run, f"{run}-samples", args.samples)
        size = ["--resolution", str(args.resolution)]
        metrics.main(["--samples", images, "--reference", forms["folder"], *size])


if __name__ == "__main__":
    main()
