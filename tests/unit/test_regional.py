"""Attention within regions in float64 against a dense computation with a mask."""

import pytest
import torch
from semantic_style.attention.regional_attention import (
    best_tokens,
    continuous_attention,
    order_by_region,
    sparse_attention,
)
from semantic_style.regions.semantic_map import SemanticMap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEADS, DIM = 2, 4


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(*shape, regions, seed=0):
    return torch.randint(0, regions, shape, generator=torch.Generator().manual_seed(seed))


def heads(batch, places, seed):
    return random(batch, HEADS, places, DIM, seed=seed)


def visible(regions, image, min_tokens):
    """[N, M]: which places of the style a place of the content sees."""
    content, style = (x[image % len(x)].flatten() for x in (regions.content, regions.style))
    same = content[:, None] == style[None, :]
    same[same.sum(1) < min_tokens] = True
    return same


def dense(q, k, v, regions, min_tokens, scale):
    """Both attentions with one places x places matrix for each image."""
    continuous, sparse = [], []
    for i in range(max(len(q), len(k), len(regions.content), len(regions.style))):
        q_i, k_i, v_i = (x[i % len(x)] for x in (q, k, v))
        logits = (q_i @ k_i.mT).masked_fill(~visible(regions, i, min_tokens), -torch.inf)
        continuous.append((logits * scale).softmax(-1) @ v_i)
        sparse.append(torch.stack([v_h[best] for v_h, best in zip(v_i, logits.argmax(-1), strict=True)]))
    return torch.stack(continuous), torch.stack(sparse)


def one_region(*shape):
    return torch.zeros(shape, dtype=torch.int64)


CASES = {
    "one region": (one_region(1, 6, 6), one_region(1, 6, 6)),
    "many regions": (labels(1, 12, 9, regions=12), labels(1, 10, 10, regions=12, seed=1)),
    "missing in the style": (labels(1, 8, 8, regions=5), labels(1, 8, 8, regions=3, seed=1)),
    "missing in the content": (labels(1, 8, 8, regions=2), labels(1, 8, 8, regions=6, seed=1)),
    "nothing in common": (one_region(1, 4, 5), one_region(1, 5, 3) + 7),
    "one place": (one_region(1, 1, 1), one_region(1, 1, 1)),
    "one place sees many": (one_region(1, 1, 1), labels(1, 4, 4, regions=2)),
    "many see one place": (labels(1, 4, 4, regions=2), one_region(1, 1, 1)),
    "not square, other size": (labels(1, 5, 11, regions=3), labels(1, 13, 4, regions=3, seed=1)),
    "exactly enough and one short": (labels(1, 6, 6, regions=3), torch.tensor([[[0, 0, 0, 0], [1, 1, 1, 2]]])),
    "many places in a region": (labels(1, 9, 31, regions=2), labels(1, 21, 37, regions=2, seed=1)),
    "negative and small types": (labels(1, 6, 6, regions=3).to(torch.int8) - 2, labels(1, 6, 6, regions=3, seed=1) - 2),
}


@pytest.mark.parametrize("min_tokens", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_both_attentions_match_the_dense_ones(case, min_tokens):
    regions = SemanticMap(*CASES[case])
    order = order_by_region(regions, min_tokens)
    q, k, v = heads(1, order.content_tokens, 1), heads(1, order.style_tokens, 2), heads(1, order.style_tokens, 3)
    continuous, sparse = dense(q, k, v, regions, min_tokens, scale=0.6)
    torch.testing.assert_close(continuous_attention(q, k, v, order, scale=0.6), continuous, rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse_attention(q, k, v, order), sparse)


@pytest.mark.parametrize("images", [1, 3, 6])
@pytest.mark.parametrize("keys", [1, 3])
@pytest.mark.parametrize("maps", [(1, 1), (3, 1), (1, 3), (3, 3)])
def test_batches_take_keys_and_maps_in_turn(images, keys, maps):
    regions = SemanticMap(labels(maps[0], 5, 6, regions=4), labels(maps[1], 7, 3, regions=3, seed=1))
    order = order_by_region(regions, 2)
    q, k, v = heads(images, 30, 1), heads(keys, 21, 2), heads(keys, 21, 3)
    continuous, sparse = dense(q, k, v, regions, 2, scale=DIM**-0.5)
    torch.testing.assert_close(continuous_attention(q, k, v, order), continuous, rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse_attention(q, k, v, order), sparse)


def small(missing=True):
    regions = SemanticMap(labels(1, 3, 4, regions=3 if missing else 2), labels(1, 2, 5, regions=2, seed=1))
    return order_by_region(regions, 1), heads(2, 12, 1), heads(2, 10, 2), heads(2, 10, 3)


def test_gradients_of_the_continuous_part():
    order, *qkv = small()
    assert torch.autograd.gradcheck(
        lambda q, k, v: continuous_attention(q, k, v, order), [x.requires_grad_() for x in qkv]
    )


def test_gradients_of_the_sparse_part_go_to_the_values():
    order, q, k, v = small()
    assert torch.autograd.gradcheck(lambda v: sparse_attention(q, k, v, order), v.requires_grad_())
    q.requires_grad_(), k.requires_grad_()
    sparse_attention(q, k, v, order).sum().backward()
    assert q.grad is None
    assert k.grad is None


def test_an_order_made_in_inference_mode_serves_gradients():
    with torch.inference_mode():
        order = small()[0]
    q, k, v = (x.requires_grad_() for x in small()[1:])
    (continuous_attention(q, k, v, order) + sparse_attention(q, k, v, order)).sum().backward()
    assert v.grad.abs().sum() > 0


@pytest.mark.parametrize("side", [6, 33])
def test_the_first_of_equal_places_is_chosen_whatever_the_chunks(side):
    regions = SemanticMap(labels(1, 6, 6, regions=4), labels(1, side, side, regions=2, seed=1))
    order = order_by_region(regions)
    # Whole numbers: their sums are exact in any order.
    q, k = heads(2, 36, 1).round(), torch.ones(2, HEADS, side**2, DIM, dtype=torch.float64)
    expected = torch.stack([visible(regions, 0, 4).int().argmax(-1)] * HEADS).expand(2, -1, -1)
    for chunk_bytes in (1, 2000, 2**20):
        assert torch.equal(best_tokens(q, k, order, chunk_bytes), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    regions = SemanticMap(labels(1, 16, 16, regions=3), labels(1, 16, 16, regions=2, seed=1))
    order = order_by_region(regions)
    q, k, v = (random(2, HEADS, 256, 32, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    continuous, sparse = dense(q.double(), k.double(), v.double(), regions, 4, scale=0.5)
    out = continuous_attention(q, k, v, order, scale=0.5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), continuous, rtol=0, atol=2e-3 if dtype == torch.float16 else 2e-2)
    # The choice is the exact one for these inputs, although half precision cannot tell all products apart.
    assert torch.equal(sparse_attention(q, k, v, order).double(), sparse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse_attention(q, k, v, order).double(), sparse)


def test_large_half_precision_logits_do_not_overflow():
    order = order_by_region(SemanticMap(one_region(1, 4, 4), one_region(1, 4, 4)))
    q = 100 * random(1, HEADS, 16, 64, seed=1, dtype=torch.float16)
    assert torch.isfinite(continuous_attention(q, q, q, order)).all()
    assert torch.equal(best_tokens(q, q, order), (q.double() @ q.double().mT).argmax(-1))


def test_runs_are_equal_to_the_bit():
    regions = SemanticMap(labels(1, 24, 24, regions=3), labels(1, 24, 24, regions=3, seed=1))
    q, k, v = (random(1, HEADS, 576, 16, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    first, again = (
        [f(q, k, v, order_by_region(regions)) for f in (continuous_attention, sparse_attention)] for _ in "12"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


class LargestTensor(TorchDispatchMode):
    """The most bytes that any operation's result has in memory."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.nbytes = max(self.nbytes, *(x.untyped_storage().nbytes() for x in tensors), 0)
        return result


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("regions", [1, 4])
def test_no_tensor_of_all_pairs_is_made(regions, grad):
    side, chunk = 48, 2**16
    order = order_by_region(
        SemanticMap(labels(1, side, side, regions=regions), labels(1, side, side, regions=regions, seed=1))
    )
    q, k, v = (random(1, 1, side**2, 8, seed=i, dtype=torch.float32).requires_grad_(grad) for i in range(3))
    with LargestTensor() as largest:
        out = continuous_attention(q, k, v, order) + sparse_attention(q, k, v, order, chunk)
        if grad:
            out.sum().backward()
    assert chunk // 2 < largest.nbytes < side**4 * 4 / 32


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((1, 2, 12, 4), (1, 2, 9, 4), (1, 2, 9, 4), "SemanticMap.at"),
        ((1, 2, 11, 4), (1, 2, 10, 4), (1, 2, 10, 4), "SemanticMap.at"),
        ((1, 2, 12, 4), (1, 3, 10, 4), (1, 3, 10, 4), "heads"),
        ((1, 2, 12, 4), (1, 2, 10, 5), (1, 2, 10, 4), r"q \[1, 2, 12, 4\], k \[1, 2, 10, 5\]"),
        ((1, 12, 8), (1, 10, 8), (1, 10, 8), "heads"),
        ((1, 2, 12, 4), (1, 2, 10, 4), (1, 2, 9, 4), "one value for each key"),
        ((3, 2, 12, 4), (2, 2, 10, 4), (2, 2, 10, 4), "3 images, 2 of keys and 1 maps"),
    ],
)
def test_refusals_name_the_shapes(q, k, v, message):
    order = small()[0]
    for attention in (continuous_attention, sparse_attention):
        with pytest.raises(ValueError, match=message):
            attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), order)


def test_at_least_one_place():
    with pytest.raises(ValueError, match="min_tokens must be at least 1, got 0"):
        order_by_region(SemanticMap(one_region(1, 2, 2), one_region(1, 2, 2)), 0)
