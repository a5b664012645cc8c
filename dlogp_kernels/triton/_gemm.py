"""Matrix products by the vendor's library, accumulated and returned in float32 whatever the inputs' dtype."""

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, in float32; `right` is converted to the dtype of `left`."""
    right = right.to(left.dtype)
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)
    else:  # Triton's interpreter: the CPU has no product of this kind
        torch.mm(left.float(), right.float(), out=out)


def add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out += left @ right, in float32."""
    right = right.to(left.dtype)
    if left.dtype == torch.float32:
        torch.addmm(out, left, right, out=out)
    elif left.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    else:
        torch.addmm(out, left.float(), right.float(), out=out)
