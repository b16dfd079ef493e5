"""The integer layers that really run: a table (scheme, device, dtype) -> kernel.

Importing this package registers the kernels, best first. The tensor subclasses are in :mod:`qat_plugin.kernels.weight`
(importing it imports torchao).
"""

from qat_plugin.kernels.cpu_conv import OneDnnConv
from qat_plugin.kernels.cpu_int4 import AtenInt4
from qat_plugin.kernels.cpu_int8 import AtenInt8, OneDnnInt8
from qat_plugin.kernels.cpu_native import NativeInt4, NativeInt8
from qat_plugin.kernels.cuda import CudaInt4, CudaInt8, CudaInt8WeightOnly
from qat_plugin.kernels.portable import Portable
from qat_plugin.kernels.table import (
    Choice,
    ConvCall,
    ConvShape,
    Kernel,
    LayerSpec,
    choose,
    kernel_named,
    kernels,
    register,
)

for _kernel in (
    *(NativeInt8(), NativeInt4(), OneDnnInt8(), AtenInt8(), AtenInt4()),
    *(CudaInt8(), CudaInt8WeightOnly(), CudaInt4(), OneDnnConv(), Portable()),
):
    register(_kernel)

__all__ = ["Choice", "ConvCall", "ConvShape", "Kernel", "LayerSpec", "choose", "kernel_named", "kernels", "register"]
