"""Token merging once more with plain loops in float64, and what it must never do."""

import numpy as np
import pytest
import torch

from sloth_fx.errors import SlothError
from sloth_fx.operators.merging import choose, merge, merge_map, merged_tokens, unmerge

CASES = [  # grid, cell, ratio, frames
    ((5, 7), (2, 2), 0.5, 1),
    ((7, 11), (3, 2), 0.3, 1),
    ((4, 6), (2, 3), 1.0, 1),
    ((1, 13), (1, 4), 0.6, 1),
    ((3, 5), (2, 2), 0.4, 3),
    ((5, 7), (9, 9), 0.8, 2),
]
BATCH, CHANNELS = 3, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cells(grid, cell):
    for r in range(0, grid[0], cell[0]):
        for c in range(0, grid[1], cell[1]):
            yield [
                i * grid[1] + j
                for i in range(r, min(r + cell[0], grid[0]))
                for j in range(c, min(c + cell[1], grid[1]))
            ]


def groups_by_hand(metric, destinations, sources, away):
    """Sets of tokens that become one, of one frame: {destination: its tokens}, and the sources that are left."""
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    best = {s: max(destinations, key=lambda d: unit[s] @ unit[d]) for s in sources}
    order = sorted(sources, key=lambda s: -(unit[s] @ unit[best[s]]))
    groups = {d: {d} for d in destinations}
    for source in order[:away]:
        groups[best[source]].add(source)
    return [*({s} for s in order[away:]), *groups.values()]


@pytest.mark.parametrize(("grid", "cell", "ratio", "frames"), CASES)
def test_the_most_similar_tokens_become_their_mean(grid, cell, ratio, frames):
    tokens = grid[0] * grid[1]
    x = torch.randn(BATCH, frames * tokens, CHANNELS, dtype=torch.float64)
    mapping = merge_map(x, grid, cell, ratio, 5, frames)
    away = merged_tokens(grid, cell, ratio)
    merged, back, chosen = merge(x, mapping), unmerge(merge(x, mapping), mapping), choose(x, mapping)
    assert merged.shape == chosen.shape == (BATCH, frames * (tokens - away), CHANNELS)
    count = len(list(cells(grid, cell)))
    for b in range(BATCH):
        for f in range(frames):
            span = slice(f * (tokens - away), (f + 1) * (tokens - away))
            frame = x[b, f * tokens : (f + 1) * tokens].numpy()
            stand = (mapping.chosen[b, span] - f * tokens).tolist()
            destinations = stand[-count:]
            assert all(len(set(cell_tokens) & set(destinations)) == 1 for cell_tokens in cells(grid, cell))
            sources = [token for token in range(tokens) if token not in destinations]
            groups = groups_by_hand(frame, destinations, sources, away)
            for group, one, mean, token in zip(groups, chosen[b, span], merged[b, span], stand, strict=True):
                assert token in group
                np.testing.assert_allclose(one, frame[token])
                np.testing.assert_allclose(mean, np.mean([frame[t] for t in group], 0))
                for t in group:
                    np.testing.assert_allclose(back[b, f * tokens + t], mean)


def test_nothing_to_merge_moves_tokens_only():
    x = torch.randn(BATCH, 35, CHANNELS)
    mapping = merge_map(x, (5, 7), ratio=0.0)
    assert torch.equal(unmerge(merge(x, mapping), mapping), x)
    assert merged_tokens((5, 7), (2, 2), 1.0) == 35 - 3 * 4


def test_the_destinations_depend_on_the_seed_and_are_spread_over_the_cell():
    x = torch.randn(1, 64 * 64, 2)
    drawn = [set(merge_map(x, (64, 64), ratio=0.75, seed=s).chosen[0].tolist()) for s in range(3)]
    assert drawn[0] != drawn[1] != drawn[2]
    assert drawn[0] == set(merge_map(x, (64, 64), ratio=0.75, seed=torch.tensor(0)).chosen[0].tolist())
    corners = np.zeros((2, 2))
    for token in drawn[0]:
        corners[token // 64 % 2, token % 2] += 1
    assert corners.sum() == 1024
    assert corners.min() > 200  # 256 each, were they random


def test_one_full_graph_whatever_the_seed():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    def through(x, seed):
        mapping = merge_map(x, (5, 7), seed=seed, frames=2)
        return unmerge(merge(x, mapping), mapping)

    compiled, x = torch.compile(through, fullgraph=True, backend=counter), torch.randn(BATCH, 70, CHANNELS)
    for seed in range(3):
        torch.testing.assert_close(compiled(x, torch.tensor(seed)), through(x, seed))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype):
    x = torch.randn(BATCH, 35, CHANNELS)
    mapping = merge_map(x, (5, 7))
    result = merge(x.to(dtype), mapping)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), merge(x, mapping), atol=4 * torch.finfo(dtype).eps, rtol=0.02)
    assert merge_map(x.to(dtype), (5, 7)).target.shape == (BATCH, 35)


def test_gradients():
    x = torch.randn(1, 12, 2, dtype=torch.float64, requires_grad=True)
    mapping = merge_map(x.detach(), (3, 4))
    assert torch.autograd.gradcheck(lambda x: unmerge(merge(x, mapping), mapping), x)


def test_errors_name_the_numbers():
    x = torch.randn(1, 34, 2)
    with pytest.raises(SlothError, match=r"34 tokens do not fit 1 x \(5, 7\), which has 35"):
        merge_map(x, (5, 7))
    with pytest.raises(SlothError, match=r"not \(0, 2\) and 0.5"):
        merge_map(x, (2, 17), (0, 2))
    with pytest.raises(SlothError, match=r"not \(2, 2\) and 1.5"):
        merge_map(x, (2, 17), ratio=1.5)
