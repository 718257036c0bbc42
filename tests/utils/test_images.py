"""PNG files and grids."""

import pytest
import torch

from k_diffusion.utils.images import image_grid, load_png, save_png, to_float, to_uint8


def test_every_pixel_value_survives_both_ways() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).min() == -1
    assert to_float(values).max() == 1


def test_rounds_to_the_nearest_value_and_clips() -> None:
    given = torch.tensor([-3.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.0, 1.2])
    assert to_uint8(given).tolist() == [0, 0, 1, 128, 255]


def test_refuses_what_has_no_pixel() -> None:
    with pytest.raises(ValueError, match=r"2 of 3 values that are not finite"):
        to_uint8(torch.tensor([0.0, torch.nan, torch.inf]))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        to_uint8(torch.tensor([1, 2]))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_file_gives_back_pixels_and_text(tmp_path, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (channels, 5, 7), generator=generator).to(torch.uint8)
    text = {"seed": 7, "sampler": "dpmpp_2m", "note": "größer → 12 \n zweite Zeile"}
    save_png(tmp_path / "a.png", image, text)
    back, said = load_png(tmp_path / "a.png")
    assert torch.equal(back, image)
    assert said == {key: str(value) for key, value in text.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    from PIL.Image import Image

    path = tmp_path / "a.png"
    save_png(path, torch.zeros(1, 4, 4))
    before = path.read_bytes()

    def half(self, name, **_) -> None:
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, torch.ones(1, 4, 4))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_refuses_shapes_and_keywords_that_a_png_cannot_hold(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 4, 4\)"):
        save_png(tmp_path / "a.png", torch.zeros(5, 4, 4))
    with pytest.raises(ValueError, match="80 characters"):
        save_png(tmp_path / "a.png", torch.zeros(1, 4, 4), {"k" * 80: 1})
    assert not list(tmp_path.iterdir())


def test_a_grid_without_names_places_every_pixel() -> None:
    images = torch.arange(5).float().view(5, 1, 1, 1).expand(5, 3, 2, 4) / 10
    grid = image_grid(images, columns=3, gap=1, scale=2)
    assert grid.shape == (3, 2 * (4 + 1) + 1, 3 * (8 + 1) + 1)
    for index in range(5):
        y, x = 1 + index // 3 * 5, 1 + index % 3 * 9
        assert (grid[:, y : y + 4, x : x + 8] == to_uint8(images[index, 0, 0, 0])).all()
    assert (grid[:, ::5] == 255).all()  # the gaps
    assert (grid[:, :, ::9] == 255).all()
    assert (grid[:, 6:, 19:] == 255).all()  # the place of the sixth image


def test_columns_default_to_a_square() -> None:
    assert image_grid(torch.zeros(5, 1, 2, 2), gap=0).shape == (1, 4, 6)


def test_names_stand_outside_the_images() -> None:
    images = torch.full((6, 1, 8, 8), -1.0)
    named = image_grid(images, rows_named=["heun", "euler"], columns_named=["0", "1", "2"], scale=2)
    dark = named[0] < 255
    cells = dark.float().view(1, 1, *dark.shape)
    full = torch.nn.functional.avg_pool2d(cells, 16, 1)[0, 0]
    assert int((full == 1).sum()) == 6  # six whole black squares
    plain = image_grid(images, columns=3, scale=2)
    left = named.shape[2] - plain.shape[2]
    assert left > 20
    assert dark[:, :left].any(), "row names are drawn"
    assert dark[: named.shape[1] - plain.shape[1], left:].any(), "column names are drawn"


def test_names_of_an_alpha_grid_are_opaque() -> None:
    named = image_grid(torch.ones(2, 4, 8, 8), rows_named=["a"], columns_named=["b", "c"])
    assert (named[3] == 255).all()
    assert (named[:3] < 255).any()


def test_a_title_stands_above_all() -> None:
    images = torch.full((2, 1, 8, 8), -1.0)
    plain = image_grid(images, rows_named=["a"], columns_named=["b", "c"])
    titled = image_grid(images, rows_named=["a"], columns_named=["b", "c"], title="of both " * 9)
    above = titled.shape[1] - plain.shape[1]
    assert above > 5
    assert torch.equal(titled[:, above:, : plain.shape[2]], plain)
    assert (titled[:, above:, plain.shape[2] :] == 255).all()
    assert titled.shape[2] > 2 * plain.shape[2]  # it is not cut off
    assert (titled[:, :above] < 255).any()


def test_the_number_of_names_must_fit() -> None:
    with pytest.raises(ValueError, match="rows_named has 3 names; the grid has 2"):
        image_grid(torch.zeros(4, 1, 2, 2), rows_named="abc")
    with pytest.raises(ValueError, match="columns_named has 1 names; the grid has 2"):
        image_grid(torch.zeros(4, 1, 2, 2), columns=2, columns_named="a")
    with pytest.raises(ValueError, match="at least one image"):
        image_grid(torch.zeros(0, 1, 2, 2))
