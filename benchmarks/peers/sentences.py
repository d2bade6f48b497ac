"""sentence-transformers as a program: reads lines of JSON with texts, writes lines with seconds and the first vectors.

`benchmarks.fleet.encoders` runs it in a separate environment, with the model's folder and dtype as arguments.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

NUM_SHOWN = 2


def main() -> None:
    """Answer input lines until the input ends."""
    folder, dtype = sys.argv[1:]
    library: Any = importlib.import_module("sentence_transformers")
    model = library.SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})
    print(json.dumps({"version": library.__version__}), flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        started_s = time.perf_counter()
        vectors = model.encode(texts, batch_size=32, normalize_embeddings=True, convert_to_tensor=True)
        seconds = time.perf_counter() - started_s
        print(json.dumps({"seconds": seconds, "vectors": vectors[:NUM_SHOWN].float().tolist()}), flush=True)


if __name__ == "__main__":
    main()
