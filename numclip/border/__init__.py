"""The border: a user's arguments, checked and described once."""
