"""sentence-transformers as a program: a line of JSON with texts in, a line with seconds and the first vectors out.

Run by `benchmarks.fleet.encoders` in an environment of its own, with the model's folder and its dtype as arguments.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

NUM_SHOWN = 2


def main() -> None:
    """Answer lines until there are none."""
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
