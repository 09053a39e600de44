"""What decoding with an adapter for each row reads and counts, and which order rows take."""

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model
from randlora_jax.core.cost import Sizes, row_order
from randlora_jax.core.rows import RowOrder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from rows import ROWS, Decoding, Widths, flops, reads

# with rank 8 some layers have more bases than the rank, some as many
SMALL = Widths(hidden=192, heads=3, key_heads=1, inner=512, depth=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sixteen_adapters_read_the_model_and_its_bases_once(dtype):
    run = Decoding(SMALL, dtype, r=8)
    programs = run.programs()
    base, _, each = (reads(*programs[name]) for name in ("base", "one adapter", "16 adapters"))
    width, hidden, head = jnp.dtype(dtype).itemsize, 192, 64 * 192
    kernels = 2 * hidden * hidden + 2 * hidden * 64 + 3 * hidden * 512
    assert base == {"shared": width * (kernels + head)}, "the count is of what is known"
    assert 2 <= (each["shared"] - width * head) / (width * kernels) <= 2.2
    # and of the table of slots, which adapter each row has and how strong
    assert each["gathered"] == run.own_bytes() + 8 * ROWS
    one, many = (flops(*programs[name]) for name in ("one adapter", "16 adapters"))
    assert many <= 1.1 * one


@pytest.mark.parametrize("n_in, n_out, r", [(576, 1536, 32), (1536, 576, 32), (4096, 4096, 32)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_order_goes_by_tokens_a_row(n_in, n_out, r, dtype):
    """Nothing for decoding, A_flat from about n (or r) tokens a row, delta from about max."""
    low, high = sorted((n_in, n_out))
    n, rows = -(-low // r), 16
    few = max(n, r)

    def order(tokens):
        sizes = Sizes.in_dtype(dtype, rows * tokens, n_in, n_out, r * n)
        return row_order(sizes, rows, r)

    assert order(1) is order(few // 2) is RowOrder.TOKENS
    assert order(2 * few) is order(high // 2) is RowOrder.FACTORS
    assert order(2 * high) is RowOrder.DELTA
    turns = [order(t) for t in range(1, 4 * high, 8)]
    assert turns == sorted(turns, key=list(RowOrder).index), "each once, and in this order"


class Own(nnx.Linear):
    def __call__(self, x):
        return jnp.tanh(x) @ self.kernel[...]


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 64, rngs=rngs)
        self.own = Own(64, 64, rngs=rngs)

    def __call__(self, x):
        return self.own(self.down(nnx.relu(self.up(x))))


def test_explain_says_what_rows_form():
    config = RandLoraConfig(r=8, target_modules=["up", "down", "own"])
    model = get_peft_model(Net(), config)
    said = [model.explain(16 * tokens, rows=16).splitlines() for tokens in (1, 64, 1024)]
    kernels = ["nothing", "A_flat for each row", "delta_W for each row"]
    for lines, formed, each in zip(said, kernels, (1, 64, 1024), strict=True):
        beside = [line for line in lines if f": 16 rows of {each} form {formed}. " in line]
        assert [line.split()[0] for line in beside] == ["down", "up"], lines
        (own,) = set(lines) - {*beside}
        assert f"not 16 rows of {each}: the layer is not known to be a sum" in own
    # lambda and gamma of a row's own cost 2 r n min; the bases' two products twice the layer itself
    r, n, low, high = 8, 8, 64, 256
    added = 2 * r * n * (low + high) + n * low
    assert f"times {1 + added / (2 * low * high):.2f}, with one" in said[0][2]


@pytest.mark.parametrize("rows", [0, -1, 3, 2.0, "a"])
def test_rows_that_do_not_share_the_tokens_are_refused(rows):
    model = get_peft_model(Net(), RandLoraConfig(r=8, target_modules=["up"]))
    with pytest.raises(ConfigError, match="rows: expected how many rows share 16 tokens"):
        model.explain(16, rows=rows)
