"""Drawing without OpenGL, on arrays of colours: VTK makes surfaces and sets type, numpy draws."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import vtkmodules.vtkRenderingFreeType  # noqa: F401  registers the text renderer
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkMath
from vtkmodules.vtkCommonDataModel import vtkImageData
from vtkmodules.vtkFiltersCore import vtkFlyingEdges3D
from vtkmodules.vtkRenderingCore import vtkTextProperty, vtkTextRenderer

from .files import check_room

Floats = NDArray[np.floating[Any]]  # pictures are [row, column, RGB] from 0 to 1, row 0 on top
Color = tuple[float, float, float]

INK = (0.93, 0.95, 0.97)  # of type
_CLOSEST, _FILLED = 80, 0.82  # mm across the canvas of surfaces at least; part of it that they fill
_EYE, _LIGHT = np.array([0, 0, 1]), np.array([-0.45, -0.6, 0.66])  # unit vectors, in the picture


class Facets(NamedTuple):
    """Triangles as seen by the viewer: x to the right, y down, z towards the viewer."""

    corners: Floats  # [triangle, corner, xyz] in mm or pixels
    normals: Floats  # [triangle, corner, xyz] unit vectors
    colors: Floats  # [triangle, RGB]


# ---- surfaces


def contour(field: Floats, level: float, spacing: Floats, origin: Floats) -> tuple[Any, Any, Any]:
    """Points [n, xyz] in mm, normals [n, xyz] and triangles [m, 3] of an isosurface; the field is [k, j, i]."""
    image = vtkImageData()
    image.SetDimensions(*field.shape[::-1])
    image.SetSpacing(*spacing[::-1])
    image.SetOrigin(*origin[::-1])
    image.GetPointData().SetScalars(numpy_to_vtk(field.ravel()))
    edges = vtkFlyingEdges3D()
    edges.SetInputData(image)
    edges.SetValue(0, level)
    edges.Update()
    surface = edges.GetOutput()
    return (
        vtk_to_numpy(surface.GetPoints().GetData()),
        vtk_to_numpy(surface.GetPointData().GetNormals()),
        vtk_to_numpy(surface.GetPolys().GetConnectivityArray()).reshape(-1, 3),
    )


def fit(parts: list[Facets], height: int, width: int) -> list[Facets]:
    """Millimetres to pixels: all in the middle of the canvas, at one scale."""
    low = np.min([part.corners.min(axis=(0, 1)) for part in parts], axis=0)
    high = np.max([part.corners.max(axis=(0, 1)) for part in parts], axis=0)
    scale = _FILLED * min(width / max(_CLOSEST, high[0] - low[0]), height / max(_CLOSEST, high[1] - low[1]))
    shift = np.array([width / 2, height / 2, 0]) - (low + high) / 2 * scale
    return [part._replace(corners=part.corners * scale + shift) for part in parts]


def render(parts: list[Facets], height: int, width: int) -> tuple[Floats, Floats]:
    """Colours [row, column, RGB] and depths [row, column] towards the viewer, -inf where there is no surface."""
    color, depth = np.zeros((height * width, 3)), np.full(height * width, -np.inf)
    if parts:
        corners, normals, colors = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        nearest = _nearest(corners, height, width)
        pixel = np.flatnonzero(nearest >= 0)
        facet = nearest[pixel]
        weights = _weights(corners[facet], pixel % width + 0.5, pixel // width + 0.5)
        depth[pixel] = np.einsum("cn,nc->n", weights, corners[facet, :, 2])
        shadow = _shadow(depth.reshape(height, width)).ravel()[pixel]
        color[pixel] = _shade(np.einsum("cn,ncx->nx", weights, normals[facet]), colors[facet], shadow)
    return color.reshape(height, width, 3), depth.reshape(height, width)


def _nearest(corners: Floats, height: int, width: int) -> NDArray[np.int64]:
    """Index of the triangle that the viewer sees in each pixel, -1 for none."""
    first = np.floor(corners[..., :2].min(axis=1)).astype(np.int64)
    size = (np.ceil(corners[..., :2].max(axis=1)).astype(np.int64) - first).max(axis=1)
    low, high = corners[..., 2].min(), corners[..., 2].max()
    seen = np.full(height * width, -1, np.int64)
    b, c = np.moveaxis(corners[:, 1:] - corners[:, :1], 1, 0)
    front = np.flatnonzero(b[:, 0] * c[:, 1] - b[:, 1] * c[:, 0] < -1e-9)  # the others face away
    order = front[size[front].argsort()]
    while order.size:  # in groups of like size, each triangle with the square of pixels that holds it
        side = int(size[order[min(len(order), 4096) - 1]])
        group, order = np.split(order, [max(1, min(4096, 2**20 // side**2))])
        side = int(size[group[-1]])
        x = first[group, 0, None, None] + np.arange(side)
        y = first[group, 1, None, None] + np.arange(side)[:, None]
        weights = _weights(corners[group, :, :, None, None], x + 0.5, y + 0.5)
        depth = sum(weight * corners[group, n, 2, None, None] for n, weight in enumerate(weights))
        rank = ((depth - low) / (high - low + 1e-6) * 2**30).astype(np.int64) << 32 | group[:, None, None]
        inside = np.min(weights, axis=0) >= -1e-5
        np.maximum.at(seen, (y * width + x)[inside], rank[inside])
    return np.where(seen >= 0, seen & (2**32 - 1), -1)


def _weights(corners: Floats, x: NDArray[Any], y: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """Barycentric coordinates of points in triangles [n, corner, xyz, ...]; negative outside."""
    a, b, c = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    x, y = x - a[:, 0], y - a[:, 1]
    area = b[:, 0] * c[:, 1] - b[:, 1] * c[:, 0]
    second, third = (x * c[:, 1] - y * c[:, 0]) / area, (y * b[:, 0] - x * b[:, 1]) / area
    return 1 - second - third, second, third


def _shadow(depth: Floats) -> Floats:
    """Light from 0 to 1 that is left where something nearby stands closer to the viewer."""
    depth = np.where(np.isfinite(depth), depth, depth[np.isfinite(depth)].min(initial=np.inf))
    light = np.ones_like(depth)
    for part in (0.008, 0.03):  # of the canvas
        radius = part * depth.shape[0]
        light *= np.exp(-0.6 * ((ndimage.gaussian_filter(depth, radius, truncate=2) - depth) / radius).clip(0, 1))
    return light


def _shade(normals: Floats, colors: Floats, light: Floats) -> Floats:
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-6)
    half = (_LIGHT + _EYE) / np.linalg.norm(_LIGHT + _EYE)
    diffuse = 0.24 + 0.36 * normals[:, 2].clip(0) + 0.52 * (normals @ _LIGHT).clip(0)
    gloss = 0.22 * (normals @ half).clip(0) ** 28
    return ((colors * diffuse[:, None] + gloss[:, None]) * light[:, None]).clip(0, 1)


# ---- colours, type and shapes


def lab(colors: ArrayLike) -> Floats:
    """CIELAB [n, L a b] of sRGB colours [n, RGB] from 0 to 255, under daylight (D65)."""
    values = np.array(colors) / 255
    for value in values:
        vtkMath.RGBToLab(value, value)
    return values


def draw_text(
    image: Floats,
    row: int,
    column: int,
    text: str,
    size: int,
    color: Color = INK,
    align: str = "left",
    *,
    bold: bool = False,
    room: float = np.inf,
) -> int:
    """Sets one line that is centred on `row`, shortened to `room` pixels; returns its width."""
    alpha = _glyphs(text, size, bold)
    while alpha.shape[1] > room and text:
        text = text.rstrip("…")[:-1].rstrip() + "…"
        alpha = _glyphs(text, size, bold)
    height, width = alpha.shape
    row, column = row - height // 2, column - {"left": 0, "center": width // 2, "right": width}[align]
    spot = image[row - 3 : row + height + 3, column - 3 : column + width + 3]
    alpha = np.pad(alpha, 3)
    blend(spot, np.zeros(3), (2 * ndimage.gaussian_filter(alpha, 1.2)).clip(0, 0.8))  # readable on white
    blend(spot, np.array(color), alpha)
    return width


def _glyphs(text: str, size: int, bold: bool) -> Floats:
    """Coverage [row, column] of a line of Arial."""
    style = vtkTextProperty()
    style.SetFontSize(size)
    style.SetBold(bold)
    image = vtkImageData()
    renderer = vtkTextRenderer.GetInstance()
    renderer.SetScaleToPowerOfTwo(False)
    if not text.strip() or not renderer.RenderString(style, text, image, [0, 0], 72):
        return np.zeros((1, 1))
    width, height, _ = image.GetDimensions()
    return vtk_to_numpy(image.GetPointData().GetScalars())[:, 3].reshape(height, width)[::-1] / 255


def draw_dot(image: Floats, row: int, column: int, radius: float, color: tuple[int, int, int]) -> None:
    """Fills a disc with a colour from 0 to 255."""
    reach = int(radius) + 2
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    square = image[row - reach : row + reach + 1, column - reach : column + reach + 1]
    blend(square, np.array(color) / 255, (radius + 0.5 - np.hypot(y, x)).clip(0, 1))


def resize(image: Floats, shape: Sequence[int], order: int) -> Floats:
    """Interpolates an array of any dimension to another shape; `order` is that of the spline."""
    ratio = np.array(shape) / image.shape
    image = ndimage.gaussian_filter(image, np.maximum(0, (1 / ratio - 1) / 2))  # what is made smaller
    return np.asarray(ndimage.zoom(image, ratio, order=order, mode="nearest", grid_mode=True))


def blend(image: Floats, color: NDArray[Any], alpha: NDArray[Any]) -> None:
    """Lays a colour, or a picture of colours, over `image` in place; alpha [row, column] is from 0 to 1."""
    image += (color - image) * alpha[..., None]


def write_png(path: os.PathLike[str], picture: Floats) -> None:
    """Writes colours from 0 to 1 with 8 bits each.

    Raises:
        OSError: The file cannot be written.
    """
    image = sitk.GetImageFromArray((picture * 255 + 0.5).astype(np.uint8), isVector=True)
    try:
        sitk.WriteImage(image, os.fspath(path), useCompression=True)
    except RuntimeError as error:
        check_room(path)
        raise OSError(f"Cannot write {path}.") from error
