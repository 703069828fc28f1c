"""Which tests need Triton's interpreter, and which a GPU."""

import pytest
import torch

from m2kernels._triton import interpreting, triton_reason

interpreted = pytest.mark.skipif(
    not interpreting() or triton_reason("cpu") is not None,
    reason="needs Triton and TRITON_INTERPRET=1, set before import: see `make test-triton`",
)
DEVICE = "cpu" if interpreting() else "cuda"

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0) or interpreting(),
    reason="needs a Hopper GPU, and TRITON_INTERPRET unset",
)
