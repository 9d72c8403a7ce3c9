"""The recipes, shipped as package data: one per method, and one per setting of a paper."""
