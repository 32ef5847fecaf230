"""Every YAML composes and checks; every bad value is one line."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conftest import REPOSITORY
from iexact_runner.cli import compose_config
from iexact_runner.config import (
    BITS,
    BinsConfig,
    CheckpointConfig,
    CompressionConfig,
    Config,
    FidelityConfig,
    MeasureConfig,
    TrainingConfig,
)
from iexact_runner.config.compression import BACKENDS, LEVELS, SCHEMES
from iexact_runner.config.presets import preset, preset_names
from iexact_runner.errors import ConfigError

CONF = REPOSITORY / "conf"
DATASETS = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
PRESETS = sorted(path.stem for path in (CONF / "compression").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_model_composes_with_every_dataset(model, dataset):
    needed = {"module": ["model.target=package:Class"], "file": ["dataset.path=PATH"]}
    overrides = [*needed.get(model, ()), *needed.get(dataset, ())]
    config = compose_config(f"model={model}", f"dataset={dataset}", "compression=none", *overrides)
    assert isinstance(config, Config)
    named = {"module": "module_Class", "file": "file_PATH"}
    assert (config.model.name, config.dataset.name) == (named.get(model, model), named.get(dataset, dataset))
    if f"{model}_{dataset}" not in RECIPES:
        assert config.training.epochs == 200 and config.training.lr == 0.01 and config.training.grad_norm == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_library_are_those_of_the_command_line(name):
    assert preset(name) == compose_config(f"compression={name}").compression
    assert name in preset_names()
    backend = compose_config(f"compression={name}", "compression.backend=torch").compression
    assert preset(name, backend="torch") == backend != preset(name)


def test_directions_are_found_less_often_on_a_gpu():
    config = preset("lowrank")
    assert (config.refresh_on("cpu"), config.refresh_on("cpu", before=1)) == (1, 1)
    intervals = [0]
    for _ in range(6):
        intervals.append(config.refresh_on("cuda", before=intervals[-1]))
    assert intervals[1:] == [10, 20, 40, 80, 100, 100]
    fixed = preset("lowrank", refresh=3)
    assert {fixed.refresh_on(device, before=before) for device in ("cpu", "cuda") for before in (0, 3)} == {3}


@pytest.mark.parametrize(("device", "refresh"), [("cuda", None), ("cpu", None), ("cuda", 1), ("cpu", 7)])
def test_oldest_directions_are_those_that_were_followed_longest(device, refresh):
    config = preset("lowrank", refresh=refresh)
    age = interval = oldest = 0
    for number in range(400):
        age += 1
        if age >= interval:
            age, interval = 0, config.refresh_on(device, before=interval)
        oldest = max(oldest, age)
        assert config.oldest_directions(device, passes=number) == oldest
    assert oldest == {("cuda", None): 99, ("cpu", None): 0, ("cuda", 1): 0, ("cpu", 7): 6}[device, refresh]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("lowrnk", {}, "compression=lowrnk: no such choice; did you mean lowrank? valid: actnn, auto, dropit, exact"),
        ("lowrank", {"rnk": 3}, "compression.rnk=3: no such field; did you mean rank? valid: scheme, format, bits"),
        ("lowrank", {"rank": 0}, "compression.rank=0: must be 1 or more"),
        ("lowrank", {"rank": "many"}, "compression.rank: Value 'many' of type 'str' could not be converted to Integer"),
        ("lowrank", {"bits": 4}, "compression.bits=4: compression.map_bits deals bits"),
        ("lowrank", {"scheme": "none"}, "compression.scheme=none: compression=lowrank is lowrank; name another preset"),
        ("lowrank", {"share_maps": False}, "compression.share_maps=false: compression=lowrank shares"),
        (
            "lowrank_v1",
            {"map_bits": 48},
            "compression.map_bits=48: does not fit compression=lowrank_v1, which has compression.bits=4: ",
        ),
        (
            "lowrank_v1",
            {"rank": None, "refresh": 2},
            "compression.rank=null: give compression.rank or compression.energy",
        ),
    ],
    ids=str,
)
def test_errors_of_a_preset_name_what_the_caller_wrote(name, fields, message):
    with pytest.raises(ConfigError) as error:
        preset(name, **fields)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_defaults_depend_on_the_scheme():
    assert CompressionConfig(scheme="lowrank", rank=8).share_maps is True
    assert CompressionConfig(scheme="lowrank").map_bits == 48
    assert CompressionConfig(scheme="lowrank", rank=8).map_bits is None
    for scheme in ("none", "projected"):
        assert CompressionConfig(scheme=scheme).share_maps is False


def test_every_recipe_belongs_to_a_pair():
    assert set(RECIPES) <= {f"{model}_{dataset}" for model in MODELS for dataset in DATASETS}


def test_defaults_are_the_embedded_job():
    config = compose_config()
    assert (config.model.name, config.dataset.name, config.task) == ("sage", "digits", "train")
    compression = config.compression
    assert (compression.bits, compression.kept_frac, compression.col_size) == (2, 0.125, 64)
    assert (compression.max_block_size, compression.store_dropout_mask, compression.share_maps) == (1024, True, False)


# Table of the specification, section 7: layers, hidden, dropout, lr, epochs, clipping.
@pytest.mark.parametrize(
    ("model", "dataset", "expected"),
    [
        ("gcn", "arxiv", (3, 128, 0.5, 0.01, 500, 0.5)),
        ("sage", "arxiv", (3, 128, 0.5, 0.01, 500, 0.5)),
        ("gcn2", "arxiv", (16, 256, 0.1, 0.001, 1000, 0.5)),
        ("gat", "arxiv", (3, 128, 0.75, 0.002, 2000, None)),
        ("gcn", "flickr", (2, 256, 0.3, 0.01, 400, 0.5)),
        ("sage", "flickr", (2, 256, 0.3, 0.01, 400, 0.5)),
        ("gcn2", "flickr", (8, 256, 0.5, 0.01, 400, 0.5)),
        ("gcn", "reddit", (2, 256, 0.5, 0.01, 400, None)),
        ("sage", "reddit2", (2, 256, 0.5, 0.01, 400, None)),
        ("gcn2", "reddit2", (4, 256, 0.5, 0.01, 400, None)),
        ("gcn", "yelp", (2, 512, 0.1, 0.01, 500, None)),
        ("gcn2", "yelp", (4, 512, 0.0, 0.01, 500, None)),
        ("sage", "products", (3, 256, 0.5, 0.002, 500, 0.5)),
        ("sage", "cora", (3, 128, 0.5, 0.01, 200, 0.5)),
        ("gcn2", "tolokers", (8, 128, 0.5, 0.01, 200, 0.5)),
        ("gat", "digits", (2, 64, 0.5, 0.01, 200, 0.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_hyper_parameters(model, dataset, expected):
    config = compose_config(f"model={model}", f"dataset={dataset}", "compression=none")
    net, training = config.model, config.training
    assert expected == (
        net.num_layers,
        net.hidden_channels,
        net.dropout,
        training.lr,
        training.epochs,
        training.grad_norm,
    )


def test_details_of_single_recipes():
    gat = compose_config("model=gat", "dataset=arxiv", "compression=none")
    assert (gat.training.optimizer, gat.training.warmup_epochs) == ("rmsprop", 50)
    net = gat.model
    assert (net.heads, net.input_dropout, net.edge_dropout, net.label_mask_rate) == (3, 0.25, 0.7, 0.5)
    assert net.residual and net.shared_attention and net.label_input
    arxiv = compose_config("model=gcn2", "dataset=arxiv", "compression=none").model
    assert (arxiv.alpha, arxiv.theta, arxiv.residual, arxiv.input_dropout) == (0.5, None, True, 0.1)
    assert compose_config("dataset=products").model.batch_norm is False
    losses = {name: compose_config(f"dataset={name}").training.loss for name in ("arxiv", "flickr", "synthetic_arxiv")}
    assert losses == {"arxiv": "log_cross_entropy", "flickr": "cross_entropy", "synthetic_arxiv": "log_cross_entropy"}
    assert compose_config("dataset=arxiv").dataset.undirected
    assert compose_config("dataset=yelp").dataset.standardize and compose_config("dataset=reddit2").dataset.standardize


def test_a_command_line_value_beats_the_recipe():
    config = compose_config("dataset=arxiv", "training.epochs=3", "model.hidden_channels=7")
    assert (config.training.epochs, config.model.hidden_channels, config.model.dropout) == (3, 7, 0.5)


def test_help_names_every_choice():
    template = (CONF / "config.yaml").read_text()
    described = template.partition("template:")[2]
    for group in ("task", "model", "dataset", "compression", "experiment", "logger"):
        for path in sorted((CONF / group).glob("*.yaml")):
            assert f" {path.stem} " in described.replace("\n", " "), f"{group}={path.stem} is not in --help"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compression.bits=3", "compression.bits=3: must be one of 1, 2, 4, 8"),
        ("compression.bits=0", "compression.bits=0: must be one of 1, 2, 4, 8"),
        ("compression.kept_frac=0", "compression.kept_frac=0.0: must be above 0 and at most 1"),
        ("compression.kept_frac=1.01", "compression.kept_frac=1.01"),
        ("compression.kept_frac=nan", "compression.kept_frac=nan"),
        ("compression.alpha=0", "compression.alpha=0: must be above 0 and below 1.5"),
        ("compression.alpha=1.5", "compression.alpha=1.5"),
        ("compression.alpha=best", "compression.alpha=best: must be above 0 and below 1.5, or auto"),
        ("compression.alpha=true", "compression.alpha=true: must be above 0 and below 1.5, or auto"),
        ("compression.levels=best", "compression.levels=best: must be one of uniform, optimal"),
        ("compression.col_size=-1", "compression.col_size=-1: must be 0 or more"),
        ("compression.max_block_size=0", "compression.max_block_size=0: must be 1 or more, or null"),
        ("compression.backend=jax", "compression.backend=jax: must be one of auto, torch"),
        ("compression.scheme=zip", "compression.scheme=zip: must be one of none, projected"),
        ("model.num_layers=0", "model.num_layers=0: must be 1 or more"),
        ("model.hidden_channels=-1", "model.hidden_channels=-1: must be 1 or more"),
        ("model.dropout=1", "model.dropout=1.0: must be at least 0 and below 1"),
        ("model.input_dropout=-.1", "model.input_dropout=-0.1"),
        ("training.epochs=0", "training.epochs=0: must be 1 or more"),
        ("training.lr=0", "training.lr=0.0: must be above 0"),
        ("training.lr=nan", "training.lr=nan: must be above 0"),
        ("training.grad_norm=0", "training.grad_norm=0.0: must be above 0, or null"),
        ("training.optimizer=sgd", "training.optimizer=sgd: must be one of adam, rmsprop"),
        ("training.loss=mse", "training.loss=mse: must be one of cross_entropy"),
        ("training.weight_decay=-1", "training.weight_decay=-1.0"),
        ("training.warmup_epochs=-1", "training.warmup_epochs=-1"),
        ("measure.timed_epochs=0", "measure.timed_epochs=0"),
        ("measure.warmup_epochs=-1", "measure.warmup_epochs=-1"),
        ("measure.max_seconds=0", "measure.max_seconds=0.0"),
        ("bins.bits=3", "bins.bits=3: must be one of 1, 2, 4, 8"),
        ("precision=float64", "precision=float64: must be one of float32, bfloat16, float16"),
        ("fidelity.epochs=[]", "fidelity.epochs=[]: must be increasing and 0 or more"),
        ("fidelity.epochs=[5,5]", "fidelity.epochs=[5, 5]"),
        ("fidelity.epochs=[-1,5]", "fidelity.epochs=[-1, 5]"),
        ("fidelity.draws=1", "fidelity.draws=1: must be 2 or more"),
        ("measure.country=denmark", "measure.country=denmark: must be an ISO 3166 code of three letters"),
        ("measure.energy=true", "measure.energy=true: timed epochs are those of task=measure"),
        ("runs=0", "runs=0: must be 1 or more"),
        ("seed=-1", "seed=-1: must be 0 or more"),
        ("dataset.root=''", "dataset.root=''"),
        ("dataset.neighbors=0", "dataset.neighbors=0: must be between 1 and 1796"),
        ("dataset.split_seed=-1", "dataset.split_seed=-1"),
        ("model.name=gat", "model.name=gat: choose one with model=NAME"),
        ("dataset.name=cora", "dataset.name=cora: choose one with dataset=NAME"),
        ("output_dir=''", "output_dir='': must be a folder"),
    ],
)
def test_bad_values_name_the_field(override, message):
    with pytest.raises(ConfigError) as error:
        compose_config(override)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compression.bits=4", "compression.alpha=.9"], "compression.alpha=0.9: the width of the first bin is for"),
        (["compression.bits=null", "compression.alpha=.9"], "compression.bits=2, which is null here"),
        (["compression.bits=4", "compression.alpha=auto"], "compression.alpha=auto: the width of the first bin is for"),
        (["compression.bits=null", "compression.levels=optimal"], "compression.levels=optimal: needs compression.bits"),
        (["compression.levels=optimal", "compression.alpha=.9"], "compression.alpha=0.9: compression.levels=optimal"),
        (["compression=none", "compression.levels=optimal"], "compression.levels=optimal: needs compression.bits"),
        (["compression=none", "compression.bits=2"], "compression.bits=2: compression=none keeps FP32"),
        (["compression=none", "compression.kept_frac=.5"], "compression.kept_frac=0.5: compression=none"),
        (["model=gat", "compression=none", "model.label_mask_rate=1"], "model.label_mask_rate=1.0"),
        (["model=gat", "compression=none", "model.heads=0"], "model.heads=0"),
        (["model=gcn2", "compression=none", "model.alpha=2"], "model.alpha=2.0"),
        (["model=gcn2", "compression=none", "model.theta=0"], "model.theta=0.0"),
        (["compression=lowrank", "compression.rank=0"], "compression.rank=0: must be 1 or more, or null"),
        (
            ["compression=lowrank", "compression.map_bits=12"],
            "compression.map_bits=12: must be a multiple of 8, or null",
        ),
        (["compression=lowrank", "compression.bits=4"], "compression.bits=4: compression.map_bits deals bits over"),
        (["compression=lowrank", "compression.residual=4"], "compression.residual=4: needs compression.map_bits=null"),
        (["compression=lowrank", "compression.rounding=up"], "compression.rounding=up: must be one of nearest"),
        (
            ["compression=lowrank_v1", "compression.rounding=stochastic"],
            "compression.rounding=stochastic: is for compression.map_bits",
        ),
        (["compression=lowrank", "compression.sign_threshold=0"], "compression.sign_threshold=0.0: must be above 0"),
        (["compression=lowrank", "compression.sign_threshold=null"], "compression.sign_share=0.33: must be above 0"),
        (
            ["compression=lowrank", "compression.sign_share=1"],
            "compression.sign_share=1.0: must be above 0 and below 1",
        ),
        (
            ["compression=lowrank", "compression.signs=exact"],
            "compression.sign_share=0.33: must be above 0 and below 1",
        ),
        (["compression=lowrank_v1", "compression.signs=exact"], "compression.signs=exact: lists errors of the signs"),
        (["compression=lowrank_v1", "compression.signs=some"], "compression.signs=some: must be one of sketch, exact"),
        (
            ["compression=lowrank_v1", "compression.sign_threshold=1", "compression.residual=2"],
            "compression.residual=2: needs compression.sign_threshold=null",
        ),
        (
            ["compression=lowrank_v1", "compression.rank=null"],
            "compression.rank=null: give compression.rank or compression.energy",
        ),
        (
            ["compression=lowrank_v1", "compression.energy=.9"],
            "compression.rank=8: give compression.rank or compression.energy",
        ),
        (
            ["compression=lowrank", "compression.rank=null", "compression.energy=2"],
            "compression.energy=2.0: must be above 0",
        ),
        (["compression=lowrank", "compression.refresh=0"], "compression.refresh=0: must be 1 or more"),
        (["compression=lowrank", "compression.sample_rows=0"], "compression.sample_rows=0: must be 1 or more"),
        (
            ["compression=lowrank", "compression.share_maps=false"],
            "compression.share_maps=false: compression=lowrank shares",
        ),
        (
            ["compression=lowrank", "compression.kept_frac=.5"],
            "compression.kept_frac=0.5: compression=lowrank has directions",
        ),
        (["compression.rank=8"], "compression.rank=8: is of compression=lowrank"),
        (["compression=lowrank", "task=distribution"], "needs maps that are quantized"),
        (["task=measure", "runs=2"], "runs=2: task=measure measures one run"),
        (["dataset=synthetic", "dataset.num_nodes=1"], "dataset.num_nodes=1"),
        (["dataset=synthetic", "dataset.average_degree=0"], "dataset.average_degree=0.0"),
        (["dataset=synthetic", "dataset.homophily=2"], "dataset.homophily=2.0"),
        (["dataset=synthetic", "dataset.num_classes=1"], "dataset.num_classes=1"),
        (["dataset=synthetic", "dataset.num_features=0"], "dataset.num_features=0"),
        (["dataset=synthetic", "dataset.degree_exponent=1"], "dataset.degree_exponent=1.0"),
        (["dataset=synthetic", "dataset.num_train=10"], "set num_train, num_val and num_test together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fields_that_do_not_fit_together(overrides, message):
    with pytest.raises(ConfigError) as error:
        compose_config(*overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("bits", [*BITS, None])
def test_projection_only_and_every_bit_width_are_valid(bits):
    assert compose_config(f"compression.bits={'null' if bits is None else bits}").compression.bits == bits
    assert CompressionConfig(scheme="projected", bits=bits).kept_frac == 1.0


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        (["compression.alpha=1"], False),
        (["compression.alpha=.9"], False),
        (["compression.alpha=auto"], True),
        (["compression.bits=8", "compression.levels=optimal"], True),
        (["compression.levels=optimal", "compression.alpha=auto"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_levels_that_are_chosen_by_block_size(overrides, chosen):
    assert compose_config(*overrides).compression.optimal_levels() == chosen


def test_configuration_files_lie_where_the_package_looks():
    from iexact_runner.cli import config_dir

    assert Path(config_dir()) == CONF


COUNTS, RATES = st.integers(1, 2**31), st.floats(0, 1, exclude_min=True)
NOT_POSITIVE = st.floats(max_value=0) | st.just(math.nan)
PROJECTED = st.fixed_dictionaries(
    {"scheme": st.just("projected"), "bits": st.sampled_from((*BITS, None)), "kept_frac": RATES},
    optional={
        "col_size": st.integers(0, 2**31),
        "max_block_size": COUNTS | st.none(),
        "share_maps": st.booleans(),
        "store_dropout_mask": st.booleans(),
        "backend": st.sampled_from(BACKENDS),
    },
)
LOW_RANK = st.fixed_dictionaries(
    {"scheme": st.just("lowrank"), "bits": st.sampled_from((*BITS, None)), "share_maps": st.just(True)},
    optional={"refresh": st.none() | COUNTS, "sample_rows": COUNTS, "residual": st.integers(0, 2**31)},
).flatmap(lambda fields: st.just(fields | {"rank": 3}) | RATES.map(lambda share: fields | {"energy": share}))
TRAINING = st.fixed_dictionaries(
    {
        "epochs": COUNTS,
        "lr": st.floats(0, 1e300, exclude_min=True),
        "weight_decay": st.floats(0, 1e300),
        "grad_norm": st.none() | st.floats(0, 1e300, exclude_min=True),
        "optimizer": st.sampled_from(("adam", "rmsprop")),
        "warmup_epochs": st.integers(0, 2**31),
        "eval_every": COUNTS,
        "cache_first_aggregate": st.sampled_from(("auto", "true", "false")),
    }
)


@given(
    st.tuples(st.just(CompressionConfig), PROJECTED | LOW_RANK)
    | st.tuples(st.just(CompressionConfig), st.just({"scheme": "none"}))
    | st.tuples(st.just(TrainingConfig), TRAINING)
)
def test_valid_groups_survive_yaml(group):
    schema, fields = group
    config = schema(**fields)
    assert {name: getattr(config, name) for name in fields} == fields
    assert schema(**yaml.safe_load(yaml.safe_dump(asdict(config)))) == config
    assert OmegaConf.to_object(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))) == asdict(config)


@settings(max_examples=12)
@given(PROJECTED, TRAINING, st.integers(0, 2**62 - 1))
def test_valid_values_compose_on_the_command_line(compression, training, seed):
    def overrides(group, fields):
        return [f"{group}.{name}={'null' if value is None else value}" for name, value in fields.items()]

    config = compose_config(f"seed={seed}", *overrides("compression", compression), *overrides("training", training))
    assert config.seed == seed
    assert {name: getattr(config.compression, name) for name in compression} == compression
    assert {name: getattr(config.training, name) for name in training} == training


@pytest.mark.parametrize(
    ("schema", "name", "values"),
    [
        (CompressionConfig, "compression.bits", st.integers().filter(lambda bits: bits not in BITS)),
        (CompressionConfig, "compression.kept_frac", NOT_POSITIVE | st.floats(1, exclude_min=True)),
        (CompressionConfig, "compression.col_size", st.integers(max_value=-1)),
        (CompressionConfig, "compression.alpha", NOT_POSITIVE | st.floats(1.5) | st.booleans() | st.just("widest")),
        (CompressionConfig, "compression.levels", st.text(max_size=9).filter(lambda word: word not in LEVELS)),
        (CompressionConfig, "compression.max_block_size", st.integers(max_value=0)),
        (CompressionConfig, "compression.scheme", st.text(max_size=9).filter(lambda word: word not in SCHEMES)),
        (TrainingConfig, "training.epochs", st.integers(max_value=0)),
        (TrainingConfig, "training.lr", NOT_POSITIVE | st.just(math.inf)),
        (TrainingConfig, "training.weight_decay", st.floats(max_value=0, exclude_max=True) | st.just(math.inf)),
        (TrainingConfig, "training.grad_norm", NOT_POSITIVE | st.just(math.inf)),
        (TrainingConfig, "training.warmup_epochs", st.integers(max_value=-1)),
        (TrainingConfig, "training.eval_every", st.integers(max_value=0)),
        (
            TrainingConfig,
            "training.cache_first_aggregate",
            st.text(max_size=9).filter(lambda word: word.lower() not in ("auto", "true", "false")),
        ),
        (MeasureConfig, "measure.timed_epochs", st.integers(max_value=0)),
        (MeasureConfig, "measure.max_seconds", NOT_POSITIVE),
        (MeasureConfig, "measure.country", st.from_regex(r"[a-z]{3}|[A-Z]{0,2}|[A-Z]{4,}", fullmatch=True)),
        (FidelityConfig, "fidelity.draws", st.integers(max_value=1)),
        (FidelityConfig, "fidelity.epochs", st.lists(st.integers(-5, 5)).filter(lambda e: sorted({*e} - {-1}) != e)),
        (CheckpointConfig, "checkpoint.every", st.integers(max_value=0) | st.floats() | st.booleans()),
        (BinsConfig, "bins.bits", st.integers().filter(lambda bits: bits not in BITS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@settings(max_examples=20)
@given(data=st.data())
def test_every_bad_value_names_its_field(schema, name, values, data):
    required = {"scheme": "projected", "bits": 2} if schema is CompressionConfig else {}
    value = data.draw(values)
    with pytest.raises(ConfigError) as error:
        schema(**(required | {name.partition(".")[2]: value}))
    typed = str(value).lower() if isinstance(value, bool) else value
    assert str(error.value).startswith(f"{name}={typed}: ")
