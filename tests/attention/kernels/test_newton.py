"""Newton's method on the threshold, a row per program: steps of a kernel against bisection, and what kernels take."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# NumPy warns about what is no number, where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

lower_power = newton_step = None  # of the interpreted module, for the kernel, which sees names of this file alone


@pytest.fixture
def newton(kernel_modules):
    return kernel_modules["newton"]


@pytest.fixture
def threshold_of(newton, monkeypatch):
    """Runs so many steps of Newton's method on rows of z, and gives the threshold tau of each."""
    for name in ("lower_power", "newton_step"):
        monkeypatch.setitem(globals(), name, getattr(newton, name))

    @triton.jit
    def kernel(z_ptr, tau_ptr, beyond, steps, LENGTH: tl.constexpr, KIND: tl.constexpr):
        row = tl.program_id(0)
        z = tl.load(z_ptr + row * LENGTH + tl.arange(0, LENGTH))
        tau = -1.0
        for _ in range(steps):
            above = tl.where(z > tau, z - tau, 0.0)
            power = lower_power(above, beyond, KIND)
            tau += newton_step(tl.sum(power * above, 0), tl.sum(power, 0), beyond, KIND)
        tl.store(tau_ptr + row, tau)

    def threshold_of(z, alpha, steps=30):
        tau = torch.empty(len(z), device=DEVICE)
        kind, _, _ = newton.describe(alpha, z.device)
        kernel[(len(z),)](z, tau, alpha - 1, steps, LENGTH=z.shape[1], KIND=kind)
        return tau

    return threshold_of


@pytest.mark.skipif(DEVICE == "cuda", reason="a kernel within a function is for the interpreter alone")
@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.3])
def test_steps_end_at_the_root_and_never_pass_it(threshold_of, by_bisection, random, close, alpha):
    scores = random(5, 16, scale=2)
    z = (alpha - 1) * (scores - scores.amax(1, keepdim=True))
    found = [threshold_of(z, alpha, steps) for steps in (1, 2, 4, 30)]
    for before, after in itertools.pairwise(found):
        assert (after >= before).all()
    weights = (z - found[-1][:, None]).clamp(min=0) ** (1 / (alpha - 1))
    close(weights, by_bisection(scores, alpha), atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="a kernel within a function is for the interpreter alone")
@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.3])
def test_a_row_without_keys_makes_no_step(threshold_of, alpha):
    assert threshold_of(torch.full((2, 4), float("-inf")), alpha).tolist() == [-1, -1]


def test_named_members_have_formulas_of_their_own(newton):
    assert [newton.describe(alpha, torch.device("cpu"))[0] for alpha in (2.0, 1.5, 1.3)] == [
        "sparsemax",
        "entmax15",
        "general",
    ]
    kind, values, stride = newton.describe(torch.tensor([1.5, 2.0], dtype=torch.float64), torch.device("cpu"))
    assert (kind, values.dtype, stride) == ("general", torch.float32, 1)
    assert newton.describe(1.3, torch.device("cpu"))[1:] == (torch.tensor([1.3]), 0)


def test_double_precision_is_not_rounded_in_silence(newton):
    newton.check(torch.zeros(1), torch.zeros(1).half())
    with pytest.raises(TypeError, match="float64"):
        newton.check(torch.zeros(1), torch.zeros(1).double())
    assert not newton.supported(torch.zeros(1))
