"""Checks that a captured step leaves to whoever captures it."""

from __future__ import annotations

import torch

from iexact_runner.compression.deferred import defer, deferred_checks


def test_checks_are_collected_where_somebody_asks_for_them():
    wrong = torch.tensor(1)
    assert not defer(wrong)
    with deferred_checks() as found:
        assert defer(wrong) and defer(torch.tensor(0))
    assert found[0] is wrong and len(found) == 2 and not defer(wrong)
