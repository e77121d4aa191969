"""Clipping within CUDA kernels that you write with `numba.cuda.jit`: device functions to call.

Gradients that lie on a GPU are clipped by `numclip.clip_by_global_norm` and the other functions of
`numclip`, which need no import of this module. These are for a kernel's own vectors, held by a
thread (`clip_vector`, `vector_norm`) or by a block (`clip_block`, `block_norm`); `clip_factor` is
the factor alone.

```python
import numclip.cuda
import numpy as np
from numba import cuda

@cuda.jit
def clip_rows(gradients, bound, norms):
    row = cuda.grid(1)
    if row < gradients.shape[0]:
        norms[row] = numclip.cuda.clip_vector(gradients[row], bound)

gradients = cuda.to_device(np.array([[3e30, 4e30], [0.3, 0.4]], np.float32))
norms = cuda.device_array(2, np.float64)
clip_rows[1, 32](gradients, 1.0, norms)
norms.copy_to_host()  # array([5.e+30, 5.e-01])
gradients.copy_to_host()  # array([[0.6, 0.8], [0.3, 0.4]], dtype=float32)
```

The import needs numba-cuda (``pip install "numba-cuda[cu12]>=0.30" "numpy<2.6"``, or ``cu13``),
and raises `numclip.DeviceError` where that is missing; kernels need a GPU when they are launched.
Leave `fastmath` off in your kernels: it flushes subnormal numbers to 0 in ours too. numba's cache
does not notice a new numclip: after an update, delete what ``cache=True`` kept of your kernels.
"""

from numclip.cuda import device as _device  # noqa: F401 - first: says what is missing
from numclip.cuda.kernels.vectors import block_norm as block_norm
from numclip.cuda.kernels.vectors import clip_block as clip_block
from numclip.cuda.kernels.vectors import clip_factor as clip_factor
from numclip.cuda.kernels.vectors import clip_vector as clip_vector
from numclip.cuda.kernels.vectors import vector_norm as vector_norm

__all__ = ["block_norm", "clip_block", "clip_factor", "clip_vector", "vector_norm"]
