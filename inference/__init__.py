"""Prompts in, completions out: prefill and decode loops, batching, chat sessions."""
