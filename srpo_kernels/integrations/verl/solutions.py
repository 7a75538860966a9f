"""What the teacher is shown: the text of a correct completion, in a prompt that leaves room for the one to distill."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

TEACHER_TEMPLATE = (
    "{prompt}\n\nHere is a correct solution:\n\n{solution}\n\nNow solve the original problem, in your own words."
)


class SolutionOptions(Protocol):
    """What a trainer's options say of the solutions that are shown."""

    teacher_template: str
    remove_thinking_from_solution: bool
    shorten_solution: bool


class Solutions:
    """Makes the teacher's prompts of completions that solve them.

    Args:
        tokenizer: decodes completions.
        tokenize: the token ids of a prompt, text or conversation.
        ends: the ids that end a completion; one without is truncated.
        max_length: tokens of the teacher's prompt and a completion together. None: no bound.
        args: the template, and what becomes of thinking and of solutions that are too long.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokenize: Callable[[Any], list[int]],
        *,
        ends: set[int],
        max_length: int | None,
        args: SolutionOptions,
    ) -> None:
        self._tokenizer, self._tokenize, self._args = tokenizer, tokenize, args
        self._ends, self._max_length = ends, max_length

    def prompts(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[int]],
        candidates: Sequence[bool],
        lengths: Sequence[int],
    ) -> list[list[int] | None]:
        """The token ids of the prompt that shows each completion, or None.

        None is for a completion that is no candidate, is truncated, says nothing, or leaves no room for a completion of
        ``lengths`` tokens.
        """
        texts = self.texts(completions)
        shown: list[list[int] | None] = []
        for prompt, ids, text, candidate, length in zip(prompts, completions, texts, candidates, lengths, strict=True):
            ended = len(ids) > 0 and ids[-1] in self._ends
            room = None if self._max_length is None else self._max_length - length
            shown.append(self._fitting(prompt, text, room) if candidate and ended and text.strip() else None)
        return shown

    def texts(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Completions without special tokens and, where the options say so, without thinking."""
        if not self._args.remove_thinking_from_solution:
            texts: list[str] = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
            return texts
        # Where its tags are special tokens, decoding without these would leave the thinking alone.
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=False)
        special = re.compile("|".join(map(re.escape, self._tokenizer.all_special_tokens)))
        return [special.sub("", without_thinking(text)).strip() for text in texts]

    def _fitting(self, prompt: Any, solution: str, room: int | None) -> list[int] | None:
        """The prompt's ids, at most ``room``; with ``shorten_solution`` the solution may have no beginning."""
        ids = self._show(prompt, solution)
        tokens: list[int] = []
        if self._args.shorten_solution:
            tokens = self._tokenizer(solution, add_special_tokens=False)["input_ids"]
        # Fewer tokens, decoded, may be more again: until it fits.
        while room is not None and len(ids) > room:
            tokens = tokens[len(ids) - room :]
            if not tokens:
                return None
            ids = self._show(prompt, self._tokenizer.decode(tokens))
        return ids

    def _show(self, prompt: Any, solution: str) -> list[int]:
        return self._tokenize(teacher_prompt(prompt, self._args.teacher_template, solution=solution))


def without_thinking(text: str) -> str:
    """``text`` without ``<think>...</think>``.

    A block that the prompt opened ends at its tag, one that is not closed ends with the text.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    return text.rpartition("</think>")[2]


def teacher_prompt(prompt: Any, template: str, **fields: str) -> Any:
    """A prompt, text or conversation, within ``template``, whose other ``fields`` are given.

    In a conversation the last message, which must be the user's and text, is replaced; the ones before it stay.
    """
    if isinstance(prompt, str):
        return template.format(prompt=prompt, **fields)
    *earlier, last = prompt
    if last["role"] != "user" or not isinstance(last["content"], str):
        raise ValueError(
            "prompt must end with a user message whose content is text, for the teacher to see a solution there, "
            f"got role {last['role']!r} and content of type {type(last['content']).__name__}"
        )
    return [*earlier, {**last, "content": template.format(prompt=last["content"], **fields)}]


def check_template(name: str, template: str, *fields: str) -> None:
    """Raise ValueError unless ``template`` has the field {prompt} and these ``fields``, and no other."""
    names = ("prompt", *fields)
    marks = {field: chr(index) for index, field in enumerate(names)}
    try:
        text = template.format(**marks)
    except (IndexError, KeyError, ValueError):
        text = ""
    if not all(mark in text for mark in marks.values()):
        listed = " and ".join(f"{{{field}}}" for field in names)
        raise ValueError(f"{name} must have the fields {listed}, and no other, got {template!r}")
