"""The shipped model, as package data: ``tiny/`` is a folder in diffusers layout."""
