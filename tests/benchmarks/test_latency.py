"""Times of components add up, and the model is left as it was."""

from detrlib.benchmarks import latency, measure
from detrlib.benchmarks.latency import measure_latency
from detrlib.experiments.costs import ORDER


def test_latency(small):
    model = small().train()
    found = measure_latency(model, (96, 128), batch=2, repeats=3, warm_up=1)
    assert model.training
    assert found.keys() == {*ORDER, "total"}
    assert all(found[name] > 0 for name in ("backbone", "input projection", "encoder", "decoder", "heads", "total"))
    assert found["scoring"] == found["proposals"] == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_time_within_a_component_counts_once(monkeypatch, small):
    """A clock that moves by one whenever it is read: heads inside the decoder are not the decoder's."""
    ticks = iter(range(100_000))
    for module in (latency, measure):
        monkeypatch.setattr(module, "now", lambda device: float(next(ticks)))
    model = small()
    found = measure_latency(model, (64, 64), repeats=1, warm_up=0)
    parts = sum(found[name] for name in ORDER)
    assert found["heads"] > 0 and found["decoder"] > 0
    whole = measure_latency(model, (64, 64), repeats=1, warm_up=0)
    assert parts == sum(whole[name] for name in ORDER)
