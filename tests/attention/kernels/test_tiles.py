"""What kernels load of a block and store of it: nothing beyond the edges, nothing of padding."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel within a function is for the interpreter")


load_tile = store_tile = valid_keys = above_tau = None  # of the interpreted module, for the kernels of this file


@pytest.fixture(autouse=True)
def tiles(kernel_modules, monkeypatch):
    """Kernels see the names of their own file alone."""
    for name in ("load_tile", "store_tile", "valid_keys", "above_tau"):
        monkeypatch.setitem(globals(), name, getattr(kernel_modules["tiles"], name))


@pytest.mark.parametrize("first", [0, 4])
def test_tiles_end_at_the_edges_of_their_matrix(random, first):
    @triton.jit
    def double(source_ptr, target_ptr, whole_ptr, first, count):
        tile = load_tile(source_ptr, first, count, WIDTH=3, ROWS=4, COLUMNS=4)
        store_tile(target_ptr, 2 * tile, first, count, WIDTH=3, ROWS=4, COLUMNS=4)
        store_tile(whole_ptr, tile, 0, 4, WIDTH=4, ROWS=4, COLUMNS=4)

    source, target, whole = random(6, 3), torch.full((8, 3), 7.0), torch.full((4, 4), 7.0)
    double[(1,)](source, target, whole, first, 6)
    end = min(first + 4, 6)
    assert torch.equal(target[first:end], 2 * source[first:end])
    assert (target[:first] == 7).all() and (target[end:] == 7).all()
    assert torch.equal(whole[: end - first, :3], source[first:end])
    assert (whole[end - first :] == 0).all() and (whole[:, 3] == 0).all()


def test_keys_that_are_padding_or_do_not_exist_are_not_valid():
    @triton.jit
    def kernel(mask_ptr, x_ptr, valid_ptr, above_ptr, first, count, PADDED: tl.constexpr):
        keys = tl.arange(0, 4)
        valid = valid_keys(mask_ptr, first, count, PADDED, 4)
        tl.store(valid_ptr + keys, valid.to(tl.float32))
        tl.store(above_ptr + keys, above_tau(tl.load(x_ptr + keys), valid, 0.5, 1.0, -1.0))

    mask = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.uint8)
    x = torch.tensor([3.0, 4.0, -1.0, float("nan")])
    for first, padded, expected in [
        (0, True, [1, 0, 1, 1]),
        (0, False, [1, 1, 1, 1]),
        (4, True, [0, 1, 0, 0]),
        (4, False, [1, 1, 0, 0]),
    ]:
        valid, above = torch.empty(4), torch.empty(4)
        kernel[(1,)](mask, x, valid, above, first, 6, PADDED=padded)
        assert valid.tolist() == expected
        wanted = torch.where(valid > 0, (0.5 * x).clamp(min=0), 0.0)  # of NaN: NaN, so that it shows
        torch.testing.assert_close(above, wanted, equal_nan=True)
