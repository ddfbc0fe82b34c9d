"""Triangle meshes as PLY and GLB, written by hand: what viewers and 3-D programs open.

PLY is binary, with z up and 8-bit colours. GLB is glTF 2.0 in one file, with y up as that format
demands, smooth normals, and colours in linear light.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F

from models.files import atomic_write


def vertex_normals(vertices, faces):
    """Unit normals: the sum of the triangles' around a vertex, by area.  (K, 3), (T, 3) -> (K, 3)

    Zero where there are no triangles.
    """
    a, b, c = vertices[faces].unbind(1)
    across = torch.linalg.cross(b - a, c - a)
    sums = torch.zeros_like(vertices).index_add(0, faces.flatten(), across.repeat_interleave(3, 0))
    return F.normalize(sums, dim=1)


def linear_light(colours):
    """sRGB in [0, 1] -> linear light in [0, 1]."""
    c = colours.clamp(0, 1)
    return torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def save_ply(mesh, path):
    """A Mesh as binary PLY, atomically."""
    kinds = [(axis, "<f4") for axis in "xyz"]
    lines = [f"property float {axis}" for axis in "xyz"]
    columns = [mesh.vertices]
    if mesh.colours is not None:
        kinds += [(name, "u1") for name in ("red", "green", "blue")]
        lines += [f"property uchar {name}" for name in ("red", "green", "blue")]
        columns.append((mesh.colours.clamp(0, 1) * 255).round())
    rows = np.zeros(len(mesh.vertices), kinds)
    for (name, _), column in zip(kinds, torch.cat(columns, dim=1).unbind(1)):
        rows[name] = column.numpy()
    faces = np.zeros(len(mesh.faces), [("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, mesh.faces.numpy()
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *lines]
    head += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    atomic_write(path, "\n".join([*head, ""]).encode() + rows.tobytes() + faces.tobytes())


def save_glb(mesh, path):
    """A Mesh as GLB, atomically. A mesh without triangles becomes a scene without objects."""
    scene = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{}]}
    body = b""
    if len(mesh.faces):
        described, body = buffers_of(mesh)
        primitive = {"attributes": {}, "indices": 0, "material": 0}
        primitive["attributes"] = {a: i for i, a in enumerate(described.pop("names")) if i}
        material = {"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}
        scene |= {"scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}], **described}
        scene |= {"meshes": [{"primitives": [primitive]}]}
        scene |= {"materials": [{**material, "doubleSided": True}]}
    text = json.dumps(scene).encode()
    chunks = [(b"JSON", text + b" " * (-len(text) % 4))]
    chunks += [(b"BIN\0", body)] if body else []
    data = b"".join(len(part).to_bytes(4, "little") + kind + part for kind, part in chunks)
    head = b"glTF" + (2).to_bytes(4, "little") + (12 + len(data)).to_bytes(4, "little")
    atomic_write(path, head + data)


FLOAT, UNSIGNED = 5126, 5125  # component types of glTF
VERTICES, INDICES = 34962, 34963  # what a view of the buffer is for


def buffers_of(mesh):
    """-> glTF's accessors, bufferViews and buffers, and "names", what each accessor is; the bytes.

    Every array is of 4-byte numbers, so that each begins at a multiple of four.
    """
    x, y, z = mesh.vertices.unbind(1)
    place = torch.stack([x, z, -y], dim=1)  # z up becomes y up
    arrays = {"indices": mesh.faces.flatten().numpy().astype("<u4"), "POSITION": place}
    arrays["NORMAL"] = vertex_normals(place, mesh.faces)
    if mesh.colours is not None:
        arrays["COLOR_0"] = linear_light(mesh.colours)
    views, accessors, body = [], [], b""
    for name, values in arrays.items():
        flat = name == "indices"
        values = values if flat else values.float().contiguous().numpy().astype("<f4")
        view = {"buffer": 0, "byteOffset": len(body), "byteLength": values.nbytes}
        views.append({**view, "target": INDICES if flat else VERTICES})
        kind = {"type": "SCALAR" if flat else "VEC3", "componentType": UNSIGNED if flat else FLOAT}
        accessors.append({"bufferView": len(accessors), "count": len(values), **kind})
        if name == "POSITION":
            accessors[-1] |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        body += values.tobytes()
    about = {"accessors": accessors, "bufferViews": views, "buffers": [{"byteLength": len(body)}]}
    return {**about, "names": list(arrays)}, body
