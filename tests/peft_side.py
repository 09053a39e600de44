"""Small PyTorch models and PEFT adapters on disk, for the commands that read both."""

import numpy as np
import peft
import torch
import transformers
from families import FAMILIES

AUTO = {
    "bert": transformers.AutoModelForSequenceClassification,
    "gpt2": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "opt": transformers.AutoModelForCausalLM,
}


def save_base(family, folder, dtype=torch.float32, shard="5GB", **changes):
    """A model of random weights, saved by transformers."""
    torch.manual_seed(7)
    name, make, _ = FAMILIES[family]
    config = make()
    for field, value in changes.items():
        setattr(config, field, value)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros would hide a bias that went astray
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def load(family, folder, **kwargs):
    kwargs = {"torch_dtype": torch.float32, "attn_implementation": "eager", **kwargs}
    return AUTO[family].from_pretrained(folder, **kwargs).eval()


def save_adapter(family, base, folder, dtype=torch.float32, auto=None, **changes):
    """A PEFT adapter whose every trained number is random; returns the PEFT model."""
    settings = {
        "r": 5,
        "randlora_alpha": 10,
        "target_modules": FAMILIES[family][2],
        "projection_prng_key": 3,
        "task_type": "SEQ_CLS" if family == "bert" else "CAUSAL_LM",
        **changes,
    }
    model = auto(base) if auto else load(family, base, torch_dtype=dtype)
    model = peft.get_peft_model(model, peft.RandLoraConfig(**settings)).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


def save_both(model, folder, load=None, **changes):
    """Any model in ``folder/base`` and an adapter of it in ``folder/adapter``; the PEFT model.

    Args:
      load: the dtype to train in, where it is not the model's.
    """
    torch.manual_seed(7)
    model.save_pretrained(folder / "base")
    if load is not None:
        model = type(model).from_pretrained(folder / "base", torch_dtype=load)
    settings = {"r": 5, "randlora_alpha": 10, "projection_prng_key": 3, **changes}
    model = peft.get_peft_model(model, peft.RandLoraConfig(**settings)).eval()
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return model


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "randlora_lambda" in name:
                p.normal_(0, 0.3)
            elif "randlora_gamma" in name:
                p.mul_(1 + 0.3 * torch.randn_like(p))
            elif p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def logits(model):
    ids = torch.tensor(np.random.default_rng(3).integers(3, 97, (3, 11)))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().numpy()


def assert_same_logits(found, expected, base, relative=1e-5):
    """Equal, where an adapter that does nothing would be far off."""
    scale = np.abs(expected).max()
    assert found.shape == expected.shape
    assert np.std(expected - base) >= 0.1 * np.std(base), "the adapter hardly moves the logits"
    assert np.abs(found - expected).max() <= relative * scale
