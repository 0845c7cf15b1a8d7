"""Kernels beside their slow twins. Without a GPU, Triton's run in numpy (TRITON_INTERPRET=1), which Triton
reads when it is imported: so it is said here, before any test imports it. With one: TRITON_INTERPRET=0 make
test.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
