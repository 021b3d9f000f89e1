"""The compiled CPU kernels of the folded convolution.

Convolutions of 3 x 3 pixels with stride 1 and at least 64 inputs, but for small images in float32,
are the library's own; of others torch makes the convolution, and the library what follows it.
"""

import functools
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ca3d_kernels import backends, pages
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.folded_conv.op import Affine, Options
from ca3d_kernels.norm_relu_conv import convolution

_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
# Channels of a group must be a multiple of this for the library's own convolution. Sums of few
# inputs are so exact that the rounding of Winograd's transforms would be most of the error.
_CHANNELS = 16
_LEAST_INPUTS = 64
# Of images of up to so many numbers, or of few pixels, torch's float32 sums are more exact than
# those of its other convolutions: the largest error of Winograd's was (median of 12 to 20 draws,
# AMD EPYC, AVX2, 2026-12-01) 5.1 times torch's of 256 x 7 x 7, 4.0 of 2304 x 3 x 3, and 0.9 of
# 512 x 7 x 7.
_SMALL_IMAGE = 20480
_FEW_PIXELS = 24

# Winograd's transforms of a filter: for two pixels side by side, by the points 0, 1, -1 and
# infinity, and for four, by 0, 1, -1, 1/2, -2 and infinity.
_TWO = ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1))
_FOUR = (
    (1, 0, 0),
    (1 / 6, 1 / 6, 1 / 6),
    (1 / 6, -1 / 6, 1 / 6),
    (16 / 15, 8 / 15, 4 / 15),
    (1 / 30, -1 / 15, 2 / 15),
    (0, 0, 1),
)


def filters(weight: Tensor, groups: int, panel: int) -> Tensor:
    """A 3 x 3 filter in the form that the kernels read.

    Args:
        weight: (K, C / groups, 3, 3).
        groups: of the convolution.
        panel: columns that lie side by side.

    Returns:
        (groups, 24, K / groups / panel, C / groups, panel), float32; the last panel may end with
        zeros.

    Example:
        >>> filters(torch.ones(32, 16, 3, 3), groups=2, panel=16).shape
        torch.Size([2, 24, 1, 16, 16])
    """
    wide = weight.double().unflatten(0, (groups, -1))
    two, four = (torch.tensor(t, dtype=torch.float64, device=weight.device) for t in (_TWO, _FOUR))
    made = torch.einsum("ay,bx,goiyx->gabio", two, four, wide).flatten(1, 2)
    made = torch.nn.functional.pad(made, (0, -made.shape[-1] % panel))
    return made.unflatten(-1, (-1, panel)).transpose(2, 3).float().contiguous()


class NativeKernels:
    """Calls the compiled library with addresses; see `op.Kernels`.

    The filters that it makes of a weight are kept as long as that tensor lives and isn't written.
    """

    def __init__(self) -> None:
        native = backends.native()
        assert native is not None
        self._native = native
        self._filters: MutableMapping[Tensor, tuple[Any, Tensor]] = WeakIdKeyDictionary()

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        affine: Affine,
        residual: Tensor | None,
        z: Tensor,
        options: Options,
    ) -> None:
        """Writes the result into z."""
        if x.dtype not in _DTYPES:
            raise UnsupportedInputError(f"dtype {x.dtype} is not float32, float16 or bfloat16")
        pages.prepare(self._native, z)
        numbers = _numbers(affine, weight.shape[0])
        addresses = tuple(row.data_ptr() for row in numbers)
        more = 0 if residual is None else residual.data_ptr()
        threads = torch.get_num_threads()
        if _is_own(x, weight, options):
            made = self._prepared(weight, options.groups)
            images, _, height, width = x.shape
            of_group = weight.shape[1], weight.shape[0] // options.groups
            sizes = (images, height, width, options.groups, *of_group)
            self._native.folded_conv(
                _DTYPES[x.dtype], sizes, made.data_ptr(), addresses, x.data_ptr(), more,
                z.data_ptr(), threads,
            )  # fmt: skip
            return
        geometry = convolution.Geometry(options.stride, options.padding, options.groups)
        y = convolution.convolve(x, weight, None, geometry)
        if not y.movedim(1, -1).is_contiguous():
            y = z.copy_(y)
        matrix = (y.numel() // weight.shape[0], weight.shape[0])
        self._native.folded_epilogue(
            _DTYPES[x.dtype], matrix, addresses, y.data_ptr(), more, z.data_ptr(), threads
        )

    def _prepared(self, weight: Tensor, groups: int) -> Tensor:
        """The filters of a weight."""
        panel = self._native.folded_conv_panel(weight.shape[0] // groups)
        # Tensors made in inference mode have no version that would tell of a change.
        version = None
        if not weight.is_inference():
            version = (weight._version, weight.data_ptr(), groups, panel)
        found = self._filters.get(weight)
        if found is not None and version is not None and found[0] == version:
            return found[1]
        made = filters(weight, groups, panel)
        if version is not None:
            self._filters[weight] = (version, made)
        return made


def _numbers(affine: Affine, channels: int) -> list[Tensor]:
    """Bias, scale, shift and factor of the residual of every channel, each (K,) in float32."""
    rows = (affine.bias, affine.scale, affine.shift, affine.residual_scale)
    return [_ones(channels) if row is None else _plain(row) for row in rows]


def _plain(row: Tensor) -> Tensor:
    plain = row.dtype == torch.float32 and row.is_contiguous()
    return row if plain else row.float().contiguous()


@functools.lru_cache(maxsize=64)
def _ones(channels: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(channels, device="cpu")


def _is_own(x: Tensor, weight: Tensor, options: Options) -> bool:
    """Whether the library convolves, and not torch: bfloat16 only where the CPU can't.

    It depends on one image, not on how many there are: an image alone has the same bits.
    """
    if x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    outputs, inputs, *kernel = weight.shape
    pixels = x.shape[2] * x.shape[3]
    small = pixels <= _FEW_PIXELS or pixels * x.shape[1] <= _SMALL_IMAGE
    if small and x.dtype == torch.float32 and options.groups == 1:
        return False
    return (
        kernel == [3, 3]
        and tuple(options.stride) == (1, 1)
        and tuple(options.padding) == (1, 1)
        and inputs >= _LEAST_INPUTS
        and inputs % _CHANNELS == 0
        and outputs // options.groups % _CHANNELS == 0
    )
