"""Where voxels lie in the patient: a Grid maps voxel (i, j, k) to RAS mm, a Volume is an array on a grid.

Arrays are always indexed [k, j, i]. Axes are three letters that name the directions in which i, j and k grow:
"LPS" means i towards left, j towards posterior, k towards superior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CANONICAL_AXES = "LPS"  # the order in which the network sees a volume
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
_LETTERS = (("R", "L"), ("A", "P"), ("S", "I"))  # positive and negative direction of the RAS axes
_SINGULAR = 1e-6  # determinant of the unit columns; three columns this flat span no volume
_CLOSE = 0.01  # grids that differ by less than this part of a voxel are the same grid


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular lattice of voxels in patient space.

    Attributes:
        shape: Number of voxels along (k, j, i), each at least 1.
        affine: Read-only float64 [4, 4], voxel (i, j, k) to RAS mm. May be oblique, mirrored or sheared.

    Raises:
        ValueError: The shape is empty, or the affine is not finite, has a zero column or is singular.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"A grid needs three sizes (k, j, i) of at least 1, got {shape}.")
        affine = np.array(self.affine, dtype=np.float64)
        _check_affine(affine)
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between voxel centres along (i, j, k) in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def direction(self) -> NDArray[np.float64]:
        """Unit vectors of i, j, k in RAS as the columns of a [3, 3] matrix."""
        return self.affine[:3, :3] / np.asarray(self.spacing)

    @property
    def axes(self) -> str:
        """Nearest axis order, such as "LPS"."""
        direction = self.direction
        order = max(permutations(range(3)), key=lambda rows: sum(abs(direction[rows[n], n]) for n in range(3)))
        return "".join(_LETTERS[row][int(direction[row, n] < 0)] for n, row in enumerate(order))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in mL."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    def is_close(self, other: Grid) -> bool:
        """Whether both grids have one shape and no corner lies more than 1 % of a voxel apart."""
        if self.shape != other.shape:
            return False
        last = np.array(self.shape[::-1]) - 1
        corners = np.array([(*(last * corner), 1) for corner in product((0, 1), repeat=3)])
        apart = np.linalg.norm(corners @ (self.affine - other.affine)[:3].T, axis=1)
        return bool(apart.max() <= _CLOSE * min(self.spacing))

    def to_axes(self, axes: str = "LPS") -> Grid:
        """The same voxels with i, j, k permuted and flipped so that the nearest axis order is `axes`.

        Raises:
            ValueError: `axes` is not one letter each of R/L, A/P and S/I.
        """
        affine, shape = np.array(self.affine), self.shape[::-1]
        moves = _moves(self.axes, axes)
        for n, (source, flip) in enumerate(moves):
            column = self.affine[:, source]
            affine[:, n] = -column if flip else column
            if flip:
                affine[:, 3] += (shape[source] - 1) * column
        i, j, k = (shape[move.source] for move in moves)
        return Grid((k, j, i), affine)


@dataclass(frozen=True, eq=False)
class Volume:
    """An array with its geometry.

    Attributes:
        array: Voxels [k, j, i] in their own type.
        grid: Where they lie.
        name: For messages and file names.
        modality: "CT" or "MR" when the source says so.
        warnings: What the reader had to assume, one sentence each.

    Raises:
        ValueError: The array's shape is not the grid's.
    """

    array: NDArray[Any]
    grid: Grid
    name: str = ""
    modality: str | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.array.shape != self.grid.shape:
            raise ValueError(f"The array's shape {self.array.shape} is not the grid's {self.grid.shape} (k, j, i).")

    def to_axes(self, axes: str = "LPS") -> Volume:
        """A view of the same voxels in another axis order, permuted and flipped, never interpolated.

        The inverse is exact: `Volume(labels.to_axes(grid.axes).array, grid)`.

        Raises:
            ValueError: `axes` is not one letter each of R/L, A/P and S/I.
        """
        moves = _moves(self.grid.axes, axes)[::-1]  # array axes run k, j, i
        array = self.array.transpose([2 - move.source for move in moves])
        array = array[tuple(slice(None, None, -1 if move.flip else 1) for move in moves)]
        return replace(self, array=array, grid=self.grid.to_axes(axes))


def pack_volume(volume: Volume) -> tuple[dict[str, Any], memoryview]:
    """All of a volume but its voxels, as JSON takes it, and the bytes of its voxels: its own where they lie in order.

    Raises:
        ValueError: The voxels are no numbers.
    """
    array = np.ascontiguousarray(volume.array)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{volume.name or 'the volume'} has voxels of type {array.dtype}, expected whole or floating-point numbers"
        )
    header = {
        "dtype": array.dtype.str,
        "shape": array.shape,
        "affine": volume.grid.affine.tolist(),
        "name": volume.name,
        "modality": volume.modality,
        "warnings": volume.warnings,
    }
    return header, array.reshape(-1).view(np.uint8).data


def unpack_volume(header: dict[str, Any], data: bytes | bytearray | memoryview) -> Volume:
    """The volume that `pack_volume` took apart; its array is a view of `data`.

    Raises:
        ValueError: Header and data do not fit each other.
    """
    array = np.frombuffer(data, np.dtype(header["dtype"])).reshape(header["shape"])
    grid = Grid(array.shape, np.array(header["affine"]))
    return Volume(array, grid, header["name"], header["modality"], tuple(header["warnings"]))


def nearest_rotation(direction: ArrayLike) -> NDArray[np.float64]:
    """The orthonormal [3, 3] matrix nearest to `direction` (least squares), of the same handedness."""
    left, _, right = np.linalg.svd(np.asarray(direction, dtype=np.float64))
    return left @ right


def foreground_box(labels: NDArray[Any]) -> tuple[slice, slice, slice] | None:
    """The smallest box [k, j, i] around all voxels that are not zero, or None where all are.

    Args:
        labels: Whole numbers from 0, or booleans, in any memory order.
    """
    slices = np.flatnonzero(labels.any(axis=(1, 2)))
    if slices.size == 0:
        return None
    plane = labels[slices[0] : slices[-1] + 1].max(axis=0)
    rows, columns = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
    k, j, i = (slice(int(hits[0]), int(hits[-1]) + 1) for hits in (slices, rows, columns))
    return k, j, i


def label_intensities(labels: NDArray[Any], image: NDArray[Any]) -> dict[int, tuple[float, float]]:
    """Mean and standard deviation of an image, by label; voxels that are no finite number do not count.

    Args:
        labels: uint8 [k, j, i], 0 is background.
        image: Of the same shape, any type.
    """
    sums = np.zeros((3, 256))  # voxels, values, squares
    for plane, values in zip(labels, image, strict=True):
        inside = (plane > 0) & np.isfinite(values)
        found, chosen = plane[inside], values[inside].astype(np.float64)
        for row, weights in zip(sums, (None, chosen, chosen**2), strict=True):
            row += np.bincount(found, weights, 256)
    count, total, squares = sums[:, sums[0] > 0]
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    present = np.flatnonzero(sums[0]).tolist()
    return {label: (float(m), float(d)) for label, m, d in zip(present, mean, deviation, strict=True)}


class _Move(NamedTuple):
    source: int  # voxel axis (0 = i) that the new axis comes from
    flip: bool


def _moves(current: str, wanted: str) -> list[_Move]:
    sources = [_ras_axis(letter) for letter in current]
    targets = [_ras_axis(letter) for letter in wanted]
    if sorted(targets) != [0, 1, 2]:
        raise ValueError(f'Axes must be one letter each of R/L, A/P and S/I, such as "LPS", got {wanted!r}.')
    order = [sources.index(target) for target in targets]
    return [_Move(source, current[source] != letter) for source, letter in zip(order, wanted, strict=True)]


def _ras_axis(letter: str) -> int:
    return next((axis for axis, letters in enumerate(_LETTERS) if letter in letters), -1)


def _check_affine(affine: NDArray[np.float64]) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(f"An affine must be 4 x 4 finite numbers, got {affine.tolist()}.")
    if not np.array_equal(affine[3], (0, 0, 0, 1)):
        raise ValueError(f"The last row of an affine must be 0 0 0 1, got {affine[3].tolist()}.")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not spacing.all():
        raise ValueError(
            f"Voxel spacing must be above zero, got {' x '.join(f'{mm:g}' for mm in spacing)} mm (i, j, k)."
        )
    if abs(math.prod(np.linalg.svd(affine[:3, :3] / spacing, compute_uv=False))) < _SINGULAR:
        raise ValueError("The three axes of the affine lie in one plane: the image has no volume.")
