"""Bytes of tensors that live at once."""

import torch
from semantic_style.benchmarks.live_memory import LiveMemory
from torch._subclasses.fake_tensor import FakeTensorMode


def test_storages_count_once_and_while_they_live():
    before = torch.zeros(1000)
    with LiveMemory() as memory:
        view = before.reshape(10, 100)
        a = torch.zeros(250)
        assert (memory.now, memory.peak) == (1000, 1000), "views and what was there before are free"
        b = a[:10] + torch.zeros(500)[:10]
        assert memory.now == 1000 + 40
        assert memory.peak == 1000 + 2000 + 40
        a.add_(1)
        del a, view
        assert memory.now == 40
    assert b.shape == (10,)


def test_what_a_graph_keeps_lives_until_the_backward_pass():
    for mode in (torch.inference_mode(False), FakeTensorMode()):
        with mode, LiveMemory() as memory:
            x = torch.ones(100, requires_grad=True)
            y = x.exp().exp()
            assert memory.now == 3 * 400
            (g,) = torch.autograd.grad(y.sum(), x)
            del y
            assert memory.now == 2 * 400
            assert g.shape == (100,)
