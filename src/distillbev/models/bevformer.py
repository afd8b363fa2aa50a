"""BEVFormer: queries on a grid gather what the cameras see and what was known a moment ago.

Source: BEVFormer (arXiv:2203.17270). Ego motion is known from poses alone; no CAN bus is read.
Letters: B batch, N cameras, C channels, L levels, D anchors of a pillar, H W rows and columns of a level, Y X
of the BEV map, Q = Y*X cells row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..boxes import Boxes3D
from ..config import Config
from ..data.schema import Batch
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from .attention import (
    FeedForward,
    Sight,
    SpatialCrossAttention,
    TemporalSelfAttention,
    cell_reference,
    find_sight,
    flatten_maps,
)
from .image_encoder import ResNetConfig
from .image_pyramid import ImagePyramid, ImagePyramidConfig
from .outputs import BevMap, DetectorOutput, labelled_boxes
from .planar_motion import NUM_SIGNALS, BevHistory, PlanarMotion, motion_between, rotate_map, standing_still
from .query_head import QueryHead, QueryHeadConfig

NEAREST_DEPTH_M = 1e-5


class EncoderConfig(Config, frozen=True):
    """The layers that build the BEV map.

    `anchors` are the heights at which a cell's pillar is looked for in the images; `spatial_points` are
    shared among them. `checkpoint_layers` computes layers twice in training to hold less memory.
    `embedding_spread`: standard deviation of the learned codes of cells, cameras and levels at the start. The
    reference's 1 outshouts what the cameras say until it has been unlearned; a short training starts from less.
    """

    layers: int = 6
    heads: int = 8
    temporal_points: int = 4
    spatial_points: int = 8
    anchors: int = 4
    ffn_channels: int = 512
    dropout: float = 0.1
    checkpoint_layers: bool = False
    embedding_spread: float = 1.0

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.temporal_points, self.anchors) < 1:
            raise ConfigError(
                f"layers={self.layers}, heads={self.heads}, temporal_points={self.temporal_points}, "
                f"anchors={self.anchors}; expected 1 or more of each"
            )
        if self.spatial_points < 1 or self.spatial_points % self.anchors:
            raise ConfigError(
                f"spatial_points={self.spatial_points} do not divide among anchors={self.anchors}; "
                "choose a multiple"
            )


class BevFormerConfig(Config, frozen=True):
    """The whole detector; the defaults are the student of the DistillBEV paper (ResNet-50, 200x200 cells)."""

    grid: BevGrid = BevGrid(cell_m=0.512)
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    image_encoder: ImagePyramidConfig = ImagePyramidConfig()
    num_cameras: int = 6
    channels: int = 256
    encoder: EncoderConfig = EncoderConfig()
    head: QueryHeadConfig = QueryHeadConfig()

    def __post_init__(self) -> None:
        low, high = self.z_range_m
        if high - low <= 1:
            raise ConfigError(f"z_range_m={self.z_range_m}; expected (lowest, highest) more than 1 m apart")
        for name, heads in (("encoder.heads", self.encoder.heads), ("head.heads", self.head.heads)):
            if self.channels % (2 * heads):
                raise ConfigError(
                    f"channels={self.channels} do not divide among {name}={heads}; choose an even multiple"
                )


class EncoderLayer(nn.Module):
    """Looks back in time, then into the cameras, then thinks each cell over; normed after every step."""

    def __init__(self, config: EncoderConfig, channels: int, levels: int) -> None:
        super().__init__()
        self.temporal = TemporalSelfAttention(channels, config.heads, config.temporal_points)
        self.spatial = SpatialCrossAttention(
            channels, config.heads, levels, config.spatial_points, config.anchors
        )
        self.feed_forward = FeedForward(channels, config.ffn_channels, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, query: Tensor, scene: Scene) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        # Without a frame before, a cell looks at the layer's own input in its place, twice.
        maps = tuple(torch.where(scene.has_history, seen, query) for seen in (scene.history, scene.initial))
        references = (scene.history_reference, scene.reference)
        update = self.temporal(query, scene.position, maps, references, scene.shape)
        query = self.norms[0](query + self.dropout(update))
        update = self.spatial(query, scene.value, scene.value_shapes, scene.sight)
        query = self.norms[1](query + self.dropout(update))
        return self.norms[2](query + self.dropout(self.feed_forward(query)))


@dataclass
class Scene:
    """All that the layers look at, computed once per frame (shapes as in the attentions)."""

    shape: tuple[int, int]
    position: Tensor
    initial: Tensor  # (B, Q, C), the queries as they enter the encoder
    history: Tensor  # (B, Q, C), turned to the present heading
    has_history: Tensor  # (B, 1, 1) bool
    reference: Tensor
    history_reference: Tensor
    value: Tensor
    value_shapes: Sequence[tuple[int, int]]
    sight: Sight


class BevFormerEncoder(nn.Module):
    """Image features of one frame, and the BEV map of the frame before, to a BEV map."""

    def __init__(self, config: BevFormerConfig) -> None:
        super().__init__()
        self.config = config
        channels, (rows, columns) = config.channels, config.grid.shape
        levels = len(config.image_encoder.strides)
        self.bev_embedding = nn.Embedding(rows * columns, channels)
        spread = config.encoder.embedding_spread
        nn.init.normal_(self.bev_embedding.weight, std=spread)
        self.row_embedding = nn.Embedding(rows, channels // 2)
        self.column_embedding = nn.Embedding(columns, channels // 2)
        self.camera_embedding = nn.Parameter(spread * torch.randn(config.num_cameras, channels))
        self.level_embedding = nn.Parameter(spread * torch.randn(levels, channels))
        self.motion_embedding = nn.Sequential(
            nn.Linear(NUM_SIGNALS, channels // 2),
            nn.ReLU(),
            nn.Linear(channels // 2, channels),
            nn.ReLU(),
            nn.LayerNorm(channels),
        )
        self.layers = nn.ModuleList(
            EncoderLayer(config.encoder, channels, levels) for _ in range(config.encoder.layers)
        )
        for layer in self.motion_embedding:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def position(self) -> Tensor:
        """(Q, C): a code of each cell's column, then of its row."""
        rows, columns = self.config.grid.shape
        column = self.column_embedding.weight.expand(rows, -1, -1)
        row = self.row_embedding.weight[:, None].expand(-1, columns, -1)
        return torch.cat([column, row], dim=-1).flatten(0, 1)

    def forward(
        self,
        features: Sequence[Tensor],
        lidar2img: Tensor,
        image_size_hw: tuple[int, int],
        motion: PlanarMotion,
        history: BevHistory | None = None,
    ) -> Tensor:
        """Builds the BEV memory of one frame.

        Args:
            features: levels (B, N, C, H, W), fine to coarse.
            lidar2img: (B, N, 4, 4), LiDAR frame -> image pixels (u*d, v*d, d, 1).
            image_size_hw: of what the features show of the images that `lidar2img` projects to.
            motion: since the frame before; zero where there is none.
            history: its map; None if no sample has one.

        Returns:
            (B, C, Y, X), the BEV memory.
        """
        scene = self.look_around(features, lidar2img, image_size_hw, motion, history)
        query = scene.initial
        for layer in self.layers:
            if self.config.encoder.checkpoint_layers and self.training and torch.is_grad_enabled():
                query = checkpoint(layer, query, scene, use_reentrant=False)
            else:
                query = layer(query, scene)
        return query.transpose(1, 2).unflatten(2, scene.shape)

    def look_around(
        self,
        features: Sequence[Tensor],
        lidar2img: Tensor,
        image_size_hw: tuple[int, int],
        motion: PlanarMotion,
        history: BevHistory | None,
    ) -> Scene:
        """What the layers share, of the same arguments as `forward`."""
        grid, B = self.config.grid, len(lidar2img)
        (x_low, x_high), (y_low, y_high) = grid.x_range_m, grid.y_range_m
        initial = self.bev_embedding.weight + self.motion_embedding(motion.signals)[:, None]  # (B, Q, C)
        reference = cell_reference(grid.shape, initial.device)[None]
        turned, history_reference = initial, reference
        has_history = torch.zeros(B, 1, 1, dtype=torch.bool, device=initial.device)
        if history is not None:
            # The car is where the map's zero lies, and the map turns about the car.
            centre = (-x_low / grid.cell_m, -y_low / grid.cell_m)
            turned = (
                rotate_map(history.bev, motion.turn_rad, centre).flatten(2).transpose(1, 2).to(initial.dtype)
            )
            shift = motion.forward_m / motion.forward_m.new_tensor([x_high - x_low, y_high - y_low])
            has_history = history.present[:, None, None]
            history_reference = torch.where(has_history, reference + shift[:, None], reference)
        N = lidar2img.shape[1]
        embedded = [
            level + (self.camera_embedding[:N] + self.level_embedding[i])[:, :, None, None]
            for i, level in enumerate(features)
        ]
        value, shapes = flatten_maps([level.flatten(0, 1) for level in embedded])
        anchors = pillar_anchors(grid, self.config.z_range_m, self.config.encoder.anchors, initial.device)
        uv, visible = project_anchors(anchors, lidar2img, image_size_hw)
        return Scene(
            shape=grid.shape,
            position=self.position(),
            initial=initial,
            history=turned,
            has_history=has_history,
            reference=reference,
            history_reference=history_reference,
            value=value.unflatten(0, (B, N)),
            value_shapes=shapes,
            sight=find_sight(uv, visible),
        )


class BevFormer(nn.Module):
    """A detector (see `Detector`) on images; its BEV map "head" is the BEV memory."""

    def __init__(self, config: BevFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImagePyramid(config.image_encoder, config.channels)
        self.encoder = BevFormerEncoder(config)
        self.head = QueryHead(config.head, config.channels, config.grid, config.z_range_m)

    @property
    def bev_channels(self) -> dict[str, int]:
        return {"head": self.config.channels}

    def forward(self, batch: Batch, history: BevHistory | None = None) -> DetectorOutput:
        """Reads `batch.images`, cameras and poses, and the history if there is one.

        Without a history, the batch's earlier frames are gone through first, if it has any.

        Raises:
            DataError: no images, more cameras than the model knows, or a history that is not the frame
            before's.
        """
        if history is None and batch.past is not None:
            history = self.remember_past(batch.past.frames[::-1], first_own_frame(batch.past.gaps_s))
        bev = self.bev(batch, history)
        return DetectorOutput(bev={"head": BevMap(bev, self.config.grid)}, queries=self.head(bev))

    def bev(self, batch: Batch, history: BevHistory | None = None) -> Tensor:
        """(B, C, Y, X): the BEV memory alone, all that past frames are needed for."""
        if batch.images is None:
            raise DataError("this batch has no images, and BEVFormer sees nothing else; load images")
        if batch.images.shape[1] > self.config.num_cameras:
            raise DataError(
                f"the batch has {batch.images.shape[1]} cameras, the model {self.config.num_cameras}; "
                "raise num_cameras or name fewer cameras in the data settings"
            )
        motion = standing_still(len(batch), batch.images.device)
        if history is not None:
            motion = motion_between(history, batch, self.config.grid)
        lidar2img = batch.cam2img @ torch.linalg.inv(batch.cam2lidar)
        shown_hw = self.image_encoder.padded_size(*batch.images.shape[-2:])
        features = self.image_encoder(batch.images)
        return self.encoder(features, lidar2img, shown_hw, motion, history)

    def remember(self, output: DetectorOutput, batch: Batch) -> BevHistory:
        """What the next frame needs of this one."""
        return self._history(output.bev["head"].features, batch)

    def _history(self, bev: Tensor, batch: Batch) -> BevHistory:
        present = torch.ones(len(batch), dtype=torch.bool, device=bev.device)
        return BevHistory(bev.detach(), batch.lidar2global, batch.bev_aug, present)

    @torch.no_grad()
    def remember_past(self, past: Sequence[Batch], first: Tensor | None = None) -> BevHistory | None:
        """The history after several past frames, oldest first: without gradient, in eval mode.

        Args:
            past: one batch per frame, the same samples' scenes in the same order.
            first: (B,) index of the first frame of each sample that counts, where scenes begin later than the
                oldest frame; None if all count. `len(past)` for a sample without any.
        """
        history = None
        in_training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            for i, batch in enumerate(past):
                history = self._history(self.bev(batch, history), batch)
                if first is not None:
                    history.present = (first <= i).to(history.present.device)
        finally:
            for module in in_training:  # not self.train(): parts may have been frozen on their own
                module.training = True
        return history

    def loss(self, output: DetectorOutput, batch: Batch) -> dict[str, Tensor]:
        """The head's weighted terms; their sum is the detection loss.

        Raises:
            DataError: a sample has no labels.
        """
        assert output.queries is not None
        return self.head.loss(output.queries, labelled_boxes(batch))

    def decode(self, output: DetectorOutput) -> list[Boxes3D]:
        """Detections of every sample, in the LiDAR frame of the batch."""
        assert output.queries is not None
        return self.head.decode(output.queries)


def first_own_frame(gaps_s: Tensor) -> Tensor:
    """(B, F) gaps of earlier frames, new to old -> (B,) index, old to new, of the first that is no stand-in.

    Where a scene begins later, its oldest frame is repeated, and at its very start the present one (gap 0).
    """
    before = torch.cat([torch.zeros_like(gaps_s[:, :1]), gaps_s[:, :-1]], dim=1)
    return gaps_s.shape[1] - (gaps_s > before).sum(dim=1)


def bevformer_tiny() -> BevFormerConfig:
    """The published tiny model: ResNet-50, its coarsest level, 50x50 cells of 2.048 m, three layers."""
    return BevFormerConfig(
        grid=BevGrid(cell_m=102.4 / 50),
        image_encoder=ImagePyramidConfig(strides=(32,)),
        encoder=EncoderConfig(layers=3),
    )


def bevformer_small() -> BevFormerConfig:
    """The published small model: deformable ResNet-101, its coarsest level, 150x150 cells, three layers."""
    return BevFormerConfig(
        grid=BevGrid(cell_m=102.4 / 150),
        image_encoder=ImagePyramidConfig(
            backbone=ResNetConfig(depth=101, stride_on="1x1"), strides=(32,), deformable_stages=(2, 3)
        ),
        encoder=EncoderConfig(layers=3),
    )


def bevformer_base() -> BevFormerConfig:
    """The published base model: deformable ResNet-101, four levels, 200x200 cells of 0.512 m, six layers."""
    return BevFormerConfig(
        image_encoder=ImagePyramidConfig(
            backbone=ResNetConfig(depth=101, stride_on="1x1"), deformable_stages=(2, 3)
        ),
    )


def pillar_anchors(
    grid: BevGrid, z_range_m: tuple[float, float], anchors: int, device: torch.device | str = "cpu"
) -> Tensor:
    """(Q, D, 3) metres: points above every cell's centre, the lowest half a metre above the range's floor."""
    low, high = z_range_m
    heights = torch.linspace(low + 0.5, high - 0.5, anchors, device=device)
    centres = grid.cell_centres(device).flatten(0, 1)  # (Q, 2)
    Q = len(centres)
    return torch.cat([centres[:, None].expand(-1, anchors, -1), heights[:, None].expand(Q, -1, -1)], dim=-1)


def project_anchors(
    anchors: Tensor, lidar2img: Tensor, image_size_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Where every camera has every anchor.

    Args:
        anchors: (Q, D, 3) metres, LiDAR frame.
        lidar2img: (B, N, 4, 4).
        image_size_hw: rows and columns of the images.

    Returns:
        uv: (B, N, Q, D, 2), x and y from 0 to 1 over the image; meaningless where not visible.
        visible: (B, N, Q, D) bool: in front of the camera and strictly inside the image.
    """
    lidar2img = lidar2img.float()
    points = torch.einsum("bnij,qdj->bnqdi", lidar2img[..., :3, :3], anchors.float())
    points = points + lidar2img[..., None, None, :3, 3]
    depth = points[..., 2:]
    height, width = image_size_hw
    uv = points[..., :2] / depth.clamp(min=NEAREST_DEPTH_M) / points.new_tensor([width, height])
    inside = ((uv > 0) & (uv < 1)).all(dim=-1)
    return uv, inside & (depth[..., 0] > NEAREST_DEPTH_M)
