"""The backward kernels of the fused operator: gradients by finite differences, and none where there is no weight."""

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("alpha", [1.5, 1.3])
def test_gradients_are_differences_of_what_the_operator_gives(flash, random, alpha):
    """Along random directions, in float32: alpha is learned, one per head."""
    inputs = [random(1, 2, n, 16, seed=n).requires_grad_() for n in (5, 9, 10)]
    inputs[2] = random(1, 2, 9, 16, seed=3).requires_grad_()
    inputs.append(torch.full((2,), alpha, device=DEVICE).requires_grad_())
    weighting = random(1, 2, 5, 16, seed=4)

    def loss(*values):
        return (flash.sparse_attention(*values) * weighting).sum()

    found = torch.autograd.grad(loss(*inputs), inputs)
    for position, gradient in enumerate(found):
        direction = random(*gradient.shape, seed=5)
        moved = [
            [x.detach() + s * direction if i == position else x for i, x in enumerate(inputs)] for s in (1e-2, -1e-2)
        ]
        difference = (loss(*moved[0]) - loss(*moved[1])) / 2e-2
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=2e-2, atol=2e-2)


def test_keys_without_weight_get_no_gradient(flash, random):
    query, value = 8 * torch.ones(1, 1, 3, 16, device=DEVICE), random(1, 1, 6, 16).requires_grad_()
    key = torch.zeros(1, 1, 6, 16, device=DEVICE)
    key[:, :, 0], key[:, :, 1] = 1.0, 0.99  # scores of 32 and less; those of the others are 0
    key.requires_grad_()
    to_key, to_value = torch.autograd.grad(flash.sparse_attention(query, key, value, 2.0).square().sum(), (key, value))
    assert (to_key[:, :, 2:] == 0).all() and (to_value[:, :, 2:] == 0).all()
    assert (to_key[:, :, :2] != 0).any() and (to_value[:, :, :2] != 0).any()
