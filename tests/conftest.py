"""shared by all tests: a fixed number of threads, and the float64 fixture."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels.py without a GPU, where Triton is installed

torch.set_num_threads(1)  # toy sizes: threads would mostly wait for each other, ten times as long on a busy machine


@pytest.fixture
def float64():
    """new tensors are float64, from a fixed seed: exactness tests see mistakes, not rounding. Undone afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
