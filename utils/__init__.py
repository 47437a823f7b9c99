"""Pure functions on arrays and the plain state they work on; imports nothing else of the project."""
