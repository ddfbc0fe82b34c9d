"""Turn TRELLIS's latents, such as the samples.safetensors of mdt_dist.py, into points and meshes.

    python -m models.meshes --teacher ROOT --structures structures.safetensors \\
        --output points.safetensors
    python -m models.meshes --teacher ROOT --points latents.safetensors --output runs/meshes
    python -m models.meshes --points points.safetensors --voxels --output runs/voxels

ROOT is TRELLIS's folder, with pipeline.json and ckpts/, or the path of the one network that is
needed. The first form decodes samples of the first stage (x0) to the voxels that each object
occupies: coords and offsets, which mdt_dist.py --sample takes as --data of the second stage. The
second makes a mesh of each sample of that stage (coords, offsets and feats, normalised as in
training), by TRELLIS's mesh decoder and FlexiCubes: 000.glb and so on, or with --format ply. The
third makes meshes of the voxels themselves and needs no network. models/encode.py is the other end.
"""

import os
from pathlib import Path

import torch

from models.files import UserError, load_json, open_tensors, save_tensors
from models.flexicubes import extract, voxel_mesh
from models.libraries import device
from models.mesh_files import save_glb, save_ply
from models.networks import load_network
from models.networks.trellis import SparseStructureDecoder, occupied
from models.networks.trellis_mesh import SLatMeshDecoder
from models.plumbing.data import Rows, SparsePlaces, SparseRows
from models.plumbing.flags import Parser
from models.plumbing.run import run_main, writing
from models.trellis_data import normalization

# ---- TRELLIS's folder ----------------------------------------------------------------------------


def load_decoder(root, name, kind):
    """The network of --teacher that pipeline.json calls `name`.  -> in eval mode, on any GPU.

    root: TRELLIS's folder, or the path of the network itself. kind: its class. Raises UserError.
    """
    path, described = root, os.path.join(root, "pipeline.json")
    if os.path.isfile(described):
        path = models_of(described).get(name)
        if not isinstance(path, str):
            raise UserError(
                f"--teacher {root}: its pipeline.json names no {name}: give the path of that "
                "network, or TRELLIS-image-large as it was released"
            )
        inside = os.path.join(root, path)
        path = inside if os.path.isfile(inside + ".json") else path
    net, _ = load_network(path)
    if not isinstance(net, kind):
        raise UserError(
            f"--teacher {root} is a {type(net).__name__}: give TRELLIS's root, or the path of its "
            f"{kind.__name__}"
        )
    return net.to(device()).eval()


def models_of(described):
    """{name: path} of the networks in pipeline.json."""
    args = load_json(described).get("args")
    models = args.get("models") if isinstance(args, dict) else None
    return models if isinstance(models, dict) else {}


# ---- structures to points ------------------------------------------------------------------------


@torch.no_grad()
def points_of(decoder, rows, where):
    """Latents of structures (N, C, R, R, R), read row by row.  -> coords (M, 3) int32, offsets.

    where: what messages begin with. Raises UserError for latents that are not the decoder's.
    """
    channels, found = decoder.config["latent_channels"], []
    if rows.dim() != 5 or rows.shape[1] != channels or not len(rows):
        raise UserError(
            f"{where}: x0 has shape {rows.shape}, and the decoder of --teacher needs "
            f"(N, {channels}, R, R, R): give samples of TRELLIS's first stage"
        )
    for i in range(len(rows)):
        logits = decoder(rows[torch.tensor([i])].to(device()))
        coords = occupied(logits)[:, 1:].int().cpu()
        if not len(coords):
            raise UserError(
                f"{where}: row {i} of x0 occupies no voxel: sample again, mdt_dist.py --seed N"
            )
        found.append(coords)
    ends = torch.tensor([0, *map(len, found)]).cumsum(0)
    return {"coords": torch.cat(found), "offsets": ends}


def decode_structures(args):
    """--structures: write --output, the points.  Raises UserError."""
    where = f"--structures {args.structures}"
    file = open_tensors(args.structures)
    if "x0" not in file.keys():
        there = ", ".join(sorted(file.keys())) or "nothing"
        raise UserError(f"{where} has no tensor x0, but {there}: give samples of the first stage")
    decoder = load_decoder(args.teacher, "sparse_structure_decoder", SparseStructureDecoder)
    points = points_of(decoder, Rows(file, "x0", where), where)
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    save_tensors(points, args.output)
    counts = points["offsets"].diff()
    print(
        f"{args.output}: {len(counts)} object(s) of {counts.min()} to {counts.max()} voxels of a "
        "grid"
    )


# ---- points to meshes ----------------------------------------------------------------------------


def decode_points(args):
    """--points: a mesh of each item, in the folder --output.  Raises UserError."""
    where, file = f"--points {args.points}", open_tensors(args.points)
    wanted = ["coords", "offsets"] if args.voxels else ["coords", "offsets", "feats"]
    if not {*wanted} <= {*file.keys()}:
        there = ", ".join(sorted(file.keys())) or "nothing"
        raise UserError(
            f"{where}: wanted {', '.join(wanted)}, and it has {there}: give samples of TRELLIS's "
            "second stage, or --voxels for meshes of the voxels of any points"
        )
    if args.voxels:
        points = SparsePlaces(file, where, 64)
        meshes = (voxel_mesh(points.places(i)[:, 1:], 64) for i in items(points))
    else:
        decoder = load_decoder(args.teacher, "slat_decoder_mesh", SLatMeshDecoder)
        points = SparseRows(file, where, decoder.config["resolution"])
        channels = decoder.config["latent_channels"]
        if points.feats.get_shape()[1] != channels:
            raise UserError(
                f"{where}: feats has {points.feats.get_shape()[1]} channels, the mesh decoder of "
                f"--teacher {args.teacher} takes {channels}: name the root that these are of"
            )
        mean, std = normalization(args.teacher)
        if mean.shape != (channels,) or std.shape != (channels,):
            raise UserError(
                f"--teacher {args.teacher}: mean and std of its latents have {len(mean)} and "
                f"{len(std)} channels, and --points {channels}: repair its pipeline.json"
            )
        meshes = (mesh_of(decoder, *points[i], mean, std) for i in items(points))
    save = {"glb": save_glb, "ply": save_ply}[args.format]
    for i, mesh in enumerate(meshes):
        path = Path(args.output) / f"{i:03d}.{args.format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(mesh, str(path))
        print(f"{path}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles")


def items(points):
    """The index of each item, alone.  -> tensors (1,)"""
    return torch.arange(len(points)).split(1)


@torch.no_grad()
def mesh_of(decoder, feats, coords, mean, std):
    """One object of the second stage as a Mesh on the CPU.  feats (n, C), coords (n, 4)."""
    x, coords = (feats * std + mean).to(device()), coords.to(device())
    features, fine = decoder(x, coords)
    mesh = extract(features, fine[:, 1:], 4 * decoder.config["resolution"])
    for name in ("vertices", "faces", "colours"):
        value = getattr(mesh, name)
        setattr(mesh, name, value if value is None else value.cpu())
    return mesh


def parse_args(argv):
    p = Parser(prog="python -m models.meshes", description=(__doc__ or "").partition("\n")[0])
    add = p.add_argument
    add("--teacher", help="TRELLIS's root, or its decoder; not needed with --voxels")
    source = p.add_mutually_exclusive_group(required=True)
    first = "safetensors file with x0 (N, 8, 16, 16, 16), samples of the first stage"
    source.add_argument("--structures", metavar="FILE", help=first)
    second = "safetensors file with coords, offsets and feats, samples of the second stage"
    source.add_argument("--points", metavar="FILE", help=second)
    add("--output", required=True, help="safetensors file for points, or folder for meshes")
    add("--format", choices=("glb", "ply"), default="glb", help="of meshes")
    add("--voxels", action="store_true", help="meshes of the voxels, without a decoder")
    return p.parse_args(argv)


def check_flags(args):
    """Raises UserError for flags that do not go together."""
    if args.voxels and args.structures:
        raise UserError(
            "--voxels is for --points: decode --structures to points first, then give these"
        )
    if args.teacher and args.voxels:
        raise UserError("--voxels needs no decoder: leave --teacher out")
    if not args.teacher and not args.voxels:
        raise UserError(
            "--teacher: give TRELLIS's root, or with --points leave it out for --voxels"
        )
    if args.structures and not args.output.endswith(".safetensors"):
        raise UserError(f"--output {args.output}: points go to FILE.safetensors, name such a file")


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    with writing(args.output, "name another"):
        decode_structures(args) if args.structures else decode_points(args)


if __name__ == "__main__":
    run_main(main, "give the command again")
