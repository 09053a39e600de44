"""The server of `make demo-serve`, over a tiny Llama: each request gets its adapter's words."""

import asyncio
import json
import shutil
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aiohttp import ClientError
from aiohttp.test_utils import TestClient, TestServer
from flax import nnx
from tiny_llama import SETTINGS, TOKENIZER, base_model, move, with_tunix

from randlora_jax import RandLoraConfig, get_peft_model

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from serve import Server, opened
from serving_steps import Sizes

pytestmark = pytest.mark.torch

NAMES = ["a", "b", "c", "d"]
SIZES = Sizes(rows=3, places=48, prompts=(1, 2), lengths=(8, 24), widths=(1, 3))
CAPACITY = 2
TOKENIZER.chat_template = "{{ messages[0].content }}"


@pytest.fixture(scope="module", autouse=True)
def as_tunix_sets_it():
    with with_tunix():
        yield


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """As for the tests beside; and for all of this module, or programs would be compiled anew."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A folder of four adapters, and the model that was saved there."""
    folder = tmp_path_factory.mktemp("adapters")
    config = RandLoraConfig(**SETTINGS, base_model_name_or_path=str(base))
    model = get_peft_model(base_model(base), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    for seed, name in enumerate(NAMES):
        model.set_adapter(name)
        move(model, seed)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def alone(adapters):
    """What an adapter says by itself, without cache, rows or stacks."""
    model, graphs = adapters[1], {}
    run = jax.jit(
        lambda graph, arrays, *asked: nnx.merge(graph, arrays)(*asked)[0], static_argnums=0
    )

    def says(name: str, prompt: str, limit: int) -> list[int]:
        if name not in graphs:
            if name != "__base__":
                model.set_adapter(name)
                graphs[name] = nnx.split(model)
            else:
                with model.disable_adapter():
                    graphs[name] = nnx.split(model)
        ids = TOKENIZER(prompt, add_special_tokens=False).input_ids
        asked, places = len(ids), jnp.arange(SIZES.places)[None]
        seen = (places <= places[0, :, None])[None]
        for _ in range(limit):
            tokens = np.zeros((1, SIZES.places), np.int32)
            tokens[0, : len(ids)] = ids
            logits = run(*graphs[name], tokens, places, None, seen)
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        return ids[asked:]

    return says


@pytest.fixture(scope="module")
def server(base, adapters, tmp_path_factory):
    """One for all tests, its programs compiled, with a folder that tests may change."""
    folder = tmp_path_factory.mktemp("served") / "adapters"
    shutil.copytree(adapters[0], folder)
    model = opened(base_model(base), folder, CAPACITY)
    server = Server(model, TOKENIZER, folder, SIZES, CAPACITY)
    for compile_one in server.steps.programs():
        compile_one()
    return server, folder


@asynccontextmanager
async def client_of(server):
    async with TestClient(TestServer(server.application())) as client:
        yield client


def text(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def asking(prompt: str, adapter: str, limit: int, **more) -> dict:
    return dict(prompt=prompt, adapter=adapter, max_tokens=limit, ignore_eos=True, **more)


async def said(client, *asked, after: float = 0.0, **more) -> str:
    await asyncio.sleep(after)
    async with client.post("/generate", json=asking(*asked, **more)) as response:
        assert response.status == 200, await response.text()
        if not more.get("stream"):
            return (await response.json())["text"]
        lines = (await response.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return "".join(json.loads(line.removeprefix("data: "))["text"] for line in lines[:-2])


PROMPTS = ["one two", "x", "a longer prompt, of 24 by", "hello"]


def test_whoever_comes_gets_the_words_of_its_own_adapter(server, alone):
    """More requests than rows, more adapters than slots, of all lengths, at different times."""
    asked = [
        (PROMPTS[i % 4][:23], name, 3 + 5 * i % 17)
        for i, name in enumerate([*NAMES, "__base__", "a", "a", "c", "b", "d", "c", "a"])
    ]

    async def run():
        async with client_of(server[0]) as client:
            answers = await asyncio.gather(
                *(
                    said(client, *each, after=0.02 * i, stream=i % 2 > 0)
                    for i, each in enumerate(asked)
                )
            )
            async with client.get("/status") as response:
                return answers, await response.json()

    answers, status = asyncio.run(run())
    assert answers == [text(alone(name, prompt, limit)) for prompt, name, limit in asked]
    assert len({text(alone(name, PROMPTS[0], 8)) for name in ["__base__", *NAMES]}) == 5
    assert status["evicted"] > 0 and status["loaded"] >= 4
    assert status["compiled"] == 0
    assert status["busy"] == status["waiting"] == 0


def test_an_answer_ends_where_its_adapter_ends_it(server, alone):
    """The token that ends answers, here one which the adapter is known to say."""
    ids = alone("a", "one two", 12)
    words = server[0].words
    tokenizer = type("Ending", (), {"eos_token_id": ids[5], "decode": TOKENIZER.decode})()
    tokenizer.apply_chat_template = TOKENIZER.apply_chat_template
    server[0].words = type(words)(tokenizer, words.longest, words.places)

    async def run():
        async with client_of(server[0]) as client:
            body = {"prompt": "one two", "adapter": "a", "max_tokens": 12}
            async with client.post("/generate", json=body) as response:
                return (await response.json())["text"]

    try:
        found = asyncio.run(run())
    finally:
        server[0].words = words
    assert found == text(ids[: ids.index(ids[5])])


BAD = [
    (b"{", 400, "no JSON"),
    (b"\xff", 400, "no JSON"),
    ([], 400, "expected a JSON object, found list"),
    ({}, 400, "'prompt' is missing"),
    ({"prompt": " "}, 400, "'prompt' is empty"),
    ({"prompt": 1}, 400, "'prompt': expected str, found int"),
    ({"prompt": "x", "max_tokens": True}, 400, "'max_tokens': expected int, found bool"),
    ({"prompt": "x", "max_tokens": 0}, 400, "'max_tokens': expected 1 or more, found 0"),
    ({"prompt": "x", "adaptor": "a"}, 400, "unknown fields ['adaptor']"),
    ({"prompt": "x" * 25}, 400, "'prompt' has 25 tokens: expected at most 24"),
    ({"prompt": "x", "max_tokens": 48}, 400, "expected at most 48 together"),
    ({"prompt": "x", "adapter": "e"}, 404, "no adapter 'e' here"),
    ({"prompt": "x", "adapter": "../adapters/a"}, 404, "no adapter '../adapters/a' here"),
    ({"prompt": "x", "adapter": "link"}, 404, "no adapter 'link' here"),
    ({"prompt": "x", "adapter": ""}, 404, "no adapter '' here"),
    (b"x" * 70_000, 413, "exceeded"),
]


def test_bad_requests_are_told_what_is_wrong(server):
    folder = server[1]
    (folder / "link").symlink_to(folder / "a", target_is_directory=True)

    async def run():
        async with client_of(server[0]) as client:
            for body, status, message in BAD:
                sent = {"data" if isinstance(body, bytes) else "json": body}
                async with client.post("/generate", **sent) as response:
                    found = (await response.json())["error"]
                    assert response.status == status and message in found, (body, found)
            async with client.get("/generate") as response:
                assert response.status == 405
            async with client.get("/adapters") as response:
                assert (await response.json())["adapters"] == ["__base__", *NAMES]

    asyncio.run(run())


def test_a_damaged_adapter_is_refused_and_the_others_go_on(server, adapters, alone):
    weights = server[1] / "d" / "adapter_model.safetensors"
    whole = weights.read_bytes()

    async def run():
        async with client_of(server[0]) as client:
            weights.write_bytes(whole[: len(whole) // 2])
            others = [said(client, "hello", name, 20) for name in "abc"]
            tries = [client.post("/generate", json=asking("hello", "d", 4)) for _ in range(3)]
            *answers, one, two, three = await asyncio.gather(*others, *tries)
            for response in (one, two, three):
                assert response.status == 422
                assert "adapter 'd' is refused" in (await response.json())["error"]
            assert answers == [text(alone(name, "hello", 20)) for name in "abc"]
            weights.write_bytes(whole)  # and once it is mended it is served
            assert await said(client, "hello", "d", 4) == text(alone("d", "hello", 4))

    asyncio.run(run())


def test_what_is_refused_evicts_nobody(server, adapters, alone):
    """All slots hold good adapters, unused; whoever is to go is asked for while d is refused."""
    weights = server[1] / "d" / "adapter_model.safetensors"
    whole = weights.read_bytes()

    async def run():
        async with client_of(server[0]) as client:
            for name in "ab":
                await said(client, "hello", name, 1)
            weights.write_bytes(whole[: len(whole) // 2])
            refused = client.post("/generate", json=asking("hello", "d", 4))
            async with refused as response:
                assert response.status == 422
            shelf = server[0].shelf
            assert shelf.here() == {"a": 0, "b": 0} and (shelf.loaded, shelf.evicted) == (2, 0)
            tries = [client.post("/generate", json=asking("hello", "d", 4)) for _ in range(3)]
            *others, answer = await asyncio.gather(*tries, said(client, "hello", "a", 4))
            assert answer == text(alone("a", "hello", 4))
            assert [response.status for response in others] == [422] * 3
            weights.write_bytes(whole)
            for name in "dabcda":
                assert await said(client, "hello", name, 4) == text(alone(name, "hello", 4))
            assert len(shelf.model.peft_config) == len(shelf.here()) == CAPACITY
        assert not shelf.model.peft_config

    asyncio.run(run())


def test_slow_and_gone_clients_hold_nobody_up(server, alone):
    """Of three rows all are asked for by clients who do not read, or hang up."""

    async def run():
        async with client_of(server[0]) as client:
            slow = [
                await client.post("/generate", json=asking("x", "a", 40, stream=True))
                for _ in range(2)
            ]
            gone = await client.post("/generate", json=asking("x", "b", 40, stream=True))
            gone.close()
            hung_up = asyncio.create_task(said(client, "x", "b", 40))
            await asyncio.sleep(0.05)
            hung_up.cancel()
            assert await said(client, "hello", "c", 6) == text(alone("c", "hello", 6))
            for response in slow:  # what they did not read is there
                lines = (await response.text()).split("\n\n")
                found = "".join(json.loads(line[6:])["text"] for line in lines[:-2])
                assert found == text(alone("a", "x", 40))
            async with client.get("/status") as response:
                status = await response.json()
            assert status["busy"] == status["waiting"] == 0
            async with client.get("/adapters") as response:
                assert set((await response.json())["loaded"].values()) == {0}

    asyncio.run(run())


def test_who_does_not_read_for_long_is_hung_up_on(server, alone, monkeypatch):
    """Of answers larger than all buffers, after its patience, which is short here."""
    monkeypatch.setattr("serve.PATIENCE", 0.2)

    async def large(_, tokens):
        async for _ in tokens:
            yield "x" * 2**24

    async def run():
        async with client_of(server[0]) as client:
            with monkeypatch.context() as patched:
                patched.setattr("serve.Words.pieces", large)
                slow = await client.post("/generate", json=asking("x", "a", 4, stream=True))
                await asyncio.sleep(1.0)
            with pytest.raises(ClientError):
                await slow.read()
            assert await said(client, "hello", "a", 4) == text(alone("a", "hello", 4))
            async with client.get("/adapters") as response:
                assert (await response.json())["loaded"] == {"a": 0}

    asyncio.run(run())


def test_loading_holds_nobody_up(server, alone):
    """An adapter is loaded for as long as it takes to answer with another one."""
    gate = threading.Event()

    async def run():
        async with client_of(server[0]) as client:
            await said(client, "hello", "a", 1)
            shelf = server[0].shelf
            changed = shelf._changed
            shelf._changed = lambda model: gate.wait() and changed(model)
            waits = asyncio.create_task(said(client, "hello", "b", 4))
            while "b" not in shelf.here():
                await asyncio.sleep(0.01)
            assert await said(client, "hello", "a", 20) == text(alone("a", "hello", 20))
            assert not waits.done()
            gate.set()
            assert await waits == text(alone("b", "hello", 4))

    asyncio.run(run())


def test_more_than_may_wait_are_told_so(server, alone, monkeypatch):
    monkeypatch.setattr("serve.WAITING", 1)

    async def run():
        async with client_of(server[0]) as client:
            await said(client, "x", "a", 1)
            tries = [client.post("/generate", json=asking("x", "a", 30)) for _ in range(12)]
            answers = await asyncio.gather(*tries)
            assert {response.status for response in answers} == {200, 503}
            for response in answers:
                body = await response.json()
                if response.status == 200:
                    assert body["tokens"] == alone("a", "x", 30)
                else:
                    assert body["error"] == "1 answers wait for a row already"

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_broke_down(server, monkeypatch):
    def broken(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(server[0].steps, "step", broken)

    async def run():
        async with client_of(server[0]) as client:
            for _ in range(2):  # one that is being written, one that comes later
                async with client.post("/generate", json=asking("x", "a", 5)) as response:
                    assert response.status == 500

    asyncio.run(run())
