"""A function with several exact ways to compute it, a way of its own for each pass.

A layer is computed forward, then differentiated with respect to its input and to what it trains.
The cheapest association differs between these three, and none may keep what it built for another:
delta_W and W + delta_W are as large as the model. What a layer reads besides, its input above all,
stays XLA's to keep or to make again, as it is without adapters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from randlora_jax.core.bases import BasisPair
from randlora_jax.core.update import holds_sums

Tree = Any
Function = Callable[[Tree, Tree], jax.Array]  # (arguments, what is trained) -> the result
Leaves = dict[int, Any]  # of a tree, by their places


def each_pass_its_way(forward: Function, inputs: Function, trained: Function) -> Function:
    """The function that all three compute: by `forward` where its value is wanted, ...

    ... by `inputs` and `trained` where it is differentiated with respect to its first and second
    argument. A rule for tangents, not for cotangents, so that forward mode and higher derivatives
    work; its tangents are rebuilt (``jax.checkpoint``) from the arguments and from what is trained.
    The latter, and what a quantised kernel is read from, come out of a barrier together with the
    cotangents: what is formed of them forward is not kept, and what is formed of them backwards is
    not before a layer's turn. (The scales too: XLA's TPU compiler made one fusion of both readings
    where they had the scales in common.) Around activations, a barrier would keep each of them
    beside what it was made of. B is the same for all layers, and so are the copies of its corners;
    behind barriers each layer had copies of its own, made when the step began. A, which is small,
    does come out of the barrier: else XLA kept delta's gradients to take lambda's and gamma's of
    them later. Where `inputs` and `trained` are the same way, they share what they can.
    """

    @jax.custom_jvp
    def function(arguments: Tree, updates: Tree) -> jax.Array:
        return forward(arguments, updates)

    def rule(primals: tuple[Tree, Tree], tangents: tuple[Tree, Tree]) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(primals)
        first = len(jax.tree.leaves(primals[0]))
        is_zero = lambda t: isinstance(t, SymbolicZero)  # noqa: E731
        steps = {
            i: step
            for i, step in enumerate(jax.tree.leaves(tangents, is_leaf=is_zero))
            if not is_zero(step)
        }

        def tangent(now: Leaves, steps: Leaves) -> jax.Array:
            def along(way: Function, moving: Sequence[int]) -> jax.Array:
                def moved(values: Leaves) -> jax.Array:
                    whole = now | values
                    return way(*jax.tree.unflatten(tree, [whole[i] for i in range(len(whole))]))

                here, there = ({i: of[i] for i in moving} for of in (now, steps))
                return jax.jvp(moved, (here,), (there,))[1]

            if inputs is trained:
                return along(inputs, list(steps))
            shares = [
                along(way, moving)
                for way, moving in (
                    (inputs, [i for i in steps if i < first]),
                    (trained, [i for i in steps if i >= first]),
                )
                if moving
            ]
            return shares[0] if len(shares) == 1 else shares[0] + shares[1]

        def rebuilt(formed: Leaves, others: Leaves, steps: Leaves) -> jax.Array:
            return tangent(formed | others, steps)

        shared = which_are_large_bases(primals)
        quantised = any(not holds_sums(x.dtype) for x in leaves[:first])
        # an integer's step says nothing
        moving = {i for i in steps if holds_sums(leaves[i].dtype)}
        formed: Leaves = {}
        others: Leaves = {}
        for i, leaf in enumerate(leaves):
            again = not shared[i] if i >= first else quantised and i not in moving
            (formed if again else others)[i] = leaf
        # not `function`: of an operation with a rule of its own, no policy would keep the products
        return forward(*primals), as_one_operation(rebuilt)(formed, others, steps)

    function.defjvp(rule, symbolic_zeros=True)
    return function


def as_one_operation(rebuilt: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`rebuilt(formed, others, steps)`, linear in the steps, from its arguments again in each pass.

    With the cotangents that are to come, `formed` goes through one barrier. To the policy of a
    ``jax.checkpoint`` around, it is one operation that a custom rule differentiates: a policy that
    saves products would keep delta otherwise. (And JAX 0.8 to 0.10 fail where a policy saves
    something inside of a checkpoint with a barrier around some of its arguments alone.)
    """
    operation = jax.custom_jvp(jax.checkpoint(rebuilt, prevent_cse=(True, False, False)))

    def again(primals: tuple[Leaves, ...], tangents: tuple[Leaves, ...]) -> Any:
        return jax.jvp(jax.checkpoint(rebuilt), primals, tangents)

    operation.defjvp(again)
    return operation


def which_are_large_bases(tree: Tree) -> list[bool]:
    """Of each leaf of a tree, whether it is the B of a pair."""
    is_pair = lambda x: isinstance(x, BasisPair)  # noqa: E731
    parts = jax.tree.leaves(tree, is_leaf=is_pair)
    return [here for part in parts for here in ((False, True) if is_pair(part) else (False,))]
