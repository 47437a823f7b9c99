"""Conversations to text and to token ids, through the Jinja chat templates of Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat_guard import ChatTokenizer, Guard
from data.chat_rendering import NO_VARIABLES, GuardedChat, RenderedChat, checked, plain, render_chat
from data.chat_spans import SpanTokenizer, mask_spans
from data.chat_templates import CHAT_TEMPLATES
from data.chat_turns import block_spans, has_blocks, turn_spans

__all__ = [
    "CHAT_TEMPLATES",
    "EncodedChat",
    "RenderedChat",
    "choose_template",
    "encode_chat",
    "encode_chat_with_mask",
    "render_chat",
]


@dataclass(frozen=True)
class EncodedChat:
    """A chat as token ids; mask[i] tells whether ids[i] is what the assistant writes."""

    ids: list[int]
    mask: list[bool]


def encode_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] = NO_VARIABLES,
    add_bos: bool | None = None,
) -> list[int]:
    """Return the ids of a chat, in which only the template can write special tokens.

    A special token's name in any string of messages, tools and variables["documents"] is encoded as plain text, so
    nobody forges a turn; added tokens that are not flagged special, such as `<think>`, stay single ids. The template
    defaults to the tokenizer's, and reads bos_token, eos_token and pad_token. BOS goes in front if add_bos, but never a
    second time; None leaves it to the tokenizer's own template, as transformers does, and with any other template
    follows the tokenizer's convention for texts. Raises ValueError as `render_chat` does.

    While the template runs, each such name is one private-use character. Limits: a template that compares content with
    a special token's name does not see it; one that deletes from the middle of a string may join what is left of it to
    a name; a format whose turns are ordinary text, such as `[INST]`, cannot be protected; and where a special token is
    set to swallow the spaces around it, those beside a text with such a name are kept.
    """
    chat = _guarded(tokenizer, messages, template, tools, variables)
    rendered = chat.render(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
    ids = [token_id for piece in chat.guard.pieces(rendered.text, tokenizer) for token_id in piece.ids]
    return _opening(tokenizer, ids, chat.template, add_bos) + ids


def encode_chat_with_mask(
    tokenizer: SpanTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] = NO_VARIABLES,
    add_bos: bool | None = None,
    learn_from: int = 0,
) -> EncodedChat:
    """Return the ids of `encode_chat`, and which of them the assistant writes: those that a loss is about.

    A template's `{% generation %}` blocks say where that is, token for token as transformers reads them. In any other
    template a turn goes from behind the header to the end of the token that ends it: reasoning, also where the template
    itself opens or leaves it empty, content, tool calls. Of a format without such a token it goes as far as what the
    template writes behind every answer. A token across the edge of a turn belongs to it.
    learn_from is the index in messages of the first one that counts. Raises ValueError as `encode_chat` does, where
    the turns of a template or the tokens of a text cannot be told apart for sure, and for tools and calls that the
    template leaves out.
    """
    if not 0 <= learn_from <= len(messages):
        raise ValueError(f"learn_from {learn_from} is no index in {len(messages)} messages")
    chat = _guarded(tokenizer, messages, template, tools, variables)
    rendered = chat.render()
    _check_functions(chat, rendered.text)
    blocks = has_blocks(chat.template)
    if blocks:
        spans = block_spans(chat, rendered, learn_from)
    else:
        names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
        stops = frozenset(names[token_id] for token_id in tokenizer.stop_ids if token_id in names)
        spans = turn_spans(chat, rendered, stops, learn_from)
    ids, mask = mask_spans(rendered.text, spans, chat.guard, tokenizer, whole=not blocks)
    opening = _opening(tokenizer, ids, chat.template, add_bos)
    return EncodedChat(opening + ids, [False] * len(opening) + mask)


def choose_template(tokenizer: ChatTokenizer, name: str | None = None) -> str:
    """The template for a checkpoint: the built-in one or file of that name, else the tokenizer's own, else the
    built-in one that its special tokens point to, else `qa`. Raises ValueError for a name that is neither.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if name is not None:
        if not Path(name).is_file():
            raise ValueError(f"chat template {name!r} is neither a file nor one of {', '.join(CHAT_TEMPLATES)}")
        return Path(name).read_text(encoding="utf-8")
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if "<|eot_id|>" in tokenizer.special_tokens:
        return CHAT_TEMPLATES["llama3"]
    return CHAT_TEMPLATES["chatml" if "<|im_start|>" in tokenizer.special_tokens else "qa"]


def _guarded(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> GuardedChat:
    template = tokenizer.chat_template if template is None else template
    if template is None:
        raise ValueError(f"the tokenizer has no chat template; pass one, such as those of {sorted(CHAT_TEMPLATES)}")
    messages, tools = checked(messages), plain(tools, "tools")
    variables = _token_names(tokenizer) | dict(variables)
    documents = plain(variables.get("documents"), "documents")
    special = tuple(tokenizer.special_tokens)
    guard = Guard(special, (template, messages, tools, variables))
    return GuardedChat(
        template=template,
        messages=guard.hide(messages),
        tools=guard.hide(tools),
        variables=variables | {"documents": guard.hide(documents)},
        guard=guard,
        special=special,
    )


def _check_functions(chat: GuardedChat, text: str) -> None:
    calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
    for what, functions in (("tools", chat.tools or ()), ("tool calls", calls)):
        for function in functions:
            name = str((function.get("function") or function).get("name", ""))
            if name not in text and name.isascii():  # others may be written in escapes
                raise ValueError(f"the chat template leaves out {what}, here of {name!r}")


def _opening(tokenizer: ChatTokenizer, ids: Sequence[int], template: str, add_bos: bool | None) -> list[int]:
    """Return the BOS that goes in front of the ids, if one does."""
    if add_bos is None:
        add_bos = tokenizer.adds_bos and template != tokenizer.chat_template
    if not add_bos:
        return []
    if tokenizer.bos_id is None:
        raise ValueError("add_bos asked of a tokenizer that has no BOS token")
    return [] if list(ids[:1]) == [tokenizer.bos_id] else [tokenizer.bos_id]


def _token_names(tokenizer: ChatTokenizer) -> dict[str, str]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    return {
        variable: names[token_id] if token_id in names else tokenizer.decode([token_id])
        for variable, token_id in ids.items()
        if token_id is not None
    }
