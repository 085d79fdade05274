"""A frozen base in four bits: NormalFloat codes in blocks, whose scales are quantised too.

``holdfast.adapters.quantise_base`` replaces a model's layers by these. Source: arXiv 2305.14314, section 3.
"""

from holdfast.adapters.nf4.backends import BACKENDS
from holdfast.adapters.nf4.codes import BLOCK_SIZES, CODEBOOK, GROUP, Quantised, dequantise, quantise
from holdfast.adapters.nf4.linear import NF4Linear

__all__ = ["BACKENDS", "BLOCK_SIZES", "CODEBOOK", "GROUP", "NF4Linear", "Quantised", "dequantise", "quantise"]
