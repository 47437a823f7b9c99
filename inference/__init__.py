"""Prompts in, completions out: prefill and decode loops, text, conversations."""

from inference.chat import ChatSession
from inference.completion import Completion, Request, generate, stream
from inference.text import TextCompletion, complete

__all__ = ["ChatSession", "Completion", "Request", "TextCompletion", "complete", "generate", "stream"]
