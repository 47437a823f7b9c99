"""Text to token batches, on the host: formats, chat templates, packing, loading."""
