import pytest
import torch

from distillbev.errors import ConfigError
from distillbev.grid import BevGrid


def test_rows_are_y_and_columns_are_x():
    grid = BevGrid(x_range_m=(-4.0, 4.0), y_range_m=(0.0, 6.0), cell_m=1.0)
    assert grid.shape == (6, 8)
    centres = grid.cell_centres()
    assert centres[0, 0].tolist() == [-3.5, 0.5]
    assert centres[5, 7].tolist() == [3.5, 5.5]


def test_every_centre_lies_in_its_own_cell():
    grid = BevGrid(x_range_m=(-3.2, 3.2), y_range_m=(-1.6, 4.8), cell_m=0.8)
    cells = grid.cell_coordinates(grid.cell_centres()).floor().long()
    rows, columns = grid.shape
    assert torch.equal(cells[..., 0], torch.arange(columns).expand(rows, columns))
    assert torch.equal(cells[..., 1], torch.arange(rows)[:, None].expand(rows, columns))


def test_grid_refuses_a_fraction_of_a_cell():
    with pytest.raises(ConfigError, match=r"holds 128\.12 cells of 0\.8 m"):
        BevGrid(x_range_m=(-51.2, 51.3))


def test_coarser_grid_covers_the_same_ground():
    grid = BevGrid()
    assert grid.coarser(4).shape == (32, 32)
    assert grid.covers_same_ground(grid.coarser(4))
    assert not grid.covers_same_ground(BevGrid(x_range_m=(-50.4, 51.2)))
