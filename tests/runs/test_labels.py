"""Configurations in words."""

from __future__ import annotations

from dataclasses import asdict

from iexact_runner.cli import compose_config
from iexact_runner.config.presets import preset, preset_names
from iexact_runner.runs.labels import compression_label, preset_of


def test_compression_in_words():
    assert compression_label({"scheme": "none", "bits": None}) == "FP32"
    fields = {"scheme": "projected", "bits": None, "kept_frac": 0.125, "col_size": 64, "alpha": 1.0}
    assert compression_label(fields) == "i-EXACT, FP32 maps, G = 64"
    assert compression_label(fields | {"bits": 2, "alpha": "auto"}) == "i-EXACT, INT2, G = 64, alpha auto"
    assert compression_label(fields | {"bits": 4, "kept_frac": 0.25, "col_size": 0}) == "EXACT, INT4, kept_frac 0.25"
    assert compression_label(fields | {"bits": 4, "kept_frac": 1.0}) == "INT4, G = 64"
    assert compression_label(fields | {"bits": 8, "kept_frac": 1.0, "col_size": 0}) == "INT8"
    fitted = {"scheme": "lowrank", "bits": 4, "rank": 8, "refresh": None, "col_size": 16}
    assert compression_label(fitted) == "low rank, INT4, rank 8"
    labels = {
        "lowrank_v1": "low rank, INT4, rank 8",
        "lowrank": "low rank, 48 bits a node",
        "prac": "PRAC, INT4, rank 8, residual 8",
        "exact": "EXACT, INT2",
    }
    for name, label in labels.items():
        assert compression_label(asdict(compose_config(f"compression={name}").compression)) == label
    other = asdict(compose_config("compression=lowrank", "compression.sign_share=0.5").compression)
    assert compression_label(other) == "low rank, 48 bits a node, sign_threshold 2.0, sign_share 0.5"
    changed = {"rank": None, "energy": 0.9, "refresh": 5, "residual": 2, "levels": "optimal"}
    words = "low rank, INT4, energy 0.9, refresh 5, residual 2, levels optimal"
    assert compression_label(fitted | changed) == words
    published = {
        "recompute": "FP32, recomputed",
        "offload": "FP32, offloaded",
        "actnn": "ActNN, INT2, group_size 256",
        "dropit": "DropIT, kept_frac 0.1",
        "velora": "VeLoRA, group_size 8",
        "hadamard": "Hadamard, INT2, group_size 128",
    }
    for name, label in published.items():
        assert compression_label(asdict(compose_config(f"compression={name}").compression)) == label
    both = compose_config("compression=int4", "compression.offload=true", "compression.simulate=true").compression
    assert compression_label(asdict(both)) == "INT4, offloaded, simulated"


def test_a_configuration_is_known_as_its_preset():
    for name in preset_names():
        assert preset_of(asdict(preset(name, backend="torch"))) == name
    assert preset_of(asdict(preset("iexact", bits=4))) is None
    old = asdict(preset("iexact"))
    for field in ("format", "group_size", "offload", "simulate"):  # that records of before do not have
        del old[field]
    assert preset_of(old) == "iexact"
