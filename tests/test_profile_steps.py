"""``dsnet profile``: steps seen from outside, and their times."""

from dataclasses import replace

import pytest
import torch
from small_network import SMALL, small

import dsnet
import dsnet_kernels
from dsnet.bench.profile import run, steps, times
from dsnet.bench.profile.steps import BACKWARD, BLOCK_STEPS, FORWARD, FUSED, OTHER, Step
from dsnet.variants import VARIANTS

TINY = VARIANTS["dsnet_tiny"]
NATIVE = "cpu" in dsnet_kernels.available_backends("co_attention")


class Recorder(steps.Watch):
    """Every end of a step."""

    def __init__(self):
        super().__init__()
        self.ends = []

    def open(self):
        pass

    def close(self, step, phase):
        self.ends.append((step, phase))


def expected_steps(depths=TINY.depths):
    yield OTHER
    for stage, depth in enumerate(depths, 1):
        yield Step("patch_embedding", stage)
        for block in range(1, depth + 1):
            coarse = [name for name in BLOCK_STEPS if name not in ("position", "split", "local")]
            names = ["position", "split", "local", coarse[0], "split", *coarse[1:]]
            # In the last stage the grids are the same.
            yield from (Step(n, stage, block) for n in names if (n, stage) != ("downsample", 4))
    yield steps.HEAD
    yield OTHER


@pytest.mark.parametrize("optimized", [False, True])
def test_steps_come_in_the_order_of_the_network(optimized):
    model = dsnet.create_model("dsnet_tiny", backend="reference").eval()
    model = dsnet.optimize(model, backend="reference") if optimized else model
    watch = Recorder()
    with torch.no_grad():
        run.run(model, torch.randn(1, 3, 32, 32), None, watch)
    assert watch.ends == [(step, FORWARD) for step in expected_steps()]


@pytest.mark.skipif(not NATIVE, reason="the native libraries are not built")
def test_heads_that_a_whole_block_does_not_take_run_step_by_step():
    # Heads of 4 channels.
    variant = replace(SMALL, num_heads=(2, 4, 6, 8))
    model = dsnet.optimize(small(dtype=torch.float32, variant=variant))
    watch = Recorder()
    with torch.no_grad():
        run.run(model, torch.randn(1, 3, 32, 32), None, watch)
    assert watch.ends == [(step, FORWARD) for step in expected_steps(SMALL.depths)]


@pytest.mark.skipif(not NATIVE, reason="the native libraries are not built")
def test_a_whole_block_is_one_step():
    model = dsnet.optimize(dsnet.create_model("dsnet_tiny").eval())
    watch = Recorder()
    with torch.no_grad():
        run.run(model, torch.randn(1, 3, 32, 32), None, watch)
    expected = [OTHER]
    for stage, depth in enumerate(TINY.depths, 1):
        expected.append(Step("patch_embedding", stage))
        expected += [Step(steps.WHOLE, stage, block) for block in range(1, depth + 1)]
    assert watch.ends == [(step, FORWARD) for step in (*expected, steps.HEAD, OTHER)]


def test_backward_passes_every_step_of_the_forward_once():
    model = dsnet.create_model("dsnet_tiny", backend="reference")
    watch = Recorder()
    run.run(model, torch.randn(2, 3, 64, 64), torch.tensor([1, 2]), watch)
    forward = {step for step, phase in watch.ends if phase == FORWARD}
    backward = [step for step, phase in watch.ends if phase == BACKWARD]
    assert set(backward) == forward
    assert backward.index(steps.HEAD) < backward.index(Step("pointwise_mlp", 4, 1))
    assert backward.index(Step("pointwise_mlp", 1, 1)) < backward.index(Step("position", 1, 1))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_is_left_behind():
    places = steps.watched_functions()
    assert {name for _, name in places} >= {*FUSED.values(), "ds_block", "patch_conv", "conv2d"}
    before = [getattr(module, name) for module, name in places]
    model = dsnet.create_model("dsnet_tiny", backend="reference").eval()
    with pytest.raises(ValueError, match="x: expected"):
        run.run(model, torch.randn(1, 3, 8, 8), None, Recorder())
    after = [getattr(module, name) for module, name in places]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_watching_changes_no_result():
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 4])
    gradients = []
    for watch in (None, Recorder(), times.Times(times.HostClock())):
        torch.manual_seed(0)
        model = dsnet.create_model("dsnet_tiny")
        run.run(model, images, labels, watch)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_times_are_differences_of_stamps():
    class Clock(times.HostClock):
        now = 0.0

        def stamp(self):
            self.now += 1.0
            return self.now

    watch = times.Times(Clock())
    watch.start()
    watch.mark(Step("position", 1, 1), None)
    watch.mark(Step("split", 1, 1), None)
    watch.mark(Step("split", 1, 1), None)
    watch.stop()
    (spent,) = watch.calls
    assert spent == {
        (Step("position", 1, 1), FORWARD): 1.0,
        (Step("split", 1, 1), FORWARD): 2.0,
        (OTHER, FORWARD): 1.0,
    }


def test_a_whole_block_is_split_by_its_own_clock(monkeypatch):
    class Clock(times.HostClock):
        now = 0.0

        def stamp(self):
            self.now += 1.0
            return self.now

    readings = iter([{"split": 0.25, "local": 0.5}, {"split": 0.75, "local": 1.0}])
    monkeypatch.setattr(times, "seconds_inside", lambda: next(readings))
    watch = times.Times(Clock())
    watch.start()
    watch.mark(Step(steps.WHOLE, 1, 1))
    watch.mark(Step(steps.WHOLE, 1, 2))
    watch.stop()
    assert watch.calls == [
        {
            (Step("split", 1, 1), FORWARD): 0.25,
            (Step("local", 1, 1), FORWARD): 0.5,
            (Step("other", 1, 1), FORWARD): 0.25,
            (Step("split", 1, 2), FORWARD): 0.5,
            (Step("local", 1, 2), FORWARD): 0.5,
            (Step("other", 1, 2), FORWARD): 0.0,
            (OTHER, FORWARD): 1.0,
        }
    ]
