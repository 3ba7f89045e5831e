"""shared by all tests: a fixed number of threads, and the float64 fixture."""
import pytest
import torch

torch.set_num_threads(1)  # toy sizes: threads would mostly wait for each other, ten times as long on a busy machine


@pytest.fixture
def float64():
    """new tensors are float64, from a fixed seed: exactness tests see mistakes, not rounding. Undone afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
