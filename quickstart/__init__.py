"""From random weights to a small reasoner on two CPU cores: `python -m quickstart`. See docs/quickstart.md."""
