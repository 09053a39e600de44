"""Runs `mesh_*cases.py` where there are eight devices, and two processes that share a mesh."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from randlora_jax.interop.peft_dir import read_adapter

HERE = Path(__file__).parents[1]


@pytest.mark.first
def test_on_eight_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, sorted(HERE.glob("mesh_*cases.py")))],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def two_processes(folder):
    """Starts both, each with four devices; what they printed."""
    flags = "--xla_force_host_platform_device_count=4"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "two_processes.py", address, number, folder],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    done = [process.communicate(timeout=300) for process in running]
    assert not any(process.returncode for process in running), done
    return [out.splitlines()[-1] for out, _ in done]


def test_two_processes_train_and_save_one_adapter(tmp_path):
    alone = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "two_processes.py", "-", "alone", tmp_path / "one"],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    said = two_processes(tmp_path / "two")
    assert said[0] == said[1] and said[0].startswith("saved")
    one, two = (read_adapter(tmp_path / name) for name in ("one", "two"))
    for name, (lam, gamma) in one.layers.items():
        np.testing.assert_allclose(two.layers[name][0], lam, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(two.layers[name][1], gamma, rtol=1e-4, atol=1e-7)
    assert one.saved.keys() == two.saved.keys() and one.saved
    for name, tensor in one.saved.items():
        np.testing.assert_allclose(two.saved[name], tensor, rtol=1e-4, atol=1e-6)
    # nothing was written or pushed twice or left over
    pushed = [(tmp_path / f"{name}-pushed").read_text() for name in ("one", "two")]
    assert pushed == ["README.md adapter_config.json adapter_model.safetensors"] * 2
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )
