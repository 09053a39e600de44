"""`make scale` reads programs rightly, and docs/scale.md says what its own lines print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from partitioned import Program, held

ROOT = Path(__file__).parents[2]


def run(*command, devices=1):
    """What a command prints, on so many host devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_on_eight_devices(which):
    pytest.importorskip("tunix", reason="google-tunix is not here", exc_type=ImportError)
    cases = str(ROOT / "tests/scale_cases.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, cases, devices=8)


def test_the_page_says_what_its_lines_print():
    pytest.importorskip("tunix", reason="google-tunix is not here", exc_type=ImportError)
    page = (ROOT / "docs/scale.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    printed = run("-c", code).rstrip("\n")
    assert len(printed.splitlines()) == 6
    assert f"```text\n{printed}\n```" in page, printed


def of_a_tpu(line, *parameters):
    """A program of one line, as a TPU's compiler writes it."""
    body = [f"  %{name} = {type} parameter({i})" for i, (name, type) in enumerate(parameters)]
    return Program("\n".join(["ENTRY %main (a: f32[]) -> f32[] {", *body, f"  {line}", "}"]))


@pytest.mark.parametrize(
    ("out", "left", "right", "attributes", "flops"),
    [
        # (8, 2048, 4096) x (4096, 7168), a batch of 8 as an axis of the window
        (
            "bf16[8,2048,7168]{2,1,0:T(8,128)(2,1)}",
            "bf16[8,2048,4096]{2,1,0}",
            "bf16[4096,7168,1]{1,0,2}",
            "window={size=1}, dim_labels=0bf_io0->0bf",
            2 * 8 * 2048 * 4096 * 7168,
        ),
        # attention's scores, 8 x 4 x 4 heads as axes of the window: of what lies between, nothing
        (
            "bf16[8,4,2048,2048,4]{3,2,4,1,0}",
            "bf16[8,2048,4,128,1]{1,3,4,2,0}",
            "bf16[8,2048,4,4,128]{4,1,3,2,0}",
            "window={size=8x4x4 stride=7x3x1 pad=0_0x0_0x3_3 lhs_dilate=8x4x1 "
            "rhs_reversal=0x0x1}, dim_labels=0b1f2_0o12i->01bf2",
            2 * 8 * 4 * 4 * 2048 * 2048 * 128,
        ),
        # sums over an axis of the window
        (
            "bf16[7168,4096,1]{1,0,2}",
            "bf16[8,2048,7168]{2,1,0}",
            "bf16[8,2048,4096]{2,1,0}",
            "window={size=8}, dim_labels=0fb_0io->bf0",
            2 * 8 * 2048 * 7168 * 4096,
        ),
    ],
)
def test_products_as_a_tpu_writes_them(out, left, right, attributes, flops):
    line = f"ROOT %c = {out} convolution(%a, %b), {attributes}"
    found = of_a_tpu(line, ("a", left), ("b", right)).products
    assert found == {"bf16": flops}


@pytest.mark.parametrize(
    ("groups", "among"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a':(2)2}", 2),
    ],
)
def test_groups_as_a_tpu_writes_them(groups, among):
    line = f"ROOT %g = f32[64]{{0}} all-gather(%a), channel_id=1, replica_groups={groups}, "
    line += "dimensions={0}, use_global_device_ids=true"
    sent = of_a_tpu(line, ("a", "f32[16]{0}")).sent["all-gather"]
    assert sent == (1, (among - 1) * 16 * 4)


def test_what_cannot_be_read_is_an_error():
    line = "ROOT %g = f32[64]{0} all-gather(%a), channel_id=1, replica_groups=<new>, dimensions={0}"
    with pytest.raises(ValueError, match=r"no group of devices .* %g"):
        assert of_a_tpu(line, ("a", "f32[16]{0}")).sent
    with pytest.raises(ValueError, match="how often the loop %w runs"):
        assert of_a_tpu("ROOT %w = f32[] while(%a), condition=%c, body=%b", ("a", "f32[]")).sent
    with pytest.raises(ValueError, match="another format"):
        held("BufferAssignment:\n", "")


def test_bytes_that_live_at_once():
    """Two values in one place count once; what has a gap below it, without the gap."""
    assignment = """BufferAssignment:
allocation 0: size 100, page 0, parameter 0, shape |f32[25]| at ShapeIndex {}:
 value: <1 p @0> (size=100,offset=0): f32[25]{0}
allocation 1: size 40, color 1, page 0, preallocated-temp:
 value: <2 v @1> (size=40,offset=0): f32[10]{0:S(1)}
allocation 2: size 90, page 0, preallocated-temp:
 value: <3 a @0> (size=40,offset=0): f32[10]{0}
 value: <4 b{0} @0> (size=40,offset=0): f32[10]{0}
 value: <5 c @0> (size=20,offset=70): f32[5]{0}
 value: <6 d @0> (size=30,offset=40): f32[5]{0}
allocation 3: size 7, page 0, thread-local:
"""
    lives = "    a{}:1-4\n    b{0}:3-6\n    c{}:4-9\n    d{}:7-9\n    v{}:1-9\n"
    assert held(assignment, lives) == (100, 60, 90)
