"""Fields of the compression schemes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from iexact_runner.config.checks import check, check_at_least, check_choice

BITS = (1, 2, 4, 8)
BACKENDS = ("auto", "torch", "numba", "triton")
SCHEMES = ("none", "projected", "lowrank", "recompute", "auto")
# Those that keep sketches.
LOW_RANK = ("lowrank", "auto")
# Formats of a map, and which fields each reads beside ``bits``.
FORMATS = {
    "blocks": ("kept_frac", "col_size", "alpha", "levels", "max_block_size"),
    "actnn": ("group_size",),
    "dropit": ("kept_frac",),
    "velora": ("group_size",),
    "hadamard": ("group_size",),
}
LEVELS = ("uniform", "optimal")
ROUNDINGS = ("nearest", "stochastic")
SIGNS = ("sketch", "exact")
# Of the low-rank scheme where nothing is said of bits and directions.
MAP_BITS = 48
# Passes from the first eigenproblem to the second on a GPU, and the most between two: maps move less and less.
GPU_REFRESH, LONGEST_GPU_REFRESH = 10, 100


@dataclass
class CompressionConfig:
    """How activations are saved for the backward pass (symbols of the equations in brackets).

    Args:
        scheme: ``none`` keeps FP32 maps; ``projected`` keeps each map in a ``format``, as EXACT and i-EXACT do;
            ``lowrank`` keeps coefficients in adaptive directions; ``auto`` does so with bits for each map that make the
            most of a budget; ``recompute`` keeps the inputs of the blocks in FP32 and computes the rest again.
        format: of a map under ``projected``: ``blocks`` (EXACT, i-EXACT), ``actnn``, ``dropit``, ``velora`` or
            ``hadamard``.
        bits: bits of a code [b]; null keeps the (projected) map in FP32. Of ``dropit`` and ``velora``, those of the
            maps that are not the input of a product.
        kept_frac: features kept by the random projection [R = ceil(kept_frac * D)]; 1.0 is no projection. Of
            ``dropit``, elements kept.
        group_size: elements of a group of ``actnn``, of a sub-token of ``velora``, or of a transform of ``hadamard``.
        col_size: block size in rows [G / R]; 0 or 1 is one block a row.
        alpha: width of the first bin of 2-bit codes in units of the code; 1.0 is uniform, ``auto`` the best width
            for the size of each map's blocks.
        levels: ``uniform``, or ``optimal`` for all levels of least variance, at any number of bits.
        max_block_size: cap of G in elements, rounded to whole rows; null is no cap.
        share_maps: transform before aggregating, so that one kept map serves both weights of a SAGE layer; null is true
            for ``lowrank``, which needs it, and false for the others.
        store_dropout_mask: keep dropout masks as 1 bit an element instead of regenerating them from the seed.
        map_bits: bits a node and map for the coefficients of ``lowrank`` [W], dealt over the directions where they
            remove most of the error; null gives each coefficient ``bits``, and is 48 where these, ``rank`` and
            ``energy`` are null too.
        rounding: of dealt bits, ``nearest`` level, or ``stochastic``.
        rank: number of directions [R] of ``lowrank``; null if ``energy`` chooses it, or a third of ``map_bits``.
        energy: share of each map's variance that the directions of ``lowrank`` hold.
        sign_threshold: from how many residual deviations [t] on the sketch of a map gives a sign of ReLU; the others
            are stored, but not those of dropped elements. null stores 1 bit for every element.
        sign_share: at most about this share of the signs is stored, those that the sketch is least sure of; null for as
            many as ``sign_threshold`` says.
        signs: ``sketch`` takes the signs that the sketch is sure of as they are, ``exact`` lists its errors as well.
        refresh: training passes from one eigenproblem of a map to the next; its directions follow it in between. null
            for 1 on a CPU; on a GPU, where one takes longer than the rest of a block, for 10, and then twice as many
            each time up to 100.
        sample_rows: rows that new directions are found from.
        residual: columns [k] of each of two random sketches of what the directions miss, which make ``lowrank``
            unbiased and noisy; 0 leaves it out of the gradient.
        budget_mib: MiB that a step may keep under ``auto``.
        budget: the same as a share of what FP32 keeps, or ``fit`` for what the device has room for; null where
            ``budget_mib`` says it.
        interval: epochs from one measurement of what each map needs to the next, under ``auto``; null measures after
            5 epochs, 20, 80 and so on, as long as trials are about 3 % of the epochs.
        offload: move what is kept to the host until the backward pass needs it: from a GPU to pinned memory, on a CPU
            to files without a name.
        offload_folder: where these files are; null for the system's folder of temporary files.
        simulate: compress and decode at once and keep the result in FP32, to judge accuracy alone.
        backend: who runs the quantizer.
    """

    scheme: str = MISSING
    format: str = "blocks"
    bits: int | None = None
    kept_frac: float = 1.0
    group_size: int | None = None
    col_size: int = 0
    alpha: Any = 1.0  # a number or a word: OmegaConf fails to merge a union
    levels: str = "uniform"
    max_block_size: int | None = None
    share_maps: bool | None = None
    store_dropout_mask: bool = False
    map_bits: int | None = None
    rounding: str = "nearest"
    rank: int | None = None
    energy: float | None = None
    sign_threshold: float | None = None
    sign_share: float | None = None
    signs: str = "sketch"
    refresh: int | None = None
    sample_rows: int = 4096
    residual: int = 0
    budget_mib: float | None = None
    budget: Any = None  # a number or a word
    interval: int | None = None
    offload: bool = False
    offload_folder: str | None = None
    simulate: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_choice("compression.scheme", self.scheme, SCHEMES)
        check_choice("compression.backend", self.backend, BACKENDS)
        check(
            self.bits is None or self.bits in BITS,
            "compression.bits",
            self.bits,
            "must be one of 1, 2, 4, 8, or null to keep the projected map in FP32",
        )
        check(0.0 < self.kept_frac <= 1.0, "compression.kept_frac", self.kept_frac, "must be above 0 and at most 1")
        check_at_least("compression.col_size", self.col_size, 0)
        check_choice("compression.format", self.format, FORMATS)
        self._check_levels()
        if self.share_maps is None:
            self.share_maps = self.scheme in LOW_RANK
        cap = self.max_block_size
        check(cap is None or cap >= 1, "compression.max_block_size", cap, "must be 1 or more, or null for no cap")
        folder = self.offload_folder
        known = folder is None or (self.offload and folder != "")
        check(known, "compression.offload_folder", folder, "must be a folder, with compression.offload=true; or null")
        if self.scheme != "auto":
            self._check_unused("is of compression=auto", *_BUDGET)
        if self.scheme == "none":
            self._check_unused("compression=none keeps FP32; use exact or iexact", *_QUANTIZED, *_LOW_RANK)
        elif self.scheme == "recompute":
            self._check_unused("compression=recompute keeps FP32; use exact or iexact", *_QUANTIZED, *_LOW_RANK)
        elif self.scheme == "projected":
            self._check_unused("is of compression=lowrank", *_LOW_RANK)
            self._check_format()
        else:
            self._check_unused("is for schemes that keep map by map; use exact or iexact", *_MAP_BY_MAP)
            if self.scheme == "auto":
                self._check_budget()
            else:
                self._check_low_rank()

    def optimal_levels(self) -> bool:
        """Whether each map's levels are chosen for the size of its blocks."""
        return self.alpha == "auto" or self.levels == "optimal"

    def _check_levels(self) -> None:
        alpha, bits = self.alpha, "null" if self.bits is None else self.bits
        number = type(alpha) in (int, float) and 0.0 < alpha < 1.5
        check(number or alpha == "auto", "compression.alpha", alpha, "must be above 0 and below 1.5, or auto")
        check(
            alpha == 1.0 or self.bits == 2,
            "compression.alpha",
            alpha,
            f"the width of the first bin is for compression.bits=2, which is {bits} here; "
            "compression.levels=optimal is for all bits",
        )
        check_choice("compression.levels", self.levels, LEVELS)
        if self.levels == "optimal":
            known = self.bits is not None
            check(known, "compression.levels", self.levels, "needs compression.bits, which is null here")
            check(
                alpha in (1.0, "auto"),
                "compression.alpha",
                alpha,
                "compression.levels=optimal chooses the first bin itself; leave out one of the two",
            )

    def _check_format(self) -> None:
        read = FORMATS[self.format]
        for name, unused in _OF_FORMATS:
            if name not in read:
                fits = " or ".join(each for each, fields in FORMATS.items() if name in fields)
                self._check_unused(f"is of compression.format={fits}, which is {self.format} here", (name, unused))
        if self.format in ("actnn", "hadamard"):
            known = self.bits is not None
            check(known, "compression.bits", "null", f"compression.format={self.format} needs 1, 2, 4 or 8")
        size = self.group_size
        if "group_size" in read:
            check(size is not None and size >= 1, "compression.group_size", size, "must be 1 or more")
        if self.format == "hadamard" and size is not None:
            check(size.bit_count() == 1 and size >= 2, "compression.group_size", size, "must be a power of two")

    def _check_budget(self) -> None:
        chosen = ("map_bits", "rank", "energy", "sign_threshold", "sign_share", "signs", "residual")
        unused = [(name, value) for name, value in (*_LOW_RANK, *_QUANTIZED) if name in (*chosen, "bits", "col_size")]
        self._check_unused("compression=auto chooses it for each map; use lowrank to say it", *unused)
        if self.budget_mib is self.budget is None:
            self.budget = "fit"
        size, share = self.budget_mib, self.budget
        one = size is None or share is None
        check(one, "compression.budget", share, "give compression.budget or compression.budget_mib, one of the two")
        check(size is None or 0.0 < size < float("inf"), "compression.budget_mib", size, "must be above 0")
        number = type(share) in (int, float) and 0.0 < share <= 1.0
        valid = "must be above 0 and at most 1, a share of what FP32 keeps, or fit"
        check(share is None or number or share == "fit", "compression.budget", share, valid)
        if self.interval is not None:
            check_at_least("compression.interval", self.interval, 1)
        self._check_sketches()

    def _check_sketches(self) -> None:
        check_choice("compression.rounding", self.rounding, ROUNDINGS)
        if self.refresh is not None:
            check_at_least("compression.refresh", self.refresh, 1)
        check_at_least("compression.sample_rows", self.sample_rows, 1)
        shared, unused = bool(self.share_maps), (("kept_frac", 1.0), ("store_dropout_mask", False))
        check(shared, "compression.share_maps", "false", f"compression={self.scheme} shares its maps; leave it at true")
        valid = f"compression={self.scheme} has directions and regenerated masks instead"
        self._check_unused(valid, *unused)

    def _check_low_rank(self) -> None:
        rank, energy = self.rank, self.energy
        if rank is energy is self.map_bits is self.bits is None:
            self.map_bits = MAP_BITS
        check(rank is None or rank >= 1, "compression.rank", rank, "must be 1 or more, or null")
        fits = energy is None or 0.0 < energy <= 1.0
        check(fits, "compression.energy", energy, "must be above 0 and at most 1, or null")
        both = "give compression.rank or compression.energy, one of the two, and null for the other"
        dealt = self.map_bits is not None
        one = (rank is None) != (energy is None) or (dealt and rank is None)
        check(one, "compression.rank", "null" if rank is None else rank, both)
        if self.map_bits is not None:
            self._check_dealt_bits(self.map_bits)
        check(
            dealt or self.rounding == "nearest",
            "compression.rounding",
            self.rounding,
            "is for compression.map_bits, which is null here; compression.bits always rounds stochastically",
        )
        self._check_signs()
        check_at_least("compression.residual", self.residual, 0)
        self._check_sketches()

    def refresh_on(self, device: str, *, before: int = 0) -> int:
        """Training passes from one eigenproblem of a map to the next on a type of device.

        ``before`` is how many there were up to this one since the one before it; 0 if it is the first.
        """
        if self.refresh or device != "cuda":
            return self.refresh or 1
        return min(max(GPU_REFRESH, 2 * before), LONGEST_GPU_REFRESH)

    def oldest_directions(self, device: str, *, passes: int) -> int:
        """Passes that directions of a map have followed it for at most, after so many training passes."""
        found, interval, oldest = 0, self.refresh_on(device), 0
        while found + interval <= passes:
            found, oldest = found + interval, interval - 1  # intervals never become shorter
            interval = self.refresh_on(device, before=interval)
        return max(oldest, passes - found)

    def _check_dealt_bits(self, bits: int) -> None:
        check(bits >= 8 and bits % 8 == 0, "compression.map_bits", bits, "must be a multiple of 8, or null")
        dealt = "compression.map_bits deals bits over directions instead; leave out one of the two"
        self._check_unused(dealt, ("bits", None), ("col_size", 0), ("max_block_size", None))
        check(
            not self.residual,
            "compression.residual",
            self.residual,
            "needs compression.map_bits=null and compression.bits, whose rounding is unbiased: compression=lowrank_v1",
        )

    def _check_signs(self) -> None:
        threshold = self.sign_threshold
        valid = threshold is None or 0.0 < threshold < float("inf")
        check(valid, "compression.sign_threshold", threshold, "must be above 0, or null to store all signs")
        share = self.sign_share
        fits = share is None or (threshold is not None and self.signs == "sketch" and 0.0 < share < 1.0)
        needs = "must be above 0 and below 1, with a compression.sign_threshold and compression.signs=sketch; or null"
        check(fits, "compression.sign_share", share, needs)
        check_choice("compression.signs", self.signs, SIGNS)
        check(
            threshold is not None or self.signs == "sketch",
            "compression.signs",
            self.signs,
            "lists errors of the signs that compression.sign_threshold takes from the sketch; null stores all of them",
        )
        check(
            threshold is None or not self.residual,
            "compression.residual",
            self.residual,
            "needs compression.sign_threshold=null: signs that are taken from the sketch are biased",
        )

    def _check_unused(self, valid: str, *fields: tuple[str, object]) -> None:
        """A field that would be ignored is a mistake."""
        for name, unused in fields:
            value = getattr(self, name)
            check(value == unused, f"compression.{name}", value, valid)


_LOW_RANK = (
    ("map_bits", None),
    ("rounding", "nearest"),
    ("rank", None),
    ("energy", None),
    ("sign_threshold", None),
    ("sign_share", None),
    ("signs", "sketch"),
    ("refresh", None),
    ("sample_rows", 4096),
    ("residual", 0),
)
_BUDGET = (("budget_mib", None), ("budget", None), ("interval", None))
_OF_FORMATS = (
    ("kept_frac", 1.0),
    ("col_size", 0),
    ("alpha", 1.0),
    ("levels", "uniform"),
    ("max_block_size", None),
    ("group_size", None),
)
_MAP_BY_MAP = (("format", "blocks"), ("group_size", None), ("simulate", False))
_QUANTIZED = (
    *_MAP_BY_MAP,
    ("bits", None),
    ("kept_frac", 1.0),
    ("col_size", 0),
    ("max_block_size", None),
    ("store_dropout_mask", False),
)
