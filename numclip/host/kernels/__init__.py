"""Compiled loops and the operations made of them."""
