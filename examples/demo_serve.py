"""`make demo-serve`: the server of serve.py, driven by a client with real requests.

    python examples/demo_serve.py            # writes out/serve/
    python examples/demo_serve.py --short    # fewer words, as the tests run it

It trains three adapters the first time, starts the server as a process of its own, and sends it
requests; in the end every answer is compared with what its adapter says alone.
"""

import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import aiohttp
import jax
import serving_alone
import serving_tasks
import smollm
from rich.console import Console
from rich.table import Table
from serving_shelf import BASE
from training import track

SHORT = "--short" in sys.argv
OUT = Path("out/serve")
ADAPTERS = OUT / "adapters"
COPIES = 16  # with the three more than the model has slots
TOKENS = 8 if SHORT else 24  # of a measured answer
ROUNDS = (1, 4, 16) if SHORT else (1, 4, 16, 16, 4, 1)  # different adapters in a batch of 16
QUESTIONS = (
    "What is the capital of Italy?",
    "What is snow?",
    "Where do bears live?",
    "What does a teacher do?",
)

console = Console()


@dataclass(frozen=True)
class Told:
    """An answer, and when it came: seconds from when it was asked for."""

    adapter: str
    prompt: str
    text: str
    first: float
    whole: float


@dataclass(frozen=True)
class Client:
    """One that asks the server."""

    session: aiohttp.ClientSession

    async def whole(self, prompt: str, adapter: str, limit: int) -> list[int]:
        """The tokens of an answer that goes on to its limit, asked for at once."""
        body = {"prompt": prompt, "adapter": adapter, "max_tokens": limit, "ignore_eos": True}
        async with self.session.post("/generate", json=body) as response:
            response.raise_for_status()
            return list((await response.json())["tokens"])

    async def streamed(self, prompt: str, adapter: str, after: float = 0.0, **more: Any) -> Told:
        """An answer as it is said, to a question asked `after` some seconds."""
        await asyncio.sleep(after)
        began, pieces, first = time.perf_counter(), list[str](), 0.0
        body = {"prompt": prompt, "adapter": adapter, "stream": True, **more}
        async with self.session.post("/generate", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - began
                    pieces.append(json.loads(line[6:])["text"])
        return Told(adapter, prompt, "".join(pieces), first, time.perf_counter() - began)

    async def refused(self, body: Any) -> tuple[int, str]:
        """What a bad request is told."""
        sent = {"data" if isinstance(body, bytes) else "json": body}
        async with self.session.post("/generate", **sent) as response:
            return response.status, (await response.json())["error"]

    async def status(self) -> dict[str, Any]:
        """The server's."""
        async with self.session.get("/status") as response:
            return dict(await response.json())


@asynccontextmanager
async def server() -> AsyncIterator[Client]:
    """A client of a server that runs within."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "examples/serve.py",
        str(ADAPTERS),
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command)  # its bars are seen
    patience = aiohttp.ClientTimeout(total=None)
    session = aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=patience)
    try:
        async with session:
            client = Client(session)
            while True:
                try:
                    await client.status()
                    break
                except aiohttp.ClientConnectionError:
                    if process.poll() is not None:
                        raise SystemExit(f"the server ended: {process.returncode}") from None
                    await asyncio.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait()


async def talk(client: Client) -> None:
    """Every manner answers two questions, asked one after another while others are answered."""
    asked = list(itertools.product(QUESTIONS[:2], [BASE, *serving_tasks.MANNERS]))
    told = await asyncio.gather(
        *(
            client.streamed(*each, after=0.3 * i, max_tokens=40)
            for i, each in enumerate(asked[:2] if SHORT else asked)
        )
    )
    table = Table("adapter", "question", "answer", "first word, s", "all, s")
    for t in told:
        table.add_row(t.adapter, t.prompt, t.text, f"{t.first:.1f}", f"{t.whole:.1f}")
    console.print(table)


async def measure(client: Client, names: Sequence[str]) -> tuple[list[Told], dict[int, Any]]:
    """Sixteen answers at once, of 1, 4 and 16 different adapters."""
    for name in track(names, "adapters, loaded when first asked for", len(names)):
        await client.streamed("Hello", name, max_tokens=1)
    every, found = list[Told](), dict[int, list[tuple[float, list[Told]]]]()
    for different in track(ROUNDS, "16 rows of 1, 4 and 16 adapters", len(ROUNDS)):
        asked = [(QUESTIONS[i % 4], names[i % different]) for i in range(16)]
        began = time.perf_counter()
        told = await asyncio.gather(
            *(
                client.streamed(*each, after=0.01 * i, max_tokens=TOKENS, ignore_eos=True)
                for i, each in enumerate(asked)
            )
        )
        found.setdefault(different, []).append((time.perf_counter() - began, told))
        every += told
    return every, {different: figures(runs) for different, runs in found.items()}


def figures(runs: Sequence[tuple[float, Sequence[Told]]]) -> dict[str, float]:
    """Of all runs together."""
    seconds, told = sum(s for s, _ in runs), [t for _, each in runs for t in each]
    return {
        "first": sum(t.first for t in told) / len(told),
        "whole": sum(t.whole for t in told) / len(told),
        "tokens_per_second": TOKENS * len(told) / seconds,
        "words_per_second": sum(len(t.text.split()) for t in told) / seconds,
    }


def show(found: dict[int, dict[str, float]]) -> None:
    """The figures, and those of 16 adapters beside those of one."""
    table = Table(
        "adapters in a batch of 16", "first word, s", "all, s", "tokens a second", "words a second"
    )
    for different, each in found.items():
        table.add_row(str(different), *(f"{value:.2f}" for value in each.values()))
    console.print(table)
    print(f"16 adapters: {ratio(found):.2f} of the tokens a second of one")


def ratio(found: dict[int, dict[str, float]]) -> float:
    """Tokens a second of 16 adapters, beside those of one."""
    return found[16]["tokens_per_second"] / found[1]["tokens_per_second"]


async def misuse(client: Client) -> dict[str, tuple[int, str]]:
    """Bad requests, and what they are told; a damaged adapter among them, while others go on."""
    damaged = ADAPTERS / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    serving_tasks.copy(ADAPTERS / "pirate", damaged, seed=0)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    bad = {
        "no JSON": b"{",
        "no prompt": {"adapter": "pirate"},
        "an unknown field": {"prompt": "Hi", "temprature": 1},
        "a wrong type": {"prompt": "Hi", "max_tokens": "many"},
        "a prompt too long": {"prompt": "far " * 500},
        "an answer too long": {"prompt": "Hi", "max_tokens": 10_000},
        "an unknown adapter": {"prompt": "Hi", "adapter": "clown"},
        "a path": {"prompt": "Hi", "adapter": "../adapters/pirate"},
        "a damaged adapter": {"prompt": "Hi", "adapter": "damaged"},
    }
    other = asyncio.create_task(client.streamed(QUESTIONS[0], "pirate", max_tokens=8))
    told = {what: await client.refused(body) for what, body in bad.items()}
    assert (await other).text, "others do not go on"
    shutil.rmtree(damaged)
    table = Table("request", "status", "error")
    for what, (status, error) in told.items():
        table.add_row(what, str(status), error if len(error) < 200 else f"{error[:200]}...")
    console.print(table)
    return told


async def drive(report: dict[str, Any]) -> tuple[list[Told], dict[tuple[str, str], list[int]]]:
    """All that is asked of the server.

    Returns:
      Answers from batches of sixteen, and what came alone: tokens by prompt and adapter.
    """
    async with server() as client:
        console.rule("2. Requests that come one after another, answered side by side")
        await talk(client)
        console.rule("3. One, four and sixteen different adapters in a batch of sixteen")
        names = [*serving_tasks.MANNERS, *sorted(p.name for p in ADAPTERS.glob("*-*"))]
        told, found = await measure(client, names[:16])
        show(found)
        console.rule("4. Each answer beside what its adapter says alone")
        pairs = list(dict.fromkeys((t.prompt, t.adapter) for t in told))[-4 if SHORT else 0 :]
        alone = {
            pair: await client.whole(*pair, TOKENS)
            for pair in track(pairs, "alone, by the same server", len(pairs))
        }
        console.rule("5. Bad requests, and more adapters than slots")
        report["refused"] = await misuse(client)
        for name in names[16:]:
            await client.streamed("Hello", name, max_tokens=1)
        status = await client.status()
        print(
            f"adapters loaded {status['loaded']} times, evicted {status['evicted']} times; "
            f"programs compiled since the server was ready: {status['compiled']}"
        )
        report |= {"batches": found, "ratio": ratio(found), "status": status}
    return told, alone


def main() -> None:
    """The whole job, in order."""
    began, report = time.perf_counter(), dict[str, Any]()
    jax.config.update("jax_compilation_cache_dir", str(OUT / "programs"))
    console.rule("1. Three adapters of a language model, sixteen copies, and a server")
    smollm.make_base()
    serving_tasks.make(ADAPTERS, COPIES)
    told, alone = asyncio.run(drive(report))
    tokenizer = smollm.load_tokenizer()
    text = {pair: tokenizer.decode(ids, skip_special_tokens=True) for pair, ids in alone.items()}
    checked = [t for t in told if (t.prompt, t.adapter) in alone]
    same = sum(t.text == text[t.prompt, t.adapter] for t in checked)
    agreed = serving_alone.agreed(tokenizer, ADAPTERS, alone)
    print(f"of {len(checked)} answers in batches, {same} are what the server says if asked alone;")
    print(f"of {len(alone)} different ones, {agreed} are what the model says after set_adapter(),")
    print("without rows or a cache")
    report |= {"answers": len(checked), "same_alone": same}
    report |= {"different": len(alone), "same_by_set_adapter": agreed}
    report["seconds"] = time.perf_counter() - began
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"everything: {report['seconds']:.0f} s; {OUT / 'report.json'}")
    if (same, agreed) != (len(checked), len(alone)):
        raise SystemExit("not every answer is its adapter's")


if __name__ == "__main__":
    main()
