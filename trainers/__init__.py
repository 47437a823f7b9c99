"""Training: what one step does, what it costs, and what is written down about it."""
