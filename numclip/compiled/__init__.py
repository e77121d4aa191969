"""numclip's functions within functions that users compile with `numba.njit`.

`global_norm`, `clip_by_global_norm`, `clip_by_norm`, `clip_by_average_norm`, `clip_by_block_rms`
and `clip_by_value` take arrays of float32, float64, complex64 and complex128, of any dimension and
layout, and where they take several, tuples (mixed ones, with None), lists and typed lists of them.
`out` is the gradients themselves, or left out; an array whose elements share memory is refused
there, and so is one whose strides are not nested. `axes`, `nonfinite` and `duplicates` are
literals in the call. Orders other than 2 are for real arrays, without axes. Bounds of values may
be arrays. Results have the bits that Python gives.

The user's flags (`fastmath`, `error_model`, `parallel` ...) do not reach our code. numba's cache
keeps the user's code; where numclip has changed since, it is compiled anew.
"""
