"""Which layers of a model a configuration adapts."""

from randlora_jax.interop import targets
from randlora_jax.interop.config import ALL_LINEAR, RandLoraConfig
from randlora_jax.interop.errors import ConfigError, TargetError, listed, shown
from randlora_jax.models.layer import Layer
from randlora_jax.models.registry import AdapterRegistry, BaseModelInfo


def select(registry: AdapterRegistry, config: RandLoraConfig) -> dict[str, Layer]:
    """The canonical names that `config` adapts, with the layer that holds each.

    Raises:
      ConfigError: it trains whole what shares its weight with other modules.
      TargetError: it selects none, or a part of what one array holds, or the model itself.
    """
    _refuse_tied(registry.info, config)
    owners = registry.owners()
    if "" in owners and (len(owners) == 1 or config.target_modules == ALL_LINEAR):
        raise TargetError(
            "the model itself is a layer, the root, and has no name by which an adapter could "
            "take it: hold it in a module, such as Sequential, or give it the name that it has "
            'in PyTorch, get_peft_model(..., names={"": "proj"})'
        )
    heads = [name for name in owners if targets.is_output_head(name)]
    stacks = {
        layer.name: layer.names
        for layer in registry.layers.values()
        if layer.is_named_as_one and layer.name not in owners
    }
    named = targets.select(
        config,
        [*owners, *stacks],
        [m for m in registry.modules if m not in owners and m not in stacks],
        model_type=registry.info.model_type,
        output_embedding=heads[0] if heads and registry.info.has_output_head else None,
    )
    parts = dict.fromkeys(part for name in named for part in stacks.get(name, (name,)))
    whole = targets.saved_modules(config)
    chosen = [name for name in parts if not owners[name].is_whole(whole)]
    if not chosen:
        raise TargetError(
            f"modules_to_save={shown(whole)} trains whole all that "
            f"target_modules={shown(config.target_modules)} takes: leave one of them out"
        )
    for name in chosen:
        if owners[name].refusal:
            raise TargetError(
                f"layer {owners[name].name!r} cannot take an adapter: {owners[name].refusal}. "
                "Leave it out of target_modules"
            )
    taken = set(chosen)
    for layer in {owners[name].name: owners[name] for name in chosen}.values():
        left_out = sorted(set(layer.names) - taken)
        if left_out:
            raise TargetError(
                f"target_modules takes a part of {layer.name!r}, one array that holds "
                f"{len(layer.names)} layers; {left_out} would be left out. Adapt all or none"
            )
    return {name: owners[name] for name in chosen}


def _refuse_tied(info: BaseModelInfo, config: RandLoraConfig) -> None:
    """Nothing, if all that `config` trains whole has weights of its own.

    PEFT trains a copy of a module whole, apart from those that share its weight; here they are
    one array, which stays one. So the two sides would compute different things.
    """
    whole = targets.saved_modules(config)
    for group in info.tied:
        taken = [name for name in group if targets.inside_saved(name, whole)]
        if taken:
            raise ConfigError(
                f"modules_to_save={shown(config.modules_to_save)} trains {listed(taken)} "
                f"whole, but {listed(group)} share one weight (they are tied; here it lies in "
                f"{group[0]!r}). PEFT trains a copy apart from the others, so its logits would "
                "not be ours: leave it out of modules_to_save, or, where only an output head "
                "shares it, take a model with config.tie_word_embeddings=False"
            )
