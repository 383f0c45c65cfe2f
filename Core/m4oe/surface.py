"""Distances between the surfaces of two masks, in mm.

A surface is made of surfels: every cube of 2 x 2 x 2 neighbouring voxels that lie partly inside the mask has one at its
centre, whose area is that of the marching cubes' triangles in it (Lorensen and Cline, 1987). That is the definition of
Nikolov et al. (Clinically applicable segmentation of head and neck anatomy, 2021, J Med Internet Res 23:e26151) and of
the challenges that score with their package surface-distance. Outside of its array a mask is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

_Floats = NDArray[np.float64]
_ROUNDING_MM = 1e-4  # a step of 3 mm that a header rounds to 3.00001 mm is within a tolerance of 3 mm


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """How far every surfel of a mask lies from the other mask's surface.

    Attributes:
        mm: Distance of each surfel, of either mask: two arrays.
        areas: Its area in mm², in the same order.
    """

    mm: tuple[_Floats, _Floats]
    areas: tuple[_Floats, _Floats]

    def dice(self, tolerance_mm: float) -> float:
        """Normalised surface Dice: the part of both surfaces that lies within `tolerance_mm` of the other one."""
        near = sum(area[mm <= tolerance_mm + _ROUNDING_MM].sum() for mm, area in zip(self.mm, self.areas, strict=True))
        return float(near / sum(area.sum() for area in self.areas))

    def hausdorff(self, share: float = 0.95) -> float:
        """The distance in mm that this share of either surface's area does not exceed; the larger of the two."""
        return max(_quantile(mm, area, share) for mm, area in zip(self.mm, self.areas, strict=True))


def surface_distances(first: NDArray[np.bool_], second: NDArray[np.bool_], steps: _Floats) -> SurfaceDistances:
    """Measures from each surface to the other one.

    Args:
        first: Mask [k, j, i] with at least one voxel.
        second: Another one, on the same grid.
        steps: Columns [3, 3] that lead from voxel to voxel along i, j and k, in mm; of any direction.
    """
    surfels = [_surfels(mask, steps) for mask in (first, second)]
    # Points of a lattice need no balanced tree, which takes longer to build and far longer where surfaces lie apart.
    trees = [KDTree(points, balanced_tree=False, compact_nodes=False) for points, _ in surfels]
    to_second, to_first = trees[1].query(surfels[0][0])[0], trees[0].query(surfels[1][0])[0]
    return SurfaceDistances((to_second, to_first), (surfels[0][1], surfels[1][1]))


def _surfels(mask: NDArray[np.bool_], steps: _Floats) -> tuple[_Floats, _Floats]:
    """Places [n, 3] in mm and areas [n] in mm² of a mask's surfels."""
    codes: NDArray[Any] = np.pad(mask, 1).view(np.uint8)  # bit 4 k + 2 j + i: whether the neighbour (k, j, i) is inside
    codes = codes[..., :-1] | codes[..., 1:] << 1
    codes = codes[:, :-1] | codes[:, 1:] << 2
    codes = codes[:-1] | codes[1:] << 4
    flat = np.flatnonzero(codes + np.uint8(1) > 1)  # neither none (0) nor all (255, and 255 + 1 is 0) are inside
    indices_kji = np.stack(np.unravel_index(flat, codes.shape), axis=1)
    return indices_kji[:, ::-1] @ steps.T, _areas(steps)[codes.reshape(-1)[flat]]


def _areas(steps: _Floats) -> _Floats:
    """Surfel area [256] in mm² by code."""
    cofactors = np.linalg.det(steps) * np.linalg.inv(steps)  # what maps area vectors, transposed
    return np.linalg.norm(_triangles() @ cofactors, axis=-1).sum(axis=-1)


@cache
def _triangles() -> _Floats:
    """Area vectors [256, 4, 3] along (i, j, k), in voxels, of the triangles that each code has; the others are zero.

    Where more than half of the neighbours are inside, the triangles are those of the inverse code: the original's
    fifteen cases, for which VTK has more.
    """
    vectors = np.zeros((256, 4, 3))
    for code in range(128):
        inside = bin(code).count("1") <= 4
        triangles = _marching_cubes(code if inside else 255 - code)
        vectors[code, : len(triangles)] = vectors[255 - code, : len(triangles)] = triangles
    return vectors


def _marching_cubes(code: int) -> _Floats:
    """Area vectors [triangles, 3] along (i, j, k) of one cube."""
    from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersCore import vtkMarchingCubes

    corners = np.unpackbits(np.uint8(code), bitorder="little")
    cube = vtkImageData()
    cube.SetDimensions(2, 2, 2)
    cube.GetPointData().SetScalars(numpy_to_vtk(corners))
    contour = vtkMarchingCubes()
    contour.SetInputData(cube)
    contour.SetValue(0, 0.5)
    contour.Update()
    mesh = contour.GetOutput()
    if not mesh.GetNumberOfPolys():
        return np.zeros((0, 3))
    places = vtk_to_numpy(mesh.GetPoints().GetData()).astype(np.float64)
    a, b, c = places[vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).reshape(-1, 3)].swapaxes(0, 1)
    return np.cross(b - a, c - a) / 2


def _quantile(mm: _Floats, areas: _Floats, share: float) -> float:
    order = np.argsort(mm)
    covered = np.cumsum(areas[order])
    return float(mm[order[np.searchsorted(covered, share * covered[-1])]])
