"""numclip's functions within functions that users compile with numba."""
