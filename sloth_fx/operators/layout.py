"""What is structural about one attention site at one moment: plain ints, one compiled graph for each distinct value."""

from __future__ import annotations

from typing import NamedTuple

from sloth_fx.operators.tiling import Run, runs


class Pooling(NamedTuple):
    """How a window of tokens becomes one: fixed for a site.

    `kind` is "avg" or "max". Keys become (1 - k_blend) * (first token of the window) + k_blend * (pooled window),
    values likewise; both blends lie in 0..1. `border` says what becomes of a last window that the grid cuts off: "keep"
    pools the tokens it has, "crop" drops it, as the nodes do.
    """

    kind: str = "avg"
    k_blend: float = 0.0
    v_blend: float = 0.0
    border: str = "keep"


class KeyLayout(NamedTuple):
    """Which keys the queries of one site see: pooled, tiled, sampled, in units of tokens, each pair (rows, columns).

    Attributes:
        grid: the site's image tokens, row-major; of one frame, where there are several.
        window: pooling window, and stride, of the (local) keys.
        tile: size of a tile; None leaves the grid whole.
        pad: how much of the padding to whole tiles lies above and to the left of the grid; the rest lies on the other
            side. Padding only shifts the tiles, it is never attended to.
        samples: stride of the global samples of the whole grid, which every query sees besides its own tile. None for
            none.
        flat: windows and strides are (1, n) and run along the flattened tokens of the grid, or of each tile.
        sample_window: pooling window of the global samples. A tile may be too small for it.
        frames: frames of a video, each a grid; tokens are frame-major. A tile is a column through all of them, and the
            samples are taken from each.
        frame_window: frames pooled together, and the stride along them, of local keys and of samples.
        guided: a negative text guides what the queries read.
        perturbed: the model is asked once more with what is read here spoilt.
    """

    grid: tuple[int, int]
    window: tuple[int, int] = (1, 1)
    tile: tuple[int, int] | None = None
    pad: tuple[int, int] = (0, 0)
    samples: tuple[int, int] | None = None
    flat: bool = False
    sample_window: tuple[int, int] = (1, 1)
    frames: int = 1
    frame_window: int = 1
    guided: bool = False
    perturbed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all frames, so queries."""
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def pooled(self) -> bool:
        """Whether keys are fewer than tokens even where nothing is tiled."""
        return self.window != (1, 1) or self.frame_window > 1

    @property
    def neutral(self) -> bool:
        """Whether the keys are the grid's own tokens, all of them, once."""
        return not self.pooled and self.tile is None and self.samples is None

    def runs(self) -> tuple[list[Run], list[Run]]:
        """The tiles along the rows and along the columns, as runs of equal tiles."""
        height, width = self.tile or self.grid
        return runs(self.grid[0], height, self.pad[0]), runs(self.grid[1], width, self.pad[1])

    def groups(self) -> list[tuple[Run, Run]]:
        """(row run, column run) of every group of equal tiles, row runs outermost: 1 to 9 groups."""
        rows, columns = self.runs()
        return [(band, run) for band in rows for run in columns]

    def local_tokens(self, group: tuple[Run, Run], border: str = "keep") -> int:
        """Keys that one tile of a group keeps of its own tokens."""
        return self._count((group[0].size, group[1].size), self.window, self.window, border)

    def sample_tokens(self, border: str = "keep") -> int:
        """Global samples that every query sees."""
        return self._count(self.grid, self.sample_window, self.samples, border) if self.samples else 0

    def gathered_tokens(self, border: str = "keep") -> int:
        """Tokens of one image that `reduce_tokens` returns: all tiles' own keys, and the global samples once."""
        local = sum(_tiles(group) * self.local_tokens(group, border) for group in self.groups())
        return local + self.sample_tokens(border)

    def kv_tokens(self, border: str = "keep") -> int:
        """Keys that a query sees, in the tile that has the most."""
        return max(self.local_tokens(group, border) for group in self.groups()) + self.sample_tokens(border)

    def pairs(self, border: str = "keep") -> int:
        """Pairs of a query and a key it sees, over the whole grid: what the attention costs. Neutral: tokens ** 2."""
        own = sum(_tiles(g) * g[0].size * g[1].size * self.local_tokens(g, border) for g in self.groups())
        return self.frames * own + self.tokens * self.sample_tokens(border)

    def _count(self, size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], border: str) -> int:
        if self.flat:
            size = (1, size[0] * size[1])
        rows, columns = (windows(*axis, border) for axis in zip(size, window, stride, strict=True))
        return windows(self.frames, self.frame_window, self.frame_window, border) * rows * columns


def windows(length: int, window: int, stride: int, border: str) -> int:
    """How many windows an axis holds: ceil(length / stride), or with "crop" those that are whole, at least one.

    A window longer than the axis is clipped to it.
    """
    if border == "crop":
        return (length - min(window, length)) // stride + 1
    return -(-length // stride)


def described(layout: KeyLayout) -> str:
    """The grid of a layout and its tokens, for error messages."""
    video = f"{layout.frames} frames of " if layout.frames > 1 else ""
    return f"{video}a grid of {layout.grid}, which has {layout.tokens}"


def _tiles(group: tuple[Run, Run]) -> int:
    return group[0].tiles * group[1].tiles
