"""spconv's kernels for sparse convolution, where the package is installed (optional).

spconv 2 is built for one kind of device: `spconv-cuXXX` for CUDA, `spconv` for CPUs, which lacks the way back.
Its kernel layout is ours; its output sites come in an order of their own.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call


@cache
def built_for() -> str | None:
    """The type of device that the installed spconv computes on; None without spconv 2, or where it is broken."""
    try:
        import spconv.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
        from spconv.cppconstants import CPU_ONLY_BUILD  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return None
    except Exception as error:  # of a build for another CUDA or torch: of any type
        warnings.warn(f"spconv is not used, as it cannot be imported: {error}", stacklevel=2)
        return None
    return "cpu" if CPU_ONLY_BUILD else "cuda"


def convolve_spconv(
    features: Tensor,
    coordinates: Tensor,
    shape: tuple[int, int, int, int],
    weight: Tensor,
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    submanifold: bool,
    tables: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """A submanifold or strided layer by spconv, in float16 under its autocast, else in float32.

    Under autocast to bfloat16, for which spconv has no kernels, the result alone is bfloat16.

    Args:
        features: (N, C_in), N > 0. coordinates: (N, 4) int32, sample, z, y, x. shape: (B, Z, Y, X).
        weight: (C_out, kz, ky, kx, C_in), of more than one cell.
        tables: spconv's own, of these sites; layers on the same sites share them.

    Returns:
        features (M, C_out) and coordinates (M, 4) int32 of the output sites.
    """
    import spconv.pytorch as spconv  # pyright: ignore[reportMissingImports]

    device = features.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    dtype = torch.float16 if autocast == torch.float16 else torch.float32
    out_channels, *kernel, in_channels = weight.shape
    with torch.device("meta"):  # the layer is a form only; the weight is ours
        if submanifold:
            layer = spconv.SubMConv3d(in_channels, out_channels, kernel, bias=False, indice_key=str(kernel))
        else:
            layer = spconv.SparseConv3d(in_channels, out_channels, kernel, stride, padding, bias=False)
    tensor = spconv.SparseConvTensor(
        features.to(dtype), coordinates, list(shape[1:]), shape[0], indice_dict=tables
    )
    with torch.autocast(device, enabled=False):
        result = functional_call(layer, {"weight": weight.to(dtype)}, (tensor,))
    if submanifold:
        tables.update(result.indice_dict)
    return result.features.to(autocast), result.indices
