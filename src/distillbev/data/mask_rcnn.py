"""Instance masks by torchvision's Mask R-CNN (COCO classes), where torchvision works. 12-14 s per image on a CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..classes import CLASSES
from ..errors import ConfigError
from .images import load_image
from .instance_masks import InstanceMasks
from .schema import Sample

# COCO's numbers -> the detection classes; COCO knows no trailer, construction vehicle, cone or barrier.
COCO_TO_CLASS = {1: "pedestrian", 2: "bicycle", 3: "car", 4: "motorcycle", 6: "bus", 8: "truck"}


class MaskRcnn:
    """Finds the instances in each camera's image.

    Raises:
        ConfigError: torchvision is absent or does not work, or its weights cannot be had.
    """

    def __init__(self, min_score: float = 0.3) -> None:
        self.min_score = min_score
        _network()

    @torch.no_grad()
    def __call__(self, sample: Sample) -> list[InstanceMasks]:
        network = _network()
        found = []
        for camera in sample.cameras:
            image = load_image(camera).image
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
            result = network([pixels])[0]
            keep = [
                i
                for i, (label, score) in enumerate(zip(result["labels"], result["scores"], strict=True))
                if int(label) in COCO_TO_CLASS and float(score) >= self.min_score
            ]
            found.append(
                InstanceMasks(
                    (result["masks"][keep, 0] > 0.5).numpy().reshape(-1, *pixels.shape[1:]),
                    np.array(
                        [CLASSES.index(COCO_TO_CLASS[int(result["labels"][i])]) for i in keep], np.int64
                    ),
                    result["scores"][keep].numpy().astype(np.float32),
                )
            )
        return found


@lru_cache(maxsize=1)
def _network() -> Any:
    try:
        from torchvision.models.detection import (  # pyright: ignore[reportMissingImports]
            MaskRCNN_ResNet50_FPN_V2_Weights,
            maskrcnn_resnet50_fpn_v2,
        )

        return maskrcnn_resnet50_fpn_v2(weights=MaskRCNN_ResNet50_FPN_V2_Weights.DEFAULT).eval()
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"Mask R-CNN cannot run: {reason}; install the torchvision that belongs to torch {torch.__version__}, "
            "or give mask files of any 2-D detector with --masks"
        ) from None
