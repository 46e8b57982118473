"""Selection of backends, its explanations, and the report of what is installed.

Selection is tested on an operation made up here, so that it does not matter what was built.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import dsnet_kernels
from dsnet_kernels import BackendUnavailable, available_backends, backends, current_backend
from dsnet_kernels.backends import BACKENDS, PREFERENCE, Operation, select

X = torch.zeros(2, 3)


def refuses_large(x):
    return f"x has {x.numel()} elements, the limit is 100" if x.numel() > 100 else None


OPERATION = Operation(
    "made_up",
    tensors=("x",),
    present={"cpu": lambda: None, "triton": lambda: "triton is not installed"},
    can_run={"cpu": refuses_large},
    loses={"cpu": lambda x: "slower below 4 elements" if x.numel() < 4 else None},
)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Each test starts at ``auto`` and leaves the process as it was."""
    monkeypatch.setattr(backends, "_current", ("auto",))
    monkeypatch.setitem(backends.OPERATIONS, OPERATION.name, OPERATION)


# The setting


def test_context_manager_sets_and_restores():
    with dsnet_kernels.backend("reference"):
        assert current_backend() == ("reference",)
    assert current_backend() == ("auto",)


def test_a_bare_call_sets_from_there_on():
    dsnet_kernels.backend("reference")
    assert current_backend() == ("reference",)
    dsnet_kernels.backend(["cpu", "auto"])
    assert current_backend() == ("cpu", "auto")


def test_nested_blocks_restore_in_turn():
    with dsnet_kernels.backend("cpu"):
        with dsnet_kernels.backend(["cuda", "reference"]):
            assert current_backend() == ("cuda", "reference")
        assert current_backend() == ("cpu",)
    assert current_backend() == ("auto",)


def test_a_block_restores_after_an_exception():
    with pytest.raises(KeyError), dsnet_kernels.backend("reference"):
        raise KeyError
    assert current_backend() == ("auto",)


def test_a_kept_object_sets_and_restores_at_every_use():
    kept = dsnet_kernels.backend("reference")
    for surrounding in ("auto", "auto", "cpu"):
        if surrounding != "auto":
            dsnet_kernels.backend(surrounding)
        with kept:
            assert current_backend() == ("reference",)
            assert select(OPERATION, None, X) == "reference"
        assert current_backend() == (surrounding,)


def test_a_kept_object_nests_in_others_and_in_itself():
    kept = dsnet_kernels.backend("reference")
    with dsnet_kernels.backend("cpu"):
        with kept:
            with dsnet_kernels.backend("cuda"), kept:
                with kept:
                    assert current_backend() == ("reference",)
                assert current_backend() == ("reference",)
            assert current_backend() == ("reference",)
        assert current_backend() == ("cpu",)
    assert current_backend() == ("reference",)


def test_the_setting_is_seen_by_every_thread():
    seen = []
    with dsnet_kernels.backend("reference"):
        threads = [
            threading.Thread(target=lambda: seen.append(select(OPERATION, None, X)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == ["reference"] * 8


@pytest.mark.parametrize("names", ["gpu", "", "CPU", [], ["cpu", "gpu"], ["cpu", ""]])
def test_unknown_names_are_refused_and_change_nothing(names):
    message = "backend: expected one or more of auto, reference, sdpa, cpu, triton, cuda, got"
    with pytest.raises(ValueError, match=message):
        dsnet_kernels.backend(names)
    with pytest.raises(ValueError, match=message):
        select(OPERATION, names, X)
    assert current_backend() == ("auto",)


# Selection


@pytest.mark.parametrize(
    ("names", "elements", "expected"),
    [
        ("auto", 10, "cpu"),
        ("auto", 101, "reference"),
        ("auto", 1, "reference"),
        ("reference", 10, "reference"),
        ("cpu", 10, "cpu"),
        ("cpu", 1, "cpu"),
        (["triton", "cpu"], 10, "cpu"),
        (["reference", "cpu"], 10, "reference"),
        (["triton", "auto"], 101, "reference"),
        (("cuda", "triton", "cpu", "reference"), 101, "reference"),
    ],
)
def test_first_backend_that_can_run_is_selected(names, elements, expected):
    x = torch.zeros(elements)
    assert select(OPERATION, names, x) == expected
    with dsnet_kernels.backend(names):
        assert select(OPERATION, None, x) == expected


def test_the_argument_of_a_call_overrides_the_setting():
    with dsnet_kernels.backend("reference"):
        assert select(OPERATION, "cpu", X) == "cpu"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cpu", "x has 101 elements, the limit is 100"),
        ("triton", "triton is not installed"),
        ("cuda", "made_up has no cuda kernel"),
    ],
)
def test_a_named_backend_raises_with_its_reason_and_never_falls_back(name, reason):
    x = torch.zeros(101)
    expected = f"made_up: no requested backend can run: {name}: {reason}"
    with pytest.raises(BackendUnavailable) as caught:
        select(OPERATION, name, x)
    assert str(caught.value) == expected
    assert isinstance(caught.value, RuntimeError)


def test_a_list_that_cannot_run_gives_every_reason():
    with pytest.raises(BackendUnavailable, match=r"triton is not installed.*has no cuda kernel"):
        select(OPERATION, ["triton", "cuda"], X)


def test_public_operations_obey_the_setting_and_the_argument():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    expected = dsnet_kernels.depthwise_conv3x3(x, weight, backend="reference")
    with dsnet_kernels.backend("cuda"):
        with pytest.raises(BackendUnavailable, match="depthwise_conv3x3"):
            dsnet_kernels.depthwise_conv3x3(x, weight)
        got = dsnet_kernels.depthwise_conv3x3(x, weight, backend="reference")
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_model_obeys_its_own_backend():
    from dsnet import DSBlock

    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        with pytest.raises(BackendUnavailable):
            DSBlock(8, 2, 1, backend="cuda").eval()(x)
        with dsnet_kernels.backend("cuda"):
            block = DSBlock(8, 2, 1, backend="reference").eval()
            assert block(x).shape == x.shape


# Explanations


def test_explain_names_the_choice_and_every_refusal():
    explanation = dsnet_kernels.explain("made_up", torch.zeros(101))
    assert explanation.operation == "made_up"
    assert explanation.requested == ("auto",)
    assert explanation.chosen == "reference"
    assert explanation.refusals == {
        "cpu": "x has 101 elements, the limit is 100",
        "triton": "triton is not installed",
        "cuda": "made_up has no cuda kernel",
    }
    assert str(explanation).splitlines() == [
        "made_up: reference (requested: auto)",
        "  not cpu: x has 101 elements, the limit is 100",
        "  not triton: triton is not installed",
        "  not cuda: made_up has no cuda kernel",
    ]


def test_explain_tells_a_slower_choice_from_an_impossible_one():
    x = torch.zeros(1)
    assert dsnet_kernels.explain("made_up", x).refusals["cpu"] == "slower below 4 elements"
    named = dsnet_kernels.explain("made_up", x, backend="cpu")
    assert named.chosen == "cpu"
    assert "cpu" not in named.refusals


def test_explain_reports_where_nothing_can_run():
    explanation = dsnet_kernels.explain("made_up", X, backend=["cuda", "triton"])
    assert explanation.chosen is None
    assert explanation.requested == ("cuda", "triton")
    assert str(explanation).startswith("made_up: nothing can run (requested: cuda, triton)")


def test_explain_agrees_with_every_registered_operation():
    streams = {"local": torch.zeros(1, 4, 5, 5), "global_": torch.zeros(1, 4, 2, 2)}
    leading = {"x": torch.zeros(1, 4, 5, 5), "fc1_weight": torch.zeros(8, 4), **streams}
    assert len(backends.OPERATIONS) > 5
    for name, operation in backends.OPERATIONS.items():
        tensors = [leading[argument] for argument in operation.tensors]
        if name == "co_attention":
            tensors[1] = tensors[1].flatten(2).transpose(1, 2)
        explanation = dsnet_kernels.explain(name, *tensors)
        assert explanation.chosen == select(operation, None, *tensors)
        assert explanation.chosen not in explanation.refusals


@pytest.mark.parametrize("tensors", [(), (None,), (3.0,)])
def test_explain_asks_for_the_tensors_it_needs(tensors):
    with pytest.raises(ValueError, match="made_up: expected the tensors x"):
        dsnet_kernels.explain("made_up", *tensors)


def test_explain_refuses_unknown_operations_and_backends():
    with pytest.raises(ValueError, match=r"operation: expected one of .*made_up.*, got 'conv'"):
        dsnet_kernels.explain("conv", X)
    with pytest.raises(ValueError, match="backend: expected one or more of"):
        dsnet_kernels.explain("made_up", X, backend="gpu")


# What is there


def test_available_backends_of_an_operation_and_of_any():
    assert available_backends("made_up") == ("reference", "cpu")
    assert available_backends("pointwise_mlp")[0] == "reference"
    everything = available_backends()
    assert set(available_backends("made_up")) <= set(everything) <= set(BACKENDS)
    with pytest.raises(ValueError, match=r"operation: expected one of .*, got 'conv'"):
        available_backends("conv")


@pytest.mark.parametrize(
    ("names", "device", "expected"),
    [
        ("auto", "cpu", ("cpu", "sdpa")),
        ("auto", "cuda", ("cuda", "triton", "sdpa")),
        (["triton", "auto", "reference"], "cpu", ("triton", "cpu", "sdpa")),
        ("cuda", "cpu", ("cuda",)),
        ("reference", "cpu", ()),
        (None, "cpu", ("triton",)),
    ],
)
def test_kernel_backends_are_those_meant_without_the_reference(names, device, expected):
    with dsnet_kernels.backend(["triton", "reference"]):
        assert backends.kernel_backends(names, device) == expected


def test_every_preference_is_a_backend_and_the_reference_comes_last():
    assert sorted(PREFERENCE) == sorted(BACKENDS)
    assert PREFERENCE[-1] == "reference"


def test_info_is_json_and_covers_every_operation_and_backend():
    facts = dsnet_kernels.info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["dsnet-kernels"] == dsnet_kernels.__version__
    assert facts["backend"] == ["auto"]
    public = set(dsnet_kernels.__all__) & set(facts["operations"])
    assert len(public) == 5
    for name in public:
        states = facts["operations"][name]
        assert set(states) == set(BACKENDS)
        usable = tuple(backend for backend in BACKENDS if states[backend] is None)
        assert usable == available_backends(name)
        assert all(reason is None or reason for reason in states.values())


# In processes of their own


def python(*arguments, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "DSNET_BACKEND"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(dsnet_kernels.__file__).parents[1],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


PRINT_CURRENT = "import dsnet_kernels; print(*dsnet_kernels.current_backend())"


@pytest.mark.parametrize(("value", "expected"), [(" cpu, auto ", "cpu auto"), ("", "auto")])
def test_environment_sets_the_backend(value, expected):
    done = python("-W", "error::RuntimeWarning", "-c", PRINT_CURRENT, DSNET_BACKEND=value)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


@pytest.mark.parametrize("value", ["cpu,gpu", ","])
def test_environment_with_an_unknown_name_warns_and_stays_at_auto(value):
    done = python("-c", PRINT_CURRENT, DSNET_BACKEND=value)
    assert (done.returncode, done.stdout.strip()) == (0, "auto"), done.stderr
    assert "RuntimeWarning: DSNET_BACKEND: expected one or more of auto, reference" in done.stderr


def test_module_prints_the_report_as_text_and_as_json():
    text = python("-m", "dsnet_kernels", DSNET_BACKEND="reference")
    assert text.returncode == 0, text.stderr
    assert torch.__version__ in text.stdout
    assert "operations (backend in force: reference)" in text.stdout
    for name in ("depthwise_conv3x3", "co_attention", "pointwise_mlp"):
        assert f"  {name}\n    reference        usable\n" in text.stdout

    as_json = python("-m", "dsnet_kernels", "--json", DSNET_BACKEND="reference")
    facts = json.loads(as_json.stdout)
    assert facts["backend"] == ["reference"]
    assert facts["operations"]["co_attention"]["reference"] is None
    assert set(facts["operations"]["co_attention"]) == set(BACKENDS)


def test_module_refuses_unknown_arguments():
    done = python("-m", "dsnet_kernels", "--yaml")
    assert done.returncode == 2
    assert "unrecognized arguments: --yaml" in done.stderr
