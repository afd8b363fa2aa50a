"""The query head: a fixed set of object queries, each refining one box layer by layer. No suppression needed.

Sources: DETR (arXiv:2005.12872) for pairing and losses, Deformable DETR (arXiv:2010.04159), section 4.2 for
the refinement, DETR3D (arXiv:2110.06922) for boxes in space; focal loss arXiv:1708.02002; groups of queries
Group DETR (arXiv:2207.13085).
Letters: B batch, L layers, Q queries, K classes, C channels, G objects of a sample, Y X rows and columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..boxes import Boxes3D
from ..classes import CLASSES
from ..config import Config
from ..errors import ConfigError
from ..grid import BevGrid
from .assignment import pair_at_least_cost
from .attention import DeformableAttention, FeedForward, flatten_maps
from .outputs import QueryPredictions
from .processes import num_processes, total_over_processes

CODE_SIZE = 10
PAIRED_BY = 8  # of a code's numbers: velocity has no say in who answers for whom
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


class QueryHeadConfig(Config, frozen=True):
    """The decoder, its losses and how boxes are read from it; the defaults are BEVFormer's.

    `code_weights` weigh the ten numbers of a box, velocity last. `skip_boxes_of_unknown_velocity` keeps such
    boxes out of the box loss altogether, as the reference does; otherwise only their velocity asks for
    nothing. `centre_range_m` (x, y, z lowest, then highest) drops detections outside. With `score_threshold`
    a sample always gives something: where nothing passes, it is lowered step by step. With `groups` so many
    sets of queries train side by side, each paired with the objects on its own: every object then teaches
    several queries in each step. Only the first group detects, at the cost of one.
    """

    classes: tuple[str, ...] = CLASSES
    num_queries: int = 900
    groups: int = 1
    layers: int = 6
    heads: int = 8
    points: int = 4
    ffn_channels: int = 512
    dropout: float = 0.1
    class_weight: float = 2.0
    box_weight: float = 0.25
    code_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
    skip_boxes_of_unknown_velocity: bool = False
    max_detections: int = 300
    score_threshold: float | None = None
    centre_range_m: tuple[float, float, float, float, float, float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)

    def __post_init__(self) -> None:
        unknown = [name for name in self.classes if name not in CLASSES]
        if unknown or not self.classes or len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"classes={self.classes}; expected distinct names among {', '.join(CLASSES)}")
        if min(self.num_queries, self.groups, self.layers, self.heads, self.points, self.max_detections) < 1:
            raise ConfigError(
                f"num_queries={self.num_queries}, groups={self.groups}, layers={self.layers}, heads={self.heads}, "
                f"points={self.points}, max_detections={self.max_detections}; expected 1 or more of each"
            )
        if len(self.code_weights) != CODE_SIZE:
            raise ConfigError(f"code_weights has {len(self.code_weights)} entries; expected {CODE_SIZE}")


class DecoderLayer(nn.Module):
    """Queries of a group look at each other, then at the BEV map around their reference points."""

    def __init__(self, channels: int, config: QueryHeadConfig) -> None:
        super().__init__()
        self.group_size = config.num_queries
        self.self_attention = nn.MultiheadAttention(channels, config.heads, config.dropout, batch_first=True)
        self.cross_attention = DeformableAttention(channels, config.heads, levels=1, points=config.points)
        self.feed_forward = FeedForward(channels, config.ffn_channels, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.xavier_uniform_(self.self_attention.out_proj.weight)

    def forward(
        self, query: Tensor, position: Tensor, value: Tensor, shape: tuple[int, int], reference: Tensor
    ) -> Tensor:
        """(B, Q, C) queries and positions, (B, Y*X, C) map, (B, Q, 2) reference points -> (B, Q, C)."""
        placed, own = (
            part.unflatten(1, (-1, self.group_size)).flatten(0, 1) for part in (query + position, query)
        )
        update = self.self_attention(placed, placed, own, need_weights=False)[0].reshape(query.shape)
        query = self.norms[0](query + self.dropout(update))
        update = self.cross_attention(query + position, value, [shape], reference)
        query = self.norms[1](query + self.dropout(update))
        return self.norms[2](query + self.dropout(self.feed_forward(query)))


class QueryHead(nn.Module):
    """Decoder, losses and decoding on a BEV map.

    Weights of the reference (mmdetection3d before 1.0) come over by turning the last layer of the box
    branches: its rows are (x, y, log w, log l, z, log h, sin, cos of the clockwise yaw, velocity).
    """

    def __init__(
        self, config: QueryHeadConfig, channels: int, grid: BevGrid, z_range_m: tuple[float, float]
    ) -> None:
        super().__init__()
        if channels % config.heads:
            raise ConfigError(
                f"{channels} channels do not divide among heads={config.heads}; choose a divisor"
            )
        self.config, self.grid = config, grid
        low, high = zip(grid.x_range_m, grid.y_range_m, z_range_m, strict=True)
        self.low_m, self.high_m = low, high
        # First half of an embedding: the position; second half: the query itself.
        self.query_embedding = nn.Embedding(config.groups * config.num_queries, 2 * channels)
        self.reference_points = nn.Linear(channels, 3)
        self.layers = nn.ModuleList(DecoderLayer(channels, config) for _ in range(config.layers))
        self.class_branches = nn.ModuleList(
            class_branch(channels, len(config.classes)) for _ in range(config.layers)
        )
        self.box_branches = nn.ModuleList(box_branch(channels) for _ in range(config.layers))
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, bev: Tensor) -> QueryPredictions:
        """(B, C, Y, X) -> what the queries say after every layer: in training all groups, otherwise the first."""
        value, (shape,) = flatten_maps([bev])
        embedding = self.query_embedding.weight
        if not self.training:
            embedding = embedding[: self.config.num_queries]
        position, query = embedding.expand(len(bev), -1, -1).chunk(2, dim=-1)
        reference = self.reference_points(position).float().sigmoid()  # (B, Q, 3), 0 to 1 over the ranges
        logits, boxes = [], []
        for layer, classify, regress in zip(self.layers, self.class_branches, self.box_branches, strict=True):
            query = layer(query, position, value, shape, reference[..., :2])
            code = regress(query).float()
            centre = (code[..., :3] + inverse_sigmoid(reference)).sigmoid()
            boxes.append(torch.cat([self._to_metres(centre), code[..., 3:]], dim=-1))
            logits.append(classify(query).float())
            # Each layer learns its own step; errors do not flow back through the steps before.
            reference = centre.detach()
        return QueryPredictions(torch.stack(logits), torch.stack(boxes))

    def _to_metres(self, centre: Tensor) -> Tensor:
        low, high = centre.new_tensor(self.low_m), centre.new_tensor(self.high_m)
        return low + centre * (high - low)

    def loss(self, predictions: QueryPredictions, boxes: list[Boxes3D]) -> dict[str, Tensor]:
        """Weighted terms (scalars, fp32): `class` and `box` of the last layer, `earlier_class`,
        `earlier_box`."""
        class_terms, box_terms = self.loss_per_layer(predictions, boxes)
        return {
            "class": class_terms[-1],
            "box": box_terms[-1],
            "earlier_class": class_terms[:-1].sum(),
            "earlier_box": box_terms[:-1].sum(),
        }

    def loss_per_layer(self, predictions: QueryPredictions, boxes: list[Boxes3D]) -> tuple[Tensor, Tensor]:
        """Class and box terms of every layer, (L,) each: focal loss, and absolute errors of paired boxes.

        Every layer and group is paired with the objects anew. Both terms are divided by the number of pairs, averaged
        over the processes of a distributed run. Predictions that are not finite are paired arbitrarily, and
        their loss is not finite either.
        """
        with torch.autocast(predictions.boxes.device.type, enabled=False):
            # Groups of queries are as so many samples with the same objects.
            logits, predicted = (
                part.float().unflatten(2, (-1, self.config.num_queries)).flatten(1, 2)
                for part in (predictions.class_logits, predictions.boxes)
            )
            groups = logits.shape[1] // len(boxes)
            targets = [target for sample in boxes for target in [self.targets(sample)] * groups]
            paired = self.pair(QueryPredictions(logits, predicted), targets)  # (L, B, Q), -1 where alone
            most = max(1, *(len(labels) for _, labels in targets))
            codes = torch.stack([functional.pad(c, (0, 0, 0, most - len(c))) for c, _ in targets])
            labels = torch.stack([functional.pad(x, (0, most - len(x))) for _, x in targets])  # (B, G)
            has_pair, which = paired >= 0, paired.clamp(min=0)
            sample = torch.arange(len(targets), device=which.device)[:, None]
            code, label = codes[sample, which], labels[sample, which]  # (L, B, Q, 10), (L, B, Q)

            pairs = total_over_processes(has_pair[0].sum().float()).clamp(min=1) / num_processes()
            wanted = functional.one_hot(label, logits.shape[-1]) * has_pair[..., None]
            class_terms = sigmoid_focal_loss(logits, wanted.to(logits)).sum(dim=(1, 2, 3)) / pairs

            known = has_pair[..., None] & code.isfinite()
            if self.config.skip_boxes_of_unknown_velocity:
                known = known & known.all(dim=-1, keepdim=True)
            errors = (predicted - torch.where(known, code, predicted.detach())).abs()
            errors = torch.where(known, errors, 0.0) * errors.new_tensor(self.config.code_weights)
            box_terms = errors.sum(dim=(1, 2, 3)) / pairs
        return class_terms * self.config.class_weight, box_terms * self.config.box_weight

    def targets(self, boxes: Boxes3D) -> tuple[Tensor, Tensor]:
        """Codes (G, 10) and labels (G,) into the head's classes.

        Boxes of other classes, without extent, or centred outside the map are left out: no query can say
        them.
        """
        index_of = torch.full((len(CLASSES) + 1,), -1, device=boxes.labels.device)
        for index, name in enumerate(self.config.classes):
            index_of[CLASSES.index(name)] = index
        labels = index_of[boxes.labels]  # -1 finds the spare last entry
        centre = boxes.boxes[:, :3].float()
        low, high = centre.new_tensor(self.low_m), centre.new_tensor(self.high_m)
        inside = ((centre[:, :2] >= low[:2]) & (centre[:, :2] < high[:2])).all(dim=1)
        keep = (labels >= 0) & inside & (boxes.boxes[:, 3:6] > 0).all(dim=1)
        return encode_boxes(boxes.boxes[keep].float()), labels[keep]

    @torch.no_grad()
    def pair(self, predictions: QueryPredictions, targets: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(L, B, Q) int64: which object each query answers for, -1 for none; at least total cost per
        sample."""
        L, B, Q = predictions.boxes.shape[:3]
        paired = np.full((L, B, Q), -1, dtype=np.int64)
        costs = [
            torch.add(
                *self.pair_costs(predictions.class_logits[:, b], predictions.boxes[:, b], codes, labels)
            )
            for b, (codes, labels) in enumerate(targets)
        ]
        # One copy from the device for all layers and samples.
        flat = torch.cat([cost.flatten() for cost in costs]).nan_to_num(1e6, 1e6, -1e6).cpu().numpy()
        start = 0
        for b, cost in enumerate(costs):
            matrices = flat[start : start + cost.numel()].reshape(L, Q, cost.shape[-1])
            start += cost.numel()
            for layer, matrix in enumerate(matrices):
                queries, objects = pair_at_least_cost(matrix)
                paired[layer, b, queries] = objects
        return torch.from_numpy(paired).to(predictions.boxes.device)

    def pair_costs(
        self, logits: Tensor, boxes: Tensor, codes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Class and box costs (L, Q, G) of pairing (L, Q, K) logits and (L, Q, 10) boxes with G objects."""
        chosen = logits[..., labels]
        p = chosen.sigmoid()
        yes = -(p + 1e-12).log() * FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA
        no = -(1 - p + 1e-12).log() * (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA
        apart = (boxes[..., None, :PAIRED_BY] - codes[:, :PAIRED_BY]).abs().sum(dim=-1)
        return self.config.class_weight * (yes - no), self.config.box_weight * apart

    @torch.no_grad()
    def decode(self, predictions: QueryPredictions) -> list[Boxes3D]:
        """Boxes of every sample by the last layer, by descending score, labels into CLASSES.

        The best pairs of query and class are taken, so a query may appear with two classes. Only the first
        group of queries is read.
        """
        config = self.config
        scores, where = (
            predictions.class_logits[-1, :, : config.num_queries]
            .float()
            .sigmoid()
            .flatten(1)
            .topk(min(config.max_detections, config.num_queries * len(config.classes)), dim=1)
        )  # (B, k)
        label_of = torch.tensor([CLASSES.index(name) for name in config.classes], device=where.device)
        labels = label_of[where % len(config.classes)]
        chosen = (where // len(config.classes))[..., None].expand(-1, -1, CODE_SIZE)
        boxes = decode_boxes(predictions.boxes[-1].float().gather(1, chosen))
        low, high = boxes.new_tensor(config.centre_range_m).split(3)
        inside = ((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(dim=-1)
        detections = []
        for b in range(len(boxes)):
            keep = inside[b]
            if config.score_threshold is not None:
                keep = keep & (scores[b] >= passing_score(scores[b], config.score_threshold))
            detections.append(Boxes3D(boxes[b], labels[b], scores[b])[keep])
        return detections


def passing_score(scores: Tensor, threshold: float) -> float:
    """The lowest score above the threshold; if there is none, the threshold is lowered until some pass.

    A tenth at a time, until it falls under 0.01; then all pass.
    """
    above = scores[scores > threshold]
    if len(above):
        return float(above.min())
    best = float(scores.max()) if len(scores) else 0.0
    while threshold >= 0.01:
        threshold *= 0.9
        if best >= threshold:
            return threshold
    return 0.0


def encode_boxes(boxes: Tensor) -> Tensor:
    """(..., 9) boxes -> (..., 10) codes as in `QueryPredictions`."""
    centre, size, yaw, velocity = boxes.split([3, 3, 1, 2], dim=-1)
    return torch.cat([centre, size.log(), yaw.sin(), yaw.cos(), velocity], dim=-1)


def decode_boxes(codes: Tensor) -> Tensor:
    """(..., 10) codes -> (..., 9) boxes, yaw in (-pi, pi]."""
    centre, log_size, sin, cos, velocity = codes.split([3, 3, 1, 1, 2], dim=-1)
    return torch.cat([centre, log_size.exp(), torch.atan2(sin, cos), velocity], dim=-1)


def inverse_sigmoid(p: Tensor) -> Tensor:
    """The logit of p in [0, 1]; at the ends it stops at about 11.5 instead of infinity."""
    p = p.clamp(0, 1)
    return (p.clamp(min=1e-5) / (1 - p).clamp(min=1e-5)).log()


def sigmoid_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss of each entry for targets of 0 or 1, not reduced (arXiv:1708.02002, equation 5)."""
    p = logits.sigmoid()
    miss = p + target - 2 * p * target  # 1 - p where wanted, p elsewhere
    balance = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return entropy * balance * miss**FOCAL_GAMMA


def class_branch(channels: int, num_classes: int) -> nn.Sequential:
    """Two normed layers and the logits, which start at a score of 0.01."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU()]
    output = nn.Linear(channels, num_classes)
    nn.init.constant_(output.bias, -math.log(99))
    return nn.Sequential(*layers, output)


def box_branch(channels: int) -> nn.Sequential:
    """Two layers and the code."""
    return nn.Sequential(
        nn.Linear(channels, channels),
        nn.ReLU(),
        nn.Linear(channels, channels),
        nn.ReLU(),
        nn.Linear(channels, CODE_SIZE),
    )
