"""A small HTTP server: one language model, and for each request the adapter that it names.

    python examples/serve.py FOLDER [--port 8000]    # a directory for each adapter in FOLDER

    POST /generate   {"prompt": ..., "adapter": ..., "max_tokens": ..., "stream": ...}
    GET /adapters    those of the folder, and which of them have a slot
    GET /status      rows, adapters loaded and evicted, programs compiled since it is ready

An example of the interface. It listens to this machine alone, and knows neither users nor limits.
"""

import argparse
import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
from aiohttp import web
from serving_engine import Answer, Engine, Full
from serving_shelf import BASE, Refused, Shelf, Unknown, adapters_in
from serving_steps import Sizes, Steps
from serving_words import Asked, Words, Wrong

from randlora_jax import RandLoraError, RandLoraModel

SIZES = Sizes(rows=16, places=192, prompts=(1, 4), lengths=(64, 128), widths=(1, 4, 16))
CAPACITY = 16  # adapters in the model at once
WAITING = 256  # requests
PATIENCE = 30.0  # seconds, with a client that does not read

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """What answers requests.

    Args:
      model: tunix's Llama 3 after ``stack_adapters(capacity + 1)``, with no adapter in it.
      folder: of adapters.
    """

    def __init__(
        self, model: Any, tokenizer: Any, folder: Path, sizes: Sizes, capacity: int
    ) -> None:
        self.steps = Steps(model, sizes)
        self.words = Words(tokenizer, sizes.lengths[-1], sizes.places)
        self._shelf_of = lambda: Shelf(model, folder, capacity, self.steps.take_arrays)
        self.compiled = 0

    def application(self) -> web.Application:
        """As aiohttp runs it."""
        app = web.Application(middlewares=[told_in_json], client_max_size=2**16)
        app.cleanup_ctx.append(self._running)
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/adapters", self.adapters)
        app.router.add_get("/status", self.status)
        return app

    async def _running(self, app: web.Application) -> AsyncIterator[None]:
        def compiled(event: str, duration_secs: float, **_: Any) -> None:
            self.compiled += event == "/jax/core/compile/backend_compile_duration"

        self.shelf = self._shelf_of()
        self.engine = Engine(self.steps, asyncio.get_running_loop(), WAITING)
        jax.monitoring.register_event_duration_secs_listener(compiled)
        yield
        jax.monitoring.unregister_event_duration_listener(compiled)
        self.engine.stop()
        self.shelf.close()

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """An answer, whole or piece by piece."""
        try:
            asked = Asked.of(await request.json())
            prompt = self.words.tokens_of(asked)
            slot = await self.shelf.take(asked.adapter)
        except ValueError as error:  # of JSON, and of its letters
            raise web.HTTPBadRequest(text=f"the body is no JSON: {error}") from error
        except Wrong as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        except Unknown as error:
            raise web.HTTPNotFound(text=str(error)) from error
        except Refused as error:
            message = f"adapter {asked.adapter!r} is refused: {error}"
            raise web.HTTPUnprocessableEntity(text=message) from error
        end = None if asked.ignore_eos else self.words.end
        done = partial(self.shelf.give_back, asked.adapter)
        answer = Answer(prompt, slot, asked.max_tokens, end, done)
        try:
            self.engine.ask(answer)
        except Full as error:
            done()
            raise web.HTTPServiceUnavailable(text=str(error)) from error
        except RuntimeError:
            done()
            raise
        try:
            if asked.stream:
                return await self._streamed(request, answer)
            tokens = [token async for token in answer.tokens()]
            return web.json_response({"text": self.words.text(tokens), "tokens": tokens})
        finally:  # whoever hangs up leaves a free row
            answer.gone = True

    async def _streamed(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        """By server-sent events: an object with some text each, and [DONE]."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            async for piece in self.words.pieces(answer.tokens()):
                event = f"data: {json.dumps({'text': piece})}\n\n".encode()
                await asyncio.wait_for(response.write(event), PATIENCE)
            await asyncio.wait_for(response.write(b"data: [DONE]\n\n"), PATIENCE)
        except TimeoutError:
            assert request.transport is not None
            request.transport.abort()
        return response

    async def adapters(self, _: web.Request) -> web.Response:
        """Names in the folder; how many answers use those that have a slot."""
        names = [BASE, *self.shelf.names()]
        return web.json_response({"adapters": names, "loaded": self.shelf.here()})

    async def status(self, _: web.Request) -> web.Response:
        """What is going on."""
        return web.json_response(
            {
                "rows": len(self.engine.rows),
                "busy": sum(answer is not None for answer in self.engine.rows),
                "waiting": self.engine.waiting,
                "steps": self.engine.taken,
                "loaded": self.shelf.loaded,
                "evicted": self.shelf.evicted,
                "compiled": self.compiled,
            }
        )


@web.middleware
async def told_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as {"error": ...}, as other answers are JSON."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        body = {"error": error.text or error.reason}
        return web.json_response(body, status=error.status)


def opened(base: Any, folder: Path, capacity: int) -> Any:
    """The base model with stacks for adapters like those of a folder, and none in them."""
    for name in adapters_in(folder):
        try:
            model = RandLoraModel.from_pretrained(base, folder / name, "first")
        except RandLoraError as error:
            print(f"{name}: {error}")
            continue
        model.stack_adapters(capacity + 1)  # one for what is loaded before another goes
        model.delete_adapter("first")
        model.load_adapter(folder / name, "first")  # as others will be: it compiles
        model.rows(["first"])
        model.delete_adapter("first")
        return model
    raise SystemExit(f"{folder}: no adapter for this model, which is to show what others have")


def main() -> None:
    """Loads, compiles, serves."""
    import smollm
    from training import run_all, track
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description="A language model and adapters, by HTTP.")
    parser.add_argument("folder", type=Path, help="has a directory for each adapter, of its name")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    options = parser.parse_args()
    logging.set_verbosity_error()
    jax.config.update("jax_compilation_cache_dir", "out/serve/programs")
    smollm.make_base()
    (model,) = run_all("loading", lambda: opened(smollm.tunix_base(), options.folder, CAPACITY))
    server = Server(model, smollm.load_tokenizer(), options.folder, SIZES, CAPACITY)
    programs = list(server.steps.programs())
    for compile_one in track(programs, "compiling", len(programs)):
        compile_one()
    asyncio.run(serve(server, options.port))


async def serve(server: Server, port: int) -> None:
    """Until it is interrupted."""
    runner = web.AppRunner(server.application(), handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    try:
        await site.start()
        print(f"listening: http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    main()
