"""Command lines that cannot be meant: wrong values of every field, unknown names, contradictions, bad grammar."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from iexact_runner.cli import compose_config

WRONG = {
    int: ("two", "1.5", "[1]", "{a: 1}", "1e3x", "0x", "null", "nan", "''", "${nowhere}", "1_0_", "-1", "-99999999999"),
    float: ("wide", "[0.1]", "{a: 1}", "nan", "-1", "-inf", "inf", "''", "${oc.env:NO_SUCH_VARIABLE}", "1,5x y"),
    bool: ("maybe", "2.5", "[true]", "''", "{}", "[]"),
    str: ("[a]", "{a: b}", "''", "no such", "../../etc/passwd", "\u202egat", "\U0001f600", "a/b", "${", "x\ty"),
}
# Any text is a folder's name; what a dataset's folder lacks is a failure of the run.
ANY_TEXT = ("output_dir", "dataset.root", "measure.country", "parallel.folder", "sampler.maps_folder")
# Values that mean something although they look wrong.
VALID = {
    "measure.max_seconds": ("inf",),
}
GROUPS = ("task", "model", "dataset", "compression", "sampler", "parallel", "logger", "recipe", "experiment", "quick")
GROUPS += ("hydra/launcher", "")
# Command lines whose fields are all tried; together they have every group.
STARTS = (
    *(("model=sage",), ("model=gat",), ("model=gcn2",), ("dataset=synthetic",), ("compression=lowrank",)),
    *(("compression=auto",), ("sampler=cluster",), ("sampler=saint_rw",), ("sampler=neighbor",), ("parallel=graph",)),
)
CHOICES = (
    "",
    "nope",
    "../config",
    "/etc/passwd",
    "../../../../etc/passwd",
    "a b",
    "GAT",
    "[gat]",
    "\u0455age",
    "null/x",
)
CONTRADICTIONS = (
    ("task=measure", "runs=2"),
    ("task=train", "measure.energy=true"),
    ("task=distribution", "compression=none"),
    ("compression=none", "compression.bits=2"),
    ("compression=none", "compression.col_size=8"),
    ("compression=lowrank_v1", "compression.energy=0.5"),
    ("compression=lowrank_v1", "compression.rank=null"),
    ("compression=lowrank", "compression.kept_frac=0.5"),
    ("compression=lowrank", "compression.share_maps=false"),
    ("compression=int4", "compression.alpha=0.5"),
    ("compression=exact", "compression.bits=null", "compression.levels=optimal"),
    ("compression=iexact", "compression.alpha=0.5", "compression.levels=optimal"),
    ("compression=exact", "compression.rank=4"),
    ("dataset=synthetic", "dataset.num_nodes=20", "dataset.average_degree=10"),
    ("dataset=synthetic", "dataset.num_train=5"),
    ("dataset=synthetic", "dataset.num_classes=20000"),
    ("dataset=synthetic", "dataset.source=digits"),
    ("dataset=digits", "dataset.name=cora"),
    ("dataset=digits", "dataset.neighbors=5000"),
    ("model=gat", "model.name=gcn"),
    ("model=gcn", "model.heads=2"),
    ("fidelity.epochs=[5,5]",),
    ("fidelity.epochs=[]",),
    ("device=cuda:99",),
    ("device=tpu",),
    ("compression.backend=triton", "device=cpu"),
    ("training.lr=0.1", "training.lr=0.2", "training.lr=x"),
    ("compression=auto", "compression.budget=0.1", "compression.budget_mib=3"),
    ("compression=auto", "compression.rank=8"),
    ("compression=lowrank", "compression.budget=0.1"),
    ("compression=lowrank", "compression.simulate=true"),
    ("compression=actnn", "compression.backend=triton"),
    ("sampler=cluster", "sampler.parts=4", "sampler.batch_parts=8"),
    ("sampler=saint_rw", "sampler.walk_length=0"),
    ("sampler=cluster", "parallel=graph"),
    ("parallel=graph", "compression.offload=true", "compression=none"),
    ("parallel=graph", "compression=auto"),
    ("parallel=graph", "model=gat", "parallel.halo_sample=0.5"),
    ("parallel=graph", "model=deepergcn"),
    ("parallel=graph", "parallel.halo_sample=1.5"),
    ("parallel=graph", "messages.backward=lowrank"),
    ("parallel=none", "parallel.parts=2"),
    ("task=partition",),
    ("task=partition", "parallel=graph"),
    ("task=advise", "advise.memory=24GB"),
    ("dataset=file",),
    ("model=module",),
    ("training.cuda_graph=true", "compression=offload"),
)
COMMANDS = (
    ("training.lr=[1",),
    ("training.lr",),
    ("=",),
    ("=1",),
    ("model.=1",),
    (".model=1",),
    ("a b=1",),
    ("++=",),
    ("~",),
    ("~training.lr",),
    ("~model",),
    ("~nothing",),
    ("training={lr: 1, lr2: 2}",),
    ("training=null",),
    ("model={}",),
    ("dataset=[cora,pubmed]",),
    ("training.lr='unclosed",),
    ("training.lr=$(touch x)",),
    ("training.lr=choice(1,2)",),
    ("seed=range(3)",),
    ("seed=1,2",),
    ("@x=1",),
    ("model@elsewhere=gat",),
    ("tr\u00e4ining.lr=1",),
    ("\uff54raining.lr=1",),
    ("training.lr=" + "9" * 500,),
    ("seed=" + "9" * 5000,),
    ("x" * 3000 + "=1",),
    ("output_dir=" + "d" * 5000,),
    ("output_dir=/dev/null/out",),
    ("output_dir=file/below/a/file",),
    ("output_dir=",),
    ("output_dir='\\\\0'", "output_dir=[x]"),
    ("dataset=cora", "dataset.root=~no_such_user/x"),
    ("hydra.run.dir=null",),
    ("hydra.run.dir=[a]",),
    ("hydra.nothing=1",),
    ("+hydra.callbacks.x._target_=no.such.thing",),
    ("hydra.mode=SIDEWAYS",),
    ("hydra.verbose={a: 1}",),
    ("hydra/job_logging=nothing",),
    ("hydra.job.env_copy=[NO_SUCH_VARIABLE]",),
    ("hydra.searchpath=3",),
    ("-m", "hydra/launcher=nothing"),
    ("-m", "hydra/sweeper=nothing"),
    ("-m", "seed=[1"),
    ("-m", "hydra.run.dir=a,b"),
    ("-m", "seed=glob("),
    ("--multirun", "--run"),
    ("--nonsense",),
    ("--cfg", "nonsense"),
    ("--config-dir", "no_such_folder"),
    ("--config-name", "no_such_file"),
    ("--config-path", "no_such_folder"),
    ("--info", "nonsense", "--cfg", "job"),
    ("--resolve",),
    ("--package", "x", "--cfg"),
    ("--experimental-rerun", "x.pickle"),
)


def bad_overrides() -> list[tuple[str, ...]]:
    """All bad command lines: wrong values of every field, unknown fields and choices, contradictions, bad grammar."""
    lines: list[tuple[str, ...]] = [*CONTRADICTIONS, *COMMANDS]
    for start in STARTS:
        for name, kind, value in fields_of(compose_config(*start)):
            lines += [(*start, f"{name}={wrong}") for wrong in WRONG[kind] if is_wrong(name, kind, value, wrong)]
            parent, _, leaf = name.rpartition(".")
            lines.append((*start, f"{parent}.{leaf}x=1".lstrip(".")))
            lines.append((*start, f"+{name}.more=1"))
            lines.append((*start, f"++{parent}.more.of.it=1".replace("++.", "++")))
    lines += [(f"{group}={choice}",) for group in GROUPS for choice in CHOICES if (group, choice) != ("quick", "")]
    return list(dict.fromkeys(lines))


def fields_of(config: object, prefix: str = "") -> Iterator[tuple[str, type, object]]:
    """Dotted names, types and values of all fields that hold a number or a word."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
            continue
        declared = str(field.type).removesuffix(" | None")
        kind = {"int": int, "float": float, "bool": bool, "str": str}.get(declared)
        if kind is not None:
            yield prefix + field.name, kind, "optional" if "None" in str(field.type) else value


def is_wrong(name: str, kind: type, value: object, wrong: str) -> bool:
    """Whether a value cannot be meant for a field."""
    if name in ANY_TEXT and wrong not in ("[a]", "{a: b}", "''", "${"):
        return False
    if value == "optional" and wrong == "null":
        return False
    return wrong not in VALID.get(name, ())
