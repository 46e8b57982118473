"""``dsnet bench --device``: rows of a GPU with the CPU as its stand-in, choice of a device."""

import argparse
import dataclasses

import pytest
import torch

import dsnet_kernels
from dsnet import devices
from dsnet.bench import cases, device, inputs, models, ops, report, row, session, table
from dsnet.bench.suite import (
    GPU_INFERENCE_BATCHES,
    GPU_TRAINING_BATCHES,
    Settings,
    tasks,
)
from dsnet.commands import bench
from dsnet_kernels import reference

STAND_IN = device.stand_in()
STAGE = cases.stages("dsnet_tiny", batch=11, size=(32, 32))[0]
DEPTHWISE = cases.CASES[0]


def op_row(case=DEPTHWISE, backward=True, **options):
    options = {"dtype": torch.float32, "backends": ["auto"], "device": STAND_IN} | options
    options.setdefault("baselines", ["eager_channels_last"])
    return ops.op_row(case, STAGE, backward=backward, **options)


def model_row(**options):
    options = {"training": False, "dtype": torch.bfloat16, "device": STAND_IN} | options
    return models.model_row(
        "dsnet_tiny", batch=options.pop("batch", 10), size=(32, 32), backends=["auto"], **options
    )


def test_auto_is_the_gpu_where_torch_sees_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.resolve("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.resolve("auto") == "cuda"


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = f"^--device: expected a GPU for '{name}', got none: torch .* (built|sees)"
    with pytest.raises(ValueError, match=message):
        devices.resolve(name)


def test_few_images_of_a_large_batch_are_judged_the_first_and_the_last_among_them():
    judged = STAND_IN.judged(512).tolist()
    assert len(set(judged)) == device.JUDGED_IMAGES
    assert (judged[0], judged[-1]) == (0, 511)
    assert STAND_IN.judged(device.JUDGED_IMAGES) is None
    assert device.CPU.judged(512) is None


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.operation}-{case.use}")
@pytest.mark.parametrize("alone", [False, True], ids=["whole", "backward"])
def test_values_of_the_judged_images_are_those_of_a_small_batch(case, alone):
    whole = inputs.make_inputs(case, STAGE, torch.float64, True, device=STAND_IN)
    kind = inputs.BackwardInputs if alone else inputs.Inputs
    whole = kind(**vars(whole))
    grads = [grad.clone() for grad in whole.grads]
    found = ops.baseline("eager_channels_last", case, whole).values()
    expected = ops.baseline("eager_channels_last", case, whole.sample()).values()
    assert found.keys() == expected.keys()
    assert any(name.startswith("out") for name in found) is not alone
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    # The timed calls have every image's gradient.
    assert all(map(torch.equal, whole.grads, grads))


def test_only_the_judged_images_are_drawn_for_the_check(monkeypatch):
    drawn, randn = [], torch.randn

    def counting(*args, **kwargs):
        result = randn(*args, **kwargs)
        drawn.append(result.numel())
        return result

    monkeypatch.setattr(torch, "randn", counting)
    for batch in (64, 8):
        stage = cases.stages("dsnet_tiny", batch=batch, size=(32, 32))[0]
        ops._draws(DEPTHWISE, stage, torch.bfloat16, True, STAND_IN)
        drawn.append("|")
    split = drawn.index("|")
    large, small = sum(drawn[:split]), sum(drawn[split + 1 : -1])
    # Three draws; in the large batch one of them is eight times as large.
    assert large < small * (8 + 2) / 3


@pytest.mark.parametrize("image", [0, 5, 10])
def test_a_wrong_judged_image_of_a_large_batch_fails_its_row(image, monkeypatch):
    judged = STAND_IN.judged(11).tolist()

    def kernel(x, *args, backend, **kwargs):
        out = reference.depthwise_conv3x3(x, *args, **kwargs)
        factor = torch.ones(len(out), 1, 1, 1)
        factor[image] = 2
        return out * factor

    monkeypatch.setattr(dsnet_kernels, "depthwise_conv3x3", kernel)
    found = op_row(backward=False)
    assert found.failed() is (image in judged)
    assert found.judged == device.JUDGED_IMAGES


@pytest.mark.parametrize(
    ("options", "work"),
    [
        ({"backward": False}, "forward"),
        ({"backward": True, "graph": True}, "forward+backward, CUDA graph"),
        ({"backward": False, "alone": True}, "backward"),
    ],
)
def test_an_operation_on_the_gpus_path(options, work):
    found = op_row(**options, dtype=torch.bfloat16, baselines=["eager_channels_last", row.NATIVE])
    assert (found.work, found.shape[0]) == (work, 11)
    assert [result.problem for result in found.results] == [None] * 4
    assert found.ours()[0].ratio > 0
    assert found.result("copy").median > 0


def test_graphs_are_captured_once_and_their_replays_are_judged_and_timed():
    captured, replayed = [], []

    def capture(call, calls=1):
        captured.append(call)

        def replay():
            replayed.append(call)
            return call()

        return replay

    recorder = dataclasses.replace(STAND_IN, capture=capture)
    found = op_row(backward=False, graph=True, device=recorder)
    assert not found.failed()
    assert len(captured) == len(set(map(id, captured))) == 2
    assert len(replayed) > 2 * len(captured)


def test_a_network_runs_plain_and_as_a_graph_against_sdpa_and_counts_launches():
    counting = dataclasses.replace(STAND_IN, count_launches=lambda call: 7)
    found = model_row(graphs=True, device=counting, dtype=torch.float32)
    plain = ["eager_channels_last", "sdpa", "auto"]
    names = [result.name for result in found.results]
    assert names == [*plain, *(f"{name}, CUDA graph" for name in plain)]
    assert [result.problem for result in found.results] == [None] * 6
    assert {result.launches for result in found.results} == {7}
    assert found.judged == device.JUDGED_IMAGES


def test_a_training_step_judges_the_whole_batch_and_has_no_graphs():
    options = {"dtype": torch.float32, "baselines": ["eager_channels_last"]}
    found = model_row(training=True, graphs=True, **options)
    assert [result.name for result in found.results] == ["eager_channels_last", "auto"]
    assert [result.problem for result in found.results] == [None] * 2
    assert found.judged is None


def test_a_network_in_bfloat16_is_compared_with_autocast():
    found = model_row(batch=1)
    names = ["eager_channels_last", "eager_amp", "sdpa", "auto"]
    assert [result.name for result in found.results] == names
    assert [result.problem for result in found.results] == [None] * 4


def test_a_gpu_is_measured_where_it_matters_first():
    titles = [task.title for task in tasks(Settings(device=STAND_IN))]
    assert len(titles) == len(set(titles))
    inference = [
        f"dsnet_tiny inference, batch {batch}, 224×224, bfloat16" for batch in GPU_INFERENCE_BATCHES
    ]
    assert titles[: len(inference)] == inference
    assert titles[len(inference)].startswith(
        f"dsnet_tiny training step, batch {GPU_TRAINING_BATCHES[0]}"
    )
    assert titles[len(inference) + 1] == "dsnet_tiny backbone, batch 1, 800×1333, bfloat16"
    first_float32 = next(i for i, title in enumerate(titles) if "float32" in title)
    assert all("bfloat16" in title for title in titles[:first_float32])
    assert titles[-2:] == [f"{inference[i]}, against torch.compile" for i in (0, 3)]
    operations = [title for title in titles if "CUDA graph" in title]
    assert len(operations) == (8 + 2) * len(cases.CASES)


def test_what_was_asked_for_replaces_a_gpus_own_rows():
    settings = Settings(
        device=STAND_IN, mode="inference", dtypes=[torch.float16], batches=[3], sizes=[(64, 96)]
    )
    assert [task.title for task in tasks(settings)] == [
        "dsnet_tiny inference, batch 3, 64×96, float16"
    ]


def parse(*arguments):
    parser = argparse.ArgumentParser(prog=bench.NAME)
    bench.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.argv = [bench.NAME, *arguments]
    return args


@pytest.mark.parametrize(
    ("name", "on", "message"),
    [
        ("triton", "cpu", "--backends: triton takes no CPU tensors; expected auto or one of cpu, "),
        ("cuda", "cpu", "with --device cpu"),
        ("cpu", "cuda", "--backends: cpu takes no GPU tensors; expected auto or one of cuda, tri"),
    ],
)
def test_a_backend_of_the_other_device_is_refused(name, on, message):
    other = device.Device(name=on)
    with pytest.raises(ValueError, match=message):
        bench.refuse_absent([name], other)


def test_the_command_on_a_gpu_records_the_gpu_and_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(device, "find", lambda name: STAND_IN)
    target = tmp_path / "gpu.json"
    arguments = ["--mode", "inference", "--batch", "1", "--dtype", "float32", "--size", "32"]
    assert bench.run(parse("--device", "cuda", *arguments, "--json", str(target))) == 0
    found = report.Report.from_json(target.read_text())
    assert found.machine["device"] == "gpu"
    assert found.machine["gpu"]["name"] == "stand-in on the CPU"
    assert found.cpu_share is None
    printed = capsys.readouterr().out
    assert printed == table.render(found)
    assert "ours, auto, graph" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_the_probe_of_a_gpu_runs_on_it():
    found = session.take("command", [], device=STAND_IN)
    assert len(found.yardstick) == 1
