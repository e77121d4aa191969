"""The border: what a user passes, checked and described once."""
