"""RandLoRA on a Haiku model; the adapter opens in PyTorch PEFT.

python examples/with_haiku.py
"""

import haiku as hk
import jax
import jax.numpy as jnp
from functional import train
from newswire import CONFIG, HIDDEN, prepare

from randlora_jax import get_peft_model

task = prepare()


@hk.without_apply_rng
@hk.transform
def net(x: jax.Array) -> jax.Array:
    """Logits (documents, classes)."""
    x = hk.nets.MLP([HIDDEN, HIDDEN], activate_final=True, name="trunk")(x)
    return hk.Linear(len(task.base["head.bias"]), name="head")(x)


params = {
    haiku_name: {
        "w": jnp.asarray(task.base[f"{name}.weight"].T),
        "b": jnp.asarray(task.base[f"{name}.bias"]),
    }
    for haiku_name, name in {
        "trunk/~/linear_0": "trunk.0",
        "trunk/~/linear_1": "trunk.1",
        "head": "head",
    }.items()
}
model = get_peft_model(
    params, CONFIG, views={".*": "i o"}, names={r"trunk/~/linear_(\d)": r"trunk.\1"}
)
train("haiku", model, net.apply, task)
