"""Packing is exact and really small; the product equals the dense one within its workspace."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pintpot.core.errors import ShapeError
from pintpot.kernels import dequantize, grid, grid_matmul, pack, packed_size, unpack, workspace_bytes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 5, 8, 64, 131])
def test_pack_round_trip_and_size(bits, count):
    codes = torch.randint(0, 1 << bits, (3, 2, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, count), codes)
    assert packed.shape[-1] == packed_size(count, bits)
    if count % 8 == 0:
        assert packed.shape[-1] == count * bits // 8


def test_bad_widths_are_refused():
    with pytest.raises(ShapeError, match="9 bits"):
        pack(torch.zeros(8, dtype=torch.uint8), 9)
    with pytest.raises(ShapeError, match="uint8"):
        pack(torch.zeros(8), 4)
    with pytest.raises(ShapeError, match="take 4 bytes, not 8"):
        unpack(torch.zeros(8, dtype=torch.uint8), 4, 8)


def make_grid(out_features, in_features, bits, group_size, symmetric):
    generator = torch.Generator().manual_seed(1)
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << bits, (out_features, groups), dtype=torch.uint8, generator=generator)
    scale = torch.rand(out_features, groups, generator=generator).to(torch.float16)
    column = torch.arange(in_features) // group_size
    zero_of_each = torch.full_like(codes, 1 << (bits - 1)) if symmetric else zeros[:, column]
    dense = (codes.float() - zero_of_each.float()) * scale.float()[:, column]
    return pack(codes, bits), scale, None if symmetric else pack(zeros, bits), dense


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "in_features", "group_size"), [(4, 64, 16), (3, 70, 32), (8, 48, 48), (5, 20, 32)])
@pytest.mark.parametrize("workspace", [16 << 20, 1000])
def test_product_and_gradient_equal_dense(symmetric, bits, in_features, group_size, workspace, monkeypatch):
    monkeypatch.setattr(grid, "WORKSPACE_BYTES", workspace)
    packed, scale, zero, dense = make_grid(24, in_features, bits, group_size, symmetric)
    assert torch.equal(
        dequantize(packed, scale, zero, bits=bits, group_size=group_size, in_features=in_features, dtype=torch.float32),
        dense,
    )
    x = torch.randn(2, 3, in_features, generator=torch.Generator().manual_seed(2), requires_grad=True)
    out = grid_matmul(x, packed, scale, zero, bits=bits, group_size=group_size)
    out.square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    expected = twin @ dense.T
    expected.square().sum().backward()
    # Sums of tens of products in float32, in another order.
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6 * float(expected.detach().abs().max()))
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-6 * float(twin.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_in_half_precision(dtype):
    packed, scale, zero, dense = make_grid(16, 64, 4, 32, False)
    x = torch.randn(3, 64, dtype=dtype)
    out = grid_matmul(x, packed, scale, zero, bits=4, group_size=32)
    assert out.dtype is dtype
    # Scale, weight and sum are each rounded once or more to 8 or 11 bits.
    torch.testing.assert_close(out.float(), x.float() @ dense.T, rtol=0.05, atol=0.5)


def test_backward_saves_no_dense_weight():
    packed, scale, zero, _ = make_grid(32, 64, 4, 32, False)
    x = torch.randn(4, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grid_matmul(x, packed, scale, zero, bits=4, group_size=32)
    assert {t.data_ptr() for t in saved} <= {packed.data_ptr(), scale.data_ptr(), zero.data_ptr()}


def test_runs_on_shapes_alone():
    packed, scale, zero, _ = make_grid(24, 64, 3, 32, False)
    with FakeTensorMode() as mode:
        x = torch.empty(2, 5, 64, requires_grad=True)
        tensors = [mode.from_tensor(t) for t in (packed, scale, zero)]
        out = grid_matmul(x, *tensors, bits=3, group_size=32)
        assert out.shape == (2, 5, 24)
        out.sum().backward()
        assert x.grad.shape == x.shape
    meta = grid_matmul(
        torch.empty(2, 64, device="meta"), packed.to("meta"), scale.to("meta"), zero.to("meta"), bits=3, group_size=32
    )
    assert meta.shape == (2, 24)


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once in storages made under it, those of ``inputs`` left out."""

    def __init__(self, *inputs):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key, size):
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [40_000, 16 << 20])
def test_workspace_is_bounded_and_predicted(dtype, workspace, monkeypatch):
    monkeypatch.setattr(grid, "WORKSPACE_BYTES", workspace)
    packed, scale, zero, _ = make_grid(256, 512, 4, 32, False)
    x = torch.randn(2 * grid.FEW_ROWS, 512, dtype=dtype)
    with LiveBytes(x, packed, scale, zero) as tracked:
        out = grid_matmul(x, packed, scale, zero, bits=4, group_size=32)
    predicted = workspace_bytes(256, 512, 32, dtype)
    temporaries = tracked.peak - out.nbytes
    assert temporaries <= predicted
    assert temporaries > 0.6 * predicted
    assert predicted <= workspace or workspace > 256 * 512 * 5
