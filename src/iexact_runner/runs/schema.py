"""What records must be for a report to be made of them; fields that are not named here may be anything."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from iexact_runner.untrusted.text import shown

# Beyond float32 nothing is measured.
_LARGEST = 1e39
Score = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0, le=_LARGEST)]
Figure = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
Count = Annotated[int, Meta(ge=0)]
# At most so many of what has a column, a line or a panel each.
_MOST = 1000
EpochName = Annotated[str, Meta(pattern=r"\A[0-9]{1,9}\Z")]
Histogram = Annotated[list[Amount], Meta(min_length=3)]


class Named(Struct):
    """The configuration of a model or a dataset."""

    name: str | None = None


class Compression(Struct):
    """The configuration of a compression."""

    scheme: str
    bits: int | None = None


class Training(Struct):
    """The configuration of training."""

    epochs: Count


class Config(Struct):
    """The configuration of a run."""

    model: Named
    dataset: Named
    compression: Compression
    training: Training
    runs: Count
    seed: int = 0
    task: str | None = None


class Scores(Struct):
    """Scores of the repeats in one split."""

    values: list[Score]
    mean: Score | None = None
    std: Score | None = None


class Accuracy(Struct):
    """Scores by split."""

    metric: str | None = None
    train: Scores | None = None
    val: Scores | None = None
    test: Scores | None = None
    highest_train: Scores | None = None
    highest_val: Scores | None = None


class Tensor(Struct):
    """A tensor that is kept."""

    layer: str
    op: str
    bytes: Count
    host_bytes: Count = 0


class Memory(Struct):
    """What a step keeps and reaches."""

    saved_mib: Amount | None = None
    offloaded_mib: Amount | None = None
    saved_mib_fp32: Amount | None = None
    loss_mib: Figure | None = None
    step_peak_mib: Amount | None = None
    evaluation_peak_mib: Amount | None = None
    data_mib: Amount | None = None
    model_mib: Amount | None = None
    peak_allocated_mib: Amount | None = None
    peak_reserved_mib: Amount | None = None
    peak_resident_mib: Amount | None = None
    reference_activation_mib: Amount | None = None
    tensors: list[Tensor] | None = None


class Rates(Struct):
    """Epochs per second."""

    median: Amount
    p20: Amount
    p80: Amount

    def __post_init__(self) -> None:
        if not self.p20 <= self.median <= self.p80:
            raise ValueError("p20, median and p80 must be in this order")


class Seconds(Struct):
    """Seconds of the repeats."""

    values: list[Amount]
    mean: Amount | None = None
    std: Amount | None = None


class Throughput(Struct):
    """Speed, whether the device was shared while it was taken, and how long training took to the best epoch."""

    epochs_per_second: Rates | None = None
    alone: bool | None = None
    seconds_to_best: Seconds | None = None


class Sizes(Struct):
    """A figure of mini-batches at quantiles of their sizes."""

    p50: Amount
    p95: Amount
    max: Amount


class Partition(Struct):
    """How a graph was partitioned."""

    method: str
    edge_cut: Score
    seconds: Amount


class Batches(Struct):
    """Mini-batches."""

    an_epoch: Count
    nodes: Sizes
    edges: Sizes
    saved_mib: Sizes
    step_peak_mib: Sizes
    edges_share: Amount
    nodes_per_second: Amount | None = None
    sampling_share: Amount | None = None
    waiting_share: Amount | None = None
    partition: Partition | None = None


class FP32(Struct):
    """Data, peaks and speed of the same model in FP32."""

    data_mib: Amount | None = None
    step_peak_mib: Amount | None = None
    evaluation_peak_mib: Amount | None = None
    epochs_per_second: Rates | None = None


class Energy(Struct):
    """Energy of the timed epochs."""

    kwh: Amount | None = None
    gco2e: Amount | None = None


class Deviation(Struct):
    """How far gradients were from the exact one."""

    relative_error: Amount | list[Amount | None] | None = None


class Fidelity(Struct):
    """Deviations by the epochs of exact training before."""

    after: Annotated[dict[EpochName, Deviation], Meta(max_length=_MOST)]


class Levels(Struct):
    """Variance of rounding to some levels."""

    measured: Figure
    reduction: Figure


class Map(Struct):
    """How the values of one map are distributed."""

    layer: str
    op: str
    d: Count
    js_uniform: Figure
    js_clipped_normal: Figure
    uniform: Levels
    optimal: Levels
    empirical: Levels
    observed: Histogram
    clipped_normal: Histogram

    def __post_init__(self) -> None:
        if len(self.observed) != len(self.clipped_normal):
            raise ValueError("observed and clipped_normal must be of the same length")


class PlannedMap(Struct):
    """How one map was kept under a budget."""

    layer: str
    kept: str
    mib: Amount
    error_share: Score


class Plan(Struct):
    """How a budget was dealt over the maps of a model."""

    run: Count
    epoch: Count
    budget_mib: Amount
    saved_mib: Amount
    maps: Annotated[list[PlannedMap], Meta(max_length=_MOST)]
    expected_error: Amount | None = None
    measured_error: Amount | None = None


class Process(Struct):
    """One of the processes that shared a graph."""

    nodes: Count
    halo: Count
    edges: Count
    saved_mib: Amount
    step_peak_mib: Amount | None
    data_mib: Amount
    sent_mib: Amount
    waiting_seconds: Amount


class Parallel(Struct):
    """How several processes shared a graph; records of a partition have no processes."""

    ranks: Annotated[list[Process], Meta(max_length=_MOST)] = []


class Summary(Struct):
    """``summary.json``."""

    config: Config
    environment: dict[str, Any] | None = None
    accuracy: Accuracy | None = None
    memory: Memory | None = None
    throughput: Throughput | None = None
    fp32: FP32 | None = None
    batches: Batches | None = None
    energy: Energy | None = None
    fidelity: Fidelity | None = None
    distribution: list[Annotated[list[Map], Meta(max_length=_MOST)]] | None = None
    plans: Annotated[list[Plan], Meta(max_length=_MOST)] | None = None
    parallel: Parallel | None = None


class Epoch(Struct):
    """A line of ``metrics.jsonl``."""

    run: int
    epoch: int
    loss: Figure | None
    test: Score | None
    train: Score | None = None
    val: Score | None = None


def check(value: Any, kind: type[Struct]) -> None:
    """Refuses a value that is not of a kind.

    Raises:
        ValueError: naming the field, what is there and what is valid.
    """
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).replace("`", "").partition(" - at ")
        field = re.sub(r"^(key|value)? ?(in )?\$\.?", "", place)
        raise ValueError(f"{field}{_quoted(value, field)}: {reason[:1].lower()}{reason[1:]}".lstrip(": ")) from error


def check_fields(config: Any) -> None:
    """Refuses a configuration with more fields than a table has room for."""
    count, groups = 0, [config]
    while groups:
        group = groups.pop()
        count += len(group)
        groups += [inner for inner in group.values() if isinstance(inner, dict)]
    if count > _MOST:
        raise ValueError(f"config has {count} fields: must be at most {_MOST}")


def _quoted(value: Any, field: str) -> str:
    """What stands at a field, where its name says it."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", field):
        try:
            value = value[int(index) if index else name]
        except (KeyError, IndexError, TypeError):
            return ""
    return f"={shown(value)}" if field and not isinstance(value, dict) else ""
