"""A record as token ids: the prompt that is given, then the summary that is to be learnt.

Two forms. With a chat template the record becomes a user turn, and the summary the assistant's;
without one a plain template is filled in. Three rules hold for both.

**One prompt for training and generation.** The text of the prompt is tokenized on its own, as
whoever uses the finished model would do it; the summary is tokenized on its own; the two lists are
joined. Tokenizing them as one text could merge tokens across the border, and the model would then
be trained after a prompt that it never sees again. Tokenizers that open every text with a word
border ("▁") supply the space between the two themselves.

**Only the document is cut.** If the prompt is too long, the document loses tokens at its end until
the prompt fits; instruction, template and summary stay whole. A summary that leaves no room for any
of the document is a `BadRecord`. Where prompts must be cut alike for every summary length, set
`max_prompt_length`.

**BOS by rule.** "auto" is what the tokenizer does by itself: in a plain prompt what its
post-processor adds, in a chat what the template writes. "always" is exactly one, "never" is none.
It is never doubled.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from string import Formatter
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from makd_llm.data.schema import BadRecord, Example, OnBadRecord, Record
from makd_llm.errors import UserError

__all__ = ["BosRule", "Example", "PromptBuilder"]

BosRule = Literal["auto", "always", "never"]

FEW_TOKENS = 8
"""With this much room, some of the document fits for certain, whatever merges at its borders."""

ANSWER = "THE-ANSWER-STANDS-HERE"


class PromptBuilder:
    """Turns records into prompts and examples for one tokenizer.

    `template` is the plain form, `user_template` the content of the user's turn in a chat; both may
    use `{document}` (which they must), `{instruction}`, `{id}` and every text column of the record.
    `chat` None means: where the tokenizer has a chat template. Lengths are in tokens:
    `max_length` for prompt and summary together, `max_prompt_length` for the prompt alone.

    Raises UserError for a template that cannot be used and for a tokenizer that lacks what is asked
    of it (a chat template, a BOS or an end-of-sequence token).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "{document}\n\nSummary:",
        user_template: str = "{instruction}\n\n{document}",
        instruction: str = "Summarize the following text.",
        chat: bool | None = None,
        system: str | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        bos: BosRule = "auto",
    ) -> None:
        if chat and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; leave chat off, or give it one")
        self._tokenizer, self._system, self._instruction = tokenizer, system, instruction
        self._chat = bool(tokenizer.chat_template) if chat is None else chat
        self._template = user_template if self._chat else template
        self._fields_used = _fields_of(self._template)
        self._frames: dict[tuple[str, ...], list[int]] = {}
        self._max_length, self._max_prompt_length = max_length, max_prompt_length
        if max_length < 2 or (max_prompt_length is not None and max_prompt_length < 1):
            raise UserError(
                f"max_length is {max_length} and max_prompt_length {max_prompt_length}; a window "
                "holds at least one token of prompt and one of summary"
            )
        self._bos: BosRule = bos
        self._bos_id = tokenizer.bos_token_id
        self._adds_bos = self._find_bos()
        self._lead, self._end_id = self._find_ending()
        known_end = tokenizer.eos_token_id
        self.eos_ids: tuple[int, ...] = tuple(
            dict.fromkeys((self._end_id, known_end or self._end_id))
        )
        """Ids that end a generation: the summary's last token, and the tokenizer's own EOS."""

    def prompt_ids(self, record: Record, room_for: int) -> list[int]:
        """The prompt, cut so that `room_for` more tokens fit into the window. Never empty.

        Raises BadRecord if not even the beginning of the document fits, and UserError for a field
        in the template that the record does not have.
        """
        return self._fit(record, room_for)[1]

    def request(self, record: Record, room_for: int) -> str | list[dict[str, str]]:
        """The same prompt for a server that tokenizes by itself: a text, or the turns of a chat.

        Raises what `prompt_ids` raises, and UserError where such a server would see other tokens.
        """
        document, ids = self._fit(record, room_for)
        content = self._template.format_map(self._values(record, document))
        if self._chat:
            seen = self._encode(self._chat_text(content))
        else:
            if self._bos == "always" and self._tokenizer("a")["input_ids"][:1] != [self._bos_id]:
                content = f"{self._tokenizer.bos_token}{content}"
            seen = list(self._tokenizer(content, verbose=False)["input_ids"])
        if seen != ids:
            raise UserError(
                f"{record.where}: a server that tokenizes this prompt by itself would see other "
                f"tokens than a local model does ({len(seen)}, not {len(ids)}; data.prompt.bos is "
                f"{self._bos!r}); let the local engine write"
            )
        return self._turns(content) if self._chat else content

    @property
    def template_options(self) -> dict[str, Any]:
        """What a server's chat template has to be told, so that it writes what ours does."""
        knows = self._chat and "enable_thinking" in str(self._tokenizer.chat_template)
        return {"enable_thinking": False} if knows else {}

    def _fit(self, record: Record, room_for: int) -> tuple[str, list[int]]:
        """The document that fits, and the prompt with it."""
        budget = self._max_length - room_for
        if self._max_prompt_length is not None:
            budget = min(budget, self._max_prompt_length)
        document = record.document.strip()
        ids = self._encode_prompt(record, document)
        if len(ids) <= budget:
            return document, ids
        cut = self._cut if self._tokenizer.is_fast else self._cut_by_search
        fitting = cut(record, document, len(ids) - budget, budget)
        if fitting is None:
            raise self._no_room(record, room_for, budget)
        return fitting

    def summary_ids(self, record: Record) -> list[int]:
        """What the model has to generate: the first reference and the token that ends the turn."""
        text = self._lead + record.references[0].strip()
        # A summary that spells a special token (say "</s>") is text about it, not the token.
        return [*self._encode(text, split_special_tokens=True), self._end_id]

    def example(self, record: Record) -> Example:
        """The record for training. Raises what `prompt_ids` raises."""
        summary = self.summary_ids(record)
        prompt = self.prompt_ids(record, len(summary))
        return Example(record.id, prompt + summary, len(prompt), self._document(record, prompt))

    def check(self, record: Record) -> None:
        """Raise what `example` would raise, mostly without tokenizing the document."""
        self.check_prompt(record, len(self.summary_ids(record)))

    def check_prompt(self, record: Record, room_for: int) -> None:
        """Raise what `prompt_ids` would raise, likewise."""
        room = self._max_length - room_for
        if self._max_prompt_length is not None:
            room = min(room, self._max_prompt_length)
        if len(self._frame(record)) + FEW_TOKENS > room:
            self.prompt_ids(record, room_for)

    def describe(self) -> str:
        """The window, the form and the BOS rule in one line."""
        prompt = (
            "" if self._max_prompt_length is None else f", prompt up to {self._max_prompt_length}"
        )
        form = "chat template" if self._chat else "plain template"
        count = "one" if self._adds_bos else "none"
        end = self._tokenizer.convert_ids_to_tokens(self._end_id)
        return (
            f"window {self._max_length} tokens{prompt}; {form}; BOS {self._bos}: {count}; "
            f"summaries end with {end}"
        )

    def _values(self, record: Record, document: str) -> dict[str, str]:
        """What the template's fields stand for. The config's instruction wins over a column's."""
        values = {"id": record.id, **record.fields, "instruction": self._instruction}
        values["document"] = document
        for field in self._fields_used:
            if field not in values:
                raise UserError(
                    f"the template {self._template!r} uses {{{field}}}, which {record.where} does "
                    f"not have; known fields: {', '.join(sorted(values))}"
                )
        return values

    def _render(self, record: Record, document: str) -> str:
        text = self._template.format_map(self._values(record, document))
        return self._chat_text(text) if self._chat else text

    def _turns(self, content: str) -> list[dict[str, str]]:
        """What is said before the assistant speaks."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, {"role": "user", "content": content}]

    def _chat_text(self, content: str, answer: str | None = None) -> str:
        """The chat up to where the assistant begins, or with the assistant's whole turn."""
        messages = self._turns(content)
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=answer is None,
                # Templates of models that can think first read this one; others ignore it.
                enable_thinking=False,
            )
        except (TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())
            advice = (
                "leave the system message out" if self._system is not None else "set chat: false"
            )
            raise UserError(f"the tokenizer's chat template fails: {reason}; {advice}") from error
        return str(text)

    def _encode(self, text: str, **options: Any) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False, **options)
        return list(encoded["input_ids"])

    def _encode_prompt(self, record: Record, document: str) -> list[int]:
        return self._with_bos(self._encode(self._render(record, document)))

    def _frame(self, record: Record) -> list[int]:
        """The prompt without its document; made once for the same fields."""
        values = self._values(record, "")
        key = tuple(values[field] for field in self._fields_used)
        if key not in self._frames:
            self._frames[key] = self._encode_prompt(record, "")
        return self._frames[key]

    def _document(self, record: Record, prompt: list[int]) -> tuple[int, int]:
        """Where the document's tokens begin and end: what the prompt has between the beginning and
        the end that it would have without one.
        """
        frame = self._frame(record)
        before = _alike(prompt[:-1], frame)  # one token at least is the document's
        after = _alike(prompt[before + 1 :][::-1], frame[before:][::-1])
        return before, len(prompt) - after

    def _with_bos(self, ids: list[int]) -> list[int]:
        bare = 0
        while self._bos_id is not None and ids[bare : bare + 1] == [self._bos_id]:
            bare += 1
        wanted = self._adds_bos or (bare > 0 and self._bos == "auto")
        return [self._bos_id] * wanted + ids[bare:]

    def _find_bos(self) -> bool:
        """Whether every prompt begins with BOS. Raises UserError where the rule cannot be kept."""
        if self._bos == "always" and self._bos_id is None:
            raise UserError("bos is 'always', but the tokenizer has no BOS token; use 'auto'")
        if self._bos_id is None:
            return False
        if not self._chat:
            by_itself = list(self._tokenizer("a")["input_ids"])[:1] == [self._bos_id]
            return self._bos == "always" or (self._bos == "auto" and by_itself)
        ids = self._encode(self._chat_text("a"))
        if self._bos == "never" and ids[:1] == [self._bos_id] and ids.count(self._bos_id) > 1:
            raise UserError(
                "bos is 'never', but the chat template opens every turn with "
                f"{self._tokenizer.bos_token!r}, the BOS token; use 'auto'"
            )
        return self._bos == "always" or (self._bos == "auto" and ids[:1] == [self._bos_id])

    def _find_ending(self) -> tuple[str, int]:
        """What stands between prompt and summary, and the token that ends the summary."""
        lead, end = " ", self._tokenizer.eos_token_id
        if self._template[-1:].isspace():
            lead = ""
        if self._chat:
            prompt, whole = self._chat_text("a"), self._chat_text("a", ANSWER)
            before, found, after = whole.rpartition(ANSWER)
            if not found:
                raise UserError(
                    "the chat template leaves the assistant's turn out; set chat: false"
                )
            lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
            lead = lead if lead.isspace() else ""
            added = self._tokenizer.added_tokens_decoder
            special = {id_ for id_, token in added.items() if token.special}
            end = next((id_ for id_ in self._encode(after) if id_ in special), end)
        if end is None:
            raise UserError("the tokenizer has no end-of-sequence token; set its eos_token")
        first = self._tokenizer.convert_ids_to_tokens(self._encode("a"))[0]
        return ("" if first.startswith("▁") else lead), end

    def _cut(
        self, record: Record, document: str, excess: int, budget: int
    ) -> tuple[str, list[int]] | None:
        """As much of the document as fits, and the prompt with it; None if not one token does.

        What is cut off may have been merged with its surroundings, so the prompt is tokenized again
        after each cut, until its own length says that it fits.
        """
        encoded = self._tokenizer(
            document, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = [end for _, end in encoded["offset_mapping"]]
        keep = len(ends)
        while keep > 1:
            keep = max(keep - excess, 1)
            fitting = document[: ends[keep - 1]]
            ids = self._encode_prompt(record, fitting)
            excess = len(ids) - budget
            if excess <= 0:
                return fitting, ids
        return None

    def _cut_by_search(
        self, record: Record, document: str, excess: int, budget: int
    ) -> tuple[str, list[int]] | None:
        """The same for a tokenizer that cannot say where its tokens lie, by bisecting the text."""
        stop = bisect_right(
            range(len(document)),
            budget,
            key=lambda stop: len(self._encode_prompt(record, document[:stop])),
        )
        fitting = document[: stop - 1]
        return (fitting, self._encode_prompt(record, fitting)) if stop > 1 else None

    def _no_room(self, record: Record, room_for: int, budget: int) -> BadRecord:
        frame = len(self._frame(record))
        whole = self._max_length - frame - 1
        if budget < self._max_length - room_for or whole < 1:
            return BadRecord(
                record.where,
                "template longer than the window",
                f"the prompt has {frame} tokens without its document and may have {budget}",
                "room for some of the document (a larger max_length or max_prompt_length, or a "
                "shorter template)",
            )
        return BadRecord(
            record.where,
            "summary longer than the window",
            f"{room_for} tokens of summary and {frame} of template leave no room for the document "
            f"in a window of {self._max_length}",
            f"a summary of at most {whole} tokens, or a larger max_length",
        )


def _alike(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _fields_of(template: str) -> list[str]:
    """The fields that a template uses. Raises UserError unless all are names, with document."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UserError(
            f"the template {template!r} cannot be read ({error}); write {{{{ for a brace"
        ) from error
    for field in fields:
        if not field.replace("-", "_").isidentifier():
            raise UserError(
                f"the template {template!r} uses {{{field}}}; a field is a column's name, and a "
                "brace is written {{"
            )
    if "document" not in fields:
        raise UserError(f"the template {template!r} has no {{document}}; say where it goes")
    return fields


def usable_examples(
    prompts: PromptBuilder,
    records: Iterable[Record],
    on_bad_record: OnBadRecord,
    skipped: Counter[str],
) -> Iterator[tuple[Record, Example]]:
    """The records that fit, with their ids; the others are counted in `skipped`, by reason.

    Raises the first BadRecord unless bad ones are to be skipped.
    """
    for record in records:
        try:
            yield record, prompts.example(record)
        except BadRecord as bad:
            if on_bad_record == "error":
                raise
            skipped[bad.reason] += 1
