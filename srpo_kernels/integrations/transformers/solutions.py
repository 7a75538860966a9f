"""What the teacher is shown: the text of a correct completion, in a prompt that leaves room for the one to distill."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

# SDPO's words (arXiv 2601.20802), whose teacher SRPO takes over.
TEACHER_TEMPLATE = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
SOLUTION_TEMPLATE = "\nCorrect solution:\n\n{solution}\n\n"
FEEDBACK_TEMPLATE = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}\n\n"


class SolutionOptions(Protocol):
    """What a trainer's options say of the solutions that are shown."""

    teacher_template: str
    solution_template: str
    feedback_template: str
    remove_thinking_from_solution: bool
    shorten_solution: bool


class Shown(NamedTuple):
    """A solution: its text, and the ids of the prompt that shows it."""

    text: str
    prompt_ids: list[int]


class Solutions:
    """Makes the teacher's prompts of completions that solve them.

    Args:
        tokenizer: decodes completions.
        tokenize: the token ids of a prompt, text or conversation, of a row of the batch.
        ends: the ids that end a completion; one without is truncated.
        max_length: tokens of the teacher's prompt and a completion together. None: no bound.
        media: what a processor takes for an image or a video; a text that says it is not shown.
        args: the templates, and what becomes of thinking and of solutions that are too long.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokenize: Callable[[Any, int], list[int]],
        *,
        ends: set[int],
        max_length: int | None,
        args: SolutionOptions,
        media: Collection[str] = (),
    ) -> None:
        self._tokenizer, self._tokenize, self._args = tokenizer, tokenize, args
        self._ends, self._max_length, self._media = ends, max_length, media

    def prompts(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[int]],
        candidates: Sequence[bool],
        lengths: Sequence[int],
    ) -> list[Shown | None]:
        """What shows each completion, or None.

        None is for a completion that is no candidate, is truncated, says nothing, or leaves no room for a completion of
        ``lengths`` tokens.
        """
        texts = self.texts(completions)
        shown: list[Shown | None] = []
        rows = zip(prompts, completions, texts, candidates, lengths, strict=True)
        for row, (prompt, ids, text, candidate, length) in enumerate(rows):
            ended = len(ids) > 0 and ids[-1] in self._ends
            shown.append(self._fitting(prompt, row, text, "", length) if candidate and ended and text.strip() else None)
        return shown

    def with_feedback(self, prompt: Any, row: int, text: str | None, feedback: str, length: int) -> list[int] | None:
        """The ids of the prompt that shows feedback, and a solution if there is one; None where it is too long."""
        shown = self._fitting(prompt, row, text or "", self._args.feedback_template.format(feedback=feedback), length)
        return None if shown is None else shown.prompt_ids

    def texts(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Completions without special tokens and, where the options say so, without thinking."""
        if not self._args.remove_thinking_from_solution:
            texts: list[str] = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
            return texts
        # Where its tags are special tokens, decoding without these would leave the thinking alone.
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=False)
        special = re.compile("|".join(map(re.escape, self._tokenizer.all_special_tokens)))
        return [special.sub("", without_thinking(text)).strip() for text in texts]

    def _fitting(self, prompt: Any, row: int, text: str, feedback: str, length: int) -> Shown | None:
        """With room for ``length`` tokens; with ``shorten_solution`` the solution may have no beginning.

        None where it does not fit, or where the prompt would have other images than the student's.
        """
        if any(token in text or token in feedback for token in self._media):
            return None
        room = None if self._max_length is None else self._max_length - length
        ids = self._show(prompt, row, text, feedback)
        tokens: list[int] = []
        if self._args.shorten_solution:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        # Fewer tokens, decoded, may be more again: until it fits.
        while room is not None and len(ids) > room:
            tokens = tokens[len(ids) - room :]
            if not tokens:
                return None
            text = self._tokenizer.decode(tokens)
            ids = self._show(prompt, row, text, feedback)
        return Shown(text, ids)

    def _show(self, prompt: Any, row: int, text: str, feedback: str) -> list[int]:
        solution = self._args.solution_template.format(solution=text) if text else ""
        fields = {"solution": solution, "feedback": feedback}
        return self._tokenize(teacher_prompt(prompt, self._args.teacher_template, **fields), row)


def without_thinking(text: str) -> str:
    """``text`` without ``<think>...</think>``.

    A block that the prompt opened ends at its tag, one that is not closed ends with the text.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    return text.rpartition("</think>")[2]


def teacher_prompt(prompt: Any, template: str, **fields: str) -> Any:
    """A prompt, text or conversation, that shows more: ``template`` with its text as ``{prompt}`` and ``fields``.

    In a conversation the text of the last message of the user is replaced, for want of one that of the last message;
    others, and images, stay.
    """
    if isinstance(prompt, str):
        return template.format(prompt=prompt, **fields)
    users = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    index = users[-1] if users else len(prompt) - 1
    content = prompt[index].get("content") or ""
    if isinstance(content, str):
        shown: Any = template.format(prompt=content, **fields)
    else:
        texts = [block for block in content if block["type"] == "text"]
        text = template.format(prompt="\n".join(block["text"] for block in texts), **fields)
        # Where the last text was.
        shown = [block for block in content if block["type"] != "text" or block is texts[-1]]
        shown = [{"type": "text", "text": text} if block["type"] == "text" else block for block in shown]
        if not texts:
            shown.append({"type": "text", "text": text})
    return [*prompt[:index], {**prompt[index], "content": shown}, *prompt[index + 1 :]]


def check_template(name: str, template: str, fields: tuple[str, ...]) -> None:
    """Raise ValueError unless ``template`` has these fields; {feedback} may be there without being required."""
    marks = {field: f"\0{index}" for index, field in enumerate(("prompt", "solution", "feedback"))}
    known = marks if "prompt" in fields else {field: marks[field] for field in fields}
    try:
        text = template.format(**known)
    except (IndexError, KeyError, ValueError):
        text = ""
    if not all(marks[field] in text for field in fields):
        raise ValueError(f"{name} must have the fields {fields}, and no other, got {template!r}")
