"""FlexiCubes (2308.05371): a signed distance on a grid, with weights, becomes a triangle mesh.

The surface crosses the edges of a cube whose corners differ in sign. The crossings of a cube fall
into one or more closed curves on its faces, and the mesh has one vertex for each of these: a
weighted mean of its crossings. Four cubes share an edge; their vertices are the corners of a quad,
which is cut into two triangles.

    mesh = extract(features, coords, 256)        # of models/networks/trellis_mesh.py, one sample
    mesh = voxel_mesh(coords, 64)                # without a decoder: the faces of the voxels

    paper       here                  meaning                                           shape
    s, x        distance, place       at a corner of the grid; negative is inside       (V,), (V, 3)
    alpha       alpha                 weight of a corner within its cube, in (0, 2)     (N, 8)
    beta        beta                  weight of a crossing in its cube's vertex         (N, 12)
    gamma       gamma                 of a cube: which diagonal cuts a quad             (N,)
    u_e         crossing              where the surface meets an edge                   (M, 3)
    v_d         vertices              a mean of crossings                               (K, 3)

Only cubes near the given ones are looked at: everywhere else the distance is 1, the weights are 0
before their tanh, and the colour is grey, as in TRELLIS. Corners, edges and their order are those
of TRELLIS's decoder; which crossings belong together is worked out here from the faces
(`curves_of_cases`) and equals the table of the authors' code.
"""

import functools
from dataclasses import dataclass

import torch

# The corners of a cube, and its edges as pairs of them.
CORNERS = torch.tensor(
    [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]
)
EDGES = torch.tensor(
    [[0, 1], [1, 5], [4, 5], [0, 4], [2, 3], [3, 7], [6, 7], [2, 6], [2, 0], [3, 1], [7, 5], [6, 4]]
)
AXIS = (CORNERS[EDGES[:, 0]] - CORNERS[EDGES[:, 1]]).abs().argmax(1)  # of each edge
LOWER = torch.minimum(CORNERS[EDGES[:, 0]], CORNERS[EDGES[:, 1]])  # its lower end, (12, 3)
WEIGHT_SCALE = 0.99  # weights are 1 +- this, and so never 0


@dataclass
class Mesh:
    """A triangle mesh in [-.5, .5]^3, z up. Triangles are counter-clockwise seen from outside."""

    vertices: torch.Tensor  # (K, 3) float32
    faces: torch.Tensor  # (T, 3) int64
    colours: torch.Tensor | None = None  # (K, 3) in [0, 1], as screens have them (sRGB)


# ---- which crossings belong to one vertex --------------------------------------------------------


@functools.cache
def curves_of_cases():
    """For each of the 256 signs of a cube: which curve each edge's crossing is on, -1 for none.

    -> curve (256, 12); twice (256, 3): the step to the neighbour through the face that one curve
    crosses twice, zero if there is none. Case: the sum of 2^i over the negative corners i. Where
    two opposite corners of a face are negative and two are not, the curves cut off the negative
    ones. The vertex of a curve that comes twice through such a face can meet another such vertex
    from its other side; see `cases_of`.
    """
    curve, twice = torch.full((256, 12), -1), torch.zeros(256, 3, dtype=torch.long)
    for case in range(256):
        inside = [bool(case >> i & 1) for i in range(8)]
        faces = {side: arcs_on_face(inside, *side) for side in SIDES}
        number, left = {}, {e for arcs in faces.values() for arc in arcs for e in arc}
        while left:  # follow the arcs of the faces from crossing to crossing
            found, front = set(), {min(left)}
            while front:
                found |= front
                linked = {e for arcs in faces.values() for a in arcs if front & {*a} for e in a}
                front = linked - found
            number |= dict.fromkeys(found, len(set(number.values())))
            left -= found
        for e, n in number.items():
            curve[case, e] = n
        for (axis, end), arcs in faces.items():
            if len(arcs) == 2 and number[arcs[0][0]] == number[arcs[1][0]]:
                twice[case, axis] = 2 * end - 1
    return curve, twice


SIDES = [(axis, end) for axis in range(3) for end in range(2)]  # the faces of a cube


def arcs_on_face(inside, axis, end):
    """Pairs of crossed edges that a curve joins across a face.  inside: 8 bools -> [(e, e), ...]"""
    on_face = [i for i in range(8) if CORNERS[i, axis] == end]
    edges = [e for e, pair in enumerate(EDGES.tolist()) if {*pair} <= {*on_face}]
    crossed = [e for e in edges if inside[EDGES[e, 0]] != inside[EDGES[e, 1]]]
    if len(crossed) < 4:
        return [tuple(crossed)] if crossed else []
    corners = [i for i in on_face if inside[i]]  # two, opposite each other: cut off each
    return [tuple(e for e in crossed if i in EDGES[e].tolist()) for i in corners]


def cases_of(inside, cubes, resolution):
    """The case of each cube.  inside (N, 8) bool, cubes (N, 3) -> (N,) int64.

    Where two cubes share a face that a curve of either crosses twice, the mesh would have an edge
    with four triangles. Both take the case of opposite signs, which joins what was cut off there.
    """
    _, twice = (table.to(cubes.device) for table in curves_of_cases())
    case = (inside.long() << torch.arange(8, device=cubes.device)).sum(1)
    step = twice[case]
    key, order = key_of(cubes, resolution + 2).sort()
    wanted = key_of(cubes + step, resolution + 2)
    at = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
    mutual = (key[at] == wanted) & (step[order[at]] == -step).all(1) & step.any(1)
    return torch.where(mutual, 255 - case, case)


# ---- from features to a mesh ---------------------------------------------------------------------


def key_of(place, side):
    """One number for each place (..., 3), from -1 up to side - 2 -> (...) int64."""
    x, y, z = (place + 1).unbind(-1)
    return (x * side + y) * side + z


def look_up(keys, values, wanted, default):
    """Rows of values (M, C) whose keys (M,), sorted, are wanted (...); default (C,) elsewhere."""
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    there = keys[at] == wanted
    return torch.where(there[..., None], values[at], default)


def extract(features, coords, resolution):
    """The mesh of one object.  -> Mesh, without vertices where nothing is inside.

    features (N, 53), or (N, 101) with colour, and coords (N, 3) int: of its voxels in a grid of
    resolution^3, as SLatMeshDecoder gives them.
    """
    features, coords, R = features.float(), coords.long(), resolution
    side, device = R + 3, coords.device
    corners = CORNERS.to(device)
    distance = features[:, :8, None] - 1 / R
    others = [features[:, 8:32].unflatten(1, (8, 3))]
    if features.shape[1] > 53:
        others.append(features[:, 32:80].unflatten(1, (8, 6)))
    per_corner = torch.cat([distance, *others], dim=2)  # (N, 8, 4 or 10)
    around = key_of(coords[:, None] + corners, side)  # (N, 8)
    keys, inverse = around.unique(return_inverse=True)
    count = inverse.flatten().bincount()[:, None]
    sums = per_corner.new_zeros(len(keys), per_corner.shape[2])
    values = sums.index_add(0, inverse.flatten(), per_corner.flatten(0, 1)) / count
    cubes = cubes_around(keys[values[:, 0] < 0], side, R)
    outside = values.new_zeros(values.shape[1])
    outside[0] = 1
    at_corners = look_up(keys, values, key_of(cubes[:, None] + corners, side), outside)
    inside = at_corners[..., 0] < 0  # (N', 8)
    surface = inside.any(1) & ~inside.all(1)
    cubes, inside, at_corners = cubes[surface], inside[surface], at_corners[surface]
    if not len(cubes):
        return Mesh(values.new_zeros(0, 3), coords.new_zeros(0, 3))
    voxel, order = key_of(coords, side).sort()
    weights = features[order, -21:]
    weights = look_up(voxel, weights, key_of(cubes, side), weights.new_zeros(21))
    return dual_mesh(cubes, inside, at_corners, weights, R)


def cubes_around(keys, side, resolution):
    """The cubes that touch corners with these keys, within the grid.  -> (N, 3) int64, sorted."""
    place = torch.stack([keys // side**2, keys // side % side, keys % side], dim=1) - 1
    near = (place[:, None] - CORNERS.to(keys.device)).flatten(0, 1)
    near = near[((near >= 0) & (near < resolution)).all(1)]
    return near.unique(dim=0)


def dual_mesh(cubes, inside, at_corners, weights, resolution):
    """Vertices and triangles of the cubes that the surface crosses.  -> Mesh

    cubes (N, 3) int64; inside (N, 8) bool; at_corners (N, 8, 4 or 10): distance, displacement and
    colour; weights (N, 21), before tanh.
    """
    R, device = resolution, cubes.device
    corners, edges = CORNERS.to(device), EDGES.to(device)
    beta, alpha = weights[:, :20].tanh().mul(WEIGHT_SCALE).add(1).split((12, 8), dim=1)
    gamma = weights[:, 20].sigmoid() * WEIGHT_SCALE + (1 - WEIGHT_SCALE) / 2
    moved = at_corners[..., 1:4].tanh() * (1 - 1e-8) / (2 * R)
    place = (cubes[:, None] + corners) / R - 0.5 + moved  # (N, 8, 3)
    values = torch.cat([place, at_corners[..., 4:].sigmoid()], dim=2)
    curve = curves_of_cases()[0].to(device)[cases_of(inside, cubes, R)]  # (N, 12)
    first = (curve.amax(1) + 1).cumsum(0) - curve.amax(1) - 1  # vertices of the cubes before

    cube, edge = (curve >= 0).nonzero(as_tuple=True)  # (M,): each crossing of each cube
    vertex = first[cube] + curve[cube, edge]
    a, b = edges[edge].unbind(1)
    s_a, s_b = (at_corners[cube, end, 0] * alpha[cube, end] for end in (a, b))
    share = (s_b / (s_b - s_a))[:, None]  # of end a
    crossing = share * values[cube, a] + (1 - share) * values[cube, b]
    w = beta[cube, edge][:, None]
    sums = values.new_zeros(int(vertex.max()) + 1, values.shape[2] + 1)
    sums = sums.index_add(0, vertex, torch.cat([w * crossing, w], dim=1))
    vertices = sums[:, :-1] / sums[:, -1:]
    faces = triangles(cubes, cube, edge, vertex, inside[cube, a], gamma, R)
    colours = vertices[:, 3:6].contiguous() if vertices.shape[1] > 3 else None
    return Mesh(vertices[:, :3].contiguous(), faces, colours)


def triangles(cubes, cube, edge, vertex, a_inside, gamma, resolution):
    """Two triangles for each crossed edge of the grid that four cubes share.  -> (T, 3) int64

    cube, edge, vertex (M,): each crossing of each cube; a_inside (M,): whether the edge's first end
    is inside. At the border of the grid an edge has fewer cubes, and no triangles.
    """
    device = cubes.device
    axis, low = AXIS.to(device)[edge], LOWER.to(device)[edge]
    key = key_of(cubes[cube] + low, resolution + 3) * 3 + axis
    # The four cubes around an edge, counter-clockwise as its axis comes towards the eye: by the
    # edge's place within the cube along the next two axes, (0, 0), (1, 0), (1, 1), (0, 1).
    p, q = (low.gather(1, ((axis + i) % 3)[:, None])[:, 0] for i in (1, 2))
    turn = torch.tensor([[0, 3], [1, 2]], device=device)[p, q]
    key, order = (key * 4 + turn).sort()
    _, count = (key // 4).unique_consecutive(return_counts=True)
    order = order[count.repeat_interleave(count) == 4].view(-1, 4)
    quad, g = vertex[order], gamma[cube[order]]
    # The normal leads along the axis where the edge's lower end is inside.
    a_low = CORNERS.to(device)[EDGES.to(device)[edge, 0]].gather(1, axis[:, None])[:, 0] == 0
    along = (a_inside == a_low)[order[:, 0]]
    quad, g = (torch.where(along[:, None], x, x.flip(1)) for x in (quad, g))
    one = g[:, 0] * g[:, 2] > g[:, 1] * g[:, 3]
    cuts = torch.tensor([[0, 1, 3, 3, 1, 2], [0, 1, 2, 0, 2, 3]], device=device)
    split = cuts[one.long()]
    return quad.gather(1, split).view(-1, 3)


# ---- without a decoder ---------------------------------------------------------------------------


def voxel_mesh(coords, resolution):
    """The outer faces of voxels as a mesh.  coords (N, 3) int in 0..resolution-1 -> Mesh"""
    coords, device = coords.long(), coords.device
    side, key = resolution + 3, key_of(coords, resolution + 3).sort()[0]
    found = []
    for axis in range(3):
        for end in range(2):
            step = torch.zeros(3, dtype=torch.long, device=device)
            step[axis] = 2 * end - 1
            wanted = key_of(coords + step, side)
            at = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
            free = coords[key[at] != wanted]
            corner = torch.zeros(4, 3, dtype=torch.long, device=device)
            corner[:, axis] = end
            corner[1:3, (axis + 1) % 3] = 1  # counter-clockwise as the axis comes towards the eye
            corner[2:4, (axis + 2) % 3] = 1
            quad = free[:, None] + (corner if end else corner.flip(0))
            found.append(quad)
    place = torch.cat(found)  # (Q, 4, 3)
    keys, quad = key_of(place, side).unique(return_inverse=True)
    vertices = torch.stack([keys // side**2, keys // side % side, keys % side], dim=1) - 1
    faces = quad[:, [0, 1, 2, 0, 2, 3]].view(-1, 3)
    return Mesh(vertices / resolution - 0.5, faces)
