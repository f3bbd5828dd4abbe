from __future__ import annotations

from vrm.training.cost import cost


def test_costs_on_the_reference_pair() -> None:
    assert str(cost("kd")) == "1 student pass"
    assert cost("vrm").passes == 2
    assert cost("ab").epochs == 30
    crd = cost("crd")
    assert crd.parameters == 2 * (256 * 128 + 128)  # two linear embeddings of 256 pooled features
    assert 2 * 50_000 * 128 * 4 <= crd.memory < 2 * 50_000 * 128 * 4 + 1e6  # two banks, and the samples by class
