"""What a client asks and is answered: words, where the engine has tokens."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from typing import Any

from serving_shelf import BASE

UNFINISHED = "\ufffd"  # a token may end in the middle of a letter


class Wrong(Exception):
    """A request that means nothing."""


@dataclass(frozen=True)
class Asked:
    """The body of POST /generate.

    Args:
      prompt: what the user says.
      adapter: of the folder; none by default.
      max_tokens: how long the answer may be.
      stream: to get words as they are said.
      ignore_eos: to go on to `max_tokens`, for measurements.
    """

    prompt: str
    adapter: str = BASE
    max_tokens: int = 32
    stream: bool = False
    ignore_eos: bool = False

    @classmethod
    def of(cls, body: Any) -> "Asked":
        """Of parsed JSON.

        Raises:
          Wrong: it has other fields, or they hold something else.
        """
        if not isinstance(body, dict):
            raise Wrong(f"expected a JSON object, found {type(body).__name__}")
        kinds = {field.name: field.type for field in fields(cls)}
        if unknown := sorted(body.keys() - kinds):
            raise Wrong(f"unknown fields {unknown}: expected some of {list(kinds)}")
        if "prompt" not in body:
            raise Wrong("'prompt' is missing")
        for name, value in body.items():
            if type(value) is not kinds[name]:
                raise Wrong(
                    f"{name!r}: expected {kinds[name].__name__}, found {type(value).__name__}"  # type: ignore[union-attr]
                )
        asked = cls(**body)
        if not asked.prompt.strip():
            raise Wrong("'prompt' is empty")
        if asked.max_tokens < 1:
            raise Wrong(f"'max_tokens': expected 1 or more, found {asked.max_tokens}")
        return asked


@dataclass(frozen=True)
class Words:
    """A tokenizer with a chat template.

    Args:
      longest: how many tokens a prompt may have.
      places: how many a prompt and its answer may have together.
    """

    tokenizer: Any
    longest: int
    places: int

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def tokens_of(self, asked: Asked) -> list[int]:
        """The conversation up to where the model answers.

        Raises:
          Wrong: it is too long.
        """
        said = [{"role": "user", "content": asked.prompt}]
        ids = list(self.tokenizer.apply_chat_template(said, add_generation_prompt=True))
        if len(ids) > self.longest:
            raise Wrong(f"'prompt' has {len(ids)} tokens: expected at most {self.longest}")
        if len(ids) + asked.max_tokens > self.places:
            raise Wrong(
                f"'prompt' has {len(ids)} tokens and 'max_tokens' is {asked.max_tokens}: expected "
                f"at most {self.places} together"
            )
        return ids

    async def pieces(self, tokens: AsyncIterator[int]) -> AsyncIterator[str]:
        """The words of an answer as far as they are certain, one piece after another."""
        ids, told = list[int](), ""
        async for token in tokens:
            ids.append(token)
            text = self.text(ids)
            if not text.endswith(UNFINISHED):
                yield text[len(told) :]
                told = text
        if rest := self.text(ids)[len(told) :]:
            yield rest

    def text(self, ids: list[int]) -> str:
        """What tokens say."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
