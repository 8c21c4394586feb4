"""How label maps that a clustering found agree with the true ones.

Adjusted Rand index: Hubert and Arabie, "Comparing partitions", Journal of Classification 2, 1985.
"""

import torch
from torch import Tensor


def adjusted_rand_index(a: Tensor, b: Tensor) -> float:
    """How alike two divisions of the same places are, whatever their labels are called: 1 the same, 0 as by chance.

    Args:
        a, b: integers of one shape.
    Raises:
        ValueError: shapes that differ, or no places.
    """
    if a.shape != b.shape or not a.numel():
        raise ValueError(f"two labellings of the same places are needed, got {list(a.shape)} and {list(b.shape)}")
    (in_a, in_b) = (torch.unique(t.flatten(), return_inverse=True)[1] for t in (a, b))
    columns = int(in_b.max()) + 1
    table = torch.bincount(in_a * columns + in_b, minlength=(int(in_a.max()) + 1) * columns).double()
    table = table.unflatten(0, (-1, columns))

    def pairs(counts: Tensor) -> float:
        return (counts * (counts - 1) / 2).sum().item()

    both, of_a, of_b = pairs(table), pairs(table.sum(dim=1)), pairs(table.sum(dim=0))
    everything = a.numel() * (a.numel() - 1) / 2
    chance = of_a * of_b / everything if everything else 0.0
    most = (of_a + of_b) / 2
    # Both one region, or every place its own: the same.
    return 1.0 if most == chance else (both - chance) / (most - chance)


def agreement(content: Tensor, style: Tensor, true_content: Tensor, true_style: Tensor) -> dict[str, float]:
    """Figures for one pair of maps; labels [H, W], content and style each of the size of their true ones.

    Returns:
        "content", "style", "joint": adjusted Rand index on either side, and of both sides as one set of places.
        "same region": share of the true regions on both sides whose most frequent label is the same there.
        "right partner": share of the content's places, of regions that the style has, times the share of the style's
        places with their label that are truly of their region: what attention within regions sees of the right kind.
        Places whose label the style lacks see the whole style.
        "regions": how many labels there are.
    """
    content, style, true_content, true_style = (t.flatten() for t in (content, style, true_content, true_style))
    shared = [r for r in torch.unique(true_content).tolist() if (true_style == r).any()]
    same = [content[true_content == r].mode().values == style[true_style == r].mode().values for r in shared]
    seen = []
    for region in shared:
        right = true_style == region
        for label, places in zip(*torch.unique(content[true_content == region], return_counts=True), strict=True):
            partners = style == label
            if not partners.any():
                partners = torch.ones_like(partners)
            seen.append((places.item(), (right & partners).sum().item() / partners.sum().item()))
    weight = sum(n for n, _ in seen)
    return {
        "content": adjusted_rand_index(content, true_content),
        "style": adjusted_rand_index(style, true_style),
        "joint": adjusted_rand_index(torch.cat([content, style]), torch.cat([true_content, true_style])),
        "same region": sum(map(float, same)) / len(same) if same else 1.0,
        "right partner": sum(n * share for n, share in seen) / weight if weight else 1.0,
        "regions": float(len(torch.unique(torch.cat([content, style])))),
    }
