"""The Triton kernels, and what their tests share.

On a machine with a GPU they run on it; elsewhere Triton's interpreter runs them, one operation at a time in NumPy, on
tiny tensors.
"""

import importlib

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def kernel_modules():
    """The files of kernels by name, imported anew: for the interpreter if there is no GPU.

    Triton decides at each decorator whether a function is compiled, and torchvision has long imported the functions of
    its own library. The environment is left as it was: other tests and their processes do not want the interpreter.
    """
    triton = pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            from triton.language import random, standard

            for name, function in (vars(importlib.reload(standard)) | vars(importlib.reload(random))).items():
                if hasattr(triton.language, name):
                    setattr(triton.language, name, function)
        order = ("newton", "tiles", "rows", "flash_backward", "flash", "deformable")  # whom they import comes before
        modules = {name: importlib.import_module(f"detrlib.attention.kernels.{name}") for name in order}
        return {name: importlib.reload(modules[name]) for name in order}


@pytest.fixture(autouse=True)
def interpret(kernel_modules, monkeypatch):
    """What `kernel_modules` has chosen, for as long as a test lasts."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def rows(kernel_modules):
    return kernel_modules["rows"]


@pytest.fixture(scope="session")
def flash(kernel_modules):
    return kernel_modules["flash"]


@pytest.fixture(params=[2.0, 1.5, 1.3, 1.05, "learned"])
def alpha(request):
    """Every kind of alpha; see `spread`."""
    return request.param


@pytest.fixture(scope="session")
def hard():
    """[1,5]: near alpha = 2, Newton's method comes close to the threshold of this row long before it is there."""
    return torch.tensor([[-0.36588633, -0.30654293, -0.26329598, 0.31967798, 0.04227265]], device=DEVICE)


@pytest.fixture(scope="session")
def random():
    def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)

    return random


@pytest.fixture(scope="session")
def spread():
    def spread(alpha: float | str, count: int) -> float | torch.Tensor:
        """The number itself, or as many alphas as there are rows or heads."""
        return torch.linspace(1.02, 1.98, count, device=DEVICE) if alpha == "learned" else alpha

    return spread


@pytest.fixture(scope="session")
def grows():
    def grows(*tensors):
        """Copies in float64 that collect gradients; what is no tensor stays as it is."""
        return [x.double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in tensors]

    return grows


@pytest.fixture(scope="session")
def gradients():
    def gradients(value, weighting, inputs):
        return torch.autograd.grad(
            (value * weighting).sum(), [x for x in inputs if isinstance(x, torch.Tensor)], retain_graph=True
        )

    return gradients


@pytest.fixture(scope="session")
def close():
    def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6, rtol: float = 0.0) -> None:
        torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=rtol)

    return close
