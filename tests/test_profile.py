"""``dsnet profile``: steps seen from outside, what they count, the command."""

import dataclasses
import functools
import json
import sys

import pytest
import torch

import dsnet
import dsnet_kernels
from dsnet import cli
from dsnet.bench import cases, networks
from dsnet.bench import profile as package
from dsnet.bench.profile import Part, Profile, Side, plot, render
from dsnet.bench.profile.steps import BLOCK_STEPS, FUSED
from dsnet.bench.report import environment
from dsnet.macs import count_macs
from dsnet.variants import VARIANTS

TINY = VARIANTS["dsnet_tiny"]
BLOCKS = sum(TINY.depths)
NATIVE = "cpu" in dsnet_kernels.available_backends("co_attention")
QUICK = {"dtype": torch.float32, "budget": 0, "rounds": (2, 2)}


@functools.cache
def macs_of_an_image(size):
    return count_macs(dsnet.create_model("dsnet_tiny", device="meta").eval(), size)


def whole(fields):
    return Profile(**environment("dsnet profile"), seconds=1.0, **fields)


@pytest.fixture(scope="module")
def inference():
    return whole(
        package.profile("dsnet_tiny", batch=1, size=(64, 64), training=False, device="cpu", **QUICK)
    )


@pytest.fixture(scope="module")
def training():
    return whole(package.profile("dsnet_tiny", batch=2, size=(64, 64), training=True, **QUICK))


@pytest.fixture(scope="module")
def one_by_one():
    """Inference whose blocks cannot be one operator."""
    with dsnet_kernels.backend("reference"):
        return whole(package.profile("dsnet_tiny", batch=1, size=(32, 32), training=False, **QUICK))


@pytest.fixture(params=["inference", "one_by_one", "training"])
def profiled(request):
    return request.getfixturevalue(request.param)


def test_parts_add_up_to_the_whole(profiled):
    for side in profiled.sides():
        assert sum(part.seconds for part in side.parts) == pytest.approx(side.seconds, rel=1e-9)
        assert all(0 <= part.backward_seconds <= part.seconds for part in side.parts)
        named = sum(side.total(name).seconds for name in profiled.operations())
        assert named == pytest.approx(side.seconds, rel=1e-9)
        by_blocks = sum(p.seconds for place in profiled.blocks() for p in side.parts
                        if p.place == place)  # fmt: skip
        around = sum(p.seconds for p in side.parts if not p.block)
        assert by_blocks + around == pytest.approx(side.seconds, rel=1e-9)
    assert len(profiled.blocks()) == BLOCKS


def test_every_step_takes_time_where_it_runs(profiled):
    for side in profiled.sides():
        for part in side.parts:
            assert part.seconds > 0, part
            assert (part.backward_seconds > 0) is profiled.training, part


def test_after_is_checked(profiled):
    assert not profiled.failed()
    assert profiled.ratio > 0
    assert 0 < profiled.after.error <= 1
    assert profiled.before.error is None


def test_published_macs_are_those_of_the_counting_function(profiled):
    images, _, size, _ = profiled.shape
    passes = 3 if profiled.training else 1
    for side in profiled.sides():
        published = sum(part.published_macs for part in side.parts)
        assert published == passes * images * macs_of_an_image(size)


def test_macs_of_the_reference_are_published_but_for_the_split(inference):
    for part in inference.before.parts:
        if part.operation != "split":
            assert part.macs == part.published_macs, part
    for stage in cases.stages("dsnet_tiny", 1, (64, 64))[:3]:
        for block in range(TINY.depths[stage.number - 1]):
            (part,) = (
                p
                for p in inference.before.parts
                if (p.operation, p.place) == ("split", (stage.number, block + 1))
            )
            pixels, coarse = stage.grid[0] ** 2, stage.global_grid[0] ** 2
            streams = pixels * stage.local_channels + coarse * stage.global_channels
            assert part.macs == streams * stage.channels
            assert part.published_macs == pixels * stage.channels**2


def test_a_backward_has_two_products_for_each_of_the_forward(inference, training):
    for name in FUSED:
        forward, both = inference.before.total(name).macs, training.before.total(name).macs
        assert both == 3 * training.shape[0] * forward, name


def test_kernels_do_not_compute_more(profiled):
    for name in profiled.operations():
        assert profiled.after.total(name).macs <= profiled.before.total(name).macs


def test_fewer_launches_and_bytes_after(profiled):
    before, after = (side.sum(side.parts) for side in profiled.sides())
    if NATIVE or not profiled.training:
        assert before.launches > after.launches
        assert before.bytes > after.bytes


def test_after_has_the_steps_of_blocks(inference, one_by_one):
    """Those of one operator, or of one operation after the other."""
    assert inference.whole_blocks() is NATIVE
    assert not one_by_one.whole_blocks()
    for profile in (inference, one_by_one):
        found = [(p.operation, p.place) for p in profile.after.parts if p.block]
        inside = profile.whole_blocks()
        expected = [name for name in BLOCK_STEPS if not (inside and name == "downsample")]
        for place in profile.blocks():
            # In the last stage the grids are the same.
            names = [n for n in expected if (n, place[0]) != ("downsample", 4)]
            assert {name for name, at in found if at == place} == {*names, *["other"] * inside}


@pytest.mark.skipif(not NATIVE, reason="the native libraries are not built")
def test_a_whole_block_is_one_launch_with_the_products_of_its_steps(inference):
    after = inference.after
    for name in BLOCK_STEPS:
        assert after.total(name).launches == 0
    for place in inference.blocks():
        (call,) = (p for p in after.parts if (p.operation, p.place) == ("other", place))
        assert (call.launches, call.macs, call.bytes, call.published_macs) == (1, 0, 0, 0)
    assert after.total("patch_embedding").launches == len(TINY.depths)
    for name in ("position", "split", "local", "global_attention", "pointwise_mlp"):
        assert after.total(name).macs == inference.before.total(name).macs
    # Absorbed in some stages, and mixed on the coarse grid.
    for name in ("co_attention", "upsample_concat"):
        assert 0 < after.total(name).macs < inference.before.total(name).macs


def test_what_has_a_kernel(inference, training):
    around = ["patch_embedding"] if NATIVE else []
    expected = [*BLOCK_STEPS, *around] if NATIVE else list(FUSED)
    assert inference.fused() == expected
    assert training.fused() == list(FUSED)
    for profile in (inference, training):
        for side in profile.sides():
            total = sum(side.total(name).seconds for name in profile.fused())
            assert side.fused().seconds == pytest.approx(total, rel=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_on_a_gpu(training):
    fields = package.profile(
        "dsnet_tiny", batch=2, size=(64, 64), training=training, device="cuda", **QUICK
    )
    profile = whole(fields)
    assert profile.launch_unit == "kernels"
    assert profile.before.sum(profile.before.parts).launches > BLOCKS * len(BLOCK_STEPS)
    for side in profile.sides():
        assert sum(part.seconds for part in side.parts) == pytest.approx(side.seconds, rel=1e-9)


def test_bound_is_amdahls():
    parts = (Part("pointwise_mlp", 1, 1, seconds=0.75, fused=True), Part("head", seconds=0.25))
    side = Side("before", "", 1.0, (1.0, 1.0), 1, 1, 1.0, {}, None, None, parts)
    assert side.fused_share() == 0.75
    assert side.bound(side.fused().seconds) == 4.0
    assert side.bound(1.0) == float("inf")


def test_json_round_trip(profiled):
    text = profiled.to_json()
    assert Profile.from_json(text) == profiled
    fields = json.loads(text)
    assert fields["schema"] == "dsnet-profile"
    with pytest.raises(ValueError, match=r"version 2, got .*, 3\)"):
        Profile.from_json(json.dumps(fields | {"version": 3}))
    with pytest.raises(ValueError, match="expected dsnet-profile version 2, got None"):
        Profile.from_json("[]")


def test_table_has_every_operation_and_fits(profiled):
    short = dataclasses.replace(profiled, command="dsnet profile dsnet_tiny")
    lines = render(short, blocks=True).splitlines()
    assert max(map(len, lines)) <= 120
    starts = [line.split()[0] for line in lines if line]
    assert all(name in starts for name in profiled.operations())
    assert any(line.startswith("3.4 co_attention ") for line in lines)
    assert any(line.startswith("Operations with a kernel take ") for line in lines)


# The command


@pytest.fixture
def quick(monkeypatch):
    """The command with a single round."""
    monkeypatch.setattr(
        package, "profile", functools.partial(package.profile, budget=0, rounds=(1, 1))
    )


def command(*arguments):
    images = ("--batch", "1", "--size", "64", "--device", "cpu")
    return cli.main(["profile", "dsnet_tiny", *images, *arguments])


def test_command_writes_all_it_is_asked_for(quick, capsys, tmp_path):
    file, picture = tmp_path / "tiny.json", tmp_path / "tiny.svg"
    arguments = ("--threads", "1", "--json", str(file), "--plot", str(picture))
    assert command(*arguments) == 0
    captured = capsys.readouterr()
    profile = Profile.from_json(file.read_text("utf-8"))
    assert captured.out == render(profile)
    assert captured.err == ""
    assert profile.machine["threads"] == 1
    assert profile.command.startswith("dsnet profile dsnet_tiny --batch 1 --size 64 --device cpu")
    assert profile.shape == (1, 3, 64, 64)
    svg = picture.read_bytes()
    assert svg == plot.draw(profile, "svg")
    assert b"<dc:date>" not in svg
    plot.write(profile, str(tmp_path / "tiny.PNG"))
    assert (tmp_path / "tiny.PNG").read_bytes().startswith(b"\x89PNG")


def test_json_alone_goes_to_stdout(inference, capsys, monkeypatch):
    names = {field.name for field in dataclasses.fields(Profile)}
    names -= {"seconds", "schema", "version", *environment("")}
    fields = {name: getattr(inference, name) for name in names}
    monkeypatch.setattr(package, "profile", lambda *args, **kwargs: fields)
    assert command("--json", "-") == 0
    printed = Profile.from_json(capsys.readouterr().out)
    assert (printed.before, printed.after) == inference.sides()
    assert printed.ratio_interval is None


def test_failed_check_is_told_and_compares_nothing(quick, capsys, monkeypatch):
    def wrong(values, *others):
        return judge({name: 0 * value for name, value in values.items()}, *others)

    judge = networks.judge
    monkeypatch.setattr(networks, "judge", wrong)
    assert command() == 1
    out = capsys.readouterr().out
    assert "FAILED: check failed: logits: " in out
    assert "After failed its check, so that it is not compared." in out
    assert "× as fast (" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", ""), "--json: expected a file or -, got ''"),
        (("--json", "absent/a.json"), "--json: no such folder: absent"),
        (("--json", "."), "--json: expected a file, got the folder ."),
        (("--plot", "a.pdf"), "--plot: expected a file ending in .svg or .png, got 'a.pdf'"),
        (("--plot", "absent/a.svg"), "--plot: no such folder: absent"),
    ],
)
def test_files_are_refused_before_anything_is_measured(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "profile", None)
    assert command(*arguments) == 2
    assert capsys.readouterr() == ("", f"dsnet profile: {message}\n")


def test_absent_matplotlib_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(package, "profile", None)
    assert command("--plot", str(tmp_path / "a.svg")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsnet profile: --plot needs matplotlib (")
    assert line.endswith("pip install 'dsnet-kernels[plots]'")
