from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from m4oe.raster import Facets, blend, contour, draw_text, fit, lab, render, resize, write_png


def square(left: float, right: float, depth: float, color: tuple[float, float, float]) -> Facets:
    """Two triangles that face the viewer, between two columns of a canvas of 40 x 40 pixels."""
    a, b, c, d = ([x, y, depth] for x, y in ((left, 5), (left, 35), (right, 35), (right, 5)))
    corners = np.array([[a, b, c], [a, c, d]], float)
    return Facets(corners, np.broadcast_to([0.0, 0.0, 1.0], corners.shape), np.array([color, color]))


@pytest.mark.parametrize(
    ("rgb", "expected"),  # Lindbloom, sRGB under D65
    [
        ((255, 255, 255), (100, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_lab_is_cielab(rgb: tuple[int, int, int], expected: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(lab([rgb, rgb]), [expected, expected], atol=0.1)


def test_a_png_holds_the_picture(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).random((5, 7, 3), np.float32)
    write_png(tmp_path / "a.png", picture)
    read = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.png")))
    np.testing.assert_array_equal(read, np.rint(picture * 255))


def test_a_png_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Cannot write"):
        write_png(tmp_path / "nowhere" / "a.png", np.zeros((5, 7, 3)))


def test_text_is_shortened_to_its_room() -> None:
    image = np.zeros((40, 400, 3))
    whole = draw_text(image, 20, 10, "Inferior vena cava", 16)
    assert 50 < whole < 300
    assert image[:, 10 : 10 + whole].max() > 0.8
    assert 20 < draw_text(image, 20, 10, "Inferior vena cava", 16, room=60) <= 60


def test_text_is_aligned_to_its_column() -> None:
    image = np.zeros((40, 400, 3))
    width = draw_text(image, 20, 390, "Liver", 16, align="right")
    columns = np.flatnonzero(image.max(axis=(0, 2)) > 0.5)
    assert 390 - width <= columns[0]
    assert columns[-1] < 390


def test_blend_lays_a_colour_over_a_picture() -> None:
    image = np.full((1, 2, 3), 0.2)
    blend(image, np.array([1.0, 0.5, 0.0]), np.array([[0.0, 0.5]]))
    np.testing.assert_allclose(image, [[[0.2, 0.2, 0.2], [0.6, 0.35, 0.1]]])


def test_resize_keeps_a_ramp() -> None:
    ramp = np.broadcast_to(np.arange(8.0), (3, 8))
    larger = resize(ramp, (6, 32), order=1)
    np.testing.assert_allclose(larger[2, 4:28], (np.arange(4, 28) + 0.5) / 4 - 0.5, atol=1e-6)


def test_the_contour_of_a_ball_is_a_sphere_with_normals_outwards() -> None:
    spacing, centre = np.array([2.0, 1.0, 0.5]), np.array([3.0, -4.0, 5.0])  # k, j, i in mm
    k, j, i = np.indices((20, 40, 80))
    mm = np.stack([k, j, i], axis=-1) * spacing - (20, 20, 20)
    field = (10 - np.linalg.norm(mm, axis=-1)).astype(np.float32)
    points, normals, triangles = contour(field, 0.0, spacing, centre - 20)
    out = points - centre[::-1]
    radius = np.linalg.norm(out, axis=1)
    np.testing.assert_allclose(radius, 10, atol=0.15)
    assert ((normals * out).sum(axis=1) / radius).min() > 0.95
    assert triangles.max() == len(points) - 1


def test_what_is_nearer_hides_what_is_behind() -> None:
    red, green = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    color, depth = render([square(5, 25, 7.0, red), square(15, 35, 9.0, green)], 40, 40)
    assert color[20, 10].argmax() == 0
    assert color[20, 20].argmax() == 1
    np.testing.assert_allclose(depth[20, [10, 20, 30]], [7, 9, 9])
    assert np.isinf(depth[2, 2])


def test_nothing_to_render_is_no_surface() -> None:
    assert np.isinf(render([], 4, 5)[1]).all()


def test_surfaces_fill_the_canvas_but_not_to_the_edge() -> None:
    (part,) = fit([square(-300, 700, 0.0, (1, 1, 1))], 200, 400)
    x = part.corners[..., 0]
    assert 0 < x.min() < 50
    assert x.max() == pytest.approx(400 - x.min())
