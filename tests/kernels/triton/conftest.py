"""These tests run the Triton kernels in Triton's interpreter, which must be enabled before triton is first imported.

So they need a process of their own: `TRITON_INTERPRET=1 pytest tests/kernels/triton`, which `test_triton.py` in the
parent folder starts. In any other run nothing is collected here.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
