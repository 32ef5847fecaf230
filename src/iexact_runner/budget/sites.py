"""What each way to keep a map would miss of it, found from sampled rows while a pass keeps it in one of them.

Shapes: N nodes, D features, S sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from iexact_runner.compression.choices import UNPLANNED, UNPLANNED_BITS, Choice
from iexact_runner.compression.coefficients import CoefficientFormat, deal_bits, directions_for
from iexact_runner.compression.directions import Directions, coefficients_of, leading_directions, rows_of
from iexact_runner.compression.maps import BFLOAT16_BITS, MapFormat
from iexact_runner.compression.signs import sure_from
from iexact_runner.compression.sketch import Coefficients
from iexact_runner.kernels.reference import MOST_BITS
from iexact_runner.schemes.lowrank import OTHER_BITS

# Bits a node of a sketch grow by about this factor from one option to the next.
GROWTH = 1.25
# From how many deviations a sketch gives a sign, and the most signs that are stored; None stores all of them.
SIGNS = ((1.5, 0.15), (2.0, 0.33), (2.5, 0.5), (3.0, 0.7), (3.0, 0.999), (None, None))
# Bits of an element of the columns themselves: codes in blocks of a node, or bfloat16.
BLOCK_BITS = (2, 4, 8, BFLOAT16_BITS)
# Of a map without a sketch; None is FP32.
ELEMENT_BITS = (2, 4, 8, BFLOAT16_BITS, None)
Signs = tuple[float | None, float | None]
# Rows that options are compared on.
ROWS = 512
# At most so much more of the signs is stored than the sampled rows ask for.
SHARE_MARGIN = 1.1


@dataclass(frozen=True)
class Way:
    """An option of a map before its effect on the gradient is known.

    Args:
        choice: how the map is kept.
        bytes: of the coefficients and the directions.
        sign_bytes: of the stored signs, if dropout drops none and ReLU comes after.
        missed: share of the map's energy that is missed.
        wrong: share of the signs that are taken wrongly from the sketch.
    """

    choice: Choice
    bytes: float
    sign_bytes: float
    missed: float
    wrong: float


@dataclass
class Site(Directions):
    """The state of a map that also finds what its options would miss.

    Args:
        name: asks for the name of the layer that runs.
        shape: (N, D), once the map has been kept.
        sketched: whether it is kept as a sketch.
        layer: where it is kept.
        usual: how it is kept while nothing is planned.
        ways: its options, by rising bytes.
    """

    name: Callable[[], str] = str
    shape: tuple[int, int] = (0, 0)
    sketched: bool = True
    layer: str = ""
    usual: Way = Way(UNPLANNED, 0.0, 0.0, 0.0, 0.0)
    ways: list[Way] = field(default_factory=list)

    def found(self) -> Site:
        """What it has found, without the state of the map."""
        return Site(shape=self.shape, sketched=self.sketched, layer=self.layer, usual=self.usual, ways=self.ways)

    def observe(self, z: Tensor, sample: Tensor, offset: Tensor) -> None:
        """Compares the options of a sketch on some rows of it."""
        self.shape, self.layer = (z.size(0), z.size(1)), self.name()
        rows = sample[:: max(1, sample.size(0) // ROWS)]
        vectors = leading_directions(sample, rank=sample.size(1), energy=None)
        variances = (sample @ vectors).square().mean(0)
        missing = Missing(z.size(0), rows, offset, vectors, variances)
        [self.usual] = missing.dealt(UNPLANNED_BITS, [(UNPLANNED.sign_threshold, UNPLANNED.sign_share)])
        self.usual = replace(self.usual, choice=UNPLANNED)
        self.ways = [way for bits in grid(z.size(1)) for way in missing.dealt(bits, SIGNS)]
        self.ways += [way for bits in BLOCK_BITS for way in missing.blockwise(bits, SIGNS)]
        self.ways.append(Way(Choice(None), 4.0 * z.numel(), z.numel() / 8, 0.0, 0.0))

    def observe_quantized(self, x: Tensor) -> None:
        """The variance of rounding to one of 2 ** b levels, or to bfloat16."""
        self.sketched, self.layer = False, self.name()
        self.shape = (x.size(0), x.numel() // max(1, x.size(0)))
        self.ways = [
            Way(Choice(bits), x.numel() * (4.0 if bits is None else bits / 8), 0.0, _variance(bits), 0.0)
            for bits in ELEMENT_BITS
        ]
        self.usual = self.ways[ELEMENT_BITS.index(OTHER_BITS)]


@dataclass
class Missing:
    """What sketches of a map would miss.

    Args:
        nodes: N.
        rows: sampled rows (S, D), centred and scaled as they are sketched.
        offset: (D,), added before signs are taken.
        vectors: all directions (D, D), the leading one first.
        variances: of the rows along them.
    """

    nodes: int
    rows: Tensor
    offset: Tensor
    vectors: Tensor
    variances: Tensor

    def dealt(self, bits: int, signs: Sequence[Signs]) -> list[Way]:
        """Options with so many bits a node, dealt over the leading directions."""
        width = self.rows.size(1)
        rank = min(directions_for(bits), width)
        dealt = deal_bits(self.variances[:rank], bits)
        form = CoefficientFormat(bits, False, "auto")
        directions, deviation = self.vectors[:, :rank], self.variances[:rank].sqrt()
        known = _known(self.rows, directions, deviation, lambda coefficients: form.encode(coefficients, dealt, seed=0))
        kept = self.nodes * min(bits, MOST_BITS * rank) / 8 + 4.0 * width * (rank + 2)
        return self._ways(known, Choice(bits), kept, signs)

    def blockwise(self, bits: int, signs: Sequence[Signs]) -> list[Way]:
        """Options with so many bits an element of the columns themselves."""
        width = self.rows.size(1)
        form = MapFormat(bits, 1.0, 0, None, None, "auto")
        columns, deviation = torch.ones(width, device=self.rows.device), self.rows.square().mean().sqrt()
        known = _known(self.rows, columns, deviation, lambda coefficients: form.encode(coefficients, seed=0))
        scales = 0 if bits == BFLOAT16_BITS else 4  # both 16 bits
        kept = self.nodes * (scales + width * bits / 8) + 4.0 * width * 3
        return self._ways(known, Choice(bits, blockwise=True), kept, signs)

    def _ways(self, known: Tensor, choice: Choice, kept: float, signs: Sequence[Signs]) -> list[Way]:
        rows, elements = self.rows, self.nodes * self.rows.size(1)
        error = (rows - known).square().mean(0)
        missed = (error.sum() / rows.square().mean(0).sum().clamp_min(1e-30)).item()
        known, true = known + self.offset, rows + self.offset > 0
        size, mistaken = known.abs(), (known > 0) != true
        limits = sure_from(
            known, error.sqrt(), [(threshold, share) for threshold, share in signs if threshold is not None]
        )
        ways = []
        for threshold, share in signs:
            if threshold is None:
                ways.append(Way(choice, kept, elements / 8, missed, 0.0))
                continue
            sure = size >= limits.pop(0)
            stored = 1 - int(sure.count_nonzero()) / sure.numel()
            wrong = int((sure & mistaken).count_nonzero()) / sure.numel()
            cap = min(share or 0.999, max(1e-3, SHARE_MARGIN * stored))
            asked = replace(choice, sign_threshold=threshold, sign_share=cap)
            ways.append(Way(asked, kept, elements / 8 * stored, missed, wrong))
        return ways


class Sites(list[Directions]):
    """States of the maps of a pass, in its order; each new one finds what its options would miss.

    Args:
        name: asks for the name of the layer that runs.
    """

    def __init__(self, name: Callable[[], str]) -> None:
        super().__init__()
        self._name = name

    def append(self, state: Directions) -> None:
        """Adds a site in the place of a state that knows nothing yet."""
        super().append(Site(name=self._name))


def grid(width: int) -> list[int]:
    """Bits a node that a sketch of so many columns may have: multiples of 8, at most 8 a column."""
    bits, found = 8.0, [8]
    while found[-1] < MOST_BITS * width:
        bits *= GROWTH
        found.append(min(MOST_BITS * width, max(found[-1] + 8, round(bits / 8) * 8)))
    return found


def _known(
    rows: Tensor,
    directions: Tensor,
    deviation: Tensor,
    encode: Callable[[Tensor], tuple[Coefficients, tuple[Tensor, ...]]],
) -> Tensor:
    """Rows (S, D) as a sketch in these directions gives them, whose coefficients are divided by deviations."""
    deviation = deviation.clamp_min(1e-12)
    layout, tensors = encode(coefficients_of(rows, directions / deviation))
    return rows_of(layout.stored(tensors[: layout.parts]).float(), directions * deviation)


def _variance(bits: int | None) -> float:
    """Of a range of about six deviations, and in the same unit that of the last bit of bfloat16, relative to values."""
    if bits == BFLOAT16_BITS:
        return 2.0**-18 / 36
    return 0.0 if bits is None else 1.0 / (2**bits - 1) ** 2
