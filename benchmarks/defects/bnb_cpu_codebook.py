"""bitsandbytes on a CPU quantises through 65,536 equal cells, so the codebook's two smallest decades are never used.

One block holds every codebook value; exact quantisation returns each of the 256 codes. The other block is 1 and zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from verdict import Finding, conclude

from holdfast.optim import codebook, dequantize_blockwise, quantize_blockwise


def finding(there_and_back: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Finding:
    one = torch.zeros(256)
    one[0] = 1
    codes, values = there_and_back(codebook(True))
    zero = float(there_and_back(one)[1][1])
    distinct, smallest = codes.unique().numel(), float(values[values.abs() > abs(zero)].abs().min())
    text = f"{distinct} of 256 codes are used, 0 comes back as {zero:.3g} absmax, the smallest other is {smallest:.3g}"
    return Finding(text, zero != 0 or distinct < 256)


def theirs() -> Finding:
    import bitsandbytes.functional as bnb

    def there_and_back(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, state = bnb.quantize_blockwise(values, code=bnb.create_dynamic_map(signed=True), blocksize=256)
        return codes, bnb.dequantize_blockwise(codes, state)

    return finding(there_and_back)


def own() -> Finding:
    def there_and_back(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, absmax = quantize_blockwise(values, signed=True, block_size=256)
        return codes, dequantize_blockwise(codes, absmax, signed=True, block_size=256)

    return finding(there_and_back)


if __name__ == "__main__":
    conclude(theirs, own)
