"""Matches against a search place by place, by region and in chunks of any size."""

import math

import pytest
import torch
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.matching import find_matches
from torch.overrides import TorchFunctionMode

PERIODS = (2.0, 0.5)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(*shape, regions, seed=0):
    return torch.randint(0, regions, shape, generator=torch.Generator().manual_seed(seed))


def placed(f, weight, row, column):
    """One place's `p`, up to its length, from the formula."""
    channels, h, w = f.shape
    v = f[:, row, column] / f[:, row, column].norm()
    if weight:
        x, y = (column + 0.5) / w, (row + 0.5) / h
        code = [g(2 * math.pi * c / t) for t in PERIODS for c in (x, y) for g in (math.sin, math.cos)]
        repeats = channels // len(code)
        code = torch.tensor(code * repeats + [0.0] * (channels - repeats * len(code)), dtype=torch.float64)
        v = v + weight * code / code.norm()
    return v


def search(out, reference, weight, out_labels=None, reference_labels=None, within=None):
    """One place after another; the first of the best wins."""
    b, _, h, w = out.shape
    _, _, h_ref, w_ref = reference.shape
    found = torch.zeros(b, h * w, dtype=torch.int64)
    for image in range(b):
        r = reference[min(image, len(reference) - 1)]
        for i in range(h * w):
            p = placed(out[image], weight, i // w, i % w)
            allowed = list(range(h_ref * w_ref)) if within is None else within[min(image, len(within) - 1)].tolist()
            if out_labels is not None:
                own = out_labels[min(image, len(out_labels) - 1)].flatten()[i]
                theirs = reference_labels[min(image, len(reference_labels) - 1)].flatten()
                allowed = [j for j in allowed if theirs[j] == own] or allowed
            best = -2.0
            for j in allowed:
                q = placed(r, weight, j // w_ref, j % w_ref)
                cosine = float(p @ q / (p.norm() * q.norm()))
                if cosine > best + 1e-12:
                    best, found[image, i] = cosine, j
    return found


@pytest.mark.parametrize("weight", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("references", [1, 3])
def test_matches_are_the_most_similar_places(references, weight):
    out, reference = random(3, 18, 4, 3), random(references, 18, 3, 6, seed=1)
    found = find_matches(out, reference, weight, periods=PERIODS)
    assert found.dtype == torch.int64
    assert torch.equal(found, search(out, reference, weight))


@pytest.mark.parametrize(
    ("references", "out_maps", "style_maps"), [(1, 1, 1), (1, 3, 1), (3, 1, 3), (3, 3, 3), (1, 1, 3)]
)
def test_matches_stay_in_their_region_where_the_reference_has_it(references, out_maps, style_maps):
    out, reference = random(3, 16, 4, 5), random(references, 16, 3, 6, seed=1)
    own, theirs = labels(out_maps, 4, 5, regions=5), labels(style_maps, 3, 6, regions=3, seed=2)
    found = find_matches(out, reference, 0.7, SemanticMap(own, theirs), PERIODS)
    assert torch.equal(found, search(out, reference, 0.7, own, theirs))
    for b in range(3):
        here, there = own[min(b, out_maps - 1)].flatten(), theirs[min(b, style_maps - 1)].flatten()
        assert set(here.tolist()) - set(there.tolist()), "some region must be lacking for this to be a test"
        for i, label in enumerate(here.tolist()):
            assert there[found[b, i]] == label or label not in there


def test_regions_are_brought_to_the_features_grids():
    out, reference = random(1, 16, 4, 4), random(1, 16, 2, 6, seed=1)
    own, theirs = labels(1, 4, 4, regions=3), labels(1, 2, 6, regions=3, seed=2)
    large = SemanticMap(
        own.repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8), theirs.repeat_interleave(5, 1)
    )
    expected = find_matches(out, reference, 1.0, SemanticMap(own, theirs))
    assert torch.equal(find_matches(out, reference, 1.0, large), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_regions", [False, True])
def test_chunks_of_any_size_give_the_same(with_regions, dtype):
    out, reference = random(2, 24, 9, 7, dtype=dtype), random(2, 24, 8, 11, seed=1, dtype=dtype)
    # Many places of the reference are exactly alike; which one wins must not depend on how the product is cut.
    reference[:, :, 4:] = reference[:, :, :4]
    regions = SemanticMap(labels(2, 9, 7, regions=4), labels(1, 8, 11, regions=3)) if with_regions else None
    expected = find_matches(out, reference, 0.0, regions)
    if not with_regions:
        assert (expected < 44).all(), "a tie goes to the lowest index"
    for chunk_bytes in (1, 500, 2000, 10**5):
        assert torch.equal(find_matches(out, reference, 0.0, regions, chunk_bytes=chunk_bytes), expected)
        assert torch.equal(
            find_matches(out, reference, 2.0, regions, chunk_bytes=chunk_bytes),
            find_matches(out, reference, 2.0, regions),
        )


class LargestTensor(TorchFunctionMode):
    """Bytes of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("with_regions", [False, True])
def test_no_temporary_is_larger_than_a_chunk(with_regions):
    out, reference = random(1, 8, 40, 40, dtype=torch.float32), random(1, 8, 40, 40, seed=1, dtype=torch.float32)
    regions = SemanticMap(labels(1, 40, 40, regions=2), labels(1, 40, 40, regions=2)) if with_regions else None
    chunk = 200_000
    assert out.nbytes < chunk
    with LargestTensor() as largest:
        find_matches(out, reference, 1.0, regions, PERIODS[:1], chunk_bytes=chunk)
    assert chunk / 2 < largest.bytes <= chunk


def test_an_image_matches_itself():
    out = random(2, 16, 5, 4)
    for weight in (0.0, 3.0):
        assert torch.equal(find_matches(out, out, weight), torch.arange(20).expand(2, -1))


def test_a_large_weight_gives_the_same_place_at_any_resolution():
    out, reference = random(1, 16, 4, 4), random(1, 16, 8, 12, seed=1)
    found = find_matches(out, reference, 1e4, periods=(2.0,))[0]
    rows, columns = found // 12, found % 12
    for i in range(16):
        # The centre of a coarse cell lies between the two middle ones of the 2x3 fine cells it covers.
        assert rows[i] in (2 * (i // 4), 2 * (i // 4) + 1)
        assert columns[i] == 3 * (i % 4) + 1


def test_half_precision_is_matched_in_float32():
    out, reference = (300 * random(1, 16, 6, 6, seed=s) for s in range(2))
    for dtype in (torch.float16, torch.bfloat16):
        half = find_matches(out.to(dtype), reference.to(dtype), 1.0)
        assert torch.equal(half, find_matches(out.to(dtype).float(), reference.to(dtype).float(), 1.0))


def test_zero_vectors_and_constant_features_have_matches():
    out, reference = random(1, 16, 3, 3), torch.zeros(1, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(find_matches(out, reference, 0.0), torch.zeros(1, 9, dtype=torch.int64))
    out[...] = 0
    found = find_matches(out, reference, 1.0, periods=(2.0,))[0]
    assert found[0] == 0
    assert found[8] == 15
    assert torch.equal(find_matches(out, out, 1.0)[0], torch.arange(9))


def test_no_gradient_and_the_arguments_are_left_as_they_are():
    out, reference = random(1, 16, 3, 3).requires_grad_(), random(1, 16, 3, 3, seed=1).requires_grad_()
    copies = out.detach().clone(), reference.detach().clone()
    assert not find_matches(out, reference, 1.0).requires_grad
    assert torch.equal(out, copies[0])
    assert torch.equal(reference, copies[1])


@pytest.mark.parametrize(
    ("out", "reference", "message"),
    [
        ((1, 4, 3, 3), (1, 8, 3, 3), "4 channels and reference 8"),
        ((3, 4, 3, 3), (2, 4, 3, 3), "3 images and 2"),
        ((1, 4, 9), (1, 4, 3, 3), "features of out"),
    ],
)
def test_refusals_name_the_shapes(out, reference, message):
    with pytest.raises(ValueError, match=message):
        find_matches(torch.zeros(out), torch.zeros(reference), 1.0)


def test_refusals_of_settings_and_maps():
    x = random(3, 8, 4, 4)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="position weight"):
            find_matches(x, x, weight)
    with pytest.raises(ValueError, match="chunk_bytes"):
        find_matches(x, x, 1.0, chunk_bytes=0)
    with pytest.raises(ValueError, match="2 content maps for 3 images"):
        find_matches(x, x, 1.0, SemanticMap(labels(2, 4, 4, regions=2), labels(1, 4, 4, regions=2)))
    with pytest.raises(ValueError, match="2 style maps for 3 images"):
        find_matches(x, x, 1.0, SemanticMap(labels(1, 4, 4, regions=2), labels(2, 4, 4, regions=2)))


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("by_region", [False, True])
def test_matches_are_looked_for_within_some_positions(references, masks, by_region):
    out, reference = random(3, 16, 4, 5), random(references, 16, 3, 6, seed=1)
    within = tuple(torch.randperm(18, generator=torch.Generator().manual_seed(i))[: 4 + i].sort()[0] for i in range(3))
    within = within[:masks]
    own, theirs = labels(1, 4, 5, regions=5), labels(1, 3, 6, regions=5, seed=2)
    regions = (own, theirs) if by_region else ()
    found = find_matches(out, reference, 0.7, SemanticMap(*regions) if by_region else None, PERIODS, within=within)
    assert torch.equal(found, search(out, reference, 0.7, *regions, within=within))
    if by_region:
        there = [set(theirs.flatten()[places].tolist()) for places in within]
        assert any(set(own.flatten().tolist()) - found for found in there), "some region must have nothing within"
