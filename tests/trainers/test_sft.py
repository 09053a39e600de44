"""google-tunix's PeftTrainer trains the adapter alone, and resumes it as if never killed."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from tiny_llama import TOKENIZER, adapted, leaves, only_the_adapter_moved, opens_in_peft
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from randlora_jax import ConfigError

pytestmark = pytest.mark.torch

TEXTS = ["red green blue", "one two three", "north east", "spring summer", "do re mi fa sol"]
TARGETS = ["q_proj", "o_proj", "down_proj"]
TX = optax.adamw(optax.cosine_decay_schedule(3e-2, 12))


class Killed(Exception):
    pass


def batches(steps, killed_at=None):
    """Two texts a batch; reading fails where the run is to be killed."""
    for i in range(steps):
        if i == killed_at:
            raise Killed
        pair = [TEXTS[i % 5], TEXTS[(i + 1) % 5]]
        tokens = TOKENIZER(pair, padding="max_length", max_length=16, return_tensors="np")
        yield TrainingInput(tokens.input_ids, tokens.attention_mask.astype(bool))


def inputs(batch):
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


class Trainer(PeftTrainer):
    def custom_checkpoint_metadata(self):
        return {"randlora": self.model.randlora_settings()}

    def close(self):  # the checkpoint that tunix ends with lacks them
        manager = self.checkpoint_manager
        if (manager.latest_step() or 0) < self.train_steps:
            last = self.train_steps, self.model, self.optimizer
            metadata = self.custom_checkpoint_metadata()
            manager.save(*last, save_only_lora_params=True, force=True, custom_metadata=metadata)
        super().close()


def trainer(model, folder, save_interval_steps=1):
    config = TrainingConfig(
        eval_every_n_steps=2,
        max_steps=6,
        gradient_accumulation_steps=2,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=save_interval_steps),
    )
    return Trainer(model, TX, config).with_gen_model_input_fn(inputs)


def test_killed_and_resumed_it_ends_as_it_would_have(base, tmp_path):
    model = adapted(base, target_modules=TARGETS)
    before = leaves(model)
    whole = trainer(model, tmp_path / "whole")
    whole.train(batches(12), list(batches(2)))
    only_the_adapter_moved(before, model)
    losses = whole.metrics_logger.get_metric_history("", "loss", "train")
    seen = whole.metrics_logger.get_metric_history("", "loss", "eval")
    assert losses[-1] < losses[0] and seen[-1] < seen[0]
    assert len(losses) == 6 and len(seen) == 4, "steps of two batches; at first, then every other"
    opens_in_peft(model, tmp_path / "adapter")

    killed = trainer(adapted(base, target_modules=TARGETS), tmp_path / "killed")
    with pytest.raises(Killed):
        killed.train(batches(12, killed_at=7))
    killed.checkpoint_manager.close()
    again = adapted(base, target_modules=TARGETS)
    resumed = trainer(again, tmp_path / "killed")
    assert resumed.train_steps == 3
    resumed.train(batches(12))
    for path, array in leaves(again).items():
        np.testing.assert_array_equal(array, leaves(model)[path], err_msg=str(path))
    for path, array in leaves(resumed.optimizer).items():
        np.testing.assert_array_equal(array, leaves(whole.optimizer)[path], err_msg=str(path))


def test_a_checkpoint_holds_what_trains_and_nothing_else(base, tmp_path):
    model = adapted(base)
    made = trainer(model, tmp_path)
    made.checkpoint_manager.save(1, model, save_only_lora_params=made._lora_enabled, force=True)
    made.checkpoint_manager.close()
    with ocp.StandardCheckpointer() as reader:
        held = reader.metadata(tmp_path / "1" / "model_params").item_metadata.tree
    sizes = [np.prod(x.shape) for x in jax.tree.leaves(held)]
    assert sum(sizes) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("steps", [0, 4, 6])
def test_its_checkpoints_tell_settings_that_another_model_lacks(base, tmp_path, steps):
    """The last of 6 steps is off the interval of 4; after 0 there is none."""
    folder = tmp_path
    if steps:
        trainer(adapted(base), folder, save_interval_steps=4).train(batches(2 * steps))
    model, other = adapted(base), adapted(base, target_modules=TARGETS)
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        if step is not None:  # else it is the first run
            metadata = manager.metadata(step).custom_metadata
            model.check_randlora_settings(metadata["randlora"])
    assert (step or 0) == steps
    if steps:
        with pytest.raises(ConfigError, match="target_modules"):
            other.check_randlora_settings(metadata["randlora"])
