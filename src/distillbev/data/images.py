"""Camera images: read, with the size that the tables promise checked first.

Pixel coordinates are continuous: the pixel in column j and row i covers [j, j+1) x [i, i+1), its centre is
(j + 0.5, i + 0.5). A resize by r is then u' = r u, a mirror of width w is u' = w - u, both exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ..errors import DataError
from .schema import CameraFrame


@dataclass(frozen=True)
class DecodedImage:
    """An RGB image of which each pixel is `reduction` source pixels wide (1, 2, 4 or 8)."""

    image: Image.Image
    source_wh_px: tuple[int, int]
    reduction: int
    exact: bool


def load_image(camera: CameraFrame, scale: float | None = None, exact: bool = False) -> DecodedImage:
    """Reads one camera image.

    Args:
        camera: what to read.
        scale: network pixels per source pixel, the largest that will be asked of this image; lets JPEG
            decoding skip resolution that a resize would throw away. None for full size.
        exact: decode in full all the same (and resize as the reference does): slower, other pixel values.

    Raises:
        DataError: the file is absent, truncated, no image, or of another size than the tables say.
    """
    try:
        image = Image.open(camera.path)
        size_wh_px = image.size
        if size_wh_px == camera.size_wh_px:
            if scale is not None and not exact:
                image.draft("RGB", (max(int(size_wh_px[0] * scale), 1), max(int(size_wh_px[1] * scale), 1)))
            image = image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{camera.path}: no such image, though the tables name it; copy it again") from None
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken headers
        size = camera.path.stat().st_size
        raise DataError(
            f"{camera.path} ({size} bytes): unreadable image: {error}; copy the file again"
        ) from None
    if size_wh_px != camera.size_wh_px:
        raise DataError(
            f"{camera.path}: the image is {size_wh_px[0]}x{size_wh_px[1]} pixels, sample_data.json says "
            f"{camera.size_wh_px[0]}x{camera.size_wh_px[1]}; the intrinsics belong to the latter: mend the "
            "table or restore the original image"
        )
    return DecodedImage(image, size_wh_px, reduction=round(size_wh_px[0] / image.size[0]), exact=exact)
