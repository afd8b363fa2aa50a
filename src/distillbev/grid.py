"""The patch of ground that a BEV map covers. Maps are (B, C, Y, X); row i is y, column j is x, both ascending."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Config
from .errors import ConfigError


class BevGrid(Config, frozen=True):
    """The patch of ground that every BEV map covers, in the LiDAR frame of the key frame."""

    x_range_m: tuple[float, float] = (-51.2, 51.2)  # x points right
    y_range_m: tuple[float, float] = (-51.2, 51.2)  # y points forward
    cell_m: float = 0.8

    def __post_init__(self) -> None:
        if self.cell_m <= 0:
            raise ConfigError(f"cell_m={self.cell_m} is not a length; choose a positive number of metres")
        for name in ("x_range_m", "y_range_m"):
            low, high = getattr(self, name)
            cells = (high - low) / self.cell_m
            if high <= low or abs(cells - round(cells)) > 1e-6 * max(cells, 1.0):
                raise ConfigError(
                    f"{name}=({low}, {high}) holds {cells:.2f} cells of {self.cell_m} m; "
                    "choose a range that is a whole, positive number of cells"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(Y, X): rows and columns of a map on this grid."""
        (x_low, x_high), (y_low, y_high) = self.x_range_m, self.y_range_m
        return round((y_high - y_low) / self.cell_m), round((x_high - x_low) / self.cell_m)

    def coarser(self, factor: float) -> BevGrid:
        """The same ground in cells `factor` times as long (a factor below 1 makes them finer)."""
        return BevGrid(x_range_m=self.x_range_m, y_range_m=self.y_range_m, cell_m=self.cell_m * factor)

    def covers_same_ground(self, other: BevGrid) -> bool:
        """Whether both grids span the same rectangle, whatever their cells."""
        return self.x_range_m == other.x_range_m and self.y_range_m == other.y_range_m

    def cell_centres(self, device: torch.device | str = "cpu") -> Tensor:
        """(Y, X, 2): x and y of every cell's centre, in metres."""
        rows, columns = self.shape
        x = self.x_range_m[0] + (torch.arange(columns, device=device) + 0.5) * self.cell_m
        y = self.y_range_m[0] + (torch.arange(rows, device=device) + 0.5) * self.cell_m
        return torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)

    def cell_coordinates(self, xy_m: Tensor) -> Tensor:
        """(..., 2) metres -> (..., 2) column and row as real numbers; floor gives the cell."""
        origin = xy_m.new_tensor([self.x_range_m[0], self.y_range_m[0]])
        return (xy_m - origin) / self.cell_m
