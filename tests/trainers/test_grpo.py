"""google-tunix's RL cluster: GRPO with rollouts by its sampler, whose weights follow the actor."""

import itertools

import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from tiny_llama import (
    MESH,
    TOKENIZER,
    adapted,
    leaves,
    only_the_adapter_moved,
    opens_in_peft,
)
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.utils import is_sharing_backbone
from tunix_pair import jax_logits

pytestmark = pytest.mark.torch

ASKED = ["count to", "hello wo"]
APART = Mesh(MESH.devices.reshape(1, 1), ("tp", "fsdp"))  # another mesh, so another copy


def cluster(model, reference, rollout_mesh):
    training = RLTrainingConfig(
        actor_optimizer=optax.adamw(2e-2), eval_every_n_steps=9, max_steps=2
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=5, max_prompt_length=12, kv_cache_size=24, temperature=1.0, seed=0
    )
    config = ClusterConfig(
        role_to_mesh={Role.ACTOR: MESH, Role.REFERENCE: MESH, Role.ROLLOUT: rollout_mesh},
        training_config=training,
        rollout_config=rollout,
    )
    return RLCluster(actor=model, reference=reference, tokenizer=TOKENIZER, cluster_config=config)


def reward(prompts, completions, **_):
    """Prefers one of the two answers to each question, whatever they are."""
    return [float(i) for i in itertools.islice(itertools.cycle((0, 1)), len(completions))]


@pytest.mark.parametrize(
    ("sparse", "rollout_mesh"),
    [(False, MESH), (True, APART)],
    ids=["dense together", "sparse apart"],
)
def test_a_few_steps(sparse, rollout_mesh, base, tmp_path):
    model = adapted(base, MESH, sparse=sparse)
    reference = nnx.merge(*nnx.split(model))
    reference.disable_adapter_layers()
    plain, before = np.asarray(jax_logits(reference)), leaves(model)
    held = {p: x.get_raw_value() for p, x in nnx.to_flat_state(nnx.state(model))}

    made = cluster(model, reference, rollout_mesh)
    assert made.actor_trainer.model is model
    reference = made.inference_worker.get_model("reference")
    shared = {p: x.get_raw_value() for p, x in nnx.to_flat_state(nnx.state(reference))}
    learner = GRPOLearner(made, GRPOConfig(num_generations=2, num_iterations=1), reward)
    assert learner.should_sync_weights == (rollout_mesh is APART)
    learner.train([{"prompts": np.array(ASKED)}] * 2)

    assert is_sharing_backbone(reference, model)
    assert all(shared[path] is x for path, x in held.items()), "no copy"
    only_the_adapter_moved(before, model)
    np.testing.assert_array_equal(jax_logits(reference), plain)
    here, there = leaves(model), leaves(made.rollout.model())
    for path in here:
        np.testing.assert_array_equal(there[path], here[path], err_msg=str(path))
    opens_in_peft(model, tmp_path)
