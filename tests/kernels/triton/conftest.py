"""These tests run the Triton kernels in Triton's interpreter, which must be chosen before triton is first imported.

So they have a process of their own: `TRITON_INTERPRET=1 pytest tests/kernels/triton`, or `test_triton.py` beside this
folder, which does that. In any other run nothing is collected here.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
