"""Camera images: read, with the size that the tables promise checked first.

Pixel coordinates are continuous: the pixel in column j and row i covers [j, j+1) x [i, i+1), its centre is
(j + 0.5, i + 0.5). A resize by r is then u' = r u, a mirror of width w is u' = w - u, both exact.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from .files import read_whole
from .schema import CameraFrame

try:
    import simplejpeg
except Exception:  # an optional part, which may also be installed and broken
    simplejpeg = None

FORMATS = ("JPEG", "PNG")  # Pillow knows dozens more, some of which start programs
MOST_IMAGE_BYTES = 2**28
MOST_SCANS = 100  # of a progressive JPEG, which has 10; each costs the time of a whole image, in a few bytes


@dataclass(frozen=True)
class DecodedImage:
    """An RGB image of which each pixel is `reduction` source pixels wide (1, 2, 4 or 8)."""

    image: Image.Image
    source_wh_px: tuple[int, int]
    reduction: int
    exact: bool


def load_image(
    camera: CameraFrame, scale: float | None = None, exact: bool = False, fast: bool = True
) -> DecodedImage:
    """Reads one camera image.

    Args:
        camera: what to read.
        scale: network pixels per source pixel, the largest that will be asked of this image; lets JPEG
            decoding skip resolution that a resize would throw away. None for full size.
        exact: decode in full all the same (and resize as the reference does): slower, other pixel values.
        fast: decode with simplejpeg where it is installed; the pixels are the same.

    Raises:
        DataError: the file is absent, truncated, neither JPEG nor PNG, or of another size than the tables say.
    """
    content = read_image_file(camera.path, "image", ", though the tables name it; copy it again")
    reduction = 1 if exact or scale is None else reduction_for(camera.size_wh_px, scale)
    image = _decode_fast(content, camera, reduction) if fast else None
    if image is None:
        image = _decode(content, camera, reduction)
    return DecodedImage(image, camera.size_wh_px, round(camera.size_wh_px[0] / image.width), exact)


def read_image_file(path: Path, what: str, absent: str) -> bytes:
    """The bytes of a JPEG or PNG that is no bomb, by its look; arguments and errors as of `read_whole`."""
    content = read_whole(path, what, MOST_IMAGE_BYTES, absent)
    scans = content.count(b"\xff\xda")
    if content.startswith(b"\xff\xd8") and scans > MOST_SCANS:
        raise DataError(f"{path}: a JPEG of {scans} scans, expected at most {MOST_SCANS}; write it again")
    return content


def has_hidden_damage(path: Path) -> bool:
    """Whether a JPEG decodes, but only by guesses of the decoder, which simplejpeg tells; False without it."""
    content = read_image_file(path, "image", "")
    if simplejpeg is None or not content.startswith(b"\xff\xd8"):
        return False
    try:
        if simplejpeg.decode_jpeg_header(content)[2] in ("YCbCr", "Gray"):
            simplejpeg.decode_jpeg(content)
    except ValueError:
        return True
    return False


def reduction_for(size_wh_px: tuple[int, int], scale: float) -> int:
    """The largest of 8, 4, 2 and 1 that leaves an image of this size at least `scale` times as large."""
    factor = min(size // max(int(size * scale), 1) for size in size_wh_px)
    return next((reduction for reduction in (8, 4, 2) if factor >= reduction), 1)


def _decode_fast(content: bytes, camera: CameraFrame, reduction: int) -> Image.Image | None:
    """The image, if simplejpeg is there and finds nothing to object to; all else is left to Pillow."""
    width, height = camera.size_wh_px
    if simplejpeg is None or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    try:
        found_height, found_width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if (found_width, found_height) != camera.size_wh_px or colours not in ("YCbCr", "Gray"):
            return None
        pixels = simplejpeg.decode_jpeg(
            content,
            min_width=-(-width // reduction),
            min_height=-(-height // reduction),
            min_factor=reduction,
        )
    except ValueError:
        return None
    return Image.fromarray(pixels)


def _decode(content: bytes, camera: CameraFrame, reduction: int) -> Image.Image:
    width, height = camera.size_wh_px
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        size_wh_px = image.size
        if size_wh_px == camera.size_wh_px:
            image.draft("RGB", (max(width // reduction, 1), max(height // reduction, 1)))
            image = image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types, and any of them means the same here
        reason = "neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{camera.path} ({len(content)} bytes): unreadable image: {reason}; copy the file again"
        ) from None
    if size_wh_px != camera.size_wh_px:
        raise DataError(
            f"{camera.path}: the image is {size_wh_px[0]}x{size_wh_px[1]} pixels, sample_data.json says "
            f"{camera.size_wh_px[0]}x{camera.size_wh_px[1]}; the intrinsics belong to the latter: mend the "
            "table or restore the original image"
        )
    return image
