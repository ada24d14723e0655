"""The built-in prompts: ten in each of eight categories, written for this project.

They make `specdec demo` and a first comparison possible without any data set. How often an answer
repeats its prompt decides how much prompt lookup gains, so both kinds are here on purpose: free
writing repeats nothing, extraction, rewriting, code edits and questions on a passage repeat a lot.
They are short and long, from one line to a page.
"""

import json
from dataclasses import dataclass
from pathlib import Path

# Its answer repeats most of the prompt, and a very small chat model can give it.
DEMO_PROMPT = "rewriting-spelling"


@dataclass(frozen=True)
class Prompt:
    """A conversation to be continued, in the form that chat templates take."""

    id: str
    category: str
    messages: list[dict[str, str]]


def builtin_prompts() -> list[Prompt]:
    """All built-in prompts, those of a category next to each other."""
    lines = Path(__file__).with_name("prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prompt(**json.loads(line)) for line in lines]
